"""How others name the tensors of a model: one function per layout, from their names to those of our `Model`.

plain      U-ViT's and DiT's own: those of our networks
official   AdaDiff (Tangshengku/AdaDiff libs/uvit.py): the same, and a certainty `lte_classifer.{i}` of every block
duodiff    DuoDiff (razvanmatisan/duodiff models/early_exit.py): `uvit.*`, a probe `matrix.{i}` and a head of every
           block's input
diffusers  `DiTTransformer2DModel`: DiT with the products of attention apart, and the embedders once in every block
"""

from collections.abc import Callable, Mapping

import torch
from torch import Size, Tensor

from ..checkpoint import Keys
from ..models.dit import position_embedding

Shapes = Mapping[str, Size]  # of our own tensors, by their names in Model.state_dict()
Layout = Callable[[Keys, Shapes], dict[str, Tensor]]

BACKBONE = "backbone."


def _stack(keys: Keys, names: list[str], shape: Size) -> Tensor:
    return torch.stack([keys.take(name, shape) for name in names])


def plain(keys: Keys, shapes: Shapes, prefix: str = "") -> dict[str, Tensor]:
    return {
        own: keys.take(prefix + own.removeprefix(BACKBONE), shape)
        for own, shape in shapes.items()
        if own.startswith(BACKBONE)
    }


def official(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    """Their UEM tells certainties; sigmoid(-s) = 1 - sigmoid(s)."""
    tensors = plain(keys, shapes)
    for name in ("weight", "bias"):
        L, *shape = shapes[f"exits.{name}"]
        tensors[f"exits.{name}"] = -_stack(keys, [f"lte_classifer.{i}.lte.{name}" for i in range(L)], Size(shape))
    return tensors


FIRST_EXIT = "matrix.0 and in_blocks_heads.0"  # of DuoDiff: they exit before block 0


def duodiff(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    """Their probe and head i read the input of block i, which is what our layer i exits with. Those of the first
    block, whose input no block has seen, have no place here, see FIRST_EXIT; layer L has no probe."""
    tensors = plain(keys, shapes, "uvit.")
    L = shapes["exits.weight"][0]
    for name in ("weight", "bias"):
        shape = shapes[f"exits.{name}"][1:]
        probes = _stack(keys, [f"matrix.{i}.classifier.0.{name}" for i in range(L)], shape)
        tensors[f"exits.{name}"] = torch.cat([probes[1:], torch.zeros_like(probes[:1])])
    half = L // 2
    heads = [f"in_blocks_heads.{i}" for i in range(half)]
    heads += ["mid_block_head", *(f"out_blocks_heads.{i}" for i in range(half))]
    for own, shape in shapes.items():
        if own.startswith("exits.heads."):
            _, _, index, name = own.split(".", 3)
            if index == "0":
                keys.take(f"{heads[0]}.{name}", shape)
            tensors[own] = keys.take(f"{heads[int(index) + 1]}.{name}", shape)
    return tensors


EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
ONCE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
    **{own: f"transformer_blocks.0.norm1.emb.{theirs}" for own, theirs in EMBEDDERS.items()},
}
EACH = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def diffusers(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    """Embedders that differ from block to block are a problem: DiT has one. The position embedding is not in their
    files, but computed."""
    tensors = {}
    for own, shape in shapes.items():
        *path, name = own.removeprefix(BACKBONE).split(".")
        part = ".".join(path)
        if not path:  # pos_embed
            tensors[own] = position_embedding(shape[2], round(shape[1] ** 0.5))[None]
        elif part in ONCE:
            tensors[own] = keys.take(f"{ONCE[part]}.{name}", shape)
        elif path[-1] == "qkv":
            block, third = f"transformer_blocks.{path[1]}.attn1", Size([shape[0] // 3, *shape[1:]])
            tensors[own] = torch.cat([keys.take(f"{block}.to_{which}.{name}", third) for which in "qkv"])
        else:
            tensors[own] = keys.take(f"transformer_blocks.{path[1]}.{EACH['.'.join(path[2:])]}.{name}", shape)
    blocks = sum(own.endswith("attn.qkv.weight") for own in shapes)
    for own, theirs in EMBEDDERS.items():
        for name in ("weight", "bias"):
            first = tensors.get(f"{BACKBONE}{own}.{name}")
            for i in range(1, blocks if first is not None else 0):
                key = f"transformer_blocks.{i}.norm1.emb.{theirs}.{name}"
                if not torch.equal(keys.take(key, first.shape), first):
                    keys.problems.append(f"{key} differs from that of block 0, and DiT has one for all blocks")
    return tensors


LAYOUTS: Mapping[str, Layout] = {"plain": plain, "official": official, "duodiff": duodiff, "diffusers": diffusers}


def layout_of(names: Mapping[str, Tensor]) -> str:
    """The layout that a state dict is in, by the names in it. Raises ValueError for one that is not known here."""
    roots = {name.split(".")[0] for name in names}
    if {"uvit", "matrix"} <= roots:
        blocks = sum(name.startswith("uvit.") and name.endswith(".norm1.weight") for name in names)
        known = {f"matrix.{i}.classifier.0.{name}" for i in range(blocks) for name in ("weight", "bias")}
        other = sorted(name for name in names if name.startswith("matrix.") and name not in known)
        if other:
            raise ValueError(
                f"{other[0]} is no probe of classifier_type mlp_probe_per_layer, the only one of DuoDiff's that is read"
            )
        return "duodiff"
    for root, layout in (("lte_classifer", "official"), ("transformer_blocks", "diffusers"), ("pos_embed", "plain")):
        if root in roots:
            return layout
    raise ValueError(f"names such as {', '.join(sorted(names)[:3])} are in no layout known here: {', '.join(LAYOUTS)}")
