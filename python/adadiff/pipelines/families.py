"""Settings of transformer classes where inference from their arguments fails, one line per class."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

# Usual names of the block lists that form the trunk of a network.
TRUNK = (
    *("transformer_blocks", "single_transformer_blocks", "temporal_transformer_blocks", "visual_transformer_blocks"),
    *("joint_transformer_blocks", "blocks", "layers", "double_blocks", "double_stream_blocks", "single_stream_blocks"),
)
TIME = ("timestep", "timesteps", "t")
SAMPLE = ("hidden_states", "x", "sample")


@dataclass(frozen=True)
class Family:
    """Settings of one transformer class. blocks: names of block lists. batch_dim: batch dimension of hidden states.
    rising: whether time rises during sampling. paired: arguments with the batch repeated k times, [k * B] (all lanes k
    times). shared: arguments that are not by lane, whatever their shape. refused: the reason if it is not supported."""

    blocks: tuple[str, ...] = TRUNK
    batch_dim: int = 0
    rising: bool = False
    paired: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    refused: str | None = None


FAMILIES: Mapping[str, Family] = {
    "ErnieImageTransformer2DModel": Family(batch_dim=1),
    "Lumina2Transformer2DModel": Family(rising=True),
    "ZImageTransformer2DModel": Family(rising=True),
    "MochiTransformer3DModel": Family(rising=True, shared=("image_rotary_emb",)),  # [S, heads, D]
    "OmniGenTransformer2DModel": Family(rising=True),
    "LuminaNextDiT2DModel": Family(rising=True),
    "Ideogram4Transformer2DModel": Family(rising=True),
    "LongCatAudioDiTTransformer": Family(rising=True),
    "QwenImageTransformer2DModel": Family(paired=("temb",)),
    "MiniMaxH3Transformer3DModel": Family(refused="its blocks look times up by an index over the whole batch"),
    "AdaDiffTransformer": Family(refused="AdaDiffPipeline takes policy= in its calls"),
    "TransformerTemporalModel": Family(refused="its rows are frames, and its blocks' rows are pixels"),
    "Cosmos3OmniTransformer": Family(refused="its blocks take all samples packed into one sequence"),
}


def family_of(transformer: nn.Module) -> Family:
    for kind in type(transformer).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    return Family()
