"""What the backward computes again: bit for bit the gradients of keeping everything."""

import contextlib
from typing import Any

import pytest
import torch
from tiny_models import TABLE, MakeBase, batch
from torch import Tensor

from rlhf_fast.models import SharedBase, recomputing

ROLES = ["policy", "critic"]
Gradients = dict[tuple[str, str], Tensor | None]


def parameters(base: SharedBase) -> dict[tuple[str, str], torch.nn.Parameter]:
    return {(role, name): p for role in ROLES for name, p in base.named_parameters(role).items()}


def gradients(base: SharedBase, states: tuple[Tensor, ...], mask: Tensor) -> Gradients:
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for each in states:
        total = total + (each * torch.randn(each.shape, generator=generator) * mask[..., None]).float().sum()
    total.backward()
    found = {name: parameter.grad for name, parameter in parameters(base).items()}
    for parameter in parameters(base).values():
        parameter.grad = None
    return found


def same(found: Gradients, expected: Gradients) -> bool:
    def alike(one: Tensor | None, other: Tensor | None) -> bool:
        return one is other is None or (one is not None and other is not None and one.equal(other))

    some = any(grad is not None and grad.any() for grad in expected.values())
    return some and all(alike(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("architecture", list(TABLE))
@pytest.mark.parametrize("layers", [None, 2])
def test_checkpointed_gradients_are_bitwise_the_same(
    full_base: MakeBase, architecture: str, layers: int | None
) -> None:
    base = full_base(architecture, lora_layers=layers)
    input_ids, mask = batch([9, 3, 7], "left")
    trunk = base.trunk(input_ids, mask)
    found = []
    for base.config.gradient_checkpointing in (False, True):
        together = gradients(base, base.hidden_of(ROLES, input_ids, mask, trunk), mask)
        one_by_one = tuple(base.hidden(role, input_ids, mask, trunk) for role in ROLES)
        with base.role("sft"):  # wherever the model stands since
            pass
        found.append((together, gradients(base, one_by_one, mask)))
    assert all(same(again, kept) for again, kept in zip(found[1], found[0], strict=True))


def test_dropout_drops_the_same_again(full_base: MakeBase) -> None:
    base = full_base("llama", lora_dropout=0.3)
    input_ids, mask = batch([9, 3, 7], "right")
    found = []
    for base.config.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        with base.dropout("policy"):
            states = base.hidden("policy", input_ids, mask)
        found.append(gradients(base, (states,), mask))
    assert same(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_only_adapted_layers_are_computed_again(full_base: MakeBase, dtype: torch.dtype) -> None:
    base = full_base("llama", dtype, lora_layers=1, gradient_checkpointing=True)
    calls = [0] * len(base.decoder.layers)
    for place, layer in enumerate(base.decoder.layers):

        def count(*_: Any, place: int = place) -> None:
            calls[place] += 1

        layer.self_attn.register_forward_hook(count)
    input_ids, mask = batch([9, 3, 7], "left")
    gradients(base, base.hidden_of(ROLES, input_ids, mask), mask)
    assert calls == [1] * (len(calls) - 1) + [2]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2", "gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_cheap_outputs_change_no_gradient(
    full_base: MakeBase, architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = full_base(architecture, dtype)
    input_ids, mask = batch([9, 3, 7], "left")
    made = gradients(base, base.hidden_of(ROLES, input_ids, mask), mask)
    monkeypatch.setattr(recomputing, "cheap_outputs_again", contextlib.nullcontext)
    assert same(made, gradients(base, base.hidden_of(ROLES, input_ids, mask), mask))


def test_cheap_outputs_are_not_kept(full_base: MakeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    base = full_base("llama")
    kept, again = [], []
    real = recomputing._pack

    def packed(tensor: Tensor) -> Any:
        found = real(tensor)
        (kept if isinstance(found, Tensor) else again).append(tensor.shape)
        return found

    monkeypatch.setattr(recomputing, "_pack", packed)
    base.hidden("policy", *batch([9, 3, 7], "left"))
    layers = len(base.decoder.layers)
    assert len(again) == 3 * layers - 1  # both norms and the product; the first norm's input needs no gradient
    assert kept


def test_an_output_that_was_written_to_is_kept() -> None:
    weight = torch.ones(3, requires_grad=True)
    calls: list[int] = []

    def make() -> Tensor:
        calls.append(0)
        return torch.full((3,), 2.0)

    for write in (False, True):
        calls.clear()
        with recomputing.cheap_outputs_again():
            output = weight * 2
            recomputing.note_output(output, make)
            if write:
                output.mul_(5)
            factor = torch.ones(3, requires_grad=True)
            total = (output * factor).sum()
        total.backward()
        assert factor.grad is not None and factor.grad.tolist() == [10.0 if write else 2.0] * 3
        assert len(calls) == (0 if write else 1)
