import math

import pytest
import torch
from devices import seeded

from rlhf_fast.ops.dpo_loss import dpo_loss

pytestmark = pytest.mark.usefixtures("backend")

# beta = 1/2; the first pair's log ratios are 1 and -1, h = 2; the second's are -1 and 0, h = -1
POLICY_CHOSEN, REF_CHOSEN = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0])
POLICY_REJECTED, REF_REJECTED = torch.tensor([-3.0, -4.0]), torch.tensor([-2.0, -4.0])
PAIRS = (POLICY_CHOSEN, POLICY_REJECTED, REF_CHOSEN, REF_REJECTED)


@pytest.mark.parametrize(
    ("arguments", "loss", "slopes"),
    [
        # beta h = 1 and -1/2: log(1 + e^-1) = 0.3132617, log(1 + e^0.5) = 0.9740770
        # slope in h = -beta sigmoid(-beta h) = -0.2689414 / 2, -0.6224593 / 2
        ({}, (0.3132617 + 0.9740770) / 2, (-0.1344707, -0.3112297)),
        # 0.9 of the above + 0.1 * log(1 + e^1) = 1.3132617, log(1 + e^-0.5) = 0.4740770
        # slope: 0.9 of the above + 0.1 * beta sigmoid(beta h) = 0.7310586 / 2, 0.3775407 / 2
        (
            {"label_smoothing": 0.1},
            (0.9 * 0.3132617 + 0.1 * 1.3132617 + 0.9 * 0.9740770 + 0.1 * 0.4740770) / 2,
            (-0.9 * 0.1344707 + 0.1 * 0.3655293, -0.9 * 0.3112297 + 0.1 * 0.1887703),
        ),
        # 1 / (2 beta) = 1: (2 - 1)^2 = 1, (-1 - 1)^2 = 4; slope 2 (h - 1) = 2, -4
        ({"loss_type": "ipo"}, (1 + 4) / 2, (2.0, -4.0)),
        # 1 - 1 = 0, 1 + 1/2 = 1.5; slope 0 at the corner, -beta
        ({"loss_type": "hinge"}, (0 + 1.5) / 2, (0.0, -0.5)),
        # (0.9 * 0.3132617 - 0.1 * 1.3132617) / 0.8 = 0.1882617, (0.9 * 0.9740770 - 0.1 * 0.4740770) / 0.8 = 1.0365770
        # slope: (-0.9 * 0.1344707 - 0.1 * 0.3655293) / 0.8, (-0.9 * 0.3112297 - 0.1 * 0.1887703) / 0.8
        (
            {"loss_type": "robust", "label_smoothing": 0.1},
            (0.1882617 + 1.0365770) / 2,
            ((-0.9 * 0.1344707 - 0.1 * 0.3655293) / 0.8, (-0.9 * 0.3112297 - 0.1 * 0.1887703) / 0.8),
        ),
    ],
)
def test_by_hand(arguments: dict, loss: float, slopes: tuple[float, float]) -> None:
    chosen, rejected = POLICY_CHOSEN.clone().requires_grad_(), POLICY_REJECTED.clone().requires_grad_()
    result = dpo_loss(chosen, rejected, REF_CHOSEN, REF_REJECTED, beta=0.5, **arguments)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(chosen.grad, torch.tensor(slopes) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rejected.grad, -chosen.grad)
    assert result.chosen_rewards.tolist() == [0.5, -0.5]
    assert result.rejected_rewards.tolist() == [-0.5, 0.0]
    assert result.accuracy.item() == 0.5


# Of one pair, in float64: the log ratios of chosen and rejected, and beta, to the loss, as written in the papers.
FORMULAS = {
    "sigmoid": lambda c, r, b: softplus(-b * (c - r)),
    "ipo": lambda c, r, b: (c - r - 1 / (2 * b)) ** 2,
    "hinge": lambda c, r, b: max(0.0, 1 - b * (c - r)),
    "robust": lambda c, r, b: (0.9 * softplus(-b * (c - r)) - 0.1 * softplus(b * (c - r))) / 0.8,
    "exo_pair": lambda c, r, b: sum(
        p * math.log(p / q) for p, q in ((sigmoid(b * (c - r)), 0.9), (sigmoid(b * (r - c)), 0.1))
    ),
    "apo_zero": lambda c, r, b: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, b: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "nca_pair": lambda c, r, b: softplus(-b * c) + 0.5 * softplus(b * c) + 0.5 * softplus(b * r),
    "bco_pair": lambda c, r, b: softplus(-b * c) + softplus(b * r),
    "sppo_hard": lambda c, r, b: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "discopop": lambda c, r, b: (
        (1 - sigmoid(b * (c - r) / 0.05)) * softplus(-b * (c - r))
        + sigmoid(b * (c - r) / 0.05) * math.exp(-b * (c - r))
    ),
}
SMOOTHING = {"robust": 0.1, "exo_pair": 0.1}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("loss_type", FORMULAS)
def test_every_loss_is_its_formula(loss_type: str) -> None:
    pairs = 3 * torch.randn(4, 6, dtype=torch.float64, generator=seeded(0))
    beta, smoothing = 0.7, SMOOTHING.get(loss_type, 0.0)
    options = {"beta": beta, "label_smoothing": smoothing, "loss_type": loss_type}
    expected = [FORMULAS[loss_type](*ratios, beta) for ratios in (pairs[:2] - pairs[2:]).T.tolist()]
    losses = dpo_loss(*pairs, **options, reduction="none").loss
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)
    assert dpo_loss(*pairs, **options).loss.item() == pytest.approx(sum(expected) / 6, rel=1e-9)
    chosen, rejected = (each.requires_grad_() for each in pairs[:2].clone())
    assert torch.autograd.gradcheck(
        lambda *policy: dpo_loss(*policy, *pairs[2:], **options, reduction="none").loss, (chosen, rejected)
    )


