"""Every workload at its small sizes: all contestants agree with float64, so they compute the same."""

import re
from pathlib import Path

import pytest
import torch

from rlhf_fast import backends
from rlhf_fast.bench import harness, peers
from rlhf_fast.bench.command import BENCHES, chosen
from rlhf_fast.bench.workload import COMPILED, EAGER, OURS, Missing, Workload

CPU = torch.device("cpu")
GPU = torch.device("cuda")
WORKLOADS = chosen(None, CPU)
GPU_WORKLOADS = chosen(None, GPU)
# a GPU's workloads at their small sizes run on the CPU too; those that differ in their full size alone run once
DISTINCT = {workload.name(workload.quick): workload for workload in [*WORKLOADS, *GPU_WORKLOADS]}
names = pytest.mark.parametrize("workload", DISTINCT.values(), ids=lambda workload: workload.name(workload.sizes))

# The required marks, written out here so that a bench cannot change them unnoticed.
MARKS = {
    "masked_logprobs, 512 x 49152 fp32, forward + backward": [
        "at least 8x as fast as torch eager",
        "at least 4x as fast as torch.compile",
        "at least 6x as fast as TRL",
        "at most 3x the time of a plain copy",
    ],
    "masked_logprobs, 512 x 49152 bf16, forward + backward": [
        "at most 1x the time of rlhf-fast, fp32",
        "at least 8x as fast as torch eager",
    ],
    "linear_logprobs, 1024 x 576 x 49152 fp32, forward + backward": [
        "at most 1.1x the time of its matrix products alone",
        "at most 64 MB extra",
        "at least 1x as fast as Liger",
        "at least 1x as fast as F.linear_cross_entropy",
    ],
    "linear_logprobs, 1024 x 576 x 49152 bf16, forward + backward": [
        "at most 1.25x the time of its matrix products alone",
        "at most 64 MB extra",
        "at least 1x as fast as Liger",
        "at least 1x as fast as F.linear_cross_entropy",
    ],
    "linear_logprobs, half of 1024 x 576 x 49152 fp32 masked": ["at most 0.55x the time of rlhf-fast, unmasked"],
    "linear_policy_loss, 1024 x 576 x 49152 fp32, policy + KL + entropy, forward + backward": [
        "at most 1.05x the time of rlhf-fast, linear_logprobs"
    ],
    "linear_policy_loss, 1024 x 576 x 49152 fp32, policy + exact KL + entropy, forward + backward": [
        "at least 1.7x as fast as torch.compile",
        "at least 1.4x as fast as rlhf-fast, linear_policy_ref",
    ],
    "lora_linear, 512 x 576 x 1536 r=16 bf16, forward + backward": ["at least 2x as fast as PEFT"],
    "lora_linear, 512 x 576 x 1536 r=16 fp32, forward + backward": ["at least 1.5x as fast as PEFT"],
    "gae, 64 x 1024": ["at least 60x as fast as a Python loop"],
    "gae, 64 x 1024 packed": ["at least 60x as fast as a Python loop"],
    "clipped_policy_loss, 1024 x 1024, forward + backward": [
        "at least 5x as fast as torch eager",
        "at least 1.5x as fast as torch.compile",
    ],
    "masked_logprobs, a call on 64 tokens": ["at most 40 us above F.cross_entropy"],
    "token_kl, a call on 64 tokens": ["at most 40 us above F.kl_div"],
    "clipped_policy_loss, a call on 64 tokens": ["at most 40 us above F.huber_loss"],
}


