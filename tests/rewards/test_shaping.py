"""Hand-worked shaping: position of the score, the KL penalty, the missing-EOS rule, the controller, running moments."""

import math

import pytest
import torch

from rlhf_fast.rewards import KLController, RunningMoments, apply_missing_eos, token_rewards


def close(left: torch.Tensor, right: list[list[float]]) -> None:
    torch.testing.assert_close(left, torch.tensor(right), rtol=0, atol=1e-6)


# ---- token rewards -------------------------------------------------------------------------------------------------


def test_the_score_is_added_at_the_last_live_token_of_each_row() -> None:
    """A full row (length-limited), one that stopped early, one of one token, and one without any."""
    kl = torch.tensor([[1.0, 2.0, -4.0], [1.0, 2.0, 9.0], [3.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    rewards = token_rewards(kl, torch.tensor([10.0, 20.0, 30.0, 40.0]), mask, kl_coef=0.5)
    close(rewards, [[-0.5, -1.0, 12.0], [-0.5, 19.0, 0.0], [28.5, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_what_stands_outside_the_mask_is_never_read() -> None:
    kl = torch.tensor([[1.0, math.nan, math.inf]])
    mask = torch.tensor([[True, False, False]])
    close(token_rewards(kl, torch.tensor([2.0]), mask, kl_coef=0.1), [[1.9, 0.0, 0.0]])


def test_a_gap_in_the_mask_does_not_move_the_score() -> None:
    kl, mask = torch.ones(1, 4), torch.tensor([[True, False, True, False]])
    close(token_rewards(kl, torch.tensor([5.0]), mask, kl_coef=1.0), [[-1.0, 0.0, 4.0, 0.0]])


def test_rewards_sum_to_score_minus_beta_times_sequence_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    kl, scores = torch.randn(5, 7, generator=generator), torch.randn(5, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]
    total = token_rewards(kl, scores, mask, kl_coef=0.3).sum(dim=1)
    torch.testing.assert_close(total, scores - 0.3 * (kl * mask).sum(dim=1))


# ---- missing EOS ---------------------------------------------------------------------------------------------------


def test_a_response_without_a_stop_token_pays_the_penalty_or_gets_the_fixed_score() -> None:
    scores, stopped = torch.tensor([2.0, 3.0, -1.0]), torch.tensor([True, False, False])
    assert apply_missing_eos(scores, stopped, penalty=1.5, fixed_score=None).tolist() == [2.0, 1.5, -2.5]
    assert apply_missing_eos(scores, stopped, penalty=1.5, fixed_score=-1.0).tolist() == [2.0, -1.0, -1.0]
    assert apply_missing_eos(scores, stopped, penalty=1.5, fixed_score=0.0).tolist() == [2.0, 0.0, 0.0]
    assert apply_missing_eos(scores, stopped, penalty=0.0, fixed_score=None).tolist() == [2.0, 3.0, -1.0]
    assert scores.tolist() == [2.0, 3.0, -1.0]


# ---- the controller ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence_kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),
        (5.4, 0.1 * (1 - 0.1 * 64 / 1000)),
        (7.2, 0.1 * (1 + 0.2 * 64 / 1000)),  # the clip's edges, and beyond them
        (600.0, 0.1 * (1 + 0.2 * 64 / 1000)),
        (4.8, 0.1 * (1 - 0.2 * 64 / 1000)),
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
        (-50.0, 0.1 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_beta_follows_the_clipped_error(sequence_kl: float, expected: float) -> None:
    controller = KLController(kl_coef=0.1, target=6.0, horizon=1000.0)
    controller.update(sequence_kl, episodes=64)
    assert controller.kl_coef == pytest.approx(expected, rel=1e-12)


def test_beta_compounds_and_a_fixed_one_stays() -> None:
    controller, fixed = KLController(0.1, 6.0, 100.0), KLController(0.1, None, 100.0)
    for _ in range(3):
        controller.update(60.0, episodes=10)
        fixed.update(60.0, episodes=10)
    assert controller.kl_coef == pytest.approx(0.1 * 1.02**3, rel=1e-12)
    assert fixed.kl_coef == 0.1


# ---- running moments -----------------------------------------------------------------------------------------------


def test_moments_of_batches_are_those_of_all_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 1000 + 3 * torch.randn(101, generator=generator, dtype=torch.float64)
    moments = RunningMoments()
    for part in scores.split([1, 30, 7, 63]):
        moments.update(part)
    assert moments.count == 101
    assert moments.mean == pytest.approx(scores.mean().item(), rel=1e-12)
    assert moments.std == pytest.approx(scores.std().item(), rel=1e-9)


def test_moments_by_hand() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    assert (moments.mean, moments.std) == (2.0, pytest.approx(2**0.5))
    moments.update(torch.tensor([5.0]))
    assert (moments.mean, moments.std) == (3.0, 2.0)


def test_the_standard_deviation_is_1_until_two_scores_differ() -> None:
    moments = RunningMoments()
    assert moments.std == 1.0
    moments.update(torch.tensor([4.0]))
    assert moments.std == 1.0
    moments.update(torch.tensor([4.0, 4.0]))
    assert moments.std == 1.0
    moments.update(torch.tensor([5.0]))
    assert moments.std == pytest.approx(0.5)


def test_moments_go_on_from_what_was_kept() -> None:
    import dataclasses

    whole, first = RunningMoments(), RunningMoments()
    for part in ([1.0, 2.0], [4.0, 8.0]):
        whole.update(torch.tensor(part))
    first.update(torch.tensor([1.0, 2.0]))
    second = RunningMoments(**dataclasses.asdict(first))
    second.update(torch.tensor([4.0, 8.0]))
    assert second == whole
