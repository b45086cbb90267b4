"""Every op test runs once per backend in BACKENDS, with that backend forced. One that cannot be tested here (CUDA,
without a GPU or a compiler to emulate it) is skipped with its reason.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from devices import GPU, GPU_BACKENDS, device_of, interpreted, stand_in, why_not, without_a_launcher

from rlhf_fast.ops import _native, _products, _sweep
from rlhf_fast.ops._dispatch import ENGINES, use_backend

if lacking := without_a_launcher():
    raise pytest.UsageError("every engine has every launcher of kernels/records.py: " + ", ".join(lacking))

BACKENDS = ["torch", "native", *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACKENDS)]

if "triton" in GPU_BACKENDS and not GPU:
    from interpreter import quicken

    quicken()

INF = float("inf")
# What Triton's interpreter need not run, or takes too long for: cases that differ from others only in what comes before
# the kernels, or in a dtype that goes the same way, and long ones. Nor need CUDA's emulation, which is faster, run the
# long rows of every dtype. A GPU runs them all.
LONG_ROWS = ("masked_logprobs", "exact_kl")
LEFT_OUT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "test_mask_dtypes_and_leading_shapes": lambda case: case["dtype"] != torch.float32,
    "test_target_dtypes": lambda case: case["dtype"] != torch.int32,
    "test_layouts": lambda case: case["layout"] not in ("sliced", "expanded"),
    "test_masked_data_is_never_read": lambda case: (case["poison"] == -INF) == (case["dtype"] != torch.bfloat16),
    "test_vocabularies": lambda case: (
        (case["dtype"] == torch.float16 and case["vocab"] != 4099)
        or (case["backend"] == "triton" and case["vocab"] == 151936 and case["op"].name not in LONG_ROWS)
    ),
    "test_the_loss_is_its_parts": lambda case: case["ratio_level"] == "sequence" and case["kl_estimator"] != "exact",
    "test_gradcheck": lambda case: True,
    "test_float64_is_the_plain_formula": lambda case: True,
    "test_a_half_precision_weight_gathers_its_gradient_in_full": lambda case: True,
    "test_packed_is_padded_is_compacted": lambda case: True,
    "test_long_sequences_against_a_loop": lambda case: True,
    "test_compiled_options": lambda case: True,
    "test_compiled_under_autocast": lambda case: case["where"] != "in the graph",
    "test_a_subclass_in_any_place": lambda case: case["op"].has_vocabulary,
    "test_inference_tensors": lambda case: case["op"].has_vocabulary,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def left_out(item: pytest.Item) -> bool:
        case = getattr(item, "callspec", None)
        if case is None or not interpreted(case.params.get("backend", "")):
            return False
        if case.params.get("dtype") == torch.float64:  # the torch reference on every backend
            return True
        if case.params["backend"] != "triton" and item.originalname != "test_vocabularies":
            return False
        return item.originalname in LEFT_OUT and LEFT_OUT[item.originalname](case.params)

    dropped = [item for item in items if left_out(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the backend that is forced while the test runs, on the device that it is for: new tensors are made
    there, and the module's own are moved.
    """
    if (reason := why_not(request.param)) is not None:
        pytest.skip(reason)
    device = device_of(request.param)
    for name, value in vars(request.module).items():
        if isinstance(value, torch.Tensor) and value.device.type != device:
            monkeypatch.setattr(request.module, name, value.to(device))
    if interpreted(request.param):
        monkeypatch.setitem(ENGINES["cpu"], request.param, stand_in(request.param))
    if request.param == "cuda" and not GPU:
        # a narrower gradient lies where a GPU's would
        monkeypatch.setattr(_sweep, "plan", lambda *sizes: _products.plan(*sizes)._replace(behind=True))
    with use_backend(request.param), torch.device(device):
        yield request.param


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA kernels, emulated where there is no GPU."""
    if not GPU:
        monkeypatch.setitem(ENGINES["cpu"], "cuda", stand_in("cuda"))
    with use_backend("cuda"), torch.device(device_of("cuda")):
        yield


@pytest.fixture(params=_native.build_info().get("cpu_paths", ["not compiled"]))
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A path of the native backend, which is forced. Path and number of threads are restored."""
    best, threads = _native._module.path(), torch.get_num_threads()
    _native._module.choose_path(request.param)
    with use_backend("native"):
        yield request.param
    _native._module.choose_path(best)
    torch.set_num_threads(threads)
