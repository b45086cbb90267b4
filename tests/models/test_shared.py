"""The shared base: the trunk, padding, what each role computes and trains, copies, dropout, refusals."""

from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, MakeBase, batch, randomise, settings, tiny_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase
from rlhf_fast.models.vocabulary import capped

ROLES = ["sft", "reward", "policy", "critic", None]
DTYPES = [torch.float32, torch.bfloat16]
every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


def with_gradient(base: SharedBase) -> set[str]:
    return {role for role in base.roles for p in base.named_parameters(role).values() if p.grad is not None}


def copies(base: SharedBase, role: str) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in base.named_parameters(role).items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- the trunk -----------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("dtype", DTYPES)
def test_trunk_and_tail_are_the_full_forward_bitwise(
    full_base: MakeBase, architecture: str, dtype: torch.dtype
) -> None:
    base = full_base(architecture, dtype, lora_layers=2)
    for side in ("left", "right"):
        input_ids, mask = batch([9, 3, 7], side)
        trunk = base.trunk(input_ids, mask)
        assert trunk is not None and trunk.dtype == dtype and not trunk.requires_grad
        for role in ROLES:
            with torch.no_grad():
                expected = base.hidden(role, input_ids, mask)
                assert torch.equal(base.hidden(role, input_ids, mask, trunk), expected)
            assert torch.equal(base.hidden(role, input_ids, mask, trunk), expected)  # and while gradients are kept
        with torch.no_grad():
            assert torch.equal(base.hidden("policy", input_ids, mask), base.hidden("policy", input_ids, mask, trunk))
            assert not torch.equal(base.hidden("policy", input_ids, mask), base.hidden("sft", input_ids, mask))


