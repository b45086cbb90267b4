"""What each call of an operation asks a GPU to do, counted on the emulated CUDA engine: its launches, memsets included,
and the operations of torch that would each be at least one kernel. These are the nodes of a captured graph.

    python tests/cuda/launches.py    -> the table of docs/roofline.md anew
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("ops", "machine_code"))
import emulation
from roofline_page import renew

from rlhf_fast import ops
from rlhf_fast.ops import _op, _products, _sweep, use_backend
from rlhf_fast.ops._dispatch import ENGINES

TOKENS, SEQUENCES = 5000, 4  # several tiles
ROWS, VOCAB, HIDDEN = 16, 9000, 32  # two segments
MANY_ROWS = 128
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view"),
    *("_reshape_alias", "_local_scalar_dense", "lift_fresh"),
}


class Operations(TorchDispatchMode):
    """Counts the operations that are no views and do more than allocate."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__ in NO_KERNEL)
        return func(*args, **(kwargs or {}))


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape).to(dtype).requires_grad_()


def calls() -> dict[str, tuple[list[Tensor], Callable[..., Any]]]:
    """Name -> trained tensors, and a function of them."""
    shape = (SEQUENCES, TOKENS // SEQUENCES)
    mask, row_mask = torch.rand(shape) < 0.7, torch.arange(ROWS) % 4 > 0
    a, b, c, d = (torch.rand(shape) for _ in range(4))
    x, y = floats(*shape), floats(*shape)
    logits, ref_logits = floats(ROWS, VOCAB, dtype=torch.bfloat16), torch.rand(ROWS, VOCAB).bfloat16()
    targets, many_targets = torch.randint(VOCAB, (ROWS,)), torch.randint(VOCAB, (MANY_ROWS,))
    hidden, ref_hidden, weight = floats(ROWS, HIDDEN), torch.rand(ROWS, HIDDEN), torch.rand(VOCAB, HIDDEN)
    of_rows = [torch.rand(ROWS) for _ in range(2)]
    states, scale = floats(ROWS, 512, dtype=torch.bfloat16), floats(512)
    heads, angles = floats(1, 4, ROWS, 64), torch.rand(1, ROWS, 64)
    bounds = torch.tensor([0, 1000, 3000, TOKENS])
    by_length = {"aggregation": "seq-mean-token-mean"}
    return {
        "masked_logprobs, 128 rows": (
            [floats(MANY_ROWS, VOCAB, dtype=torch.bfloat16)],
            lambda x: ops.masked_logprobs(x, many_targets),
        ),
        "masked_logprobs": ([logits], lambda x: ops.masked_logprobs(x, targets, row_mask)),
        "masked_logprobs, entropy": (
            [logits],
            lambda x: ops.masked_logprobs(x, targets, row_mask, return_entropy=True),
        ),
        "exact_kl": ([logits], lambda x: ops.exact_kl(x, ref_logits, row_mask)),
        "linear_logprobs": ([hidden], lambda h: ops.linear_logprobs(h, weight, targets, row_mask)),
        "linear_cross_entropy": ([hidden], lambda h: ops.linear_cross_entropy(h, weight, targets)),
        "linear_policy_loss": ([hidden], lambda h: ops.linear_policy_loss(h, weight, targets, *of_rows, row_mask).loss),
        "linear_policy_ref": ([hidden], lambda h: ops.linear_policy_ref(h, ref_hidden, weight, targets, row_mask)),
        "token_kl": ([x], lambda x: ops.token_kl(x, a, mask)),
        "gae": ([], lambda: ops.gae(a, b, mask)),
        "gae, whiten": ([], lambda: ops.gae(a, b, mask, whiten=True)),
        "gae, packed": ([], lambda: ops.gae(a.view(-1), b.view(-1), mask.view(-1), cu_seqlens=bounds)),
        "masked_whiten": ([x], lambda x: ops.masked_whiten(x, mask)),
        "clipped_policy_loss": ([x], lambda x: ops.clipped_policy_loss(x, a, b, mask).loss),
        "clipped_value_loss": ([x], lambda x: ops.clipped_value_loss(x, a, b, mask).loss),
        "ppo_loss": ([x, y], lambda x, y: ops.ppo_loss(x, a, b, y, c, d, mask).loss),
        "ppo_loss, by sequence": ([x, y], lambda x, y: ops.ppo_loss(x, a, b, y, c, d, mask, **by_length).loss),
        "rms_norm": ([states, scale], lambda x, w: ops.rms_norm(x, w, eps=1e-6)),
        "gated_activation": ([states], lambda x: ops.gated_activation(x, x.detach())),
        "rotary_embedding": ([heads], lambda x: ops.rotary_embedding(x, angles, angles)),
    }


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, CPU tensors go the way of CUDA's, past the checks of values, to the emulated engine."""

    def plan(rows: int, vocab: int, matrices: int, device: torch.device, *options: bool) -> Any:
        return _products.plan(rows, vocab, matrices, torch.device("cuda"), *options)

    with (
        patch.dict(ENGINES["cpu"], cuda=emulation.engine()),
        patch.object(sys.modules["rlhf_fast.ops.gae"], "check_bounds", lambda *_: None),
        patch.object(_op, "_watched", lambda: False),
        patch.object(_sweep, "plan", plan),
        patch.object(_products, "_memory", lambda device: 80 << 30),
        patch.object(_products, "_own_float32", lambda left: False),
        use_backend("cuda"),
    ):
        yield


def counted() -> dict[str, list[tuple[int, int]]]:
    """Name -> (launches of the engine, operations of torch) of the forward, and of the backward if there is one."""

    def count(run: Callable[[], Any]) -> tuple[Any, tuple[int, int]]:
        before = emulation.launches()
        with Operations() as operations:
            result = run()
        return result, (emulation.launches() - before, operations.count)

    found = {}
    with as_on_a_gpu():
        for name, (trained, call) in calls().items():
            outputs, forward = count(partial(call, *trained))
            found[name] = [forward]
            if trained:
                outputs = [x for x in ([outputs] if isinstance(outputs, Tensor) else outputs) if x.requires_grad]
                upstream = [torch.ones_like(output) for output in outputs]
                found[name].append(count(partial(torch.autograd.grad, outputs, trained, upstream))[1])
    return found


def table() -> str:
    lines = ["| call | forward: ours | torch's | backward: ours | torch's |", "|---|---|---|---|---|"]
    for name, numbers in counted().items():
        op, comma, options = name.partition(",")
        cells = [f"`{op}`{comma}{options}", *(str(number) for pair in numbers for number in pair)]
        lines.append(f"| {' | '.join(cells + [''] * (5 - len(cells)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    renew("launches", table())
