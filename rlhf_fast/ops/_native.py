"""Loads the compiled engine, rlhf_fast._C, and calls its CPU launchers (_cuda.py calls those for CUDA).

No other module imports rlhf_fast._C. The launchers read and write raw memory: the public functions check all arguments.
"""

import hashlib
import importlib
import os
import struct
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels import records

_PACKAGE = Path(__file__).parent.parent
PANEL = 48  # columns that the engine's bfloat16 product computes at a time


def _load() -> tuple[Any, str | None]:
    """The compiled module and None, or None and the reason why it cannot be used."""
    wanted = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
    built = sorted(path.name for path in _PACKAGE.glob("_C.*"))
    damaged = f"the compiled module {wanted} cannot be loaded ({{}}); install rlhf-fast again"
    if not built:
        return None, "not compiled: install a C++ compiler and rlhf-fast again (without RLHF_FAST_NATIVE=0)"
    if wanted not in built:
        there = ", ".join(built)
        return None, f"compiled for another Python: there is {there}, this one needs {wanted}; install rlhf-fast again"
    if _is_cut_short(_PACKAGE / wanted):
        return None, damaged.format("its end is missing")
    try:
        # torch is loaded before, so that the engine uses torch's OpenMP threads
        module = importlib.import_module("rlhf_fast._C")
    except ImportError as error:
        return None, damaged.format(error)
    sources = _interface()
    if getattr(module, "records", None) != records.digest() or sources not in (None, module.interface):
        return None, f"the compiled module {wanted} is from other sources than csrc/; run make or install it again"
    return module, None


def _is_cut_short(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section table does; loading such a file would crash the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02" or len(header) < 64:
        return False  # the loader reports what is wrong with it
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < table + size * count


def _interface() -> str | None:
    """The hash of the interface's sources, computed as in CMakeLists.txt; None without a checkout."""
    sources = [_PACKAGE.parent / "csrc" / name for name in ("records.h", "rlhf_fast.h", "bindings.cpp")]
    if not all(source.exists() for source in sources):
        return None
    return "".join(hashlib.sha256(source.read_bytes()).hexdigest() for source in sources)


_module, _reason = _load()


if _module is not None and (_path := os.environ.get("RLHF_FAST_CPU_PATH")):
    _module.choose_path(_path)


class Native:
    """The launchers of csrc/cpu."""

    def __init__(self, module: Any, reason: str | None) -> None:
        self.module, self.reason = module, reason

    def why_not(self, device: torch.device) -> str | None:
        return self.reason

    def launch(self, launcher: str, record: records.Record) -> None:
        getattr(self.module, launcher)(record, torch.get_num_threads())


native = Native(_module, _reason)


class Packed(NamedTuple):
    """A right factor (k, m) of bfloat16 products, in the order in which the engine reads it."""

    pairs: Tensor  # (panels, ceil(k / 2), PANEL) int32: two neighbours along k, of each column of a panel
    inner: int  # k


class Term(NamedTuple):
    """scale * left (n, k) x right (k, m), bfloat16, in rows [start, start + n) of a sum. Columns of left contiguous."""

    left: Tensor
    right: Tensor  # not read where it is packed
    start: int = 0
    scale: float = 1.0
    packed: Packed | None = None


def bfloat16_product(out: Tensor, terms: Sequence[Term], bias: Tensor | None = None) -> None:
    """``out`` (n, m) = bias (m,) + the sum of ``terms``, accumulated in float32. Columns of out contiguous.

    out: float32 or bfloat16. Where two terms have rows in common, the scale of the later one must not be 0.
    """
    _module.bfloat16_product(
        *out.shape, [_addresses(term) for term in terms], 0 if bias is None else bias.data_ptr(), out.data_ptr(),
        out.stride(0), out.dtype == torch.float32, torch.get_num_threads(),
    )  # fmt: skip


def pack_bfloat16(right: Tensor) -> Packed:
    """right: (k, m), bfloat16, any strides."""
    inner, columns = right.shape
    pairs = torch.empty(-(-columns // PANEL), -(-inner // 2), PANEL, dtype=torch.int32)
    _module.pack_bfloat16(columns, _addresses(Term(right[:0], right)), pairs.data_ptr(), torch.get_num_threads())
    return Packed(pairs, inner)


def _addresses(term: Term) -> tuple[Any, ...]:
    left, right, start, scale, packed = term
    place: tuple[int, ...] = (0, 0, 0, packed.pairs.data_ptr(), packed.inner) if packed else (
        right.data_ptr(), *right.stride(), 0, right.shape[0],
    )  # fmt: skip
    return left.data_ptr(), left.stride(0), *place, start, start + left.shape[0], scale


def float32_product(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool) -> None:
    """``out`` (n, m) = scale * left (n, k) x right (k, m), or += with ``add``; float32, columns of out contiguous."""
    _module.float32_product(
        *out.shape, left.shape[1], left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride(), out.data_ptr(),
        out.stride(0), scale, add, torch.get_num_threads(),
    )  # fmt: skip


def short_attention(
    dtype: int,
    sizes: Sequence[int],
    starts: Tensor,
    mask: Tensor,
    scale: float,
    rows: Sequence[Tensor | None],
    log_sums: Tensor,
    grads: Sequence[Tensor | None],
    scratch: Tensor,
) -> None:
    """The launcher of csrc/cpu/short_attention.cpp, whose structure names the arguments.

    rows: query, key, value, out; grads: of out, query, key, value. (heads, N, width) each, with contiguous columns.
    """
    _module.short_attention(
        dtype, sizes, starts.data_ptr(), mask.data_ptr(), scale, [*map(_head_rows, rows)], log_sums.data_ptr(),
        [*map(_head_rows, grads)], scratch.data_ptr(), scratch.shape[1], torch.get_num_threads(),
    )  # fmt: skip


def _head_rows(rows: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if rows is None else (rows.data_ptr(), rows.stride(1), rows.stride(0))


def multiplies_float32() -> bool:
    """Whether float32 products are computed by the engine, not by torch; depends on the maker of the processor."""
    return _module is not None and bool(_module.multiplies_float32())


multiplies_float32._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile cannot look inside


def multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions, which make torch's bfloat16 products faster than float32."""
    return bool(_module.multiplies_bfloat16())


def prefers_bfloat16() -> bool:
    """Whether the engine computes bfloat16 products, not torch: decided by the maker of the processor."""
    return _module is not None and bool(_module.prefers_bfloat16())


prefers_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile cannot look inside


def build_info() -> dict[str, Any]:
    """What was compiled: CPU paths and the one in use, compiler, OpenMP, CUDA and its architectures; and which library
    computes float32 and bfloat16 products on this processor ("rlhf-fast" or "torch").

    ``{"native": None, "reason": ...}`` if the compiled module is missing or cannot be loaded.
    """
    if _module is None:
        return {"native": None, "reason": _reason}
    return {"native": Path(_module.__file__).name, **_module.build_info()}
