"""Sequences without padding, roles in one pass, and exchanged elementwise layers: the same numbers as one by one."""

from typing import Any

import pytest
import torch
from tiny_models import TABLE, MakeBase, batch, tiny_model
from torch import Tensor
from transformers.masking_utils import sliding_window_causal_mask_function

from rlhf_fast.models import SharedBase, attention, elementwise

ROLES = ["sft", "reward", "policy", "critic", None]
# Layers that mix tokens of one row, or attention that transformers does not let be exchanged.
PADDED = {
    "bamba", "bloom", "falcon", "gpt_neo", "granitemoehybrid", "jamba", "mpt", "qwen3_5_text", "qwen3_next", "xglm",
}  # fmt: skip
every_architecture = pytest.mark.parametrize("architecture", list(TABLE))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))


def padded_hidden(base: SharedBase, role: str | None, input_ids: Tensor, mask: Tensor) -> Tensor:
    """With padding, one role, and the model's own attention."""
    with base.role(role):
        return base._forward.padded(input_ids, mask)


def close(found: Tensor, expected: Tensor) -> bool:
    """Within a few roundings of the dtype, by the norm of a token's states; in half precision a router may differ."""
    gap = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return gap.max().item() < 1e-4 if expected.dtype == torch.float32 else gap.median().item() < 0.1


@every_architecture
def test_which_models_compute_no_padding(bare_base: MakeBase, architecture: str) -> None:
    base = bare_base(architecture)
    assert base.packs == (architecture not in PADDED)
    assert any("packed without padding" in note for note in base.notes) != base.packs


@every_architecture
@DTYPES
def test_states_are_those_of_the_padded_batch(full_base: MakeBase, architecture: str, dtype: torch.dtype) -> None:
    base = full_base(architecture, dtype)
    for side in ("left", "right"):
        input_ids, mask = batch([9, 1, 7], side)
        for role in ("policy", None):
            if architecture == "phimoe" and dtype == torch.bfloat16:
                continue  # most tokens go to other experts
            with torch.no_grad():
                found, expected = base.hidden(role, input_ids, mask), padded_hidden(base, role, input_ids, mask)
            assert close(found[mask.bool()], expected[mask.bool()])


@every_architecture
def test_roles_in_one_pass_are_the_roles_one_by_one(full_base: MakeBase, architecture: str) -> None:
    base = full_base(architecture, lora_layers=2)
    mixture = any("experts." in name and weight.dim() == 3 for name, weight in base.model.named_parameters())
    assert base.one_pass == (architecture != "falcon" and not mixture)  # falcon's linear layers are its own class
    input_ids, mask = batch([9, 3, 7], "left")
    trunk = base.trunk(input_ids, mask)
    with torch.no_grad():
        for given in (None, trunk):
            together = base.hidden_of(ROLES, input_ids, mask, given)
            for role, states in zip(ROLES, together, strict=True):
                assert close(states[mask.bool()], base.hidden(role, input_ids, mask)[mask.bool()])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss", "qwen3", "bloom"])
