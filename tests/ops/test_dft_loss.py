"""Dynamic fine-tuning."""

import math

import pytest
import torch

from rlhf_fast.ops import dft_loss


def test_by_hand() -> None:
    """p = 1/2 and 1/4: the loss is log 2 / 2 + log 4 / 4, the slope -p; an impossible label adds nothing."""
    logprobs = torch.tensor([[-math.log(2), -math.log(4)], [-math.inf, math.nan]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    loss = dft_loss(logprobs, mask)
    assert loss.item() == pytest.approx((math.log(2) / 2 + math.log(4) / 4) / 3)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert grad.flatten().tolist() == pytest.approx([-1 / 6, -1 / 12, 0, 0])
    by_sequence = dft_loss(logprobs[:1], aggregation="seq-mean-token-sum")
    assert by_sequence.item() == pytest.approx(math.log(2) / 2 + math.log(4) / 4)
    assert dft_loss(torch.tensor([math.nan])).isnan()
    with pytest.raises(ValueError, match="dft_loss: aggregation must be one of"):
        dft_loss(logprobs, aggregation="sum")
