"""linear_logprobs: log-probabilities straight from hidden states, and their gradient; the head is frozen."""

import functools

import torch
from torch import Tensor

from rlhf_fast import linear_logprobs
from rlhf_fast.bench import peers
from rlhf_fast.bench.bench_masked_logprobs import naive as logits_logprobs
from rlhf_fast.bench.heads import GPU_SIZES, PRODUCTS, QUICK, SEQUENCES, SIZES, first_rows, products, random_head, work
from rlhf_fast.bench.workload import (
    COMPILED,
    EAGER,
    OURS,
    Contest,
    Mark,
    Results,
    Sizes,
    Workload,
    compiled,
    forward_backward,
    leaf,
)


def build(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    head = random_head(sizes, dtype, device)
    hidden, weight, targets, upstream = head
    do = functools.partial(forward_backward, upstream=upstream)
    fast = compiled(naive)

    def truth() -> Results:
        first, labels, grads = first_rows([hidden, targets, upstream])
        return forward_backward(naive, leaf(first), weight.double(), labels, upstream=grads)

    def chunked() -> Results:
        (gradient,) = torch.autograd.grad(peers.linear_cross_entropy(hidden, weight, targets, "sum"), hidden)
        return None, -gradient

    return Contest(
        {
            OURS: lambda: do(linear_logprobs, hidden, weight, targets),
            EAGER: lambda: do(naive, hidden, weight, targets),
            COMPILED: lambda: do(fast, hidden, weight, targets),
            "F.linear_cross_entropy": chunked,
            "Liger": lambda: liger(hidden, weight, targets),
            PRODUCTS: products(hidden, weight),
        },
        names=("logprobs", "gradient"),
        truth=truth,
        work=work(head),
    )


def build_masked(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    head = random_head(sizes, dtype, device)
    hidden, weight, targets, upstream = head
    mask = torch.rand(sizes["tokens"], device=device).argsort() < sizes["tokens"] // 2
    do = functools.partial(forward_backward, upstream=upstream)

    def truth() -> Results:
        first, labels, grads, live = first_rows([hidden, targets, upstream, mask])
        return forward_backward(naive_masked, leaf(first), weight.double(), labels, live, upstream=grads)

    return Contest(
        {
            OURS: lambda: do(linear_logprobs, hidden, weight, targets, mask),
            EAGER: lambda: do(naive_masked, hidden, weight, targets, mask),
            "rlhf-fast, unmasked": lambda: do(linear_logprobs, hidden, weight, targets)[:0],
            PRODUCTS: products(hidden[mask], weight),
        },
        names=("logprobs", "gradient"),
        truth=truth,
        work=work(head, tokens=sizes["tokens"] // 2),
    )


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return logits_logprobs(hidden @ weight.T, targets)


def naive_masked(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return naive(hidden, weight, targets) * mask


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Results:
    """Liger's chunked GRPO loss reduced to log-probs: advantage 1, no KL. Liger offers no log-probs alone on a CPU."""
    shape = (SEQUENCES, -1)
    ones = torch.ones_like(targets, dtype=torch.float32).view(shape)
    loss, _ = peers.liger_grpo(0.0)(
        hidden.view(*shape, hidden.shape[-1]), weight, targets.view(shape), ones, ones[:, 0]
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    return None, -len(targets) * gradient


MARKS = (Mark("memory", 64), Mark("faster", 1, "Liger"), Mark("faster", 1, "F.linear_cross_entropy"))
WORKLOADS = [
    Workload(
        "linear_logprobs",
        "{tokens} x {hidden} x {vocab} fp32, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.float32),
        (Mark("within", 1.1, PRODUCTS), *MARKS),
    ),
    Workload(
        "linear_logprobs",
        "{tokens} x {hidden} x {vocab} bf16, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.bfloat16),
        (Mark("within", 1.25, PRODUCTS), *MARKS),
    ),
    Workload(
        "linear_logprobs",
        "half of {tokens} x {hidden} x {vocab} fp32 masked",
        SIZES,
        QUICK,
        functools.partial(build_masked, torch.float32),
        (Mark("within", 0.55, "rlhf-fast, unmasked"),),
    ),
]
GPU_WORKLOADS = [
    Workload(
        "linear_logprobs",
        "{tokens} x {hidden} x {vocab} bf16, forward + backward",
        GPU_SIZES,
        QUICK,
        functools.partial(build, torch.bfloat16),
    ),
    Workload(
        "linear_logprobs",
        "half of {tokens} x {hidden} x {vocab} bf16 masked",
        GPU_SIZES,
        QUICK,
        functools.partial(build_masked, torch.bfloat16),
    ),
]
