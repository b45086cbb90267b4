"""Every op test runs once per backend in BACKENDS, with that backend forced: a backend that cannot run fails loudly."""

from collections.abc import Iterator

import pytest
import torch

from rlhf_fast.ops import _native
from rlhf_fast.ops._dispatch import use_backend

BACKENDS = ["torch", "native", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that is forced while the test runs."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=_native.build_info().get("cpu_paths", ["not compiled"]))
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A path of the native backend, which is forced. Path and number of threads are restored."""
    best, threads = _native._module.path(), torch.get_num_threads()
    _native._module.choose_path(request.param)
    with use_backend("native"):
        yield request.param
    _native._module.choose_path(best)
    torch.set_num_threads(threads)
