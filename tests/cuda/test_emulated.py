"""The emulation of CUDA does what a GPU does, and says what a GPU would not."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or "c++"

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})")


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Launches a kernel of faults.cpp on 2 blocks of 64 threads: what it stored, or the launch's error."""
    program = tmp_path_factory.mktemp("emulated") / "faults"
    sources = [HERE / "faults.cpp", HERE / "emulated" / "emulator.cpp"]
    subprocess.run([COMPILER, "-std=c++17", f"-I{HERE / 'emulated'}", *sources, "-o", program], check=True)

    def run(kernel: str) -> str:
        return subprocess.run([program, kernel], capture_output=True, text=True, check=True).stdout

    return run


def test_barriers_and_shuffles(launch: Callable[[str], str]) -> None:
    assert [float(x) for x in launch("sum").split()[:2]] == [2016, 2016]
    half = [float(x) for x in launch("half_a_warp").split()]
    assert half[:16] == [3] * 16 and half[32:48] == [35] * 16


def test_a_missing_barrier_shows(launch: Callable[[str], str]) -> None:
    """The threads of the second block run from the last one on, and find what the first block left."""
    assert [float(x) for x in launch("no_barrier").split()][64:] != [1] * 64


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("some_at_a_barrier", r"do not meet: thread 39 waits at .*faults.cpp:\d+, thread 63 has ended"),
        ("at_two_barriers", r"do not meet: thread 63 waits at .*faults.cpp:\d+, thread 31 waits at .*faults.cpp:\d+"),
        ("part_of_a_warp", r"do not meet: thread 15 waits at .*faults.cpp:\d+, thread 63 has ended"),
        ("a_lane_that_gives_nothing", r"faults.cpp:\d+: thread \d+ of block 0: lane 20 gives nothing to mask 0000ffff"),
        ("misaligned", r"faults.cpp:\d+: thread \d+ of block 0: an access of 16 bytes to the address 0x\w+4"),
    ],
)
def test_what_cuda_leaves_undefined_is_an_error(launch: Callable[[str], str], kernel: str, said: str) -> None:
    import re

    assert re.search(said, launch(kernel)), launch(kernel)
