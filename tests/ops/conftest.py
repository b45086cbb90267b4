"""Every op test runs once per backend in BACKENDS, with that backend forced: a backend that cannot run fails loudly."""

from collections.abc import Iterator

import pytest

from rlhf_fast.ops._dispatch import use_backend

BACKENDS = ["torch", "native"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that is forced while the test runs."""
    with use_backend(request.param):
        yield request.param
