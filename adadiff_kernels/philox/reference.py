"""Philox4x32-10: random integers as a pure function of (counter, key), and normal values computed from them.

    ten rounds of (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),
    (k0, k1) <- (k0 + W0, k1 + W1) mod 2^32 between rounds

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. Unsigned
32-bit words are held in int64, so the integers are the same on every device and in every PyTorch version.
"""

import math

import torch
from torch import Tensor

from adadiff_kernels import extension
from adadiff_kernels.upload import upload

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Four random words for each counter.

    counter: int64[..., 4], key: int64[..., 2], words in [0, 2^32); leading dimensions broadcast.
    Returns int64[..., 4], words in [0, 2^32). ValueError for another dtype or last dimension.
    """
    if counter.dtype != torch.int64 or key.dtype != torch.int64:
        raise ValueError(f"counter and key must be int64, got {counter.dtype} and {key.dtype}")
    if counter.shape[-1:] != (4,) or key.shape[-1:] != (2,):
        raise ValueError(
            f"counter must be [..., 4] and key [..., 2], got {tuple(counter.shape)} and {tuple(key.shape)}"
        )
    return torch.stack(_rounds(*counter.unbind(-1), *key.unbind(-1)), dim=-1)


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    for step in range(10):
        # The product wraps to the same 64 bits as an unsigned one. c1 and c3 keep its high word as well until
        # they are masked: only their low word counts.
        a, b = c0 * M0, c2 * M1
        c0 = ((b >> 32) ^ c1 ^ ((k0 + step * W0) & WORD)) & WORD
        c2 = ((a >> 32) ^ c3 ^ ((k1 + step * W1) & WORD)) & WORD
        c1, c3 = b, a
    return torch.broadcast_tensors(c0, c1 & WORD, c2, c3 & WORD)


def philox_normal(
    seeds: Tensor, step: Tensor, stream: int, count: int, device: torch.device | str | None = None
) -> Tensor:
    """Standard normal values, a pure function of (seed, step, stream, element).

    seeds: int64[n] in [0, 2^63); step: int64[n] in [0, 2^32); stream in [0, 2^32); count: values per sample, at most
    2^34. Returns float32[n, count] on `device` (default: that of seeds). ValueError outside these ranges. Checking them
    reads seeds and steps: to avoid host synchronisation, keep both on the CPU and pass `device`.

    Element e takes word e % 4 of counter (e // 4, step, stream, 0) under the key (seed mod 2^32, seed >> 32).
    Words (w0, w1) become u1 = (w0 + 1) / 2^32 in (0, 1] and u2 = w1 / 2^32 in [0, 1), then by Box and Muller
        r = sqrt(-2 ln u1), z0 = r cos(2 pi u2), z1 = r sin(2 pi u2);
    (w2, w3) give z2 and z3 likewise. All in float64, rounded to float32 at the end: implementations whose
    float64 functions differ in the last bit differ in about one value of 2^28.
    """
    _check("seeds", seeds, 2**63)
    _check("step", step, 2**32)
    if seeds.shape != step.shape:
        raise ValueError(f"seeds and step must have one length, got {len(seeds)} and {len(step)}")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must lie in [0, 2^32), got {stream}")
    if not 0 <= count <= 2**34:
        raise ValueError(f"count must lie in [0, 2^34], got {count}")
    device = seeds.device if device is None else torch.device(device)
    words = _words(seeds, step, stream, (count + 3) // 4, device)
    radius = (words[..., 0] + 1).double().div_(2**32).log_().mul_(-2).sqrt_()  # [n, blocks, 2]
    angle = words[..., 1].double().mul_(2 * math.pi / 2**32)
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return normal.flatten(1)[:, :count].float()


def _words(seeds: Tensor, step: Tensor, stream: int, blocks: int, device: torch.device) -> Tensor:
    """int64[n, blocks, 2, 2]: (w0, w1), (w2, w3) of each counter."""
    n = len(seeds)
    if extension.core is not None and device.type == "cpu" and seeds.is_cpu and step.is_cpu:
        words = torch.empty(n, blocks, 2, 2, dtype=torch.int64, device="cpu")
        seeds, step = seeds.contiguous(), step.contiguous()
        extension.core.philox(seeds.data_ptr(), step.data_ptr(), n, stream, blocks, words.data_ptr())
        return words
    seeds, step = upload(seeds, device)[:, None], upload(step, device)[:, None]
    block = torch.arange(blocks, device=device)[None]
    purpose = torch.full_like(block[:, :1], stream)
    rest = torch.zeros_like(purpose)
    return torch.stack(_rounds(block, step, purpose, rest, seeds & WORD, seeds >> 32), -1).view(n, blocks, 2, 2)


def _check(name: str, value: Tensor, limit: int) -> None:
    if value.dtype != torch.int64 or value.dim() != 1:
        raise ValueError(f"{name} must be int64[n], got {value.dtype}{list(value.shape)}")
    low, high = (int(value.min()), int(value.max())) if value.numel() else (0, 0)
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must lie in [0, 2^{limit.bit_length() - 1}), got {low} to {high}")
