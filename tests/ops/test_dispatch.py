"""Which backend runs: forced, unforced, passed over, and what is said about it."""

import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

from rlhf_fast.ops import _dispatch, backends, masked_logprobs, pairwise_loss, use_backend

SINGLE = torch.zeros(1)
DOUBLE = SINGLE.double()


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table, probes and memory of warnings that the test may change; no backend forced from outside."""
    monkeypatch.setattr(_dispatch, "_table", {op: dict(row) for op, row in _dispatch._table.items()})
    monkeypatch.setattr(_dispatch, "_probes", {"torch": lambda device: None})
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_dispatch, "_forced", None)
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    yield


def add(name: str, reason: str | None) -> None:
    _dispatch.register_backend(name, lambda device: reason)
    _dispatch.implements("demo", name)(lambda: name)
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


def test_a_forced_backend_that_is_not_built_or_lacks_the_op() -> None:
    logits, targets = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="masked_logprobs: .*'cuda'.* not part of this build"):
        masked_logprobs(logits, targets)
    _dispatch.register_backend("cuda", lambda device: None)
    _dispatch._table["masked_logprobs"].pop("cuda", None)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="has no masked_logprobs"):
        masked_logprobs(logits, targets)


def test_an_op_of_torch_alone_runs_under_every_forced_backend() -> None:
    assert set(_dispatch._table["pairwise_loss"]) == {"torch"}
    with use_backend("native"):
        assert pairwise_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(torch.tensor(2.0).log().item())


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="cuda, triton, native, torch; got 'fastest'"):
        with use_backend("fastest"):
            pass
    with pytest.raises(ValueError, match="'fastest'"):
        _dispatch.register_backend("fastest", lambda device: None)


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
        "unavailable": {"cuda": "not part of this build", "triton": "Triton is not installed"},
    }
    with use_backend("triton"):
        assert backends("cpu")["demo"]["chosen"] is None


def test_backends_of_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for row in backends("cuda").values():
        assert row["chosen"] is None and row["available"] == []
        assert all("sees no CUDA device here" in reason for reason in row["unavailable"].values())


def test_every_public_op_has_a_torch_reference() -> None:
    ops = {
        "clipped_policy_loss", "clipped_value_loss", "dpo_loss", "exact_kl", "gae", "linear_cross_entropy",
        "linear_logprobs", "linear_policy_loss", "linear_policy_ref", "masked_logprobs", "masked_whiten",
        "pairwise_loss", "ppo_loss", "token_kl",
    }  # fmt: skip
    listing = backends("cpu")
    assert set(listing) == ops
    assert all("torch" in listing[op]["available"] for op in ops)
