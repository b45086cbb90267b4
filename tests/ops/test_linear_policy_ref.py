"""linear_policy_ref: values worked by hand, and no gradient for the reference."""

import math
from typing import Any

import pytest
import torch
from devices import seeded
from torch.utils.flop_counter import FlopCounterMode

from rlhf_fast.ops import exact_kl, linear_logprobs, linear_policy_ref

pytestmark = pytest.mark.usefixtures("backend")


def test_by_hand() -> None:
    """Policy logits (0, 0), reference logits (0, log 3): p = (1/2, 1/2), r = (1/4, 3/4)."""
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    hidden, ref_hidden = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    result = linear_policy_ref(hidden, ref_hidden, weight, torch.tensor([1]))
    assert result.logprobs.item() == pytest.approx(-math.log(2))
    assert result.ref_logprobs.item() == pytest.approx(math.log(3 / 4))
    assert result.entropy.item() == pytest.approx(math.log(2))
    assert result.exact_kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("lead", [10.0, 16.0, 20.0])
def test_a_confident_policy_keeps_the_digits_of_its_gradient(lead: float, target: int) -> None:
    """Whether the confidence is in the target or in another column; an identity head makes states of logits."""
    states = torch.tensor([[lead, 0.0, 1.0, -0.5]], requires_grad=True)
    ref_states = torch.tensor([[lead - 1, 0.5, 0.3, -0.5]])
    result = linear_policy_ref(states, ref_states, torch.eye(4), torch.tensor([target]))
    (grad,) = torch.autograd.grad(result.exact_kl.sum(), states)
    exact = states.detach().double().requires_grad_()
    log_p, log_r = exact.log_softmax(-1), ref_states.double().log_softmax(-1)
    (truth,) = torch.autograd.grad((log_p.exp() * (log_p - log_r)).sum(), exact)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=0)


def random_inputs() -> tuple[torch.Tensor, ...]:
    generator = seeded(0)
    hidden, ref_hidden = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    return hidden, ref_hidden, weight, torch.randint(0, 7, (2, 3), generator=generator)


def test_is_the_four_ops_in_one() -> None:
    hidden, ref_hidden, weight, targets = random_inputs()
    temperature = torch.tensor([[0.5, 1.0, 2.0], [0.7, 1.0, 1.5]], dtype=torch.float64)
    options: dict[str, Any] = {"softcap": 2.0, "temperature": temperature, "vocab_size": 7}
    result = linear_policy_ref(hidden, ref_hidden, weight, targets, **options)
    logprobs, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True, **options)
    ref_logprobs = linear_logprobs(ref_hidden, weight, targets, **options)
    capped = [2 * torch.tanh(states @ weight[:7].T / 2) for states in (hidden, ref_hidden)]
    kl = exact_kl(*capped, temperature=temperature)
    torch.testing.assert_close(tuple(result), (logprobs, ref_logprobs, entropy, kl), rtol=1e-12, atol=1e-13)


def test_the_reference_is_a_constant() -> None:
    hidden, ref_hidden, weight, targets = random_inputs()
    ref_hidden.requires_grad_()
    result = linear_policy_ref(hidden, ref_hidden, weight, targets)
    assert not any(output.requires_grad for output in result)

    hidden.requires_grad_()
    result = linear_policy_ref(hidden, ref_hidden, weight, targets)
    assert not result.ref_logprobs.requires_grad
    torch.stack(result).sum().backward()
    assert hidden.grad is not None and ref_hidden.grad is None


def test_the_same_states_give_no_kl() -> None:
    hidden, _, weight, targets = random_inputs()
    result = linear_policy_ref(hidden, hidden.clone(), weight, targets)
    assert (result.exact_kl == 0).all()
    assert torch.equal(result.logprobs, result.ref_logprobs)


def test_masked_tokens_cost_nothing() -> None:
    """Two products forward, three with the backward's recomputation (two) and d hidden: 5 for a frozen head."""
    hidden, ref_hidden, weight, targets = random_inputs()
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    with FlopCounterMode(display=False) as counter:
        result = linear_policy_ref(hidden.requires_grad_(), ref_hidden, weight, targets, mask)
        (result.logprobs.sum() + result.exact_kl.sum()).backward()
    assert counter.get_total_flops() == 5 * 2 * (2 * 4 * 9)


def test_wrong_reference() -> None:
    hidden, ref_hidden, weight, targets = random_inputs()
    with pytest.raises(ValueError, match=r"ref_hidden must have shape \(2, 3, 4\)"):
        linear_policy_ref(hidden, ref_hidden[:1], weight, targets)
    with pytest.raises(TypeError, match="ref_hidden must be torch.float64 like hidden; got torch.float32"):
        linear_policy_ref(hidden, ref_hidden.float(), weight, targets)