# f' of a ratio t, in the words of the f-DPO paper and, for alpha, of TRL
DIVERGENCES = {
    "reverse_kl": lambda t: math.log(t) + 1,
    "forward_kl": lambda t: -1 / t,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t ** (0.3 - 1) - 1) / (0.3 - 1),
}


@pytest.mark.parametrize("f_divergence_type", DIVERGENCES)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust", "exo_pair", "discopop"])
def test_divergences(f_divergence_type: str, loss_type: str) -> None:
    """A loss of c - r is given f'(t) in place of log t, and the rewards stay what they are."""
    pairs = 0.5 * torch.randn(4, 6, dtype=torch.float64, generator=seeded(0))
    slope, beta, smoothing = DIVERGENCES[f_divergence_type], 0.7, SMOOTHING.get(loss_type, 0.0)
    options = {
        "beta": beta, "loss_type": loss_type, "label_smoothing": smoothing, "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": 0.3,
    }  # fmt: skip
    ratios = (pairs[:2] - pairs[2:]).exp().T.tolist()
    expected = [FORMULAS[loss_type](slope(t), slope(u), beta) for t, u in ratios]
    result = dpo_loss(*pairs, **options, reduction="none")
    assert result.loss.tolist() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(result.chosen_rewards, beta * (pairs[0] - pairs[2]))
    chosen, rejected = (each.requires_grad_() for each in pairs[:2].clone())
    assert torch.autograd.gradcheck(
        lambda *policy: dpo_loss(*policy, *pairs[2:], **options, reduction="none").loss, (chosen, rejected)
    )


def test_the_ends_of_alpha() -> None:
    pairs = torch.randn(4, 6, generator=seeded(0))
    for alpha, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        own = dpo_loss(*pairs, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
        assert torch.equal(own.loss, dpo_loss(*pairs, f_divergence_type=name).loss)


@pytest.mark.parametrize("options", [{"loss_type": "discopop"}, *({"f_divergence_type": name} for name in DIVERGENCES)])
def test_far_log_ratios_are_finite(options: dict) -> None:
    """Where e^-d or a power of t overflows float32."""
    policy = torch.tensor([-400.0, 400.0], requires_grad=True)
    result = dpo_loss(policy, -policy.detach(), torch.zeros(2), torch.zeros(2), beta=1.0, **options)
    (grad,) = torch.autograd.grad(result.loss, policy)
    assert result.loss.isfinite() and grad.isfinite().all()


def test_without_a_reference_and_with_a_margin_it_is_simpo() -> None:
    """-log sigmoid(beta (chosen - rejected) - gamma), of mean log-probs."""
    chosen, rejected = torch.tensor([-0.5, -1.0]), torch.tensor([-1.5, -0.5])
    expected = [softplus(-(2 * 1.0 - 0.3)), softplus(-(2 * -0.5 - 0.3))]
    for margin in (0.3, torch.full((2,), 0.3)):
        result = dpo_loss(chosen, rejected, None, None, beta=2.0, margin=margin, reduction="none")
        assert result.loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert result.chosen_rewards.tolist() == [-1.0, -2.0]


def test_beta_defaults_to_a_tenth() -> None:
    assert torch.equal(dpo_loss(*PAIRS).loss, dpo_loss(*PAIRS, beta=0.1).loss)
    torch.testing.assert_close(dpo_loss(*PAIRS).chosen_rewards, torch.tensor([0.1, -0.1]))


def test_a_tie_is_not_counted_as_accurate() -> None:
    same = torch.zeros(3)
    assert dpo_loss(same, same, same, same).accuracy.item() == 0


@pytest.mark.parametrize("arguments", [{}, {"label_smoothing": 0.2}, {"loss_type": "ipo"}, {"loss_type": "hinge"}])
def test_gradcheck(arguments: dict) -> None:
    generator = seeded(0)
    chosen, rejected, *refs = torch.randn(4, 5, dtype=torch.float64, generator=generator).unbind()
    assert torch.autograd.gradcheck(
        lambda a, b: dpo_loss(a, b, *refs, beta=0.7, **arguments).loss,
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )


@pytest.mark.parametrize("loss_type", FORMULAS)
def test_no_pairs(loss_type: str) -> None:
    empty = torch.empty(0, requires_grad=True)
    smoothing = SMOOTHING.get(loss_type, 0.0)
    result = dpo_loss(empty, empty, empty, empty, loss_type=loss_type, label_smoothing=smoothing)
    result.loss.backward()
    assert result.loss.item() == 0 and result.accuracy.item() == 0
    assert result.chosen_rewards.shape == result.rejected_rewards.shape == empty.grad.shape == (0,)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_a_nan_is_not_hidden_and_stays_in_its_row(loss_type: str) -> None:
    chosen = torch.tensor([-1.0, torch.nan], requires_grad=True)
    result = dpo_loss(chosen, *PAIRS[1:], loss_type=loss_type)
    result.loss.backward()
    assert torch.isnan(result.loss) and torch.isfinite(chosen.grad[0])
    assert torch.isnan(result.chosen_rewards).tolist() == [False, True]


def test_extreme_log_ratios_are_finite() -> None:
    for sign in (1.0, -1.0):
        chosen = torch.tensor([sign * 1e5], requires_grad=True)
        result = dpo_loss(chosen, torch.zeros(1), torch.zeros(1), torch.zeros(1), label_smoothing=0.1)
        result.loss.backward()
        # beta h = +-1e4: the wrong label costs 1e4
        assert result.loss.item() == pytest.approx(1e4 * (0.1 if sign > 0 else 0.9))
        assert torch.isfinite(chosen.grad).all()


def test_gradients_go_to_the_policy_alone() -> None:
    tensors = [tensor.clone().requires_grad_() for tensor in PAIRS]
    result = dpo_loss(*tensors)
    result.loss.backward()
    assert [tensor.grad is None for tensor in tensors] == [False, False, True, True]
    assert [tensor.requires_grad for tensor in result] == [True, False, False, False]


def test_strides_and_dtypes() -> None:
    table = torch.randn(6, 4, generator=seeded(1)).bfloat16()
    expected = dpo_loss(*(column.float().contiguous() for column in table.unbind(1)))
    got = dpo_loss(*table.unbind(1))
    for ours, wanted in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, wanted)
    expanded = dpo_loss(*table.unbind(1)[:3], table[0, :1].expand(6))
    assert torch.equal(expanded.loss, dpo_loss(*table.unbind(1)[:3], table[0, :1].repeat(6)).loss)
    assert dpo_loss(*table.double().unbind(1)).loss.dtype == torch.float64


