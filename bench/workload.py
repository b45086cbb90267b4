"""The parts of a bench: a workload, the contestants that run it, and the marks that we want to reach.

Each bench_<op>.py lists its WORKLOADS for the CPU and its GPU_WORKLOADS; harness.py measures them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Sizes = dict[str, int]
Results = tuple[Tensor | None, ...]
Run = Callable[[], Results]
Output = TypeVar("Output")

OURS = "rlhf-fast"  # names that begin with it, such as "rlhf-fast, fp32", are other work of ours for comparison
EAGER = "torch eager"
COMPILED = "torch.compile"
LOOP = "a Python loop"  # over time, each step of it torch eager
COPY = "a plain copy"


class Missing(Exception):
    """This contestant cannot take part. The message gives the reason and how to install it."""


@dataclass(frozen=True)
class Work:
    """The minimal amount of the work, and the amount that the ceiling (a contestant that does only this) handles."""

    unit: Literal["bytes", "flops"]
    amount: float
    ceiling: str
    ceiling_amount: float


@dataclass(frozen=True)
class Contest:
    """The contestants of a workload, which share inputs of one size.

    A run returns the tensors called ``names``, gradients included, with None for one that it does not have, or () where
    there is nothing to compare. ``truth`` gives the same in float64; it may stop after the first rows.
    """

    runs: dict[str, Run]  # ours is called OURS
    names: tuple[str, ...] = ()
    truth: Run = tuple
    work: Work | None = None
    # restores inputs that a run overwrites, before each run and untimed; its result lives as long as the run
    fresh: Callable[[], object] | None = None


@dataclass(frozen=True)
class Mark:
    """A target, usually relative to another contestant of the workload."""

    kind: Literal["faster", "within", "above", "share", "time", "host", "memory"]
    bound: float
    against: str = ""

    def __str__(self) -> str:
        return {
            "faster": f"at least {self.bound:g}x as fast as {self.against}",
            "within": f"at most {self.bound:g}x the time of {self.against}",
            "above": f"at most {self.bound:g} us above {self.against}",
            "share": f"at least {self.bound:.0%} of the rate of {self.against}",
            "time": f"at most {self.bound:g} us",
            "host": f"at most {self.bound:g} us of host time",
            "memory": f"at most {self.bound:g} MB extra",
        }[self.kind]

    def value(self, contestants: dict[str, dict[str, Any]]) -> float | None:
        """The value reached, in the unit of the mark; None if the other contestant or the quantity was not measured."""
        ours = contestants[OURS]
        if self.kind in ("time", "host", "memory"):
            return {"time": ours["ms"] * 1e3, "host": ours.get("host_us"), "memory": ours["extra_mb"]}[self.kind]
        if self.against not in contestants:
            return None
        other = contestants[self.against]
        if self.kind == "share":
            unit = "gb_per_s" if "gb_per_s" in ours else "gflop_per_s"
            return ours[unit] / other[unit]
        speed = other["ms"] / ours["ms"]
        return {"faster": speed, "within": 1 / speed, "above": (ours["ms"] - other["ms"]) * 1e3}[self.kind]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.kind in ("faster", "share") else value <= self.bound


@dataclass(frozen=True)
class Workload:
    op: str
    title: str  # what comes after the op's name; {sizes} are filled in
    sizes: Sizes
    quick: Sizes  # small ones, for --quick
    build: Callable[[Sizes, torch.device], Contest]
    marks: tuple[Mark, ...] = ()

    def name(self, sizes: Sizes) -> str:
        return f"{self.op}, {self.title.format(**sizes)}"


# ---- parts of contestants ------------------------------------------------------------------------------------------


def forward_backward(function: Callable[..., Tensor], leaf: Tensor, *rest: Tensor, upstream: Tensor) -> Results:
    """function(leaf, ...) and the gradient of ``leaf``, given that of the output."""
    output = function(leaf, *rest)
    (gradient,) = torch.autograd.grad(output, leaf, upstream.to(output.dtype))
    return output.detach(), gradient


def compiled(function: Callable[..., Output]) -> Callable[..., Output]:
    """Compiled for the shapes of its first call, which is never timed."""
    return torch.compile(function, dynamic=False)


def copying(tensor: Tensor) -> Run:
    """A plain copy: reads and writes the tensor's bytes once."""
    source, buffer = tensor.detach(), torch.empty_like(tensor)

    def run() -> Results:
        buffer.copy_(source)
        return ()

    return run


def leaf(tensor: Tensor) -> Tensor:
    """Its own memory, with a gradient."""
    return tensor.detach().clone().requires_grad_()
