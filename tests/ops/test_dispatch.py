"""Which backend runs: forced, unforced, passed over, and what is said about it."""

import runpy
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import devices
import pytest
import torch

from rlhf_fast.kernels import records
from rlhf_fast.ops import __all__ as public
from rlhf_fast.ops import _dispatch, _native, backends, masked_logprobs, pairwise_loss, use_backend

SINGLE = torch.zeros(1)
DOUBLE = SINGLE.double()


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table, engines and memory of warnings that the test may change; no backend forced from outside."""
    monkeypatch.setattr(_dispatch, "_table", {op: dict(row) for op, row in _dispatch._table.items()})
    monkeypatch.setattr(_dispatch, "ENGINES", {"cpu": {}, "cuda": {}})
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_dispatch, "_forced", None)
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    yield


class Demo:
    """An engine that tells what it was asked to launch."""

    def __init__(self, name: str, reason: str | None) -> None:
        self.name, self.reason = name, reason

    def why_not(self, device: torch.device) -> str | None:
        return self.reason

    def launch(self, launcher: str, record: records.Record) -> None:
        launched.append((self.name, launcher))


launched: list[tuple[str, str]] = []
RECORD = records.MaskedMoments(elements=1, x=SINGLE, live=None, mean=None, moments=DOUBLE)


def fused() -> str:
    launched.clear()
    _dispatch.launch(RECORD, SINGLE)
    return launched[0][0]


def add(name: str, reason: str | None) -> None:
    _dispatch.ENGINES["cpu"][name] = Demo(name, reason)
    _dispatch.implements("demo", "fused")(fused)
    _dispatch.implements("demo", "torch")(lambda: "torch")


def chosen(like: torch.Tensor = SINGLE) -> str:
    return _dispatch.implementation("demo", like)()


def test_the_preferred_backend_that_can_run_is_chosen() -> None:
    add("native", None)
    assert chosen() == "native"
    with use_backend("torch"):
        assert chosen() == "torch"
    assert chosen() == "native"


def test_float64_is_the_reference_on_every_backend() -> None:
    add("native", None)
    assert chosen(DOUBLE) == "torch"
    with use_backend("native"):
        assert chosen(DOUBLE) == "torch"
        assert chosen(SINGLE.half()) == "native"


def test_a_backend_passed_over_is_said_once() -> None:
    add("native", "this processor has no vectors")
    with pytest.warns(UserWarning, match="demo: backend 'native' .* this processor has no vectors"):
        assert chosen() == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "torch"


@pytest.mark.parametrize("like", [SINGLE, DOUBLE], ids=["float32", "float64"])
def test_a_forced_backend_that_cannot_run_is_an_error(like: torch.Tensor) -> None:
    add("native", "this processor has no vectors")
    with use_backend("native"), pytest.raises(RuntimeError, match="'native' was asked for .* no vectors"):
        chosen(like)


def test_a_forced_backend_of_another_device() -> None:
    logits, targets = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    for name in ("cuda", "triton"):
        with (
            use_backend(name),
            pytest.raises(RuntimeError, match=f"masked_logprobs: .*{name!r}.* runs on CUDA; .* cpu"),
        ):
            masked_logprobs(logits, targets)


def test_an_engine_that_is_given_in_runs_where_it_is_forced() -> None:
    add("native", None)
    add("triton", None)
    assert chosen() == "native"
    with use_backend("triton"):
        assert chosen() == "triton"
        assert launched == [("triton", "masked_moments")]


def test_a_launch_that_no_engine_can_run_is_an_error() -> None:
    add("native", "this processor has no vectors")
    add("triton", None)
    with pytest.raises(RuntimeError, match="masked_moments: no engine can run on cpu"):
        _dispatch.launch(RECORD, SINGLE)


def test_a_launcher_that_an_engine_lacks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which conftest.py asks before the first test."""
    assert devices.without_a_launcher() == []
    monkeypatch.setattr(devices, "launcher_of", lambda name: None if name == "gae" else print)
    monkeypatch.setattr(devices, "GPU_BACKENDS", ("triton",))
    assert devices.without_a_launcher() == ["triton has no gae"]


