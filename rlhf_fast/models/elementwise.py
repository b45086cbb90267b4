"""Replaces norms, gated activations and rotary embeddings of a transformers model by this project's kernels.

In transformers each takes about six passes over the hidden states, with float32 copies; here each takes one. There is
no list of supported modules. Each candidate is run on a few random rows, and replaced only if a kernel gives the same
numbers within rounding.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlhf_fast.base_weights import matrix
from rlhf_fast.models.recomputing import note_output
from rlhf_fast.ops import gated_activation, rms_norm, rotary_embedding

ROWS = 4  # random rows that a module is tried on
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
# Largest relative difference (of a row's norm) between the kernel's and the module's result: a few roundings.
NEAR = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@torch.no_grad()
def exchange(body: nn.Module) -> list[str]:
    """Replaces the forward of each norm and gated feed-forward layer that a kernel can compute; returns their names."""
    found = []
    for name, module in body.named_modules():
        if "forward" not in vars(module) and (forward := _norm(module) or _feed_forward(module)) is not None:
            module.forward = forward  # type: ignore[method-assign]
            found.append(name)
    return found


def _norm(module: Any) -> Callable[[Tensor], Tensor] | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not _plain(weight) or weight.dim() != 1 or not isinstance(eps, float) or _arguments(module) != 1:
        return None
    # a random weight: the module's own may be 1 everywhere, which would hide how it is applied
    rows, trial = _rows(weight.shape[0], like=weight), _rows(weight.shape[0], like=weight)[0, 1]
    expected = _tried(lambda: functional_call(module, {"weight": trial}, (rows,)))
    for offset in (0.0, 1.0):
        if _near(rms_norm(rows, trial, eps=eps, offset=offset), expected):

            def forward(hidden_states: Tensor, offset: float = offset) -> Tensor:
                given = hidden_states.detach()
                output = rms_norm(hidden_states, module.weight, eps=eps, offset=offset)
                return note_output(output, lambda: rms_norm(given, module.weight, eps=eps, offset=offset))

            return forward
    return None


def _feed_forward(module: Any) -> Callable[[Tensor], Tensor] | None:
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not isinstance(gate, nn.Linear) or gate.weight.is_meta or _arguments(module) != 1:
        return None
    rows = _rows(gate.in_features, like=matrix(gate))
    expected = _tried(lambda: module(rows))
    for activation in ACTIVATIONS:

        def forward(hidden_states: Tensor, activation: str = activation) -> Tensor:
            # called as modules, because lora_layers may have replaced their class
            gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
            product, given = gated_activation(gate, up, activation=activation), (gate.detach(), up.detach())
            return module.down_proj(note_output(product, lambda: gated_activation(*given, activation=activation)))

        if isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and _near(_tried(lambda: forward(rows)), expected):
            return forward
    return None


def _plain(weight: object) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta


def _arguments(module: nn.Module) -> int:
    return len(inspect.signature(module.forward).parameters)


def _rows(width: int, like: Tensor) -> Tensor:
    rows = torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(0))
    return rows.to(like.device, like.dtype)


def _tried(run: Callable[[], Any]) -> Any:
    """The result of ``run``, or None if it raises: then the module is not replaced."""
    try:
        return run()
    except Exception:
        return None


def _near(found: Any, expected: Any) -> bool:
    """Whether the rows are equal within a few roundings."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return False
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    gap = (found.double() - expected.double()).norm(dim=-1)
    return bool((gap <= NEAR[expected.dtype] * expected.double().norm(dim=-1)).all())


class Rotary:
    """Replaces apply_rotary_pos_emb in the Python modules that define the classes of ``body``."""

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
        """Inside, ``rotary_embedding`` computes rotary embeddings."""
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
    expected = _tried(lambda: own(q, k, cos, sin))
    ours = rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)
    return isinstance(expected, tuple) and len(expected) == 2 and all(map(_near, ours, expected))
