"""return_statistics of masked_logprobs and linear_logprobs, on every backend."""

from typing import Any

import pytest
import torch
from devices import seeded
from torch import Tensor

from rlhf_fast.ops import TokenStatistics, linear_logprobs, masked_logprobs

pytestmark = pytest.mark.usefixtures("backend")
FIELDS = TokenStatistics._fields
DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")


def plain(logits: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float | None = None) -> TokenStatistics:
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    x = logits / temperature
    log_p = x.log_softmax(-1)
    entropy = -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    target = x.gather(-1, targets[..., None])
    return TokenStatistics(
        log_p.gather(-1, targets[..., None]).squeeze(-1),
        entropy,
        x.logsumexp(-1),
        x.mean(-1),
        (2 * log_p).logsumexp(-1),
        (target >= x).all(-1),
    )


def case(shape: tuple[int, ...], vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, of which one in three rows has its target at the top, targets and mask."""
    generator = seeded(len(shape) + vocab)
    logits = (3 * torch.randn(*shape, vocab, generator=generator, dtype=torch.float64) + 2).to(dtype)
    targets = torch.randint(vocab, shape, generator=generator)
    targets = torch.where(targets % 3 == 0, logits.argmax(-1), targets)
    return logits, targets, torch.rand(shape, generator=generator) < 0.8


OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "scaled": {"temperature": 0.7, "softcap": 5.0}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("shape", "vocab"), [((2, 5), 1), ((2, 5), 7), ((130,), 17), ((2,), 16385)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values(shape: tuple[int, ...], vocab: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits, targets, mask = case(shape, vocab, dtype)
    truth = plain(logits.double(), targets, **options)
    ours = masked_logprobs(logits, targets, mask, return_statistics=True, **options)
    for name, mine, true in zip(FIELDS, ours, truth, strict=True):
        true = true.masked_fill(~mask, 0)
        assert mine.dtype == (torch.bool if name == "is_top1" else torch.promote_types(dtype, torch.float32))
        bound = 1e-12 if dtype == torch.float64 else 4e-6
        torch.testing.assert_close(
            mine.double(), true.double(), rtol=bound, atol=bound, msg=lambda m, n=name: f"{n} {m}"
        )
    logprobs, entropy = masked_logprobs(logits, targets, mask, return_entropy=True, **options)
    assert torch.equal(ours.logprobs, logprobs) and torch.equal(ours.entropy, entropy)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    logits, targets, mask = case((2, 2), 2051, dtype)
    weights = torch.randn(2, 2, generator=seeded(1), dtype=torch.float64)
    ours, truth = logits.requires_grad_(), logits.detach().double().requires_grad_()
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0}
    mine = masked_logprobs(ours, targets, mask, return_statistics=True, **options)
    assert [each.requires_grad for each in mine] == [each in DIFFERENTIABLE for each in FIELDS]
    (grad,) = torch.autograd.grad((getattr(mine, name) * weights).sum(), ours)
    (true,) = torch.autograd.grad((getattr(plain(truth, targets, **options), name) * weights * mask).sum(), truth)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(grad.double(), true, rtol=bound, atol=bound * float(true.abs().max()))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_from_hidden_states(name: str, trained: bool, dtype: torch.dtype) -> None:
    """Those of the logits, in value and gradient, by a head with a bias, frozen or trained."""
    generator = seeded(3)
    hidden, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in ((3, 5, 8), (67, 8), (67,))
    )
    targets, mask = torch.randint(67, (3, 5), generator=generator), torch.rand(3, 5, generator=generator) < 0.8
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0}
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_(), bias.requires_grad_()] if trained else [])]
    ours = linear_logprobs(hidden, weight, targets, mask, bias=bias, return_statistics=True, **options)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (hidden, weight, bias)]
    theirs = plain(exact[0] @ exact[1].T + exact[2], targets, **options)
    bound = 1e-11 if dtype == torch.float64 else 1e-5
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), true.masked_fill(~mask, 0).double(), rtol=bound, atol=bound)
    names = DIFFERENTIABLE if name == "all" else (name,)
    mine, true = (sum((getattr(each, name) * mask).sum() for name in names) for each in (ours, theirs))
    grads = torch.autograd.grad(mine, leaves)
    true_grads = torch.autograd.grad(true, exact[: len(leaves)])
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad.double(), true_grad, rtol=bound, atol=10 * bound)


def test_edges() -> None:
    """Ties, infinities, NaN, a masked row of NaN, and a target outside of the vocabulary that counts."""
    inf, nan = torch.inf, torch.nan
    rows = {
        "tie": ([1.0, 3.0, 3.0], 2),
        "target at -inf": ([1.0, -inf, 3.0], 1),
        "others at -inf": ([-inf, 2.0, -inf], 1),
        "one at -inf": ([-inf, 2.0, 4.0], 1),
        "+inf": ([inf, 2.0, 4.0], 1),
        "target at +inf": ([1.0, inf, 4.0], 1),
        "NaN": ([nan, 2.0, 4.0], 1),
        "only -inf": ([-inf, -inf, -inf], 1),
        "masked": ([nan, nan, nan], -100),
    }
    logits, targets = torch.tensor([row for row, _ in rows.values()]), torch.tensor([to for _, to in rows.values()])
    ours = masked_logprobs(logits, targets, return_statistics=True)
    found = {name: TokenStatistics(*(each[i].item() for each in ours)) for i, name in enumerate(rows)}
    assert [name for name, each in found.items() if each.is_top1] == ["tie", "others at -inf"]
    for name in ("+inf", "target at +inf", "NaN", "only -inf"):
        assert all(torch.tensor(found[name][:-1]).isnan()), name
    assert found["masked"] == (0,) * len(FIELDS)
    assert found["target at -inf"].mean_logit == found["others at -inf"].mean_logit == -inf
    assert found["one at -inf"].mean_logit == -inf
    assert found["others at -inf"][:3] == (0.0, 0.0, 2.0)
    assert found["others at -inf"].log_sum_squares == 0.0
    truth = torch.tensor([1.0, 3.0]).double()
    assert found["target at -inf"].logsumexp == pytest.approx(truth.logsumexp(0).item(), rel=1e-6)
    squares = torch.logsumexp(2 * truth.log_softmax(0), 0).item()
    assert found["target at -inf"].log_sum_squares == pytest.approx(squares, rel=1e-6)


def test_large_logits() -> None:
    """The statistics of a confident row far from 0 are as exact as float32 holds them."""
    logits = torch.randn(4, 300, generator=seeded(5)) + 1000
    logits[:, 7] += 30
    targets = torch.tensor([7, 8, 7, 9])
    ours = masked_logprobs(logits, targets, return_statistics=True)
    for mine, true in zip(ours, plain(logits.double(), targets), strict=True):
        torch.testing.assert_close(mine.double(), true.double(), rtol=1e-6, atol=1e-6)
