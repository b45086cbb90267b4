"""Calls of the public ops that together launch every Triton kernel, in each of the forms that compile to other code.

Rows and tokens are few, because nothing is launched: a size matters where it picks another kernel, and where Triton
may or may not take it for a multiple of 16.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import _sweep, use_backend
from rlhf_fast.ops._dispatch import ENGINES
from rlhf_fast.ops._triton import Triton
from rlhf_fast.ops.masked_whiten import Moments, _moments

VOCAB = 32768  # two segments
ODD = 1001  # rows that begin at any address
ROWS, HIDDEN = 16, 16


class Call(NamedTuple):
    forward: Callable[[], Any]
    wide: bool = True  # whether 16-byte loads and stores are to be expected

    def run(self) -> None:
        """Forward and backward."""
        outputs = self.forward()
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        differentiable = [output.sum() for output in outputs if output.requires_grad]
        if differentiable:
            torch.stack(differentiable).sum().backward()


def calls() -> Iterator[Call]:
    for of_op in (masked_logprobs, exact_kl, linear_ops, token_kl, gae, whitening, clipped_losses, layers):
        yield from of_op()


class OnTheCpu(Triton):
    def why_not(self, device: torch.device) -> str | None:
        return None


@contextlib.contextmanager
def triton_forced() -> Iterator[None]:
    """Inside, CPU tensors go to Triton's kernels, and the lm head's matrix products are left out."""
    ENGINES["cpu"]["triton"] = OnTheCpu()
    assert hasattr(_sweep, "product_dtype") and hasattr(_sweep, "logits_product")
    _sweep.product_dtype = lambda hidden: hidden.dtype  # as on a GPU
    _sweep.logits_product = lambda hidden, weight, out: None
    with use_backend("triton"):
        yield


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def mask(*shape: int) -> Tensor:
    return torch.arange(shape[-1]).expand(shape) % 2 == 0


def masked_logprobs() -> Iterator[Call]:
    for dtype, vocab, options in (
        (torch.float32, VOCAB, {"return_entropy": True}),
        (torch.bfloat16, VOCAB, {"return_entropy": True}),
        (torch.bfloat16, VOCAB, {"return_entropy": True, "softcap": 30.0}),
        (torch.float16, VOCAB, {}),
        (torch.bfloat16, ODD, {"return_entropy": True}),
        (torch.bfloat16, VOCAB, {"return_statistics": True}),
    ):
        logits, targets = floats(ROWS, vocab, dtype=dtype), torch.zeros(ROWS, dtype=torch.int64)
        yield Call(partial(ops.masked_logprobs, logits, targets, mask(ROWS), **options), vocab == VOCAB)


def exact_kl() -> Iterator[Call]:
    for dtype, vocab in ((torch.float32, VOCAB), (torch.bfloat16, VOCAB), (torch.bfloat16, ODD)):
        logits, ref_logits = floats(ROWS, vocab, dtype=dtype), floats(ROWS, vocab, dtype=dtype)
        yield Call(partial(ops.exact_kl, logits, ref_logits, mask(ROWS)), vocab == VOCAB)


def linear_ops() -> Iterator[Call]:
    targets = torch.zeros(ROWS, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):  # of the gradient; the logits are float32
        hidden, weight = floats(ROWS, HIDDEN, dtype=dtype), floats(VOCAB, HIDDEN, dtype=dtype).detach()
        yield Call(partial(ops.linear_logprobs, hidden, weight, targets, return_entropy=True))
        yield Call(partial(ops.linear_policy_ref, hidden, hidden.detach(), weight, targets))
    yield Call(partial(ops.linear_logprobs, hidden, weight, targets, return_statistics=True))
    yield Call(partial(ops.linear_cross_entropy, hidden, weight, targets))
    yield Call(partial(ops.linear_policy_ref, hidden, hidden.detach(), weight, targets, softcap=30.0))
    tokens = [floats(ROWS).detach() for _ in range(3)]
    options = {"ref_logprobs": tokens[2], "kl_coef": 0.1, "entropy_coef": 0.1}
    # its statistics come of a clipped policy loss without a gradient to store
    yield Call(partial(ops.linear_policy_loss, hidden, weight, targets, *tokens[:2], **options), wide=False)
    options = {"ref_hidden": hidden.detach(), "kl_estimator": "exact", "kl_coef": 0.1, "entropy_coef": 0.1}
    yield Call(partial(ops.linear_policy_loss, hidden, weight, targets, *tokens[:2], **options), wide=False)


def token_kl() -> Iterator[Call]:
    for count, estimator, live in (
        (64, "k1", None),
        (64, "k2", None),
        (64, "k3", mask(64)),
        (64, "abs", mask(64)),
        (61, "k3", mask(61)),
    ):
        logprobs, ref_logprobs = floats(count), floats(count).detach()
        yield Call(partial(ops.token_kl, logprobs, ref_logprobs, live, estimator=estimator), count == 64)


def gae() -> Iterator[Call]:
    for shape, live in (((2, 64), mask(2, 64)), ((2, 64), None), ((3, 1001), None), ((2, 8192), mask(2, 8192))):
        yield Call(partial(ops.gae, floats(*shape), floats(*shape), live), shape != (3, 1001))
    bounds = torch.tensor([0, 30, 64])  # packed sequences begin anywhere
    for live in (mask(64), None):
        yield Call(partial(ops.gae, floats(64), floats(64), live, cu_seqlens=bounds), wide=False)


def whitening() -> Iterator[Call]:
    for count, live, options in (
        (64, mask(64), {}),
        (4096, mask(4096), {"shift_mean": False}),
        (4095, None, {"unbiased": False}),
    ):
        yield Call(partial(ops.masked_whiten, floats(count), live, **options), count != 4095)
    for mean in (None, torch.zeros((), dtype=torch.float64)):
        yield Call(partial(_moments, Moments(floats(64).detach(), mask(64), mean)))


def clipped_losses() -> Iterator[Call]:
    for shape, live, options in (
        ((4, 16), mask(4, 16), {}),
        ((4, 16), None, {}),
        ((4, 1024), mask(4, 1024), {}),
        ((4, 16), mask(4, 16), {"aggregation": "seq-mean-token-mean"}),
        ((4, 1024), mask(4, 1024), {"aggregation": "seq-mean-token-sum"}),
        ((5, 1021), mask(5, 1021), {"aggregation": "seq-mean-token-mean"}),
    ):
        wide = shape != (5, 1021)
        level = {"ratio_level": "sequence" if "aggregation" in options else "token"}
        data = [floats(*shape), floats(*shape).detach(), floats(*shape).detach()]
        yield Call(partial(ops.clipped_value_loss, *data, live, **options), wide)
        joint = [*data, floats(*shape), floats(*shape).detach(), floats(*shape).detach()]
        yield Call(partial(ops.ppo_loss, *joint, live, **options), wide)
        terms = {"entropy": floats(*shape), "entropy_coef": 0.1, "ref_logprobs": data[1], "kl_coef": 0.1}
        yield Call(partial(ops.ppo_loss, *joint, live, **options, **terms), wide)
        yield Call(partial(ops.clipped_policy_loss, *data, live, **level, **options), wide)


def layers() -> Iterator[Call]:
    for dtype, width in ((torch.float32, 512), (torch.bfloat16, 512), (torch.float16, 512), (torch.bfloat16, 509)):
        wide = width == 512
        hidden, weight = floats(ROWS, width, dtype=dtype), floats(width)
        for given in (weight, weight.detach(), None):
            # the last step of a weight's gradient reads and writes float32 a column
            yield Call(partial(ops.rms_norm, hidden, given, eps=1e-6), wide)
        for activation in ("silu", "gelu_tanh", "gelu", "relu"):
            up = floats(ROWS, width, dtype=dtype)
            yield Call(partial(ops.gated_activation, hidden, up, activation=activation), wide)
    for dtype, of_angles, width, turned in (
        (torch.float32, torch.float32, 64, 64),
        (torch.bfloat16, torch.bfloat16, 128, 128),
        (torch.bfloat16, torch.float32, 64, 64),
        (torch.float16, torch.float16, 80, 20),
    ):
        heads = floats(2, 9, ROWS, width, dtype=dtype)
        angles = floats(1, ROWS, turned, dtype=of_angles).detach()
        yield Call(partial(ops.rotary_embedding, heads, angles, angles), turned == width)
