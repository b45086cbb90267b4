"""`pytest bench/`: the same workloads under pytest-benchmark, one test per contestant. Not part of `make test`."""

import pytest

from rlhf_fast.bench import command, harness
from rlhf_fast.bench.workload import COMPILED, Contest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, and nothing that compiles")
    parser.addoption("--device", default="cpu", help="cpu, cuda or cuda:N")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick, device = metafunc.config.getoption("--quick"), command.checked_device(metafunc.config.getoption("--device"))
    cases, ids = [], []
    for workload in command.chosen(None, device):
        at_size = (workload, workload.quick if quick else workload.sizes, device)
        for name in harness.built(workload, workload.quick, device).runs:  # only for the names, so of small sizes
            if not (quick and name == COMPILED):
                cases.append((at_size, name))
                ids.append(f"{workload.name(at_size[1])}: {name}")
    metafunc.parametrize(("contest", "name"), cases, indirect=["contest"], ids=ids, scope="module")


@pytest.fixture(scope="module")
def contest(request: pytest.FixtureRequest) -> Contest:
    return harness.built(*request.param)
