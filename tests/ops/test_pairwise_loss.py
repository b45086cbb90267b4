import math

import pytest
import torch
from devices import seeded

from rlhf_fast.ops.pairwise_loss import pairwise_loss

pytestmark = pytest.mark.usefixtures("backend")


def test_by_hand() -> None:
    # differences 1 and -2: -log sigmoid = log(1 + e^-1) = 0.313262 and log(1 + e^2) = 2.126928, mean 1.220095
    # d / d chosen = -sigmoid(-difference) / 2 = -0.268941 / 2 and -0.880797 / 2; d / d rejected is its negative
    chosen = torch.tensor([1.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0], requires_grad=True)
    loss = pairwise_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(1.220095, abs=1e-6)
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.1344707, -0.4403985]))
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_margin_by_hand() -> None:
    # margins equal to the differences leave sigmoid(0) = 1 / 2
    margin = torch.tensor([1.0, -2.0], requires_grad=True)
    chosen = torch.tensor([1.0, 0.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.tensor([0.0, 2.0]), margin)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad.tolist() == [-0.25, -0.25]
    assert margin.grad is None


def test_extreme_scores_keep_their_digits() -> None:
    chosen = torch.tensor([1e4, -1e4, 30.0], requires_grad=True)
    losses = [pairwise_loss(chosen[i : i + 1], torch.zeros(1)) for i in range(3)]
    assert [loss.item() for loss in losses] == [0.0, 1e4, pytest.approx(math.exp(-30), rel=1e-5)]
    sum(losses).backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([0.0, -1.0, -math.exp(-30)]), rtol=1e-5, atol=0)


def test_gradcheck() -> None:
    chosen, rejected, margin = torch.randn(3, 5, dtype=torch.float64, generator=seeded(0))
    inputs = (chosen.requires_grad_(), rejected.requires_grad_(), margin)
    assert torch.autograd.gradcheck(pairwise_loss, inputs[:2])
    assert torch.autograd.gradcheck(lambda a, b: pairwise_loss(a, b, margin), inputs[:2])


def test_no_pairs() -> None:
    empty = torch.empty(0, requires_grad=True)
    loss = pairwise_loss(empty, torch.empty(0), torch.empty(0))
    loss.backward()
    assert loss.item() == 0 and loss.dim() == 0 and empty.grad.shape == (0,)


def test_a_nan_score_is_not_hidden_and_stays_in_its_row() -> None:
    chosen = torch.tensor([1.0, torch.nan], requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(2))
    loss.backward()
    assert torch.isnan(loss) and torch.isnan(chosen.grad).tolist() == [False, True]


def test_strides_and_dtypes() -> None:
    scores = torch.randn(6, 2, generator=seeded(1)).half()
    expected = pairwise_loss(scores[:, 0].float().contiguous(), scores[:, 1].float().contiguous())
    got = pairwise_loss(scores[:, 0], scores[:, 1])
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert torch.equal(
        pairwise_loss(scores[0, :1].expand(6), scores[:, 1]), pairwise_loss(scores[0, :1].repeat(6), scores[:, 1])
    )
    assert pairwise_loss(scores[:, 0].double(), scores[:, 1]).dtype == torch.float64


def test_bad_arguments() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"chosen must have shape \(N,\).*got \(3, 1\)"):
        pairwise_loss(x[:, None], x[:, None])
    with pytest.raises(ValueError, match=r"rejected must have shape \(3,\).*got \(2,\)"):
        pairwise_loss(x, x[:2])
    with pytest.raises(ValueError, match=r"margin must have shape \(3,\).*got \(\)"):
        pairwise_loss(x, x, torch.tensor(0.5))
    with pytest.raises(TypeError, match="margin must be a torch.Tensor; got float"):
        pairwise_loss(x, x, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="chosen must be float64"):
        pairwise_loss(x.long(), x)
    with pytest.raises(ValueError, match="one device"):
        pairwise_loss(x, x.to("meta"))
