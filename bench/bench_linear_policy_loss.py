"""linear_policy_loss: clipped policy loss, KL to the reference and entropy from hidden states, and their gradient."""

import functools

import torch
from torch import Tensor

from rlhf_fast import linear_logprobs, linear_policy_loss
from rlhf_fast.bench import peers
from rlhf_fast.bench.bench_linear_logprobs import naive as naive_logprobs
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

KL_COEF, ENTROPY_COEF = 0.05, 0.01
LOGPROBS, LIGER = "rlhf-fast, linear_logprobs", "Liger, no entropy"


def build(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    head = random_head(sizes, dtype, device)
    hidden, weight, targets, upstream = head
    with torch.no_grad():
        logprobs = naive_logprobs(hidden, weight, targets).float()
    # ratios far from the clip bounds, so that rounding cannot move a token across one
    steps = torch.tensor([-0.6, -0.06, 0.06, 0.6], device=device)
    old_logprobs = logprobs + steps[torch.randint(4, logprobs.shape, device=device)]
    ref_logprobs = logprobs + 0.2 * torch.randn_like(logprobs)
    advantages = torch.randn(SEQUENCES, device=device).repeat_interleave(len(targets) // SEQUENCES)
    tokens = (targets, old_logprobs, advantages, ref_logprobs)
    fast = compiled(naive)

    def gradient(loss: Tensor) -> Results:
        return loss.detach(), *torch.autograd.grad(loss, hidden)

    def ours() -> Results:
        targets, old_logprobs, advantages, ref_logprobs = tokens
        result = linear_policy_loss(
            hidden,
            weight,
            targets,
            old_logprobs,
            advantages,
            ref_logprobs=ref_logprobs,
            kl_coef=KL_COEF,
            entropy_coef=ENTROPY_COEF,
        )
        return gradient(result.loss)

    def liger() -> Results:
        targets, old_logprobs, advantages, ref_logprobs = (tensor.view(SEQUENCES, -1) for tensor in tokens)
        loss, _ = peers.liger_grpo(KL_COEF)(
            hidden.view(*targets.shape, -1),
            weight,
            targets,
            torch.ones_like(advantages),
            advantages[:, 0],
            ref_per_token_logps=ref_logprobs,
            old_per_token_logps=old_logprobs,
        )
        torch.autograd.grad(loss, hidden)
        return ()

    def truth() -> Results:
        exact = weight.double()
        first, *rest = first_rows([hidden, *tokens])
        sums = [
            naive(rows.double(), exact, own_targets, *(tensor.double() for tensor in own)).sum()
            for rows, own_targets, *own in zip(
                hidden.detach().split(128), *(tensor.split(128) for tensor in tokens), strict=True
            )
        ]
        share = torch.full((len(first),), 1 / len(targets), dtype=torch.float64, device=device)
        _, of_first = forward_backward(naive, leaf(first), exact, *rest, upstream=share)
        return torch.stack(sums).sum() / len(targets), of_first

    return Contest(
        {
            OURS: ours,
            EAGER: lambda: gradient(naive(hidden, weight, *tokens).mean()),
            COMPILED: lambda: gradient(fast(hidden, weight, *tokens).mean()),
            LIGER: liger,
            LOGPROBS: lambda: forward_backward(linear_logprobs, hidden, weight, targets, upstream=upstream)[:0],
            PRODUCTS: products(hidden, weight),
        },
        names=("loss", "gradient"),
        truth=truth,
        work=work(head),
    )


def naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, ref_logprobs: Tensor
) -> Tensor:
    """The loss of each token."""
    logprobs = torch.log_softmax(hidden @ weight.T, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    logprobs = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    ratio = (logprobs - old_logprobs).exp()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    difference = ref_logprobs - logprobs
    return policy + KL_COEF * (difference.exp() - 1 - difference) - ENTROPY_COEF * entropy


WORKLOADS = [
    Workload(
        "linear_policy_loss",
        "{tokens} x {hidden} x {vocab} fp32, policy + KL + entropy, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.float32),
        (Mark("within", 1.05, LOGPROBS),),
    )
]
LOGITS_MB = GPU_SIZES["tokens"] * GPU_SIZES["vocab"] * 2 / 1e6
GPU_WORKLOADS = [
    Workload(
        "linear_policy_loss",
        "{tokens} x {hidden} x {vocab} bf16, policy + KL + entropy, forward + backward",
        GPU_SIZES,
        QUICK,
        functools.partial(build, torch.bfloat16),
        (Mark("within", 1.15, PRODUCTS), Mark("memory", 0.05 * LOGITS_MB), Mark("faster", 1.7, LIGER)),
    )
]
