"""Shared by the benches of ops with an lm head: hidden states, the head, and its matrix products alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.bench.workload import Results, Run, Sizes, Work, leaf

SIZES = {"tokens": 1024, "hidden": 576, "vocab": 49152}
QUICK = {"tokens": 64, "hidden": 32, "vocab": 1000}
GPU_SIZES = {"tokens": 8192, "hidden": 4096, "vocab": 131072}
SEQUENCES = 4  # for losses that work on sequences
PRODUCTS = "its matrix products alone"


class Head(NamedTuple):
    hidden: Tensor  # (N, H), with a gradient
    weight: Tensor  # (V, H), frozen
    targets: Tensor  # (N,)
    upstream: (
        Tensor  # (N,), the gradient of the log-probs: 1, which makes it the negative gradient of a summed cross-entropy
    )


def random_head(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Head:
    tokens, features, vocab = sizes["tokens"], sizes["hidden"], sizes["vocab"]
    return Head(
        leaf(torch.randn(tokens, features, device=device).to(dtype)),
        (torch.randn(vocab, features, device=device) * 3 / features**0.5).to(dtype),
        torch.randint(vocab, (tokens,), device=device),
        torch.ones(tokens, device=device),
    )


def products(hidden: Tensor, weight: Tensor, *, trained: bool = False) -> Run:
    """logits and d hidden (and d weight if it is trained), into preallocated memory, with nothing in between."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight) if trained else None

    def run() -> Results:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(logits.T, hidden, out=grad_weight)
        return ()

    return run


def three_products(hidden: Tensor, ref_hidden: Tensor, weight: Tensor) -> Run:
    """``products`` of a frozen head, and the logits of the reference."""
    both, reference = products(hidden, weight), hidden.new_empty(hidden.shape[0], weight.shape[0])

    def run() -> Results:
        torch.mm(ref_hidden, weight.T, out=reference)
        return both()

    return run


def work(head: Head, *, tokens: int | None = None, count: int = 2) -> Work:
    """``count`` matrix products over ``tokens`` (all of them when None)."""
    flops = 2.0 * count * (len(head.hidden) if tokens is None else tokens) * head.weight.numel()
    return Work("flops", flops, PRODUCTS, flops)


def first_rows(tensors: Sequence[Tensor], rows: int = 64) -> list[Tensor]:
    """The first rows of each tensor; floating-point tensors in float64."""
    return [tensor[:rows].detach().double() if tensor.is_floating_point() else tensor[:rows] for tensor in tensors]
