"""Layouts: how other projects name the tensors of a model. One function per layout translates to our `Model`'s names.

plain      U-ViT and DiT: the names of our networks
sit        SiT (willisma/SiT models.py): DiT's names
official   AdaDiff (Tangshengku/AdaDiff libs/uvit.py): U-ViT's names, and a UEM `lte_classifer.{i}` for every block
duodiff    DuoDiff (razvanmatisan/duodiff models/early_exit.py): `uvit.*`, and a probe `matrix.{i}` and a head that read
           every block's input
diffusers  `DiTTransformer2DModel`: q, k and v separate, and a copy of the embedders in every block
pixart     PixArt (PixArt-alpha/PixArt-sigma, PixArt.py): our names, and an embedding for the null caption
pixart-diffusers  `PixArtTransformer2DModel`
mmdit      Stable Diffusion 3 (Stability-AI/sd3-ref, mmdit.py): our names, with a larger grid of positions
mmdit-diffusers  `SD3Transformer2DModel`
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Size, Tensor

from ..checkpoint import Keys
from ..models.dit import position_embedding

Shapes = Mapping[str, Size]  # of our own tensors, by their names in Model.state_dict()
Layout = Callable[[Keys, Shapes], dict[str, Tensor]]

BACKBONE = "backbone."
LAST = f"{BACKBONE}final_layer.linear."


def _stack(keys: Keys, names: list[str], shape: Size) -> Tensor:
    return torch.stack([keys.take(name, shape) for name in names])


def plain(keys: Keys, shapes: Shapes, prefix: str = "") -> dict[str, Tensor]:
    return {
        own: keys.take(prefix + own.removeprefix(BACKBONE), shape)
        for own, shape in shapes.items()
        if own.startswith(BACKBONE)
    }


def official(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    """AdaDiff's UEM outputs a certainty, so its weights are negated: sigmoid(-s) = 1 - sigmoid(s)."""
    tensors = plain(keys, shapes)
    for name in ("weight", "bias"):
        L, *shape = shapes[f"exits.{name}"]
        tensors[f"exits.{name}"] = -_stack(keys, [f"lte_classifer.{i}.lte.{name}" for i in range(L)], Size(shape))
    return tensors


