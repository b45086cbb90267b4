"""lora_linear: a frozen layer under an adapter in float32, layers that read the same input, and rows of two roles."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast import lora_linear
from rlhf_fast.bench import peers
from rlhf_fast.bench.heads import PRODUCTS
from rlhf_fast.bench.workload import EAGER, OURS, Contest, Mark, Results, Sizes, Work, Workload, leaf

SCALE = 2.0
Lora = tuple[Tensor, Tensor, float]
Call = Callable[[Tensor, list[Tensor], list[Lora]], list[Tensor]]


def build(dtype: torch.dtype, layers: tuple[str, ...], sizes: Sizes, device: torch.device, roles: int = 1) -> Contest:
    """``layers`` names the sizes of the outputs; the rows are shared out evenly among the roles."""
    tokens, features, rank = sizes["tokens"], sizes["hidden"], sizes["rank"]
    outputs = [sizes[name] for name in layers]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device) / shape[-1] ** 0.5

    hidden = leaf(random(tokens, features).to(dtype))
    weights = [random(size, features).to(dtype) for size in outputs]
    adapters: list[list[Lora]] = [
        [(leaf(random(rank, features)), leaf(random(size, rank)), SCALE) for size in outputs] for _ in range(roles)
    ]
    upstream = [random(tokens, size).to(dtype) for size in outputs]
    rows = [part.shape[0] for part in torch.empty(tokens).chunk(roles)]

    def results(call: Call, hidden: Tensor, weights: list[Tensor], adapters: list[list[Lora]]) -> Results:
        """Outputs, and the gradients of hidden and of every A and B."""
        if roles == 1 or call is ours:
            parts = [call(hidden, weights, adapters[0])]
        else:
            parts = [call(part, weights, each) for part, each in zip(hidden.split(rows), adapters, strict=True)]
        made = [torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)]
        leaves = [hidden, *(tensor for loras in adapters for lora in loras for tensor in lora[:2])]
        grads = torch.autograd.grad(
            made, leaves, [grad.to(output.dtype) for grad, output in zip(upstream, made, strict=True)]
        )
        return *(output.detach() for output in made), *grads

    def ours(hidden: Tensor, weights: list[Tensor], loras: list[Lora]) -> list[Tensor]:
        if roles == 1:
            return list(lora_linear(hidden, weights, loras))
        return list(lora_linear(hidden, weights, adapters, rows=rows))

    def truth() -> Results:
        exact = [[(leaf(down.double()), leaf(up.double()), scale) for down, up, scale in each] for each in adapters]
        return results(naive, leaf(hidden.double()), [weight.double() for weight in weights], exact)

    def products() -> Results:
        for weight, grad in zip(weights, upstream, strict=True):
            hidden.detach() @ weight.T, grad @ weight
        return ()

    flops = 4.0 * tokens * features * sum(outputs)
    parts = [f"{what} {layer}" for layer in layers for what in ("grad A", "grad B")] * roles
    return Contest(
        {
            OURS: lambda: results(ours, hidden, weights, adapters),
            EAGER: lambda: results(naive, hidden, weights, adapters),
            "PEFT": lambda: results(peers.peft_linear, hidden, weights, adapters),
            PRODUCTS: products,
        },
        names=(*layers, "grad hidden", *(f"{part} {number}" for number, part in enumerate(parts))),
        truth=truth,
        work=Work("flops", flops, PRODUCTS, flops),
    )


def naive(hidden: Tensor, weights: list[Tensor], loras: list[Lora]) -> list[Tensor]:
    return [
        hidden @ weight.T + scale * (hidden @ down.to(hidden.dtype).T) @ up.to(hidden.dtype).T
        for weight, (down, up, scale) in zip(weights, loras, strict=True)
    ]


SMOLLM = {"tokens": 512, "hidden": 576, "q": 576, "k": 192, "v": 192, "gate": 1536, "up": 1536, "rank": 16}
QUICK = {"tokens": 40, "hidden": 32, "q": 32, "k": 16, "v": 16, "gate": 48, "up": 48, "rank": 8}
LLAMA = {"tokens": 8192, "hidden": 4096, "q": 4096, "k": 1024, "v": 1024, "gate": 14336, "up": 14336, "rank": 16}
BF16, FP32 = torch.bfloat16, torch.float32
LAYER = "{tokens} x {hidden} x {gate} r={rank} "
QKV = "{tokens} x {hidden} x ({q}, {k}, {v}) r={rank} "
GATE_UP = "{tokens} x {hidden} x ({gate}, {up}) r={rank} "


def listed(
    title: str, sizes: Sizes, dtype: torch.dtype, layers: tuple[str, ...], *marks: Mark, roles: int = 1
) -> Workload:
    name = "bf16" if dtype == BF16 else "fp32"
    return Workload(
        "lora_linear",
        f"{title}{name}{', two roles' if roles == 2 else ''}, forward + backward",
        sizes,
        QUICK,
        functools.partial(build, dtype, layers, roles=roles),
        marks,
    )


WORKLOADS = [
    listed(LAYER, SMOLLM, BF16, ("gate",), Mark("faster", 2, "PEFT")),
    listed(LAYER, SMOLLM, FP32, ("gate",), Mark("faster", 1.5, "PEFT")),
    listed(QKV, SMOLLM, BF16, ("q", "k", "v")),
    listed(QKV, SMOLLM, FP32, ("q", "k", "v")),
    listed(GATE_UP, SMOLLM, BF16, ("gate", "up")),
    listed(GATE_UP, SMOLLM, FP32, ("gate", "up")),
    listed(GATE_UP, SMOLLM, BF16, ("gate", "up"), roles=2),
    listed(GATE_UP, SMOLLM, FP32, ("gate", "up"), roles=2),
]
GPU_WORKLOADS = [
    listed(QKV, LLAMA, BF16, ("q", "k", "v")),
    listed(GATE_UP, LLAMA, BF16, ("gate", "up")),
    listed(GATE_UP, LLAMA, BF16, ("gate", "up"), roles=2),
]
