"""gae: advantages and returns, padded and packed, compared with the Python loop over time that other trainers use."""

import functools

import torch
from torch import Tensor

from rlhf_fast import gae
from rlhf_fast.bench.workload import COPY, LOOP, OURS, Contest, Mark, Results, Run, Sizes, Work, Workload, copying

GAMMA, LAM = 0.99, 0.95


def build(sizes: Sizes, device: torch.device, packed: bool = False, loop_too: bool = True) -> Contest:
    shape = (sizes["sequences"], sizes["tokens"])
    rewards, values = torch.randn(shape, device=device), torch.randn(shape, device=device)
    bounds = torch.arange(0, rewards.numel() + 1, sizes["tokens"], device=device)

    def ours() -> Results:
        if packed:
            flat = gae(rewards.view(-1), values.view(-1), gamma=GAMMA, lam=LAM, cu_seqlens=bounds)
            return tuple(result.view(shape) for result in flat)
        return gae(rewards, values, gamma=GAMMA, lam=LAM)

    def truth() -> Results:
        exact = loop(rewards.double().cpu(), values.double().cpu())  # on a GPU the loop's launches take minutes
        return tuple(result.to(device) for result in exact)

    runs: dict[str, Run] = {OURS: ours, LOOP: lambda: loop(rewards, values), COPY: copying(rewards)}
    if not loop_too:
        del runs[LOOP]
    return Contest(
        runs,
        names=("advantages", "returns"),
        truth=truth,
        work=Work("bytes", 4 * rewards.nbytes, COPY, 2 * rewards.nbytes),  # two tensors read, two written
    )


def loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The recursion as TRL, OpenRLHF and verl write it."""
    steps, advantages = rewards.shape[1], []
    advantage: Tensor | float = 0.0
    for t in reversed(range(steps)):
        next_values = values[:, t + 1] if t < steps - 1 else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        advantages.append(advantage)
    stacked = torch.stack(advantages[::-1], dim=1)
    return stacked, stacked + values


SIZES, QUICK, MARKS = {"sequences": 64, "tokens": 1024}, {"sequences": 4, "tokens": 64}, (Mark("faster", 60, LOOP),)
WORKLOADS = [
    Workload("gae", "{sequences} x {tokens}", SIZES, QUICK, build, MARKS),
    Workload("gae", "{sequences} x {tokens} packed", SIZES, QUICK, functools.partial(build, packed=True), MARKS),
]
SHARE = (Mark("share", 0.6, COPY),)
ALONE = functools.partial(build, loop_too=False)  # thousands of steps, each of several launches
GPU_WORKLOADS = [
    Workload("gae", "{sequences} x {tokens}", {"sequences": 4096, "tokens": 128}, QUICK, build, (Mark("time", 10),)),
    Workload("gae", "{sequences} x {tokens}", {"sequences": 64, "tokens": 32768}, QUICK, ALONE, SHARE),
    Workload(
        "gae",
        "{sequences} x {tokens} packed",
        {"sequences": 1024, "tokens": 1024},
        QUICK,
        functools.partial(ALONE, packed=True),
        SHARE,
    ),
]
