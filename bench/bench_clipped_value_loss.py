"""clipped_value_loss: the critic's loss with the share of clipped values, and the gradient of the values."""

import torch
from torch import Tensor

from rlhf_fast import clipped_value_loss
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


def build(sizes: Sizes, device: torch.device) -> Contest:
    shape = (sizes["sequences"], sizes["tokens"])
    # multiples of 1/64, so that rounding cannot move a value across a clip bound
    values, old_values, returns = ((64 * torch.randn(shape, device=device)).round() / 64 for _ in range(3))
    values = leaf(old_values + values / 4)
    mask = torch.rand(shape, device=device) < 0.8
    inputs = (values, old_values, returns, mask)
    fast = compiled(naive)

    def truth() -> Results:
        exact = leaf(values.double())
        return gradient(naive(exact, old_values.double(), returns.double(), mask), exact)

    return Contest(
        {
            OURS: lambda: gradient(clipped_value_loss(*inputs), values),
            EAGER: lambda: gradient(naive(*inputs), values),
            COMPILED: lambda: gradient(fast(*inputs), values),
            COPY: copying(returns),
        },
        names=("loss", "clip_fraction", "gradient"),
        truth=truth,
        # three tensors and the mask read, the gradient written
        work=Work("bytes", 4 * returns.nbytes + mask.nbytes, COPY, 2 * returns.nbytes),
    )


def gradient(outputs: tuple[Tensor, ...], values: Tensor) -> Results:
    return *(output.detach() for output in outputs), *torch.autograd.grad(outputs[0], values)


def naive(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    count = mask.sum()
    held = torch.clamp(values, old_values - 0.2, old_values + 0.2)
    unclipped, clipped = (values - returns).square(), (held - returns).square()
    loss = 0.5 * (torch.max(unclipped, clipped) * mask).sum() / count
    with torch.no_grad():
        return loss, ((clipped > unclipped) * mask).sum() / count


WORKLOADS = [
    Workload(
        "clipped_value_loss",
        "{sequences} x {tokens}, forward + backward",
        {"sequences": 1024, "tokens": 1024},
        {"sequences": 8, "tokens": 64},
        build,
    )
]
GPU_WORKLOADS = WORKLOADS
