"""No call asks the GPU for more, or less, than docs/roofline.md says."""

import launches
import pytest
from launches import emulation
from roofline_page import read

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))


def test_the_launches_of_each_call() -> None:
    assert launches.table() == read("launches"), "python tests/cuda/launches.py renews the table"
