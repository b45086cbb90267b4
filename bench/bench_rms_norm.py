"""rms_norm: a layer's norm with a weight that is not trained, as under LoRA, and with one that is."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import rms_norm
from rlhf_fast.bench.workload import (
    COMPILED,
    COPY,
    EAGER,
    OURS,
    Contest,
    Results,
    Run,
    Sizes,
    Work,
    Workload,
    compiled,
    copying,
    leaf,
)

EPS = 1e-5


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype, trained: bool) -> Contest:
    shape = (sizes["tokens"], sizes["width"])
    hidden = leaf(torch.randn(shape, device=device).to(dtype))
    weight = (1 + 0.1 * torch.randn(sizes["width"], device=device)).to(dtype).requires_grad_(trained)
    upstream = torch.randn(shape, device=device).to(dtype)

    def run(function: object, hidden: Tensor = hidden, weight: Tensor = weight, upstream: Tensor = upstream) -> Results:
        output = function(hidden, weight)  # type: ignore[operator]
        wanted = [hidden, weight] if trained else [hidden]
        return output.detach(), *torch.autograd.grad(output, wanted, upstream)

    fast = compiled(eager)
    runs: dict[str, Run] = {
        OURS: lambda: run(functools.partial(rms_norm, eps=EPS)),
        EAGER: lambda: run(eager),
        "F.rms_norm": lambda: run(lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS)),
        COMPILED: lambda: run(fast),
        COPY: copying(hidden),
    }
    return Contest(
        runs,
        names=("normed", "gradient", "weight's gradient")[: 2 + trained],
        truth=lambda: run(eager, leaf(hidden.double()), leaf(weight.double()), upstream.double()),
        # forward: one tensor read, one written; backward: two read, one written
        work=Work("bytes", 5 * upstream.nbytes, COPY, 2 * upstream.nbytes),
    )


def eager(hidden: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Llama has it."""
    x = hidden if hidden.dtype == torch.float64 else hidden.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * x.to(hidden.dtype)


def workload(dtype: torch.dtype, trained: bool, sizes: Sizes) -> Workload:
    title = "{tokens} x {width} " + {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return Workload(
        "rms_norm",
        f"{title}{', trained weight' if trained else ''}, forward + backward",
        sizes,
        {"tokens": 8, "width": 64},
        functools.partial(build, dtype=dtype, trained=trained),
    )


SMALL, LARGE = {"tokens": 800, "width": 576}, {"tokens": 8192, "width": 4096}
WORKLOADS = [
    workload(torch.float32, False, SMALL),
    workload(torch.bfloat16, False, SMALL),
    workload(torch.bfloat16, True, SMALL),
]
GPU_WORKLOADS = [workload(torch.bfloat16, False, LARGE), workload(torch.bfloat16, True, LARGE)]
