"""How many forms of each Triton kernel calls of many sizes and alignments would compile, on a machine without a GPU.

    python tests/kernels/forms.py    -> one line of JSON a kernel and its constants: the number of forms

Triton itself says which form it would compile next, and is told not to.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # which Triton reads when a kernel is defined

import torch
from calls import HIDDEN, Call, triton_forced
from compile_ahead import Driver, gpu_target
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from rlhf_fast import ops

COUNTS = (1, 2, 15, 16, 48, 1024, 1025, 2048, 65536)
VOCAB = 64

Tensors = Callable[..., Tensor]


def inputs(count: int, misplaced: int) -> tuple[Tensors, Tensor]:
    """What makes tensors of ``count`` numbers, of which the bits of ``misplaced`` say whether their addresses are
    multiples of 16; and a mask.
    """
    made = iter(range(100))

    def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
        numbers = torch.zeros(torch.Size(shape).numel() + 1, dtype=dtype)
        first = misplaced >> next(made) % 4 & 1
        return numbers[first : len(numbers) - 1 + first].view(shape).requires_grad_(grad)

    return tensor, tensor(count, dtype=torch.bool, grad=False)


def run_all(count: int, misplaced: int) -> None:
    tensor, mask = inputs(count, misplaced)
    two = tensor(count), tensor(count, grad=False)
    rows = tensor(count, VOCAB, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.int64)
    joint = [*two, two[1], *(tensor(count, grad=i == 0) for i in range(3))]
    padded = [x.view(1, count) for x in (*two, mask)]
    hidden, weight = tensor(count, HIDDEN), tensor(HIDDEN)
    for forward in (
        lambda: ops.token_kl(*two, mask),
        lambda: ops.masked_whiten(two[0], mask),
        lambda: ops.gae(*padded),
        lambda: ops.gae(*two, mask, cu_seqlens=torch.tensor([0, count // 2, count])),
        lambda: ops.ppo_loss(*joint, mask).loss,
        lambda: ops.ppo_loss(*(x.view(1, -1) for x in joint), padded[2], aggregation="seq-mean-token-mean").loss,
        lambda: ops.clipped_policy_loss(*(x.view(1, -1) for x in joint[:3]), padded[2], ratio_level="sequence").loss,
        lambda: ops.masked_logprobs(*rows, mask),
        lambda: ops.exact_kl(rows[0], rows[0].detach(), mask),
        lambda: ops.linear_logprobs(hidden, tensor(VOCAB, HIDDEN), rows[1], mask),
        lambda: ops.rms_norm(hidden, weight, eps=1e-6),
        lambda: ops.gated_activation(hidden, tensor(count, HIDDEN)),
        lambda: ops.rotary_embedding(tensor(1, 2, count, HIDDEN), *(tensor(1, count, HIDDEN, grad=False),) * 2),
    ):
        Call(forward).run()


def main() -> None:
    driver.set_active(Driver(gpu_target("sm_90")))
    forms: dict[tuple[str, str], set[str]] = defaultdict(set)

    def note(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        # sizes and counts of blocks are constants of some kernels: others are compiled for others
        names = list(compile["signature"])
        constants = {names[place]: value for (place, *_), value in compile["constants"].items()}
        forms[f"{fn.module.rpartition('.')[2]}.{fn.name}", repr(constants)].add(repr(key))
        return True  # do not compile

    knobs.runtime.jit_cache_hook = note
    with triton_forced():
        for count, misplaced in product(COUNTS, range(16)):
            run_all(count, misplaced)
    for (kernel, constants), keys in sorted(forms.items()):
        json.dump({"kernel": kernel, "constants": constants, "forms": len(keys)}, sys.stdout)
        print()


if __name__ == "__main__":
    main()
