"""gated_activation: SwiGLU of a layer, and the gradients of both factors."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import gated_activation
from rlhf_fast.bench.workload import (
    COMPILED,
    COPY,
    EAGER,
    OURS,
    Contest,
    Results,
    Sizes,
    Work,
    Workload,
    compiled,
    copying,
    leaf,
)


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Contest:
    shape = (sizes["tokens"], sizes["width"])
    gate, up = (leaf(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
    upstream = torch.randn(shape, device=device).to(dtype)

    def run(function: object, gate: Tensor = gate, up: Tensor = up, upstream: Tensor = upstream) -> Results:
        output = function(gate, up)  # type: ignore[operator]
        return output.detach(), *torch.autograd.grad(output, (gate, up), upstream)

    fast = compiled(eager)
    return Contest(
        {
            OURS: lambda: run(gated_activation),
            EAGER: lambda: run(eager),
            COMPILED: lambda: run(fast),
            COPY: copying(gate),
        },
        names=("product", "gradient of gate", "gradient of up"),
        truth=lambda: run(eager, leaf(gate.double()), leaf(up.double()), upstream.double()),
        # forward: two tensors read, one written; backward: three read, two written
        work=Work("bytes", 8 * upstream.nbytes, COPY, 2 * upstream.nbytes),
    )


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def workload(dtype: torch.dtype, sizes: Sizes) -> Workload:
    title = "silu, {tokens} x {width} " + {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return Workload(
        "gated_activation",
        f"{title}, forward + backward",
        sizes,
        {"tokens": 8, "width": 64},
        functools.partial(build, dtype=dtype),
    )


WORKLOADS = [workload(dtype, {"tokens": 800, "width": 1536}) for dtype in (torch.float32, torch.bfloat16)]
GPU_WORKLOADS = [workload(torch.bfloat16, {"tokens": 8192, "width": 14336})]