@every_architecture
def test_gradients_through_the_trunk_are_those_of_the_full_forward(full_base: MakeBase, architecture: str) -> None:
    base = full_base(architecture, lora_layers=2)
    input_ids, mask = batch([6, 6], "left")
    gradients = []
    for trunk in (None, base.trunk(input_ids, mask)):
        base.hidden("policy", input_ids, mask, trunk).square().sum().backward()
        parameters = base.named_parameters("policy")
        gradients.append({name: p.grad for name, p in parameters.items()})
        for parameter in parameters.values():
            parameter.grad = None
    assert same(gradients[0], gradients[1])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_layers_below_the_trunk_are_not_computed_again(full_base: MakeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    base = full_base(lora_layers=1)
    input_ids, mask = batch([5, 4], "left")
    trunk = base.trunk(input_ids, mask)
    expected = base.hidden("policy", input_ids, mask)

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("a layer below the trunk was computed")

    for layer in base.model.model.layers[:3]:
        monkeypatch.setattr(layer.mlp, "forward", refuse)
    assert torch.equal(base.hidden("policy", input_ids, mask, trunk), expected)
    with pytest.raises(AssertionError, match="was computed"):
        base.hidden("policy", input_ids, mask)


def test_an_error_in_the_middle_leaves_the_model_whole(full_base: MakeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    base = full_base(lora_layers=2)
    input_ids, mask = batch([5, 4], "left")
    trunk, expected = base.trunk(input_ids, mask), base.hidden("policy", input_ids, mask)
    for call in (lambda: base.hidden("policy", input_ids, mask, trunk), lambda: base.trunk(input_ids, mask)):
        with monkeypatch.context() as patch:
            patch.setattr(base.model.model.norm, "forward", lambda hidden: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call()
        assert torch.equal(base.hidden("policy", input_ids, mask), expected)


def test_there_is_no_trunk_where_the_lowest_layer_is_adapted_or_none_is(
    full_base: MakeBase, bare_base: MakeBase
) -> None:
    assert full_base().first_adapted_layer == 0
    assert full_base().trunk(*batch([4], "left")) is None
    assert bare_base().first_adapted_layer == 4
    assert bare_base().trunk(*batch([4], "left")) is None


def test_the_lowest_adapted_layer_of_any_role_ends_the_trunk(bare_base: MakeBase) -> None:
    base = bare_base(lora_layers=3)
    base.add_role("sft")
    base.config.lora_layers = 1
    base.add_role("policy")
    assert base.first_adapted_layer == 1


# ---- padding and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "lora_layers"), [("llama", None), *((architecture, 2) for architecture in ARCHITECTURES)]
)
def test_padding_and_the_rest_of_the_batch_change_nothing(
    full_base: MakeBase, architecture: str, lora_layers: int | None
) -> None:
    base = full_base(architecture, lora_layers=lora_layers)
    lengths = [8, 1, 5]
    for role in ("policy", "reward", None):
        for side in ("left", "right"):
            input_ids, mask = batch(lengths, side, width=11)
            trunk = base.trunk(input_ids, mask)
            with torch.no_grad():
                hidden = base.hidden(role, input_ids, mask, trunk)
                for row, length in enumerate(lengths):
                    own = input_ids[row : row + 1, mask[row].bool()]
                    alone = base.hidden(role, own, torch.ones_like(own))
                    live = hidden[row, mask[row].bool()]
                    torch.testing.assert_close(live, alone[0], rtol=0, atol=3e-5)
                    if role == "reward":
                        score = base.scores(role, input_ids, mask, trunk)[row]
                        expected = base.heads[role](alone[0, length - 1])
                        torch.testing.assert_close(score, expected, rtol=0, atol=3e-5)


def test_pad_in_the_text_is_a_token_like_any_other(full_base: MakeBase) -> None:
    """The mask decides what is padding: the score is that of the last live position, even if its token is PAD."""
    base = full_base()
    alone = torch.tensor([[7, 0, 9, 0]])
    padded = torch.tensor([[7, 0, 9, 0, 0, 0]])
    with torch.no_grad():
        expected = base.scores("reward", alone, torch.ones_like(alone))
        got = base.scores("reward", padded, torch.tensor([[1, 1, 1, 1, 0, 0]]))
        other = base.scores("reward", padded, torch.tensor([[1, 1, 1, 0, 0, 0]]))
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)
    assert (other - expected).abs() > 1e-2


# ---- what a role computes and trains -------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_adapter_changes_nothing_and_the_base_stays_reachable(
    bare_base: MakeBase, architecture: str, dtype: torch.dtype
) -> None:
    base = bare_base(architecture, dtype)
    input_ids, mask = batch([7, 4], "left")
    with torch.no_grad():
        expected = base.hidden(None, input_ids, mask)
        base.add_role("policy")
        assert torch.equal(base.hidden("policy", input_ids, mask), expected)
        randomise(base, "policy", 0)
        assert not torch.equal(base.hidden("policy", input_ids, mask), expected)
        assert torch.equal(base.hidden(None, input_ids, mask), expected)
    assert {p.dtype for p in base.named_parameters("policy").values()} == {torch.float32}


@every_architecture
def test_hidden_states_and_vocabulary_give_the_models_own_logits(bare_base: MakeBase, architecture: str) -> None:
    base = bare_base(architecture)
    base.add_role("policy")
    randomise(base, "policy", 0)
    input_ids, mask = batch([6, 6], "right")
    with torch.no_grad():
        with base.role("policy"):
            expected = base.model(input_ids=input_ids, attention_mask=mask).logits
        head = base.vocabulary
        logits = nn.functional.linear(base.hidden("policy", input_ids, mask), head.weight, head.bias)
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (head.softcap == 3.0) == (architecture == "gemma2")


def test_switching_roles_never_changes_what_trains(full_base: MakeBase) -> None:
    base = full_base()

    def trains() -> dict[str, set[bool]]:
        return {role: {p.requires_grad for p in base.named_parameters(role).values()} for role in base.roles}

    expected = {"sft": {False}, "reward": {False}, "policy": {True}, "critic": {True}}
    assert trains() == expected
    for role in ("sft", "policy", None, "reward", None, "critic"):
        with base.role(role):
            pass
        assert trains() == expected
        assert not any(p.requires_grad for name, p in base.model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("others", [[], ["critic"], [None], ["sft", None, "reward", None]])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_gradients_go_to_the_role_alone_wherever_the_model_stands_at_backward(
    full_base: MakeBase, role: str, others: list[str | None]
) -> None:
    base = full_base(lora_layers=2)
    input_ids, mask = batch([6, 4], "left")
    hidden = base.hidden(role, input_ids, mask)
    loss = base.heads[role](hidden).sum() if role in base.heads else hidden.square().sum()
    for other in others:
        base.hidden(other, input_ids, mask)
    loss.backward()
    assert with_gradient(base) == {role}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in base.named_parameters(role).values())
    assert all(p.grad is None for name, p in base.model.named_parameters() if "lora_" not in name)


