"""linear_policy_ref: log-probs of policy and reference, entropy and exact KL in one pass, and the policy's gradient."""

import functools

import torch
from torch import Tensor

from rlhf_fast import linear_policy_ref
from rlhf_fast.bench.heads import GPU_SIZES, PRODUCTS, QUICK, SIZES, first_rows, random_head, three_products, work
from rlhf_fast.bench.workload import COMPILED, EAGER, OURS, Contest, Results, Sizes, Workload, compiled

KL_COEF, ENTROPY_COEF = 0.05, 0.01


def build(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    head = random_head(sizes, dtype, device)
    hidden, weight, targets, upstream = head
    ref_hidden = (hidden + 0.1 * torch.randn_like(hidden)).detach()
    fast = compiled(naive)

    def gradient(outputs: tuple[Tensor, ...], hidden: Tensor, upstream: Tensor) -> Results:
        logprobs, _, entropy, kl = outputs
        loss = (upstream * logprobs + KL_COEF * kl - ENTROPY_COEF * entropy).sum()
        return *(output.detach() for output in outputs), *torch.autograd.grad(loss, hidden)

    def truth() -> Results:
        first, reference, labels, grads = first_rows([hidden, ref_hidden, targets, upstream])
        first.requires_grad_()
        return gradient(naive(first, reference, weight.double(), labels), first, grads)

    inputs = (hidden, ref_hidden, weight, targets)
    return Contest(
        {
            OURS: lambda: gradient(linear_policy_ref(*inputs), hidden, upstream),
            EAGER: lambda: gradient(naive(*inputs), hidden, upstream),
            COMPILED: lambda: gradient(fast(*inputs), hidden, upstream),
            PRODUCTS: three_products(hidden, ref_hidden, weight),
        },
        names=("logprobs", "ref_logprobs", "entropy", "exact_kl", "gradient"),
        truth=truth,
        work=work(head, count=3),
    )


def naive(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    policy = torch.log_softmax(hidden @ weight.T, dim=-1)
    reference = torch.log_softmax(ref_hidden @ weight.T, dim=-1)
    chosen = [logprobs.gather(-1, targets[:, None]).squeeze(-1) for logprobs in (policy, reference)]
    probabilities = policy.exp()
    return *chosen, -(probabilities * policy).sum(-1), (probabilities * (policy - reference)).sum(-1)


WORKLOADS = [
    Workload(
        "linear_policy_ref",
        "{tokens} x {hidden} x {vocab} fp32, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.float32),
    )
]
GPU_WORKLOADS = [
    Workload(
        "linear_policy_ref",
        "{tokens} x {hidden} x {vocab} bf16, forward + backward",
        GPU_SIZES,
        QUICK,
        functools.partial(build, torch.bfloat16),
    )
]
