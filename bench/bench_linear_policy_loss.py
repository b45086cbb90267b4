"""linear_policy_loss: clipped policy loss, KL to the reference and entropy from hidden states, and their gradient."""

import functools

import torch
from torch import Tensor

from rlhf_fast import linear_logprobs, linear_policy_loss, linear_policy_ref
from rlhf_fast.bench import peers
from rlhf_fast.bench.bench_linear_logprobs import naive as naive_logprobs
from rlhf_fast.bench.bench_linear_policy_ref import naive as naive_policy_ref
from rlhf_fast.bench.heads import (
    GPU_SIZES,
    PRODUCTS,
    QUICK,
    SEQUENCES,
    SIZES,
    Head,
    first_rows,
    products,
    random_head,
    three_products,
    work,
)
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
REF = "rlhf-fast, linear_policy_ref"


def random_tokens(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the policy, old log-probs and advantages (N,)."""
    hidden, weight, targets, _ = head
    with torch.no_grad():
        logprobs = naive_logprobs(hidden, weight, targets).float()
    # ratios far from the clip bounds, so that rounding cannot move a token across one
    steps = torch.tensor([-0.6, -0.06, 0.06, 0.6], device=hidden.device)
    old_logprobs = logprobs + steps[torch.randint(4, logprobs.shape, device=hidden.device)]
    advantages = torch.randn(SEQUENCES, device=hidden.device).repeat_interleave(len(targets) // SEQUENCES)
    return logprobs, old_logprobs, advantages


def build(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    head = random_head(sizes, dtype, device)
    hidden, weight, targets, upstream = head
    logprobs, old_logprobs, advantages = random_tokens(head)
    ref_logprobs = logprobs + 0.2 * torch.randn_like(logprobs)
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
    difference = ref_logprobs - logprobs
    return of_parts(logprobs, old_logprobs, advantages, difference.exp() - 1 - difference, entropy)


def of_parts(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, kl: Tensor, entropy: Tensor) -> Tensor:
    ratio = (logprobs - old_logprobs).exp()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return policy + KL_COEF * kl - ENTROPY_COEF * entropy


# ---- the exact KL ----------------------------------------------------------------------------------------------------


def build_exact(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    head = random_head(sizes, dtype, device)
    hidden, weight, targets, _ = head
    ref_hidden = (hidden + 0.1 * torch.randn_like(hidden)).detach()
    inputs = (ref_hidden, weight, targets, *random_tokens(head)[1:])
    fast = compiled(naive_exact)

    def gradient(loss: Tensor) -> Results:
        return loss.detach(), *torch.autograd.grad(loss, hidden)

    def ours() -> Results:
        ref_hidden, weight, targets, old_logprobs, advantages = inputs
        result = linear_policy_loss(
            hidden,
            weight,
            targets,
            old_logprobs,
            advantages,
            ref_hidden=ref_hidden,
            kl_coef=KL_COEF,
            kl_estimator="exact",
            entropy_coef=ENTROPY_COEF,
        )
        return gradient(result.loss)

    def from_results(hidden: Tensor, *rest: Tensor) -> Tensor:
        ref_hidden, weight, targets, old_logprobs, advantages = rest
        logprobs, _, entropy, kl = linear_policy_ref(hidden, ref_hidden, weight, targets)
        return of_parts(logprobs, old_logprobs, advantages, kl, entropy)

    def truth() -> Results:
        ref_hidden, _, *tokens = inputs
        exact = weight.double()
        sums = [
            naive_exact(own.double(), ref.double(), exact, labels, old.double(), advantage.double()).sum()
            for own, ref, labels, old, advantage in zip(
                *(tensor.split(128) for tensor in (hidden.detach(), ref_hidden, *tokens)), strict=True
            )
        ]
        first, ref, *rest = first_rows([hidden, ref_hidden, *tokens])
        share = torch.full((len(first),), 1 / len(targets), dtype=torch.float64, device=device)
        _, of_first = forward_backward(naive_exact, leaf(first), ref, exact, *rest, upstream=share)
        return torch.stack(sums).sum() / len(targets), of_first

    return Contest(
        {
            OURS: ours,
            EAGER: lambda: gradient(naive_exact(hidden, *inputs).mean()),
            COMPILED: lambda: gradient(fast(hidden, *inputs).mean()),
            REF: lambda: gradient(from_results(hidden, *inputs).mean()),
            PRODUCTS: three_products(hidden, ref_hidden, weight),
        },
        names=("loss", "gradient"),
        truth=truth,
        work=work(head, count=3),
    )


def naive_exact(
    hidden: Tensor, ref_hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor
) -> Tensor:
    """The loss of each token."""
    logprobs, _, entropy, kl = naive_policy_ref(hidden, ref_hidden, weight, targets)
    return of_parts(logprobs, old_logprobs, advantages, kl, entropy)


WORKLOADS = [
    Workload(
        "linear_policy_loss",
        "{tokens} x {hidden} x {vocab} fp32, policy + KL + entropy, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.float32),
        (Mark("within", 1.05, LOGPROBS),),
    ),
    Workload(
        "linear_policy_loss",
        "{tokens} x {hidden} x {vocab} fp32, policy + exact KL + entropy, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build_exact, torch.float32),
        (Mark("faster", 1.7, COMPILED), Mark("faster", 1.4, REF)),
    ),
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
    ),
    Workload(
        "linear_policy_loss",
        "{tokens} x {hidden} x {vocab} bf16, policy + exact KL + entropy, forward + backward",
        GPU_SIZES,
        QUICK,
        functools.partial(build_exact, torch.bfloat16),
    ),
]
