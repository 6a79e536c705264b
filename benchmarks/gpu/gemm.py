"""Products over M = n * 257 rows, where the host knows n and where only the device does.

cuBLAS sizes itself by M; `grouped_mm` takes one group whose end the device knows; the persistent Triton kernel reads M.
Beside the time: whether a sample's rows keep their bits when other samples share the product, and when it lies
elsewhere among them.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from rows import say
from torch import Tensor
from torch.nn import functional as F

from gpu.session import Session, Task, check_close, teraflops

SUITE = "gpu-gemm"
TOKENS = 257
BRAIN = torch.bfloat16
PRODUCTS = {  # name -> K, N
    "L qkv": (1024, 3072),
    "L proj": (1024, 1024),
    "L fc1": (1024, 4096),
    "L fc2": (4096, 1024),
    "S fc1": (512, 2048),
    "H fc1": (1152, 4608),
}
TILES = {"persistent, 128 x 256": (128, 256, 64), "persistent, 128 x 128": (128, 128, 64)}
TINY_TILES = {"persistent, 32 x 16": (32, 16, 16)}


def tasks(session: Session) -> Iterator[Task]:
    products, counts = ({"tiny": (32, 48)}, (1, 3)) if session.dry else (PRODUCTS, (1, 2, 4, 8, 16, 32, 64, 128, 256))
    tokens = 5 if session.dry else TOKENS
    for name, (K, N) in products.items():
        made: list[Ways] = []  # for the first of them that is measured
        for n in counts:
            given = {"product": name, "k": K, "n": N, "samples": n}
            yield Task("product", given, partial(measure, session, made, (K, N, tokens, counts), given))


class Ways:
    """The same product three ways. All but cuBLAS read the number of rows from `rows`, on the device."""

    def __init__(self, session: Session, K: int, N: int, tokens: int, counts: tuple[int, ...]) -> None:
        import triton

        from gpu.kernels import Product

        torch.manual_seed(0)
        most = max(counts)
        self.session, self.tokens = session, tokens
        self.a = session.normal(most * tokens, K, dtype=BRAIN)
        self.w = session.normal(N, K, dtype=BRAIN) / K**0.5
        self.rows = torch.zeros(1, dtype=torch.int32, device=session.device)
        cores = 4 if session.dry else torch.cuda.get_device_properties(session.device).multi_processor_count
        self.calls: dict[str, Callable[[int], Tensor]] = {"cuBLAS": lambda M: F.linear(self.a[:M], self.w)}
        grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm
        self.calls["grouped_mm"] = lambda _: grouped(self.a, self.w.t()[None], offs=self.rows)
        tiles = TINY_TILES if session.dry else TILES
        if session.dry and triton.__version__.startswith("3.6."):
            say("its interpreter takes no loop bound from memory: the persistent product is left out")
            tiles = {}
        for name, tile in tiles.items():
            product = Product(self.a, self.w, self.rows, tile, cores)
            self.calls[name] = lambda _, product=product: product()
        with torch.inference_mode():
            self.bits = {way: self.bits_of(way, counts) for way in self.calls}

    def of(self, way: str, n: int) -> Tensor:
        """[n * tokens, N]."""
        M = n * self.tokens
        self.rows.fill_(M)
        return self.calls[way](M)[:M].clone()

    def bits_of(self, way: str, counts: tuple[int, ...]) -> dict[str, object]:
        """In which numbers of samples the first one's rows are those it has alone, and whether it may lie last."""
        T, most = self.tokens, max(counts)
        exact = F.linear(self.a[:T].float(), self.w.float())
        check_close(way, alone := self.of(way, 1), exact, 1e-2)
        same = [n for n in counts if torch.equal(self.of(way, n)[:T], alone)]
        before, first = self.of(way, most)[:T], self.a[:T].clone()
        self.a[:T], self.a[-T:] = self.a[-T:].clone(), first
        moved = self.of(way, most)[-T:]
        self.a[:T], self.a[-T:] = self.a[-T:].clone(), self.a[:T].clone()
        return {"same_bits_at": same, "same_bits_at_all": same == list(counts), "same_bits_last": moved.equal(before)}


def measure(
    session: Session, made: list[Ways], sizes: tuple[int, int, int, tuple[int, ...]], parameters: dict[str, object]
) -> None:
    if not made:
        made.append(Ways(session, *sizes))
    ways = made[0]
    M = parameters["samples"] * ways.tokens
    ways.rows.fill_(M)
    calls = {name: session.captured(lambda call=call: call(M), shared=True) for name, call in ways.calls.items()}
    measured = session.compare(calls)
    macs = M * ways.a.shape[1] * len(ways.w)
    results = {
        name: {
            "tflops": teraflops(measured.median(name), macs),
            "over_cublas": measured.ratio(name, "cuBLAS").median,
            **ways.bits[name],
        }
        for name in calls
    }
    session.write(SUITE, "product", parameters, measured, results, BRAIN)
