"""The accuracy of every op of op_table.py on every backend, against float64 and against naive code."""

import math

import pytest
import torch
from op_table import OPS, Case, Op, V, make, outputs_and_grads

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
vocabulary_op = pytest.mark.parametrize("op", [op for op in OPS if op.has_vocabulary], ids=lambda op: op.name)
target_op = pytest.mark.parametrize("op", [op for op in OPS if op.has_targets], ids=lambda op: op.name)
pytestmark = pytest.mark.usefixtures("backend")

HALVES = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)


@every_op
@pytest.mark.parametrize("masked", [True, False])
def test_float64_is_the_plain_formula(op: Op, masked: bool) -> None:
    case = make(op, dtype=torch.float64)
    mask = case.mask if masked else None
    outputs, grads = outputs_and_grads(op.run, op, case, mask)
    truth, true_grads = outputs_and_grads(op.naive, op, case, mask)
    for ours, theirs in zip(outputs, truth, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    for name in op.grads:
        torch.testing.assert_close(grads[name], true_grads[name], rtol=1e-11, atol=1e-13)


@every_op
def test_gradcheck(op: Op) -> None:
    case = make(op, (2, 3), torch.float64)
    names = [name for name in op.grads if name not in op.constants]
    leaves = [case.x[name].requires_grad_() for name in names]

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = op.run(case.x | dict(zip(names, inputs, strict=True)), case.targets, case.mask)
        return tuple(output for output in outputs if output.requires_grad)

    if leaves:
        assert torch.autograd.gradcheck(call, leaves)
    elif not op.grads:
        constant = {name: tensor.requires_grad_() for name, tensor in case.x.items()}
        assert not any(output.requires_grad for output in op.run(constant, case.targets, case.mask))


@every_op
@every_dtype
def test_error_is_no_larger_than_the_naive_codes(op: Op, dtype: torch.dtype, backend: str) -> None:
    no_worse_than_naive(op, make(op, (6, 9), dtype), backend)


@vocabulary_op
@pytest.mark.parametrize("vocab", [1, 2, 17, 4099, 50257, 151936])
@every_dtype
def test_vocabularies(op: Op, vocab: int, dtype: torch.dtype, backend: str) -> None:
    """Vocabularies: shorter than a vector, with a partial last vector, of several blocks, and those of real models."""
    case = make(op, (1, 4), dtype, vocab=vocab)
    for name in {"old_logprobs", "ref_logprobs"} & case.x.keys():
        case.x[name] -= math.log(vocab)  # otherwise the ratios overflow
    no_worse_than_naive(op, case, backend)


def no_worse_than_naive(op: Op, case: Case, backend: str) -> None:
    """Outputs as exact as fp32 allows, in a half dtype too; gradients as exact as their own dtype allows.

    With a head, the gradient of the logits goes through matrix products: long sums in float32 and, but for the torch
    backend, bfloat16 factors, so that a result has up to three roundings behind it where naive code has more.
    """
    dtype = next(iter(case.x.values())).dtype
    exact = Case({name: tensor.double() for name, tensor in case.x.items()}, case.targets, case.mask)
    truth, true_grads = outputs_and_grads(op.naive, op, exact, exact.mask)
    naive, naive_grads = outputs_and_grads(op.naive, op, case, case.mask)
    ours, our_grads = outputs_and_grads(op.run, op, case, case.mask)

    for mine, theirs, true in zip(ours, naive, truth, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, rtol=2e-6, atol=2e-6)
        if dtype in HALVES:
            assert (mine - true).abs().max() <= (theirs - true).abs().nan_to_num(math.inf).max()
    for name in op.grads:
        mine, theirs, true = our_grads[name], naive_grads[name], true_grads[name]
        assert mine.dtype == dtype
        rounding = (true.to(dtype) - true).abs().max()  # what no result in this dtype can avoid
        margins = [1.01 * rounding + 2e-6 * true.abs().max()]
        if op.shared:
            margins.append((theirs - true).abs().nan_to_num(0.0).max())
        if op.shared and dtype == torch.bfloat16 and backend != "torch":
            margins.append(1.5 * torch.finfo(dtype).eps * true.abs().max())
        assert (mine - true).abs().max() <= max(margins) * (1 if dtype in HALVES else 4), name


@vocabulary_op
@every_dtype
def test_columns_at_minus_infinity_might_as_well_not_be_there(op: Op, dtype: torch.dtype) -> None:
    case = make(op, (3, 5), dtype, vocab=40)
    kept = torch.tensor([column for column in range(40) if column not in (0, 5, 16, 17, 39)])
    targets = case.targets % len(kept)
    case.targets = kept[targets]
    short = Case({name: tensor.double() for name, tensor in case.x.items()}, targets, case.mask)
    dims = {name: sizes.index(V) - len(sizes) for name, sizes in (op.data | op.shared).items() if V in sizes}
    for name, dim in dims.items():
        short.x[name] = short.x[name].index_select(dim, kept)
    for name in {"logits", "ref_logits", "bias"} & case.x.keys():
        removed = torch.full_like(case.x[name], -math.inf)
        case.x[name] = removed.index_copy(-1, kept, case.x[name].index_select(-1, kept))

    truth, true_grads = outputs_and_grads(op.naive, op, short, short.mask)
    ours, our_grads = outputs_and_grads(op.run, op, case, case.mask)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2e-6, atol=2e-6)
    for name in op.grads:
        mine, true = our_grads[name], true_grads[name]
        if name in dims:
            assert (mine.index_fill(dims[name], kept, 0) == 0).all()
            mine = mine.index_select(dims[name], kept)
        assert relative_error(mine, true) <= 1.5 * torch.finfo(dtype).eps + 1e-5, name


