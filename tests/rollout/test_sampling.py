"""The draw of a token: its distribution, its log-prob, and the ends of the range."""

import math

import pytest
import torch

from rlhf_fast.rollout.sampling import BLOCK, sample

VOCABULARIES = [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5]


def logits_of(vocab: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)).repeat(rows, 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocab", [2, 7, 2 * BLOCK + 3])
def test_frequencies_follow_the_softmax(vocab: int, temperature: float) -> None:
    """Pearson's chi-square below its 99.9999% quantile (Wilson and Hilferty's approximation), over tokens that are
    expected five times or more and the rest together."""
    count = 200_000
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = logits_of(vocab, 1)
    expected = (logits[0].double() / temperature).softmax(dim=0) * count
    tokens, _ = sample(logits.repeat(count, 1), temperature, uniforms)
    seen = torch.bincount(tokens, minlength=vocab).double()
    often = expected >= 5
    seen = torch.cat([seen[often], seen[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]]).clamp(min=1e-9)
    chi_square = ((seen - expected).square() / expected)[expected > 1].sum().item()
    freedom = int((expected > 1).sum()) - 1
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_evenly_spaced_draws_cover_every_token_by_its_probability(vocab: int) -> None:
    count = 20_000
    logits = logits_of(vocab, count, seed=vocab)
    probabilities = logits[0].double().softmax(dim=0)
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = sample(logits, 1.0, uniforms)
    seen = torch.bincount(tokens, minlength=vocab).double() / count
    assert (seen - probabilities).abs().max() < 1.5 / count
    assert tokens.tolist() == sorted(tokens.tolist())
    torch.testing.assert_close(logprobs.double(), probabilities.log()[tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("place", [0, 5, BLOCK, BLOCK + 9])
def test_a_token_without_probability_is_never_drawn(place: int, uniform: float) -> None:
    logits = torch.full((1, BLOCK + 10), -torch.inf)
    logits[0, place] = 3.0
    tokens, logprobs = sample(logits, 0.7, torch.tensor([uniform], dtype=torch.float64))
    assert tokens.tolist() == [place] and logprobs.tolist() == [0.0]


def test_a_tiny_temperature_takes_the_largest_logit_and_nothing_overflows() -> None:
    logits = 1e4 * torch.randn(4, 600, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(dim=1)
    tokens, logprobs = sample(logits.clone(), 1e-30, torch.full((4,), 0.9, dtype=torch.float64))
    assert torch.equal(tokens, best) and logprobs.tolist() == [0.0] * 4


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_row_that_is_not_finite_tells_by_its_log_prob(wrong: float) -> None:
    logits = logits_of(300, 2)
    logits[1, 7] = wrong
    tokens, logprobs = sample(logits, 1.0, torch.tensor([0.3, 0.3], dtype=torch.float64))
    assert math.isfinite(logprobs[0]) and math.isnan(logprobs[1]) and 0 <= tokens.min() and tokens.max() < 300
