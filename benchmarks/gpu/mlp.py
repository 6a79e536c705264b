"""Implementations of a block's MLP: GELU as a call of its own, as epilogue of the first matrix product, or compiled;
residual sum in the fused pass or in the second product (beta = 1).

DiT's GELU is the tanh approximation, which cuBLAS offers as an epilogue; U-ViT's exact GELU has no such epilogue.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from adadiff.models.layers import Mlp
from adadiff_kernels import residual_uem
from benchmarks.gpu.session import Call, Session, Task, teraflops

SUITE = "gpu-mlp"
BRAIN = torch.bfloat16
SHAPES = {"DiT-XL/2": (256, 1152, "tanh"), "U-ViT-L/2": (258, 1024, "none")}  # tokens, channels, GELU


def tasks(session: Session) -> Iterator[Task]:
    for shape in SHAPES:
        for n in (2,) if session.dry else (8, 64):
            yield Task("mlp", given := {"shape": shape, "rows": n}, partial(measure, session, given))


def measure(session: Session, parameters: dict[str, object]) -> None:
    T, D, approximate = SHAPES[parameters["shape"]]
    T, D, n = (5, 16, parameters["rows"]) if session.dry else (T, D, parameters["rows"])
    with session.device:
        mlp = Mlp(D, 4 * D, approximate).to(BRAIN).requires_grad_(False)
    x, h = session.normal(n, T, D, dtype=BRAIN), session.normal(n, T, D, dtype=BRAIN)
    lanes = torch.arange(n, dtype=torch.int32, device=session.device)

    def apart() -> Tensor:
        return F.gelu(mlp.fc1(h), approximate=approximate)

    def summed_by_the_pass() -> Tensor:
        branch = mlp(h, add_bias=False)
        return residual_uem(x, branch, row_to_lane=lanes, bias=mlp.bias, out=branch)[0]

    def summed_by_the_product() -> Tensor:
        given = (x + mlp.bias).view(n * T, D), apart().view(n * T, 4 * D), mlp.fc2.weight.t()
        return torch.addmm(*given).view(n, T, D)

    calls: dict[str, Call] = {"GELU apart": apart, "GELU compiled": session.compile(apart, dynamic=False)}
    if approximate == "tanh" and not session.dry:  # on a CPU the operator has the exact GELU
        calls["GELU as epilogue"] = lambda: mlp._gelu(h)
    calls |= {"sum by the pass": summed_by_the_pass, "sum by the product": summed_by_the_product}
    with torch.inference_mode():
        if "GELU as epilogue" in calls:
            torch.testing.assert_close(calls["GELU as epilogue"](), apart(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(summed_by_the_product(), summed_by_the_pass(), rtol=2e-2, atol=5e-2)
        measured = session.compare({name: session.captured(call, shared=True) for name, call in calls.items()})
    macs = {name: (4 if name.startswith("GELU") else 8) * n * T * D * D for name in calls}
    rows = {name: {"tflops": teraflops(measured.median(name), macs[name])} for name in calls}
    session.write(SUITE, "mlp", parameters, measured, rows, BRAIN)
