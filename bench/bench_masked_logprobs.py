"""masked_logprobs: log-probabilities of the targets, and the gradient of the logits, written in place."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import masked_logprobs
from rlhf_fast.bench import peers
from rlhf_fast.bench.workload import (
    COMPILED,
    COPY,
    EAGER,
    OURS,
    Contest,
    Mark,
    Results,
    Run,
    Sizes,
    Work,
    Workload,
    compiled,
    copying,
    forward_backward,
    leaf,
)


def build(dtype: torch.dtype, sizes: Sizes, device: torch.device) -> Contest:
    # random bfloat16 numbers whatever the dtype, so that each contestant is given exactly the same ones
    kept = torch.randn(sizes["tokens"], sizes["vocab"], device=device).mul_(3).bfloat16().to(dtype)
    targets = torch.randint(sizes["vocab"], (sizes["tokens"],), device=device)
    upstream = torch.randn(sizes["tokens"], device=device).bfloat16().float()
    logits, logits_fp32 = leaf(kept), leaf(kept.float())
    do = functools.partial(forward_backward, upstream=upstream)
    fused = functools.partial(masked_logprobs, inplace_backward=True)
    fast = compiled(naive)

    elsewhere = torch.zeros_like(logits_fp32, requires_grad=False)

    def fresh() -> None:
        logits.detach().copy_(kept)
        logits_fp32.detach().copy_(kept)
        elsewhere.add_(1)  # otherwise the logits that were restored last would be in the cache

    runs = {
        OURS: lambda: do(fused, logits, targets),
        EAGER: lambda: do(naive, logits, targets),
        COMPILED: lambda: do(fast, logits, targets),
        "F.cross_entropy": lambda: do(cross_entropy, logits, targets),
        "TRL": lambda: do(peers.selective_log_softmax(), logits, targets),
        COPY: copying(kept),
    }
    if dtype != torch.float32:
        runs["rlhf-fast, fp32"] = lambda: do(fused, logits_fp32, targets)[:0]
    return Contest(
        runs,
        names=("logprobs", "gradient"),
        truth=lambda: forward_backward(
            naive, leaf(kept[:64].double()), targets[:64], upstream=upstream[:64].double()
        ),  # fmt: skip
        # logits read twice, their gradient written once
        work=Work("bytes", 3 * kept.nbytes, COPY, 2 * kept.nbytes),
        fresh=fresh,
    )


def build_gpu(sizes: Sizes, device: torch.device) -> Contest:
    """Forward and backward in bf16, compared with kernels of other libraries, each in place where possible."""
    kept, targets, upstream = random_logits(sizes, device)
    logits = leaf(kept)
    do = functools.partial(forward_backward, upstream=upstream)
    fast = compiled(naive)

    def loss(function: Callable[[Tensor, Tensor], Tensor]) -> Run:
        return lambda: do(lambda logits, targets: -function(logits, targets), logits, targets)

    return Contest(
        {
            OURS: lambda: do(functools.partial(masked_logprobs, inplace_backward=True), logits, targets),
            EAGER: lambda: do(naive, logits, targets),
            COMPILED: lambda: do(fast, logits, targets),
            "F.cross_entropy": lambda: do(cross_entropy, logits, targets),
            "TRL": lambda: do(peers.selective_log_softmax(), logits, targets),
            "Liger": loss(peers.liger_cross_entropy),
            "flash-attn": loss(peers.flash_cross_entropy),
            "quack": loss(peers.quack_cross_entropy),
            COPY: copying(kept),
        },
        names=("logprobs", "gradient"),
        truth=lambda: forward_backward(
            naive, leaf(kept[:64].double()), targets[:64], upstream=upstream[:64].double()
        ),  # fmt: skip
        work=Work("bytes", 3 * kept.nbytes, COPY, 2 * kept.nbytes),
        fresh=lambda: logits.detach().copy_(kept),
    )


def build_forward(sizes: Sizes, device: torch.device) -> Contest:
    """Log-probs and entropy in bf16, without a gradient."""
    logits, targets, _ = random_logits(sizes, device)
    return Contest(
        {
            OURS: lambda: masked_logprobs(logits, targets, return_entropy=True),
            EAGER: lambda: naive_with_entropy(logits, targets),
            COPY: copying(logits),
        },
        names=("logprobs", "entropy"),
        truth=lambda: naive_with_entropy(logits[:64].double(), targets[:64]),
        work=Work("bytes", logits.nbytes, COPY, 2 * logits.nbytes),  # logits read once
    )


def build_backward(sizes: Sizes, device: torch.device) -> Contest:
    """The gradient of log-probs and entropy in bf16; ours is written over the logits."""
    kept, targets, upstream = random_logits(sizes, device)
    logits, plain = leaf(kept), leaf(kept)
    upstreams = (upstream, upstream.flip(0))
    outputs: tuple[Tensor, ...] = ()

    def forward() -> tuple[Tensor, ...]:
        nonlocal outputs
        logits.detach().copy_(kept)
        outputs = masked_logprobs(logits, targets, return_entropy=True, inplace_backward=True)
        return outputs

    @functools.cache
    def plain_outputs() -> tuple[Tensor, ...]:
        return naive_with_entropy(plain, targets)

    def backward(outputs: tuple[Tensor, ...], logits: Tensor) -> Results:
        grads = tuple(each.to(output.dtype) for each, output in zip(upstreams, outputs, strict=True))
        return torch.autograd.grad(outputs, logits, grads, retain_graph=True)

    def truth() -> Results:
        exact = leaf(kept[:64].double())
        grads = tuple(each[:64].double() for each in upstreams)
        return torch.autograd.grad(naive_with_entropy(exact, targets[:64]), exact, grads)

    return Contest(
        {
            OURS: lambda: backward(outputs, logits),
            EAGER: lambda: backward(plain_outputs(), plain),
            COPY: copying(kept),
        },
        names=("gradient",),
        truth=truth,
        work=Work("bytes", 2 * kept.nbytes, COPY, 2 * kept.nbytes),  # logits read, their gradient written
        fresh=forward,
    )


def random_logits(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """In bf16, with targets and the gradient of the log-probs."""
    logits = torch.randn(sizes["tokens"], sizes["vocab"], device=device, dtype=torch.bfloat16).mul_(3)
    targets = torch.randint(sizes["vocab"], (sizes["tokens"],), device=device)
    return logits, targets, torch.randn(sizes["tokens"], device=device).bfloat16().float()


def naive(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def naive_with_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(logits, targets, reduction="none")


SIZES, QUICK = {"tokens": 512, "vocab": 49152}, {"tokens": 64, "vocab": 1000}
WORKLOADS = [
    Workload(
        "masked_logprobs",
        "{tokens} x {vocab} fp32, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.float32),
        (Mark("faster", 8, EAGER), Mark("faster", 4, COMPILED), Mark("faster", 6, "TRL"), Mark("within", 3, COPY)),
    ),
    Workload(
        "masked_logprobs",
        "{tokens} x {vocab} bf16, forward + backward",
        SIZES,
        QUICK,
        functools.partial(build, torch.bfloat16),
        (Mark("within", 1, "rlhf-fast, fp32"), Mark("faster", 8, EAGER)),
    ),
]
GPU_VOCABS = (32000, 50257, 128256, 151936)
PEERS = (COMPILED, "TRL", "Liger", "flash-attn", "quack")
GPU_WORKLOADS = [
    *(
        Workload(
            "masked_logprobs",
            title,
            {"tokens": 8192, "vocab": vocab},
            QUICK,
            builder,
            (Mark("share", share, COPY), Mark("faster", 5, EAGER)),
        )
        for title, builder, share in (
            ("{tokens} x {vocab} bf16, with entropy, forward", build_forward, 0.9),
            ("{tokens} x {vocab} bf16, with entropy, backward in place", build_backward, 0.85),
        )
        for vocab in GPU_VOCABS
    ),
    *(
        Workload(
            "masked_logprobs",
            "{tokens} x {vocab} bf16, forward + backward",
            {"tokens": 8192, "vocab": vocab},
            QUICK,
            build_gpu,
            (Mark("faster", 5, EAGER), *(Mark("faster", 1, name) for name in PEERS)),
        )
        for vocab in (GPU_VOCABS[0], GPU_VOCABS[-1])
    ),
    Workload(
        "masked_logprobs",
        "{tokens} x {vocab} bf16, with entropy, forward",
        {"tokens": 16, "vocab": 151936},
        QUICK,
        build_forward,
        (Mark("share", 0.6, COPY),),
    ),
]
