"""rotary_embedding: a layer's queries, in the memory of the projection that gave them."""

import functools

import torch
from torch import Tensor

from rlhf_fast import rotary_embedding
from rlhf_fast.bench.workload import (
    COMPILED,
    COPY,
    EAGER,
    OURS,
    Contest,
    Sizes,
    Work,
    Workload,
    compiled,
    copying,
    forward_backward,
)


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Contest:
    shape = (1, sizes["tokens"], sizes["heads"], sizes["width"])
    memory, upstream = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    x, upstream = memory.transpose(1, 2).requires_grad_(), upstream.transpose(1, 2)
    angle = torch.rand(1, sizes["tokens"], sizes["width"] // 2, device=device).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    do = functools.partial(forward_backward, upstream=upstream)
    fast = compiled(eager)
    return Contest(
        {
            OURS: lambda: do(rotary_embedding, x, cos, sin),
            EAGER: lambda: do(eager, x, cos, sin),
            COMPILED: lambda: do(fast, x, cos, sin),
            COPY: copying(memory),
        },
        names=("turned", "gradient"),
        truth=lambda: forward_backward(
            eager, x.detach().double().requires_grad_(), cos.double(), sin.double(), upstream=upstream.double()
        ),
        # one tensor read and one written, each way
        work=Work("bytes", 4 * memory.nbytes, COPY, 2 * memory.nbytes),
    )


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers has it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def workload(dtype: torch.dtype, sizes: Sizes) -> Workload:
    title = "{tokens} tokens, {heads} heads of {width}, " + {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return Workload(
        "rotary_embedding",
        f"{title}, forward + backward",
        sizes,
        {"tokens": 8, "heads": 2, "width": 16},
        functools.partial(build, dtype=dtype),
    )


WORKLOADS = [workload(dtype, {"tokens": 800, "heads": 9, "width": 64}) for dtype in (torch.float32, torch.bfloat16)]
GPU_WORKLOADS = [workload(torch.bfloat16, {"tokens": 8192, "heads": 32, "width": 128})]
