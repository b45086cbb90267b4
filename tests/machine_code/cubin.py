"""The machine code of many cubins, disassembled at once: a process takes a third of a second, whatever it is given."""

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from sass import Instruction, instructions


def code_of(cubin: bytes) -> bytes:
    """The machine code of its only kernel: of the ELF file the section .text.NAME."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    # of each section: where its name begins among the names, where it begins in the file, and its bytes
    headers = [struct.unpack_from("<I20xQQ", cubin, sections + 64 * i) for i in range(count)]
    (code,) = (
        cubin[start : start + size]
        for name, start, size in headers
        if cubin[headers[names][1] + name :].startswith(b".text.")
    )
    return code


def disassembled(codes: Sequence[bytes], architecture: str, nvdisasm: Path) -> list[list[tuple[int, Instruction]]]:
    """Of each code its instructions with their addresses."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [nvdisasm, "--binary", f"SM{architecture}", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    starts = accumulate(map(len, codes), initial=0)
    steps = instructions(said)
    return [[step for step in steps if start <= step[0] < stop] for start, stop in pairwise(starts)]
