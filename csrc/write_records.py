"""Writes csrc/records.h, the C structures of kernels/records.py: python csrc/write_records.py."""

import inspect
import re
from pathlib import Path
from typing import Any

from rlhf_fast.kernels import records as _records

TARGET = Path(__file__).with_name("records.h")


def header() -> str:
    """The text of csrc/records.h."""
    structures = [_structure(record, fields) for record, fields in _records.structures().items()]
    launchers = [f"  X({name}, {record.__name__})" for name, record in _records.LAUNCHERS.items()]
    table = " \\\n".join(["#define RLHF_FAST_LAUNCHERS(X)", *launchers])
    return f"""// The launchers' arguments. Written by csrc/write_records.py from kernels/records.py: change that file.
// `fields(a)` are a structure's fields in their order, `last` is an enum's last code.
#pragma once

#include <cstdint>
#include <tuple>

#define RLHF_FAST_RECORDS "{_records.digest()}"

namespace rlhf_fast {{

{"".join(map(_enum, _records.ENUMS, _records.ENUMS.values()))}
constexpr int kStatistics = {_records.STATISTICS};

{"".join(structures)}}}  // namespace rlhf_fast

// Name and arguments of every launcher, of the CPU's and of CUDA's.
{table}
"""


def _enum(name: str, values: tuple[str, ...]) -> str:
    return f"""enum class {name} : int32_t {{ {", ".join(values)} }};
constexpr int32_t last({name}) {{ return {len(values) - 1}; }}
"""


def _structure(record: type, fields: dict[str, Any]) -> str:
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(record), re.MULTILINE))
    lines = [f"struct {record.__name__} {{"]
    for name, kind in fields.items():
        declared = f"  {kind.__name__ if isinstance(kind, type) else kind} {name};"
        lines.append(f"{declared}  // {comments[name]}" if name in comments else declared)
    ties = ", ".join(f"a.{name}" for name in fields)
    return "\n".join([*lines, "};", f"inline auto fields({record.__name__}& a) {{ return std::tie({ties}); }}", "", ""])


if __name__ == "__main__":
    TARGET.write_text(header())
