"""One test per contestant and workload, such as `pytest bench/ -k gae`."""

from typing import Any

import pytest
import torch

from rlhf_fast.bench import harness
from rlhf_fast.bench.workload import Contest, Missing


def test_speed(benchmark: Any, contest: Contest, name: str, request: pytest.FixtureRequest) -> None:
    benchmark.group = request.node.callspec.id.removesuffix(f": {name}")
    device = torch.device(request.config.getoption("--device"))
    run = contest.runs[name]
    try:
        run()  # loads and compiles, and is not timed
    except Missing as reason:
        pytest.skip(str(reason))

    def timed() -> None:
        run()
        harness.synchronize(device)

    if contest.fresh:
        benchmark.pedantic(timed, setup=contest.fresh, rounds=harness.LEAST_ROUNDS)
    else:
        benchmark(timed)
