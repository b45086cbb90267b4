"""One test per contestant and workload, such as `pytest bench/ -k gae`.

The samples are the harness's, as in `rlhf-fast bench`; pytest-benchmark keeps, compares and shows them.
"""

from typing import Any

import pytest
import torch

from rlhf_fast.bench import device as gpu
from rlhf_fast.bench import harness
from rlhf_fast.bench.workload import Contest, Missing

sampled = 0.0  # seconds, of all samples so far: the clock that pytest-benchmark reads before and after each


@pytest.mark.benchmark(timer=lambda: sampled)
def test_speed(benchmark: Any, contest: Contest, name: str, request: pytest.FixtureRequest) -> None:
    benchmark.group = request.node.callspec.id.removesuffix(f": {name}")
    device = torch.device(request.config.getoption("--device"))

    def take() -> None:
        global sampled
        sampled += sample()

    with gpu.on_its_own_stream(device):
        try:
            contest.runs[name]()  # loads and compiles
        except Missing as reason:
            pytest.skip(str(reason))
        sample = harness.samplers({name: contest.runs[name]}, contest.fresh, device)[name]
        long = sample() > 0.1
        benchmark.pedantic(take, rounds=harness.LEAST_ROUNDS if long else harness.MOST_ROUNDS)
