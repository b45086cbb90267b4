"""Logit scales and softcaps: measured exactly, or refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import settings, tiny_model
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, Vocabulary
from rlhf_fast.models.vocabulary import measure
from rlhf_fast.ops import linear_logprobs

RAW = 4 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))


def model(**numbers: Any) -> Any:
    return SimpleNamespace(config=LlamaConfig(**numbers))


def cap(x: torch.Tensor, limit: float) -> torch.Tensor:
    return limit * torch.tanh(x / limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("numbers", "logits", "expected"),
    [
        ({}, RAW, (None, 1.0)),
        ({"logits_scaling": 8.0}, RAW / 8, (None, 1 / 8)),
        ({"logits_scaling": 8.0}, RAW, (None, 1.0)),  # a number that is not used
        ({"logit_scale": 0.0625}, RAW * 0.0625, (None, 0.0625)),
        ({"any_name": 3}, RAW * 3, (None, 3.0)),
        ({"final_logit_softcapping": 5.0}, cap(RAW, 5.0), (5.0, 1.0)),
        ({"final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0}, RAW, (None, 1.0)),
        ({"logits_soft_cap": 5.0, "scale": 0.25}, cap(RAW * 0.25, 5.0), (20.0, 0.25)),
        ({"logits_soft_cap": 5.0, "scale": 0.25}, cap(RAW, 5.0) * 0.25, (5.0, 0.25)),
        ({"final_logit_softcapping": 1e4}, RAW, (1e4, 1.0)),  # too high to have an effect, but set by the model
    ],
)
def test_scale_and_softcap_are_found_in_whatever_order(
    dtype: torch.dtype, numbers: dict[str, float], logits: torch.Tensor, expected: tuple[float | None, float]
) -> None:
    assert measure(model(**numbers), RAW, logits.to(dtype)) == pytest.approx(expected)


def test_a_scale_that_the_config_does_not_name_is_measured_in_full_precision_alone() -> None:
    softcap, scale = measure(model(), RAW, RAW * 0.7123)
    assert softcap is None and scale == pytest.approx(0.7123, rel=1e-6)
    with pytest.raises(UserError, match=r"0\.712\d* times .* use --dtype float32"):
        measure(model(), RAW, (RAW * 0.7123).bfloat16())


@pytest.mark.parametrize("logits", [RAW + 1.0, RAW.abs(), -RAW, cap(RAW, 3.0), RAW * torch.linspace(1, 2, 50)])
def test_logits_that_are_no_scaled_linear_head_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(UserError, match="not a linear head") as error:
        measure(model(), RAW, logits)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [0.125, 3.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_ops_compute_the_log_probs_of_the_scaled_logits(scale: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 8), Vocabulary(torch.randn(11, 8), torch.randn(11), softcap, scale)
    raw = hidden @ head.weight.T + head.bias
    logits = scale * (raw if softcap is None else cap(raw, softcap))
    targets = torch.tensor([0, 3, 7, 10])
    found = linear_logprobs(hidden, head.weight, targets, **head.options(temperature=0.6))
    expected = (logits.double() / 0.6).log_softmax(dim=-1)[range(4), targets]
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "changes", "scale"),
    [
        ("granite", {"logits_scaling": 8.0}, 1 / 8),
        ("granite", {"logits_scaling": 1.0}, 1.0),
        ("cohere", {"logit_scale": 0.0625}, 0.0625),
        ("cohere2", {"logit_scale": 0.25}, 0.25),
    ],
)
def test_models_with_a_scale_are_taken(
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    architecture: str,
    changes: dict[str, float],
    scale: float,
) -> None:
    base = SharedBase(tiny_model(architecture, **changes).to(dtype), tokenizer, settings())
    assert (base.vocabulary.scale, base.vocabulary.softcap) == (scale, None)