@vocabulary_op
@every_dtype
@pytest.mark.parametrize("offset", [9984.0, -9984.0])
def test_large_logits(op: Op, dtype: torch.dtype, offset: float, backend: str) -> None:
    """The inputs of a head are such that its logits are exact in fp32, which has 2^-10 left at 10^4."""
    case = make(op, (3, 5), dtype)
    for name in op.shared.keys() | op.data.keys() & {"hidden", "ref_hidden"}:
        case.x[name] = (4 * case.x[name]).round() / 4 if name == "weight" else (2 * case.x[name]).round() / 2
    for name in {"logits", "ref_logits", "bias"} & case.x.keys():
        case.x[name] = case.x[name] * 64 + offset if name != "bias" else torch.full_like(case.x[name], offset)
    no_worse_than_naive(op, case, backend)


@target_op
@every_dtype
def test_a_confident_token_keeps_its_relative_precision(op: Op, dtype: torch.dtype) -> None:
    """p(target) = 1 - 1e-8 (1 - 2e-3 in float16, whose gradients end there), where ``p - 1`` in fp32 has no digits."""
    case = make(op, (3, 5), dtype)
    case.targets.fill_(3)
    for name in {"logits", "ref_logits", "hidden", "ref_hidden", "bias"} & case.x.keys():
        case.x[name] *= 0.25
    favoured = "logits" if "logits" in case.x else "bias"
    case.x[favoured][..., 3] = 8.0 if dtype == torch.float16 else 20.0
    exact = Case({name: tensor.double() for name, tensor in case.x.items()}, case.targets, case.mask)
    truth, true_grads = outputs_and_grads(op.naive, op, exact, exact.mask)
    ours, our_grads = outputs_and_grads(op.run, op, case, case.mask)
    allowed = [1e-5 * true.abs() for true in truth]
    if op.name == "linear_policy_ref":
        allowed[3] += error_of_kl(exact.x) * case.mask
    for mine, true, error in zip(ours, truth, allowed, strict=True):
        assert ((mine - true).abs() <= error).all()
    limits = torch.finfo(dtype)
    for name in op.grads:
        rounding = limits.smallest_normal * limits.eps / 2  # of a subnormal number
        allowed_error = 1.5 * limits.eps + 1e-5 + rounding / true_grads[name].abs().max()
        assert relative_error(our_grads[name], true_grads[name]) <= allowed_error, name


def error_of_kl(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T): what float32 takes of the KL where the logit of token 3 is 20 in policy and reference.

    With d_j = log p_j - log r_j it is the sum of p_j (d_j - 1 + exp(-d_j)) over the other tokens, to first order. An
    error e in d_j moves it by p_j |1 - exp(-d_j)| e. In d_j are four numbers between 16 and 32, each rounded by up to
    2^-20: logit 3 of both, and the distance of logit j to it in both.
    """
    log_p, log_r = ((x[name] @ x["weight"].T + x["bias"]).log_softmax(-1) for name in ("hidden", "ref_hidden"))
    moved = log_p.exp() * (1 - (log_r - log_p).exp()).abs()
    moved[..., 3] = 0
    return 4 * 2**-20 * moved.sum(-1)


def relative_error(mine: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    return (mine - true).abs().max() / true.abs().max()
