"""Norms, gated activations and rotary embeddings of a transformers model by this project's kernels.

In transformers each is half a dozen passes over the hidden states, with copies in float32; here each is one. What a
module computes is learnt by trying it, not from a list of names: one that gives the same numbers, within rounding, is
exchanged, and any other is left as it is.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.ops import gated_activation, rms_norm, rotary_embedding

ROWS = 4  # of a trial
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
# How far a trial's rows may lie from the module's own, of their norm: a few roundings.
NEAR = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@torch.no_grad()
def exchange(body: nn.Module) -> list[str]:
    """Exchanges the forward of each norm and gated feed-forward layer that a kernel computes; returns their names.

    Their weights must be frozen in float: the exchanged forward reads them anew at every call.
    """
    found = []
    for name, module in body.named_modules():
        if "forward" not in vars(module) and (forward := _norm(module) or _feed_forward(module)) is not None:
            module.forward = forward  # type: ignore[method-assign]
            found.append(name)
    return found


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    plain = isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point() and not weight.is_meta
    if not plain or not isinstance(eps, float) or list(module.children()) or _arguments(module) != 1:
        return None
    for offset in (0.0, 1.0):

        def forward(hidden_states: Tensor, offset: float = offset) -> Tensor:
            return rms_norm(hidden_states, module.weight, eps=eps, offset=offset)

        if _same(module, forward, weight.shape[0], weight):
            return forward
    return None


def _feed_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    children = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj"} <= children.keys() or _arguments(module) != 1:
        return None
    gate = children["gate_proj"]
    weight = getattr(gate, "weight", None)
    if not isinstance(gate, nn.Linear) or not isinstance(weight, Tensor) or weight.is_meta:
        return None
    for activation in ACTIVATIONS:

        def forward(hidden_states: Tensor, activation: str = activation) -> Tensor:
            gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
            return module.down_proj(gated_activation(gate, up, activation=activation))

        if _same(module, forward, gate.in_features, weight):
            return forward
    return None


def _arguments(module: nn.Module) -> int:
    return len(inspect.signature(module.forward).parameters)


def _same(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int, like: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, ROWS, width, generator=generator).to(like.device, like.dtype)
    try:
        expected, found = module(rows), forward(rows)
    except Exception:  # of a module that takes something else, or computes in another way: it is left as it is
        return False
    return isinstance(expected, Tensor) and expected.shape == found.shape and _near(found, expected)


def _near(found: Tensor, expected: Tensor) -> bool:
    gap = (found.double() - expected.double()).norm(dim=-1)
    return found.dtype == expected.dtype and bool((gap <= NEAR[expected.dtype] * expected.double().norm(dim=-1)).all())


class Rotary:
    """The functions apply_rotary_pos_emb of the modules that ``body``'s classes were written in."""

    def __init__(self, body: nn.Module) -> None:
        sources = {type(module).__module__ for module in body.modules()}
        functions = {
            (source, vars(sys.modules[source])["apply_rotary_pos_emb"])
            for source in sources
            if "apply_rotary_pos_emb" in vars(sys.modules[source])
        }
        self._exchanged = [(sys.modules[source], own, _turning(own)) for source, own in functions if _turns_halves(own)]

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside, ``rotary_embedding`` computes them."""
        try:
            for module, _, ours in self._exchanged:
                module.apply_rotary_pos_emb = ours  # type: ignore[attr-defined]
            yield
        finally:
            for module, own, _ in self._exchanged:
                module.apply_rotary_pos_emb = own  # type: ignore[attr-defined]


def _turning(own: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> Any:
        if more or options or cos.dim() != 3:
            return own(q, k, cos, sin, *more, **options)
        return rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)

    return apply_rotary_pos_emb


@torch.no_grad()
def _turns_halves(own: Callable[..., Any]) -> bool:
    q, k = torch.randn(2, 1, 2, ROWS, 8, generator=torch.Generator().manual_seed(0)).unbind()
    cos, sin = torch.randn(2, 1, ROWS, 8, generator=torch.Generator().manual_seed(1)).unbind()
    try:
        expected = own(q, k, cos, sin)
    except Exception:  # of one that takes something else: it is left as it is
        return False
    ours = rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)
    return isinstance(expected, tuple) and len(expected) == 2 and all(map(_near, ours, expected))
