import pytest
import torch

from rlhf_fast.ops import sample_op

pytestmark = pytest.mark.usefixtures("backend")


def test_by_hand() -> None:
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    y = sample_op(x, torch.tensor([1, 0, 1]), scale=2.0)
    y.backward(torch.tensor([1.0, 10.0, 100.0]))
    assert y.tolist() == [2.0, 0.0, 6.0]
    assert x.grad is not None and x.grad.tolist() == [2.0, 0.0, 200.0]


def test_gradcheck() -> None:
    x = torch.tensor([[-2.0, -0.5], [0.7, 3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sample_op(x, torch.tensor([[1, 1], [0, 1]]), scale=3.0), x)


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="sample_op: scale must be a finite number > 0; got 0.0"):
        sample_op(x, scale=0.0)
    with pytest.raises(ValueError, match=r"sample_op: mask must have shape \(2, 3\).*got \(2,\)"):
        sample_op(x, torch.ones(2))
    with pytest.raises(TypeError, match="sample_op: x must be float64.*torch.int64"):
        sample_op(x.long())