def test_bad_arguments() -> None:
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="beta must be a finite number > 0"):
            dpo_loss(*PAIRS, beta=beta)
    with pytest.raises(ValueError, match="loss_type must be one of sigmoid, ipo, hinge, .*; got 'kto'"):
        dpo_loss(*PAIRS, loss_type="kto")
    for label_smoothing in (-0.1, 0.5, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0.5\)"):
            dpo_loss(*PAIRS, label_smoothing=label_smoothing)
    with pytest.raises(ValueError, match="label_smoothing is defined for loss_type sigmoid, .*; got 'ipo'"):
        dpo_loss(*PAIRS, loss_type="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match="'exo_pair' needs label_smoothing > 0"):
        dpo_loss(*PAIRS, loss_type="exo_pair")
    with pytest.raises(ValueError, match="margin is defined for loss_type sigmoid, .*; got 'apo_zero'"):
        dpo_loss(*PAIRS, loss_type="apo_zero", margin=1.0)
    with pytest.raises(ValueError, match="f_divergence_type must be one of reverse_kl, .*; got 'kl'"):
        dpo_loss(*PAIRS, f_divergence_type="kl")
    with pytest.raises(ValueError, match="f_divergence_type 'forward_kl' is defined for .*; got 'apo_down'"):
        dpo_loss(*PAIRS, loss_type="apo_down", f_divergence_type="forward_kl")
    with pytest.raises(ValueError, match=r"f_alpha_divergence_coef must be in \[0, 2\]; got 3"):
        dpo_loss(*PAIRS, f_alpha_divergence_coef=3)
    with pytest.raises(ValueError, match="discopop_tau must be a finite number > 0; got 0"):
        dpo_loss(*PAIRS, loss_type="discopop", discopop_tau=0)
    with pytest.raises(ValueError, match="both given or both None"):
        dpo_loss(*PAIRS[:3], None)
    with pytest.raises(TypeError, match="margin must be a torch.Tensor; got list"):
        dpo_loss(*PAIRS, margin=[1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"policy_chosen must have shape \(N,\).*got \(2, 1\)"):
        dpo_loss(*(tensor[:, None] for tensor in PAIRS))
    with pytest.raises(ValueError, match=r"ref_rejected must have shape \(2,\).*got \(1,\)"):
        dpo_loss(*PAIRS[:3], REF_REJECTED[:1])
    with pytest.raises(TypeError, match="ref_chosen must be float64"):
        dpo_loss(*PAIRS[:2], REF_CHOSEN.long(), REF_REJECTED)
    with pytest.raises(ValueError, match="one device"):
        dpo_loss(*PAIRS[:3], REF_REJECTED.to("meta"))