def test_an_error_under_the_bare_base_still_leaves_the_roles_trainable(full_base: MakeBase) -> None:
    base = full_base()
    with pytest.raises(ZeroDivisionError), base.role(None):
        _ = 1 / 0
    assert all(p.requires_grad for p in base.named_parameters("policy").values())


def test_training_one_role_leaves_the_base_and_the_others_as_they_were(full_base: MakeBase) -> None:
    base = full_base()
    input_ids, mask = batch([6, 4], "left")
    before = {name: p.detach().clone() for name, p in base.model.named_parameters() if ".policy." not in name}
    policy, score = copies(base, "policy"), base.heads["critic"].weight.detach().clone()
    optimizer = torch.optim.AdamW(base.named_parameters("policy").values(), lr=0.1, weight_decay=0.1)
    base.hidden("policy", input_ids, mask).square().sum().backward()
    optimizer.step()
    assert same(before, {name: p for name, p in base.model.named_parameters() if ".policy." not in name})
    assert torch.equal(base.heads["critic"].weight, score)
    assert not any(torch.equal(policy[name], p) for name, p in base.named_parameters("policy").items())


@every_architecture
def test_a_copy_is_bitwise_and_lives_its_own_life(full_base: MakeBase, architecture: str) -> None:
    base = full_base(architecture, lora_layers=2)
    base.heads["reward"].calibrate(0.5, 2.0)
    base.add_role("second", copy_of="reward", head=True)
    base.add_role("third", copy_of="policy")
    original = copies(base, "reward")
    assert same(copies(base, "second"), original)
    assert same(base.heads["second"].state_dict(), base.heads["reward"].state_dict())
    assert same(copies(base, "third"), copies(base, "policy"))
    assert "third" not in base.heads
    input_ids, mask = batch([6, 4], "left")
    assert torch.equal(base.scores("second", input_ids, mask), base.scores("reward", input_ids, mask))

    base.scores("second", input_ids, mask).sum().backward()
    torch.optim.SGD(base.named_parameters("second").values(), lr=1.0).step()
    assert same(copies(base, "reward"), original)
    assert not any(torch.equal(p, original[name]) for name, p in base.named_parameters("second").items())


def test_a_critic_copied_from_a_role_without_a_head_gets_a_fresh_one(full_base: MakeBase) -> None:
    base = full_base()
    base.add_role("second", copy_of="policy", head=True)
    assert "score.weight" in base.named_parameters("second")
    assert base.heads["second"].weight.requires_grad


def test_an_unknown_role_is_named(full_base: MakeBase) -> None:
    with pytest.raises(KeyError, match="no role 'polcy'"):
        full_base().hidden("polcy", *batch([4], "left"))


# ---- dropout -------------------------------------------------------------------------------------------------------


def test_dropout_is_on_for_one_role_and_only_inside(full_base: MakeBase) -> None:
    base = full_base(lora_dropout=0.5)
    input_ids, mask = batch([6, 6], "left")

    def differs(role: str | None) -> bool:
        with torch.no_grad():
            return not torch.equal(base.hidden(role, input_ids, mask), base.hidden(role, input_ids, mask))

    assert not differs("policy")
    with base.dropout("policy"):
        assert differs("policy")
        assert not differs("critic") and not differs("sft") and not differs(None)
    assert not differs("policy")
    with pytest.raises(ZeroDivisionError), base.dropout("policy"):
        _ = 1 / 0
    assert not differs("policy")