LOGITS, COPY = "masked_logprobs, 8192 x {} bf16, {}", "of the rate of a plain copy"
HEAD = "8192 x 4096 x 131072 bf16"
GPU_MARKS = {
    "ppo_loss, 1024 x 1024, policy + value + KL + entropy, forward + backward": [f"at least 80% {COPY}"],
    **{
        LOGITS.format(vocab, f"with entropy, {what}"): [
            f"at least {share} {COPY}",
            "at least 5x as fast as torch eager",
        ]
        for vocab in (32000, 50257, 128256, 151936)
        for what, share in (("forward", "90%"), ("backward in place", "85%"))
    },
    **{
        LOGITS.format(vocab, "forward + backward"): [
            "at least 5x as fast as torch eager",
            *(f"at least 1x as fast as {name}" for name in ("torch.compile", "TRL", "Liger", "flash-attn", "quack")),
        ]
        for vocab in (32000, 151936)
    },
    "masked_logprobs, 16 x 151936 bf16, with entropy, forward": [f"at least 60% {COPY}"],
    f"linear_policy_loss, {HEAD}, policy + KL + entropy, forward + backward": [
        "at most 1.15x the time of its matrix products alone",
        "at most 107.374 MB extra",
        "at least 1.7x as fast as Liger, no entropy",
    ],
    "gae, 4096 x 128": ["at most 10 us"],
    "gae, 64 x 32768": [f"at least 60% {COPY}"],
    "gae, 1024 x 1024 packed": [f"at least 60% {COPY}"],
}


def test_the_marks_are_those_that_were_set() -> None:
    found = {workload.name(workload.sizes): [str(mark) for mark in workload.marks] for workload in WORKLOADS}
    assert {name: marks for name, marks in found.items() if marks} == MARKS
    calls = {f"{op}, a call on 64 tokens": ["at most 30 us of host time"] for op in set(BENCHES) - {"overhead"}}
    found = {workload.name(workload.sizes): [str(mark) for mark in workload.marks] for workload in GPU_WORKLOADS}
    assert {name: marks for name, marks in found.items() if marks} == {**GPU_MARKS, **calls}
    assert len(found) == len(GPU_WORKLOADS)


def test_every_op_of_tokens_has_a_bench_of_its_name() -> None:
    files = Path(harness.__file__).parent.glob("bench_*.py")
    assert {path.stem.removeprefix("bench_") for path in files} == set(BENCHES)
    assert set(backends()) - {"pairwise_loss", "dpo_loss"} == set(BENCHES) - {"overhead"}  # one number per pair
    for name in BENCHES:
        for device in (CPU, GPU):
            assert {workload.op for workload in chosen(name, device)} == {name} or name == "overhead"


@names
def test_contestants_agree_with_float64(workload: Workload) -> None:
    contest = harness.built(workload, workload.quick, CPU)
    truth = contest.truth()
    tolerance = {OURS: 2e-2, EAGER: 0.5} if "bf16" in workload.title else {}  # torch rounds each step to bf16
    assert set(mark.against for mark in workload.marks) <= {*contest.runs, ""}
    assert not contest.work or contest.work.ceiling in contest.runs
    for name, run in contest.runs.items():
        if name == COMPILED:  # torch.compile itself is not tested here
            continue
        if contest.fresh:
            contest.fresh()
        try:
            errors = harness.errors(contest.names, run(), truth)
        except Missing as reason:
            assert re.search(r"pip install|torch 2\.13|runs on a GPU alone", str(reason))
            continue
        assert set(errors) == set(contest.names) or name != OURS
        assert max(errors.values(), default=0.0) < tolerance.get(name, tolerance.get(OURS, 2e-5)), name


def test_a_peer_that_is_not_installed_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed_version", lambda package: None)
    peers._load.cache_clear()
    peers.liger_grpo.cache_clear()
    with pytest.raises(Missing, match="^not installed: pip install trl$"):
        peers.selective_log_softmax()
    with pytest.raises(Missing, match="^not installed: pip install liger-kernel$"):
        peers.liger_grpo(0.0)


def test_a_peer_too_old_or_broken_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed_version", lambda package: "0.1")
    with pytest.raises(Missing, match=r"json 0.1 gives no nonesuch \(.*\): pip install -U json"):
        peers._load("json", "json", "nonesuch")
    with pytest.raises(Missing, match="nonesuch 0.1 gives no f"):
        peers._load("nonesuch", "nonesuch.module", "f")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(Missing, match="torch 2.13 has it"):
        peers.linear_cross_entropy(torch.ones(2, 2), torch.ones(3, 2), torch.zeros(2, dtype=torch.long), "sum")