def sit(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    """SiT's time runs from noise to data, so its velocity has the opposite sign of ours. Its head also has rows for
    DiT's variance, which it does not use."""
    tensors = plain(keys, {own: shape for own, shape in shapes.items() if not own.startswith(LAST)})
    channels = shapes[f"{BACKBONE}x_embedder.proj.weight"][1]
    for name in ("weight", "bias"):
        rows, *rest = shapes[LAST + name]
        value = keys.take(f"final_layer.linear.{name}", Size([2 * rows, *rest]))
        tensors[LAST + name] = -value.view(rows // channels, 2, channels, *rest)[:, 0].reshape(rows, *rest)
    return tensors


FIRST_EXIT = "matrix.0 and in_blocks_heads.0"  # DuoDiff's exit before block 0


def duodiff(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    """DuoDiff's probe and head i read the input of block i, which is the output of our layer i. Those of block 0 have
    no counterpart here (FIRST_EXIT), and layer L has no probe."""
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
    """Reports a problem if the embedders differ between blocks, as DiT has one for all. The position embedding is not
    stored in these files, but computed."""
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


NO_CAPTION = "y_embedder.y_embedding"  # PixArt's null caption; here, guidance uses the embeddings of an empty prompt


def pixart(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    tensors = plain(keys, shapes)
    keys.ignore(NO_CAPTION)
    return tensors


PIXART_ONCE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
PIXART_EACH = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
PIXART_PARTS = {"attn.qkv": ("attn1", "qkv"), "cross_attn.kv_linear": ("attn2", "kv")}


def pixart_diffusers(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    """The position embedding is not stored in these files; `translate` computes it."""
    tensors = {}
    for own, shape in shapes.items():
        *path, name = own.removeprefix(BACKBONE).split(".")
        part, inside = ".".join(path), ".".join(path[2:])
        block = f"transformer_blocks.{path[1]}" if path[:1] == ["blocks"] else ""
        if name == "scale_shift_table":
            tensors[own] = keys.take(f"{block}.{name}".removeprefix("."), shape)
        elif part in PIXART_ONCE:
            tensors[own] = keys.take(f"{PIXART_ONCE[part]}.{name}", shape)
        elif inside in PIXART_PARTS:
            attention, products = PIXART_PARTS[inside]
            each = Size([shape[0] // len(products), *shape[1:]])
            names = [f"{block}.{attention}.to_{which}.{name}" for which in products]
            tensors[own] = torch.cat([keys.take(theirs, each) for theirs in names])
        elif path:  # not pos_embed
            tensors[own] = keys.take(f"{block}.{PIXART_EACH[inside]}.{name}", shape)
    return tensors


def mmdit(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    position = f"{BACKBONE}pos_embed"
    tensors = plain(keys, {own: shape for own, shape in shapes.items() if own != position})
    return {**tensors, position: _middle(keys, "pos_embed", shapes[position])}


def _middle(keys: Keys, key: str, shape: Size) -> Tensor:
    """Position embedding of our patches, [1, side * side, D], cut from the middle of a larger grid."""
    grid = keys.take_any(key)
    sides = [math.isqrt(rows) for rows in (shape[1], 0 if grid is None or grid.ndim != 3 else grid.shape[1])]
    if grid is None or sides[1] < sides[0] or grid.shape != (1, sides[1] ** 2, shape[2]):
        if grid is not None:
            keys.problems.append(f"{key} is {tuple(grid.shape)}, no grid of {sides[0]} positions in a row or more")
        return torch.zeros((), device="cpu").expand(tuple(shape))
    first = (sides[1] - sides[0]) // 2
    cut = slice(first, first + sides[0])
    return grid.view(1, sides[1], sides[1], -1)[:, cut, cut].reshape(shape)


MMDIT_ONCE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
MMDIT_EACH = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
MMDIT_PRODUCTS = {"x_block.attn.qkv": "attn.to_{}", "context_block.attn.qkv": "attn.add_{}_proj"}


def mmdit_diffusers(keys: Keys, shapes: Shapes) -> dict[str, Tensor]:
    """In modulations without a gate, diffusers has the scale before the shift; they are swapped here."""
    tensors = {}
    for own, shape in shapes.items():
        *path, name = own.removeprefix(BACKBONE).split(".")
        part, inside = ".".join(path), ".".join(path[2:])
        block = f"transformer_blocks.{path[1]}" if path[:1] == ["joint_blocks"] else ""
        if not path:  # pos_embed
            tensors[own] = _middle(keys, "pos_embed.pos_embed", shape)
        elif inside in MMDIT_PRODUCTS:
            third = Size([shape[0] // 3, *shape[1:]])
            names = [f"{block}.{MMDIT_PRODUCTS[inside].format(which)}.{name}" for which in "qkv"]
            tensors[own] = torch.cat([keys.take(theirs, third) for theirs in names])
        else:
            theirs = MMDIT_ONCE[part] if part in MMDIT_ONCE else f"{block}.{MMDIT_EACH[inside]}"
            value = keys.take(f"{theirs}.{name}", shape)
            ungated = "adaLN_modulation" in part and shape[0] == 2 * shapes[f"{BACKBONE}context_embedder.bias"][0]
            tensors[own] = torch.cat(value.chunk(2)[::-1]) if ungated else value
    return tensors


LAYOUTS: Mapping[str, Layout] = {
    "plain": plain,
    "sit": sit,
    "official": official,
    "duodiff": duodiff,
    "diffusers": diffusers,
    "pixart": pixart,
    "pixart-diffusers": pixart_diffusers,
    "mmdit": mmdit,
    "mmdit-diffusers": mmdit_diffusers,
}


ROOTS = {  # first parts of names -> layout; the most specific first
    "joint_blocks": "mmdit",
    "lte_classifer": "official",
    "transformer_blocks": "diffusers",
    "t_block": "pixart",
    "pos_embed": "plain",
}


def layout_of(names: Mapping[str, Tensor]) -> str:
    """The layout of a state dict, by its names. Raises ValueError for an unknown one."""
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
    if "transformer_blocks" in roots and "adaln_single" in roots:
        return "pixart-diffusers"
    if "transformer_blocks" in roots and "time_text_embed" in roots:
        return "mmdit-diffusers"
    for root, layout in ROOTS.items():
        if root in roots:
            return layout
    raise ValueError(f"names such as {', '.join(sorted(names)[:3])} are in no layout known here: {', '.join(LAYOUTS)}")
