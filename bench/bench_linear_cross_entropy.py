"""linear_cross_entropy: fine-tuning's mean loss with a trained head, and the gradients of hidden states and head."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import linear_cross_entropy
from rlhf_fast.bench import peers
from rlhf_fast.bench.heads import GPU_SIZES, PRODUCTS, QUICK, SIZES, products, random_head, work
from rlhf_fast.bench.workload import COMPILED, EAGER, OURS, Contest, Results, Run, Sizes, Workload, compiled, leaf


def build(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    head = random_head(sizes, dtype, device)
    hidden, weight, labels = head.hidden, leaf(head.weight), head.targets
    fast = compiled(naive)

    def gradients(loss: Tensor) -> Results:
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    def truth() -> Results:
        loss, parts = torch.zeros((), dtype=torch.float64, device=device), []
        exact = leaf(weight.double())
        total = torch.zeros_like(exact)
        for rows, own in zip(hidden.detach().double().split(128), labels.split(128), strict=True):
            rows.requires_grad_()
            part = naive(rows, exact, own) * len(own) / len(labels)
            of_rows, of_weight = torch.autograd.grad(part, (rows, exact))
            loss += part.detach()
            total += of_weight
            parts.append(of_rows)
        return loss, torch.cat(parts), total

    runs: dict[str, Run] = {
        OURS: lambda: gradients(linear_cross_entropy(hidden, weight, labels)),
        EAGER: lambda: gradients(naive(hidden, weight, labels)),
        COMPILED: lambda: gradients(fast(hidden, weight, labels)),
        "F.linear_cross_entropy": lambda: gradients(peers.linear_cross_entropy(hidden, weight, labels, "mean")),
        PRODUCTS: products(hidden, weight, trained=True),
    }
    if dtype == torch.bfloat16:  # of kernels for GPUs
        runs["Liger"] = lambda: gradients(peers.liger_linear_cross_entropy(hidden, weight, labels))
        runs["cut-cross-entropy"] = lambda: gradients(peers.cut_cross_entropy(hidden, weight, labels))
    return Contest(
        runs,
        names=("loss", "gradient of hidden", "gradient of weight"),
        truth=truth,
        work=work(head, count=3),
    )


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)


WORKLOADS = [
    Workload(
        "linear_cross_entropy",
        "{tokens} x {hidden} x {vocab} fp32, trained head, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.float32),
    )
]
GPU_WORKLOADS = [
    Workload(
        "linear_cross_entropy",
        "{tokens} x {hidden} x {vocab} bf16, trained head, forward + backward",
        GPU_SIZES,
        QUICK,
        functools.partial(build, torch.bfloat16),
    )
]
