"""Triton's interpreter where there is no GPU; and the command line in this process, on the tiny model, with small data
files in the working folder.
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from command_lines import OWN, arguments, write_data

# With these, Intel processors give the same bits for any number of threads (docs/operations.md). torch's libraries read
# them when they are first used.
CPUINFO = Path("/proc/cpuinfo")
if CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text():
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when a kernel is defined

from rlhf_fast.cli import main  # noqa: E402


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stage -> the adapter folder of one short run."""
    folder = tmp_path_factory.mktemp("tiny_adapters")
    made: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data(folder)
        for stage in ("sft", "reward"):
            assert main([*arguments(stage, "", made), "--output_dir", stage]) == 0
            made[stage] = str(folder / stage / "adapter")
    return made


@pytest.fixture
def command(
    tmp_path: Path, tiny_adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """``command(stage, flags)`` in a folder with data; ``{sft}`` and ``{reward}`` in flags are adapter folders."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)

    def run(stage: str, flags: str = "") -> Outcome:
        capsys.readouterr()
        code = main(arguments(stage, flags, tiny_adapters) if stage in OWN else [stage, *shlex.split(flags)])
        return Outcome(code, *capsys.readouterr())

    return run
