"""Every CUDA kernel compiles for an H100 without a warning, and keeps to budget.json."""

from pathlib import Path

import pytest
from compiled import ARCHITECTURES, Report, breaches, budget_of, compile_all, compile_file, cuobjdump, nvcc, read_budget

needs_nvcc = pytest.mark.skipif(
    nvcc() is None or cuobjdump() is None,
    reason="no nvcc or no cuobjdump: the CUDA kernels are not compiled, and not held to their budget",
)
REPORT: Report = {
    **{"registers": 60, "shared": 4104, "instructions": 80, "stack": 0, "spills": 0},
    **{"load": 128, "store": 128, "flight": 52},
}
# What the kernels say of themselves: they read and write their tokens and rows 16 bytes at a time. (A fold's gradient
# may be narrower than its logits.)
WIDE = (
    "token_kl.",
    "ppo_loss.evaluate",
    "ppo_loss.scale_gradients",
    "masked_whiten.whiten",
    "masked_logprobs.write_segments",
    "exact_kl.write_segments",
    "rms_norm.normalise",
    "rms_norm.differentiate",
    "gated_activation.",
    "rotary_embedding.",
)
WIDE_LOADS = (*WIDE, "masked_logprobs.walk_", "exact_kl.walk_", "exact_kl.sum_", "linear_")


@needs_nvcc
def test_kernels_keep_to_their_budget() -> None:
    assert not (found := breaches(read_budget()["90"], compile_all("90"))), "\n".join(found)


def test_the_budget_is_of_every_architecture_and_of_wide_accesses() -> None:
    budget = read_budget()
    assert tuple(budget) == ARCHITECTURES
    for allowed in budget.values():
        assert set(allowed) == set(budget["90"])
        for kernel, bounds in allowed.items():
            if kernel.startswith(WIDE_LOADS) and ".finish_rows" not in kernel:
                assert bounds["load"] >= 128, kernel
            if kernel.startswith(WIDE):
                assert bounds["store"] >= 128, kernel


@pytest.mark.parametrize(
    ("column", "value", "line"),
    [
        ("registers", 73, "kl.evaluate: registers 73, allowed at most 72"),
        ("shared", 4105, "kl.evaluate: shared 4105, allowed at most 4104"),
        ("stack", 8, "kl.evaluate: stack 8, allowed at most 0"),
        ("spills", 4, "kl.evaluate: spills 4, allowed at most 0"),
        ("instructions", 91, "kl.evaluate: instructions 91, allowed at most 90"),
        ("load", 64, "kl.evaluate: load 64, allowed at least 128"),
        ("flight", 16, "kl.evaluate: flight 16, allowed at least 52"),
        ("store", 32, "kl.evaluate: store 32, allowed at least 128"),
    ],
)
def test_a_breach_is_named(column: str, value: int, line: str) -> None:
    allowed = budget_of({"kl.evaluate": REPORT})
    assert breaches(allowed, {"kl.evaluate": REPORT}) == []
    assert breaches(allowed, {"kl.evaluate": {**REPORT, column: value}}) == [line]


def test_kernels_that_come_and_go_are_named() -> None:
    (gone, new) = breaches({"kl.old": REPORT}, {"kl.new": REPORT})
    assert gone == "kl.old: in budget.json, and not in csrc/cuda"
    assert new == "kl.new: not in budget.json; compiled.py --renew adds it"


@needs_nvcc
def test_what_the_compiler_says_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "sample.cu"
    source.write_text("""
namespace rlhf_fast::cuda { namespace {
template <int kCount> __global__ void __launch_bounds__(1024, 2) reverse(const float4* from, float4* to) {
  float4 all[kCount];
  for (int i = 0; i < kCount; i++) all[i] = from[i * 1024 + threadIdx.x];
  for (int i = 0; i < kCount; i++) to[i * 1024 + threadIdx.x] = all[kCount - 1 - i];
}
__global__ void narrow(const float* from, float* to) {
  __shared__ float shared[32];
  shared[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = shared[31 - threadIdx.x];
}
template __global__ void reverse<2>(const float4*, float4*);
template __global__ void reverse<16>(const float4*, float4*);
}
void use() { narrow<<<1, 32>>>(nullptr, nullptr); }
}
""")
    reports = compile_file(source, "90", tmp_path)
    assert set(reports) == {"sample.reverse<2>", "sample.reverse<16>", "sample.narrow"}
    assert reports["sample.reverse<2>"].items() >= {"spills": 0, "stack": 0, "load": 128, "store": 128}.items()
    assert reports["sample.reverse<16>"]["spills"] > 0 and reports["sample.reverse<16>"]["stack"] > 0
    assert reports["sample.narrow"].items() >= {"shared": 128, "load": 32, "store": 32, "spills": 0}.items()
    source.write_text("__global__ void kernel() { int unused; }")
    with pytest.raises(RuntimeError, match='variable "unused" was declared but never referenced'):
        compile_file(source, "90", tmp_path)
