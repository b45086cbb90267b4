"""What compute-sanitizer watches, on each of a GPU's backends: every op forward and backward at its bench's small
sizes, the ops of a number a token at sizes of several blocks, whose parts are joined, and rows of logits that begin at
any address.

All rows of logits together are a multiple of 16 bytes here. Others are read by whole aligned vectors, of which the last
may lie partly past the tensor: nobody's memory to the sanitizer, and harmless.
"""

from collections.abc import Callable, Iterator

import torch

import rlhf_fast
from rlhf_fast import backends, use_backend
from rlhf_fast.bench import harness
from rlhf_fast.bench.command import BENCHES, chosen
from rlhf_fast.bench.device import KERNELS
from rlhf_fast.bench.workload import OURS

Call = Callable[[], object]


def small_workloads(device: torch.device) -> Iterator[tuple[str, Call]]:
    benches = ",".join(name for name in BENCHES if name != "overhead")  # which calls the same ops again
    smallest = {workload.name(workload.quick): workload for workload in chosen(benches, torch.device("cuda"))}
    for name, workload in smallest.items():
        contest = harness.built(workload, workload.quick, device)

        def call(contest: harness.Contest = contest) -> None:
            if contest.fresh:
                contest.fresh()
            contest.runs[OURS]()

        yield name, call


def several_blocks(device: torch.device) -> Iterator[tuple[str, Call]]:
    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, requires_grad=True)

    tokens = [random(5, 1031) for _ in range(6)]
    mask = tokens[0] < 0.7
    by_length = {"aggregation": "seq-mean-token-mean"}
    yield "ppo_loss, 5 x 1031", lambda: rlhf_fast.ppo_loss(*tokens, mask, **by_length).loss.backward()
    yield (
        "clipped_policy_loss, 5 x 1031 by the sequence",
        lambda: rlhf_fast.clipped_policy_loss(*tokens[:3], mask, ratio_level="sequence", **by_length).loss.backward(),
    )
    yield "masked_whiten, 5 x 1031", lambda: rlhf_fast.masked_whiten(tokens[0], mask).sum().backward()
    for shape in ((3, 2300), (300, 1100)):
        rewards, values = random(*shape), random(*shape)
        yield f"gae, {shape}", lambda rewards=rewards, values=values: rlhf_fast.gae(rewards, values, rewards < 0.7)
    packed = random(5000)
    bounds = torch.tensor([0, 130, 5000], device=device)
    yield "gae, packed", lambda: rlhf_fast.gae(packed, packed, cu_seqlens=bounds, whiten=True)


def unaligned_rows(device: torch.device) -> Iterator[tuple[str, Call]]:
    """Rows of two segments, whose ends share 16 aligned bytes with the next row. Their gradient takes their place."""
    rows, vocab = 8, 9001
    targets = torch.arange(rows, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        ref_logits = torch.rand(rows, vocab, device=device).to(dtype)

        def logits(like: torch.Tensor = ref_logits) -> torch.Tensor:
            return like.clone().requires_grad_()

        yield (
            f"masked_logprobs in place, {rows} x {vocab} {dtype}",
            lambda logits=logits: rlhf_fast.masked_logprobs(logits(), targets, inplace_backward=True).sum().backward(),
        )
        yield (
            f"masked_logprobs with statistics, {rows} x {vocab} {dtype}",
            lambda logits=logits: (
                rlhf_fast.masked_logprobs(logits(), targets, return_statistics=True).logsumexp.sum().backward()
            ),
        )
        yield (
            f"exact_kl in place, {rows} x {vocab} {dtype}",
            lambda logits=logits, ref=ref_logits: (
                rlhf_fast.exact_kl(logits(), ref, inplace_backward=True).sum().backward()
            ),
        )


def main(device: torch.device, kernels: tuple[str, ...]) -> None:
    for calls in (small_workloads, several_blocks, unaligned_rows):
        for name, call in calls(device):
            for backend in kernels:
                with use_backend(backend):
                    call()
                harness.synchronize(device)
                print(name, backend, flush=True)


if __name__ == "__main__":
    device = torch.device("cuda")
    main(device, tuple(name for name in KERNELS if name in backends(device)["gae"]["available"]))
