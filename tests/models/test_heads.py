"""The scalar head: its start, its dtype, its calibration."""

import torch

from rlhf_fast.models import ScoreHead


def test_the_head_starts_with_standard_deviation_one_over_root_of_width_plus_one() -> None:
    torch.manual_seed(0)
    weight = ScoreHead(99_999).weight
    assert weight.shape == (1, 99_999) and weight.dtype == torch.float32
    torch.testing.assert_close(weight.std() * 100_000**0.5, torch.tensor(1.0), rtol=0, atol=0.01)
    assert weight.mean().abs() < 5e-5


def test_scores_by_hand() -> None:
    head = ScoreHead(3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    hidden = torch.tensor([[[4.0, 1.0, 2.0], [0.0, 0.0, 0.0]]])
    assert head(hidden).tolist() == [[3.0, 0.0]]
    head.calibrate(1.0, 4.0)
    assert head(hidden).tolist() == [[0.5, -0.25]]
    assert head(hidden.bfloat16()).dtype == torch.float32
    assert set(head.state_dict()) == {"weight", "mean", "std"}


def test_calibrated_scores_have_mean_0_and_standard_deviation_1() -> None:
    head, hidden = ScoreHead(16), torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) + 3
    raw = head(hidden).detach()
    head.calibrate(raw.mean().item(), raw.std().item())
    torch.testing.assert_close(head(hidden).mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(head(hidden).std(), torch.tensor(1.0), rtol=0, atol=1e-5)


def test_a_refitted_head_gives_a_linear_function_of_its_scores() -> None:
    head, hidden = ScoreHead(16), torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    head.calibrate(1.5, 4.0)
    before = head(hidden).detach()
    head.refit(0.25, -3.0)
    torch.testing.assert_close(head(hidden).detach(), 0.25 * before - 3, rtol=0, atol=1e-6)
    head.refit(0.0, 2.0)
    assert head(hidden).tolist() == [2.0] * 9