def test_the_bases_own_dropouts_never_are_on(tokenizer: PreTrainedTokenizerFast) -> None:
    base = SharedBase(tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), tokenizer, settings())
    base.add_role("policy")
    input_ids, mask = batch([6, 6], "left")
    with torch.no_grad(), base.dropout("policy"):
        assert torch.equal(base.hidden("policy", input_ids, mask), base.hidden("policy", input_ids, mask))


# ---- settings and refusals -----------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize(("lora_layers", "expected"), [(None, {0, 1, 2, 3}), (4, {0, 1, 2, 3}), (1, {3})])
def test_adapters_stand_on_the_top_layers_alone(
    bare_base: MakeBase, architecture: str, lora_layers: int | None, expected: set[int]
) -> None:
    base = bare_base(architecture, lora_layers=lora_layers)
    base.add_role("policy")
    numbers = [[int(part) for part in name.split(".") if part.isdigit()] for name in base.named_parameters("policy")]
    assert {number[0] for number in numbers} == expected
    assert base.first_adapted_layer == min(expected)
    assert not any("lm_head" in name or "embed" in name for name in base.named_parameters("policy"))


@every_architecture
@pytest.mark.parametrize("lora_layers", [None, 2])
def test_a_second_fresh_role_is_adapted_like_the_first(
    bare_base: MakeBase, architecture: str, lora_layers: int | None
) -> None:
    """Adapters add linear modules to the base; these are not targets."""
    base = bare_base(architecture, lora_layers=lora_layers)
    base.add_role("policy")
    base.add_role("critic")
    assert base.named_parameters("critic").keys() == base.named_parameters("policy").keys()


def test_only_the_named_modules_get_an_adapter(bare_base: MakeBase) -> None:
    base = bare_base(lora_target_modules=["q_proj", "down_proj"])
    base.add_role("policy")
    assert {name.split(".")[-3] for name in base.named_parameters("policy")} == {"q_proj", "down_proj"}
    assert {tuple(p.shape) for n, p in base.named_parameters("policy").items() if "q_proj.lora_A" in n} == {(4, 32)}


def test_wrong_adapter_settings_are_refused(bare_base: MakeBase) -> None:
    with pytest.raises(UserError, match=r"no linear module 'q_prj'.*did you mean 'q_proj'\?.*up_proj, v_proj"):
        bare_base(lora_target_modules=["q_prj"]).add_role("policy")
    with pytest.raises(UserError, match="--lora_layers must be at most 4, the number of decoder layers; got 5"):
        bare_base(lora_layers=5).add_role("policy")


def test_padded_vocabulary(bare_base: MakeBase) -> None:
    base = bare_base()
    assert (base.vocab_size, base.vocabulary.weight.shape[0], base.rows) == (258, 288, 288)


def test_the_lower_layers_are_computed_for_every_role_where_the_model_cannot_start_above_them(
    bare_base: MakeBase,
) -> None:
    """In Gemma 3n, upper layers use the keys of lower ones."""
    shared = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    per_layer: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 288}
    per_layer["activation_sparsity_pattern"] = [0.0] * 4
    tiny = {"num_key_value_heads": 2, "head_dim": 8, "altup_num_inputs": 2, "laurel_rank": 4, "sliding_window": 5}
    model = tiny_model("gemma3n_text", **shared, **per_layer, **tiny)
    base = SharedBase(model, bare_base().tokenizer, settings(lora_layers=2))
    base.add_role("policy")
    randomise(base, "policy", 0)
    input_ids, mask = batch([6, 6], "right")
    assert base.trunk(input_ids, mask) is None
    assert [note for note in base.notes if "cannot be run from decoder layer 2" in note]
    with torch.no_grad(), base.role("policy"):
        expected = model(input_ids=input_ids, attention_mask=mask).logits
    head, hidden = base.vocabulary, base.hidden("policy", input_ids, mask)
    logits = head.scale * capped(nn.functional.linear(hidden, head.weight, head.bias), head.softcap)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_roles_do_not_nest(full_base: MakeBase) -> None:
    base = full_base()
    with base.role("policy"), pytest.raises(RuntimeError, match="inside another role"):
        base.hidden(None, *batch([3], "right"))
    base.hidden("sft", *batch([3], "right"))