def test_gradients_of_roles_in_one_pass(full_base: MakeBase, architecture: str) -> None:
    base = full_base(architecture)
    input_ids, mask = batch([9, 3, 7], "left")
    upstream = torch.randn(2, *mask.shape, 32, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    parameters = {(role, n): p for role in ("policy", "critic") for n, p in base.named_parameters(role).items()}

    def gradients(states: Any) -> dict[Any, Tensor | None]:
        sum((each * one).sum() for each, one in zip(states, upstream, strict=True)).backward()
        found = {name: parameter.grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        return found

    together = gradients(base.hidden_of(["policy", "critic"], input_ids, mask))
    alone = gradients([padded_hidden(base, role, input_ids, mask) for role in ("policy", "critic")])
    for name, grad in together.items():
        if "score" not in name[1]:
            torch.testing.assert_close(grad, alone[name], rtol=1e-3, atol=1e-4)


def test_a_sequence_sees_no_other(full_base: MakeBase) -> None:
    """Bit for bit: the states of a row depend on it alone, but for its place in the products."""
    base = full_base("llama")
    ids, mask = batch([5, 5, 5], "right")
    with torch.no_grad():
        before = base.hidden("policy", ids, mask)
        others = ids.clone()
        others[[0, 2]] = ids[[2, 0]] + 1
        assert torch.equal(base.hidden("policy", others, mask)[1], before[1])


def test_a_row_without_tokens(full_base: MakeBase) -> None:
    base = full_base("llama")
    ids, mask = batch([5, 4], "right")
    empty = torch.cat([ids, ids[:1]]), torch.cat([mask, mask[:1] * 0])
    with torch.no_grad():
        found = base.hidden("policy", *empty)
        assert torch.equal(found[:2], base.hidden("policy", ids, mask)) and not found[2].any()


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 3], ids=("causal", "window"))
@pytest.mark.parametrize("short", [True, False], ids=("products", "sdpa"))
def test_attention_is_softmax_of_each_sequence(
    heads: tuple[int, int], window: int | None, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients against the formula, sequence by sequence, in float64."""
    monkeypatch.setattr(attention, "SHORT", 100 if short else 0)
    lengths, size, scale = [5, 1, 8], 16, 0.3
    many, shared = heads
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, sum(lengths), size, generator=generator, requires_grad=True)
        for count in (many, shared, shared)
    )
    layout = attention.Layout(lengths, query.device)
    causal = lambda batch, head, q, k: k <= q  # noqa: E731
    mask_function = causal if window is None else sliding_window_causal_mask_function(window)
    with attention.packed([], layout):
        mask = attention._mask(mask_function=mask_function)
        out, _ = attention._attention(torch.nn.Identity(), query, key, value, mask, scaling=scale)
    upstream = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, (query, key, value), upstream)

    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    pieces = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in exact), strict=True):
        k, v = (tensor.repeat_interleave(many // shared, dim=1) for tensor in (k, v))
        rows, columns = torch.meshgrid(*[torch.arange(q.shape[2])] * 2, indexing="ij")
        seen = (columns <= rows) & (columns > rows - (window or 100))
        pieces.append((scale * q @ k.transpose(2, 3)).masked_fill(~seen, -torch.inf).softmax(dim=3) @ v)
    expected = torch.cat(pieces, dim=2).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_attention_refuses_what_it_does_not_know() -> None:
    rows = torch.randn(1, 2, 4, 8)
    with (
        attention.packed([], attention.Layout([4], rows.device)),
        pytest.raises(NotImplementedError, match="position_bias"),
    ):
        attention._attention(torch.nn.Identity(), rows, rows, rows, None, position_bias=rows)


# ---- elementwise layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "norms", "feed_forwards"),
    [("llama", 9, 4), ("gemma2", 17, 4), ("qwen3", 17, 4), ("gpt2", 0, 0), ("olmo", 0, 4), ("mixtral", 9, 0)],
)
@DTYPES
def test_what_is_exchanged(architecture: str, norms: int, feed_forwards: int, dtype: torch.dtype) -> None:
    body = tiny_model(architecture).to(dtype).base_model
    found = elementwise.exchange(body)
    assert sum("mlp" in name.rsplit(".", 1)[-1] for name in found) == feed_forwards
    assert sum("norm" in name for name in found) == norms


@every_architecture
def test_exchanged_layers_give_the_models_own_states(architecture: str) -> None:
    ids = batch([9], "left")[0]
    with torch.no_grad():
        expected = tiny_model(architecture).base_model(input_ids=ids, use_cache=False)[0]
        body = tiny_model(architecture).base_model
        elementwise.exchange(body)
        with elementwise.Rotary(body).exchanged():
            found = body(input_ids=ids, use_cache=False)[0]
    assert close(found, expected)


def test_rotary_functions_are_put_back() -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(ZeroDivisionError), elementwise.Rotary(tiny_model("llama")).exchanged():
        assert modeling_llama.apply_rotary_pos_emb is not own
        _ = 1 / 0
    assert modeling_llama.apply_rotary_pos_emb is own
