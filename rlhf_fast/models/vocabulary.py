"""The language-model head in the form of the linear ops. Softcap and scale are measured, not listed by architecture."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_fast.errors import UserError
from rlhf_fast.ops import lora_linear

FULL_PRECISION = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Vocabulary:
    """logits = scale * cap(hidden weight^T + bias); cap(x) = softcap * tanh(x / softcap), or x if softcap is None.

    ``weight`` (V, H), ``bias`` (V,) or None, ``scale`` above 0. ``lora``: one role's adapter on the head, (A (r, H),
    B (V, r), scale).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    scale: float = 1.0
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., V), in the dtype of the weight."""
        return self.scaled(self.raw(hidden))

    def raw(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's outputs before cap and scale: hidden weight^T + bias, plus the adapter's part."""
        return lora_linear(hidden, self.weight, self.lora, biases=self.bias)

    def scaled(self, raw: torch.Tensor) -> torch.Tensor:
        """Applies cap and scale to the result of ``raw``."""
        logits = capped(raw, self.softcap)
        return logits if self.scale == 1 else self.scale * logits

    def options(self, temperature: float = 1.0) -> dict[str, Any]:
        """The linear ops' arguments besides the weight, such that they compute log softmax(logits / temperature)."""
        return {
            "bias": self.bias,
            "softcap": self.softcap,
            "temperature": temperature / self.scale,
            "lora": self.lora,
        }


def measure(model: PreTrainedModel, raw: torch.Tensor, logits: torch.Tensor) -> tuple[float | None, float]:
    """The (softcap, scale) that map the head's outputs ``raw`` to the model's ``logits``, both (..., V).

    Softcaps come from the config. The scale is measured. If it is close to a number of the config or to the reciprocal
    of one, that number is used, because it has no measurement error. Raises UserError if nothing fits, or if the dtype
    is too coarse to measure the scale.
    """
    dtype = logits.dtype
    numbers = _numbers(model)
    tolerance, near = (1e-4, 1e-5) if dtype in FULL_PRECISION else (1e-2, 1e-2)
    raw, logits = raw.double(), logits.double()
    scales = [1.0, *(number for value in numbers.values() if value > 0 for number in (value, 1 / value))]
    for cap, measured, inside in _candidates(numbers, raw, logits):
        if not measured > 0:
            continue
        nearest = min(scales, key=lambda scale: abs(scale / measured - 1))
        known = abs(nearest / measured - 1) <= near
        scale = nearest if known else measured
        softcap = None if cap is None else cap / scale if inside else cap
        gap = (scale * capped(raw, softcap) - logits).abs().max()
        if gap <= tolerance * logits.abs().max():
            if not known and dtype not in FULL_PRECISION:
                raise UserError(
                    f"{type(model).__name__}: its logits are {measured:.4g} times its head's output; its config.json "
                    f"has no such number, and {dtype} is too coarse to measure it: use --dtype float32"
                )
            return softcap, scale
    raise UserError(
        f"{type(model).__name__}: its logits are not a linear head (scaled, with a softcap) on the last hidden states, "
        "so the fused losses would be wrong; this architecture is not supported"
    )


def capped(raw: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def _candidates(
    numbers: dict[str, float], raw: torch.Tensor, logits: torch.Tensor
) -> Iterator[tuple[float | None, float, bool]]:
    """(cap, scale, whether the scale is applied inside the cap). Candidates with a cap come first: if the logits are
    small, a cap has no visible effect, so a cap of the config is assumed to be used."""
    for name, cap in numbers.items():
        if "cap" in name and "logit" in name and cap > 0:
            low = logits.abs() < 0.9 * cap
            yield cap, _ratio(cap * torch.atanh(logits[low] / cap), raw[low]), True
            yield cap, _ratio(logits, capped(raw, cap)), False
    yield None, _ratio(logits, raw), False


def _ratio(values: torch.Tensor, of: torch.Tensor) -> float:
    """The least-squares r of r * ``of`` = ``values``; 1 if ``of`` is 0."""
    square = of.square().sum().item()
    return (values * of).sum().item() / square if square > 0 else 1.0


def _numbers(model: PreTrainedModel) -> dict[str, float]:
    """The numbers of the config by name, without those of the attention."""
    settings = model.config.get_text_config(decoder=True).to_dict()
    return {
        name: float(value)
        for name, value in settings.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "att" not in name
    }