def test_the_structures_are_those_of_the_records() -> None:
    script = Path(__file__).parents[2] / "csrc" / "write_records.py"
    assert runpy.run_path(str(script))["header"]() == script.with_name("records.h").read_text()


def test_a_record_that_does_not_fit_is_refused() -> None:
    launch = _native.native.launch
    with pytest.raises(TypeError, match="expected a record of 5 fields; got "):
        launch("masked_moments", RECORD[:-1])
    with pytest.raises(AttributeError, match="data_ptr"):
        launch("masked_moments", RECORD._replace(x=3.0))
    kl = records.TokenKl(tokens=1, logprobs=SINGLE, ref_logprobs=SINGLE, live=None, estimator=4, kl=SINGLE)
    with pytest.raises(ValueError, match="expected a code from 0 to 3; got 4"):
        launch("token_kl", kl)


def test_an_op_of_torch_alone_runs_under_every_forced_backend() -> None:
    assert set(_dispatch._table["pairwise_loss"]) == {"torch"}
    with use_backend("native"):
        assert pairwise_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(torch.tensor(2.0).log().item())


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="cuda, triton, native, torch; got 'fastest'"):
        with use_backend("fastest"):
            pass


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    add("native", None)
    monkeypatch.setenv("RLHF_FAST_BACKEND", "torch")
    assert chosen() == "torch"
    with use_backend("native"):  # the block wins over the environment
        assert chosen() == "native"
    monkeypatch.setenv("RLHF_FAST_BACKEND", "")
    assert chosen() == "native"
    monkeypatch.setenv("RLHF_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="'fastest'"):
        chosen()


def test_blocks_nest_and_are_left_after_an_error() -> None:
    with use_backend("native"):
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            assert _dispatch.forced_backend() == "triton"
            raise ZeroDivisionError
        assert _dispatch.forced_backend() == "native"
    assert _dispatch.forced_backend() is None


def test_the_block_holds_in_every_thread() -> None:
    """The autograd engine and data loaders call ops on threads of their own."""
    seen: list[str | None] = []
    with use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(_dispatch.forced_backend()))
        thread.start()
        thread.join()
    assert seen == ["triton"]


def test_backends_listing() -> None:
    add("native", None)
    add("triton", "Triton is not installed")
    listing = backends("cpu")
    assert listing["demo"] == {
        "chosen": "native",
        "available": ["native", "torch"],
        "unavailable": {"cuda": "runs on CUDA; the tensors are on cpu", "triton": "Triton is not installed"},
    }
    with use_backend("triton"):
        assert backends("cpu")["demo"]["chosen"] is None


def test_backends_of_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for row in backends("cuda").values():
        assert row["chosen"] is None and row["available"] == []
        assert all("sees no CUDA device here" in reason for reason in row["unavailable"].values())


# of torch's functions and other operations
COMPOSED = {
    "aggregate", "cispo_loss", "clip_cov_loss", "clip_fractions", "dft_loss", "dppo_loss", "gmpo_loss", "gpg_loss",
    "group_advantages", "group_whiten", "gspo_loss", "importance_weighted_kl", "kl_cov_loss", "kto_loss", "orpo_loss",
    "sapo_loss", "truncated_importance_weights", "vespo_loss",
}  # fmt: skip


def test_every_public_op_has_a_torch_reference() -> None:
    ops = {name for name in public if name.islower()} - {"backends", "build_info", "use_backend"}
    listing = backends("cpu")
    assert set(listing) == ops - COMPOSED
    assert all("torch" in row for row in _dispatch._table.values())
    assert {op for op in listing if "fused" not in _dispatch._table[op]} == {"pairwise_loss", "dpo_loss"}
