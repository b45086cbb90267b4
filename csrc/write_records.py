"""Writes csrc/records.h, the C structures of kernels/records.py: python csrc/write_records.py.

The text is as clang-format would leave it.
"""

import inspect
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

from rlhf_fast.kernels import records as _records

TARGET = Path(__file__).with_name("records.h")


def header() -> str:
    """The text of csrc/records.h."""
    structures = [_structure(record, fields) for record, fields in _records.structures().items()]
    table = ["#define RLHF_FAST_LAUNCHERS(X)"]
    table += [f"  X({name}, {record.__name__})" for name, record in _records.LAUNCHERS.items()]
    width = max(map(len, table))
    launchers = " \\\n".join(line.ljust(width) for line in table).rstrip()
    return f"""// The launchers' arguments. Written by csrc/write_records.py from kernels/records.py: change that file.
// `fields(a)` ties a structure's fields in their order; `last` is the last code of an enum.
#pragma once

#include <cstdint>
#include <tuple>

#define RLHF_FAST_RECORDS "{_records.digest()}"

namespace rlhf_fast {{

{"".join(map(_enum, _records.ENUMS, _records.ENUMS.values()))}
constexpr int kStatistics = {_records.STATISTICS};
constexpr int kExtras = {_records.EXTRAS};

{"".join(structures)}}}  // namespace rlhf_fast

// Name and arguments of every launcher, for the CPU and for CUDA.
{launchers}
"""


def _enum(name: str, values: tuple[str, ...]) -> str:
    return f"""enum class {name} : int32_t {{ {", ".join(values)} }};
constexpr int32_t last({name}) {{ return {len(values) - 1}; }}
"""


def _structure(record: type, fields: dict[str, Any]) -> str:
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(record), re.MULTILINE))
    members = [
        (f"  {kind.__name__ if isinstance(kind, type) else kind} {name};", comments.get(name))
        for name, kind in fields.items()
    ]
    lines = [f"struct {record.__name__} {{"]
    for commented, group in itertools.groupby(members, lambda member: member[1] is not None):
        run = list(group)
        width = max(len(declaration) for declaration, _ in run)  # comments on consecutive lines start in one column
        lines += [f"{line.ljust(width)}  // {comment}" if commented else line for line, comment in run]
    tie = f"return std::tie({', '.join(f'a.{name}' for name in fields)});"
    function = f"inline auto fields({record.__name__}& a) {{ {tie} }}"
    if len(function) > 120:
        start = "  return std::tie("
        tie = textwrap.fill(tie, 120, initial_indent="  ", subsequent_indent=" " * len(start))
        function = f"inline auto fields({record.__name__}& a) {{\n{tie}\n}}"
    return "\n".join([*lines, "};", function, "", ""])


if __name__ == "__main__":
    TARGET.write_text(header())
