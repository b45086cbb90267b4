"""fuse and unfuse on tiny random models of several architectures, against PEFT's own forward and backward."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.integrations.peft import fuse, unfuse

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
# Layers a decoder layer that read the same input.
ARCHITECTURES: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "llama": ({"num_key_value_heads": 2}, [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
    "qwen2": ({"num_key_value_heads": 2}, [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
    "mistral": ({"num_key_value_heads": 2}, [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
    "gemma": ({"num_key_value_heads": 2, "head_dim": 8}, [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
    "gpt2": ({}, []),
    "gpt_neox": ({}, []),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    sizes = SIZES | ARCHITECTURES[name][0]
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}
    config = AutoConfig.for_model(name, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | options
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **lora))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft.train()


def example() -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def results(model: nn.Module) -> dict[str, Tensor]:
    """Logits and the gradient of every trained parameter."""
    torch.manual_seed(3)
    model.zero_grad()
    logits = model(**example()).logits
    weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits.float() * weights).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach()} | grads


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rounding: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 1
    for name, true in theirs.items():
        assert ours[name].dtype == true.dtype
        assert (ours[name] - true).abs().max() <= rounding * true.abs().max() + 1e-8, name


def distance(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The mean relative distance of the tensors."""
    return sum(float((found[name].double() - each).norm() / each.norm()) for name, each in true.items()) / len(true)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], true) for name, true in theirs.items())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each call of lora_linear had."""
    from rlhf_fast import lora_layers as module

    counts: list[int] = []
    function = module.lora_linear

    def counting(x: Tensor, weights: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        counts.append(len(weights))
        return function(x, weights, *args, **kwargs)

    monkeypatch.setattr(module, "lora_linear", counting)
    yield counts


@every_architecture
@pytest.mark.parametrize("grouped", [True, False])
def test_within_rounding_of_peft(name: str, grouped: bool, calls: list[int]) -> None:
    model = tiny(name)
    theirs, keys = results(model), list(model.state_dict())
    report = fuse(model, example() if grouped else None)
    layers = [path for path, module in model.named_modules() if isinstance(module, Linear)]
    assert report.layers == layers and report.left == {}
    tails = [[path.rpartition(".")[2] for path in group] for group in report.groups]
    assert tails == (2 * ARCHITECTURES[name][1] if grouped else [])
    calls.clear()
    close(results(model), theirs)
    assert sum(calls) == len(layers) and len(calls) == len(layers) - sum(len(group) - 1 for group in tails)
    assert list(model.state_dict()) == keys
    unfuse(model)
    same(results(model), theirs)
    assert len(calls) == len(layers) - sum(len(group) - 1 for group in tails)


@every_architecture
def test_bfloat16_with_adapters_in_float32(name: str) -> None:
    """Both against the same model in float64. PEFT multiplies the adapters in float32; here they are rounded too."""
    model = tiny(name, torch.bfloat16)
    theirs, true = results(model), results(copy.deepcopy(model).double())
    fuse(model, example())
    ours = results(model)
    assert distance(ours, true) <= 2 * distance(theirs, true) <= 0.04


def test_autocast() -> None:
    """Both against the same model in float64."""
    model = tiny()
    true = results(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = results(model)
        fuse(model, example())
        assert distance(results(model), true) <= 1.2 * distance(theirs, true) <= 0.04


def test_dropout_in_training_alone(calls: list[int]) -> None:
    """With PEFT's masks: the order of its layers is that of a group."""
    model = tiny(lora_dropout=0.3)
    theirs = results(model)
    calm = results(model.eval())
    assert not torch.equal(theirs["logits"], calm["logits"])
    fuse(model, example())
    close(results(model), calm)
    close(results(model.train()), theirs)
    assert 3 in calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = tiny(lora_dropout=0.2)
    theirs = results(model)
    fuse(model, example())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    close(results(model), theirs)


def test_what_is_switched_later(calls: list[int]) -> None:
    model = tiny()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("default")
    plain = copy.deepcopy(model)
    fuse(model, example())

    def agree(used: bool) -> None:
        calls.clear()
        with torch.no_grad():
            ours, theirs = model(**example()).logits, plain(**example()).logits
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert bool(calls) is used

    agree(used=True)
    for each in (model, plain):
        each.set_adapter("other")
    agree(used=True)
    with model.disable_adapter(), plain.disable_adapter():
        agree(used=False)
    for each in (model, plain):
        each.base_model.set_adapter(["default", "other"])
    agree(used=False)
    for each in (model, plain):
        each.set_adapter("default")
        each.merge_adapter()
    agree(used=False)
    for each in (model, plain):
        each.unmerge_adapter()
    agree(used=True)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**example()).logits, plain(**example()).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fused_is_left_and_named() -> None:
    model = tiny(use_dora=True)
    theirs = results(model)
    report = fuse(model, example())
    assert report.layers == [] and set(report.left.values()) == {"its adapter is a DoraLinearVariant"}
    same(results(model), theirs)
    biased = fuse(tiny("gpt2", lora_bias=True))
    assert biased.layers == [] and set(biased.left.values()) == {"its adapter has a bias"}
    embedded = fuse(tiny(target_modules=["q_proj", "embed_tokens"]))
    assert [path.rpartition(".")[2] for path in embedded.left] == ["embed_tokens"]
    assert "over Embedding" in next(iter(embedded.left.values())) and len(embedded.layers) == 2
    hooked = tiny()
    hooked.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)
    assert list(fuse(hooked).left.values()) == ["a part of it has hooks"]
    merged = tiny()
    merged.merge_adapter()
    assert set(fuse(merged).left.values()) == {"its adapter is merged"}
    with pytest.raises(TypeError, match="fuse: Linear has no LoRA layer of PEFT"):
        fuse(nn.Linear(2, 2))


def test_a_layer_whose_input_changed_in_between_is_computed_again() -> None:
    """The group of another forward, and an input that was written to, give nothing away."""
    model = tiny()
    fuse(model, example())
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(3, 32)
    with torch.no_grad():
        attention.q_proj(x)
        x.mul_(2)
        again = attention.k_proj(x)
        unfuse(model)
        torch.testing.assert_close(again, attention.k_proj(x), rtol=1e-5, atol=1e-6)
    fuse(model, example())
    attention.q_proj(x)
    with torch.no_grad():
        assert not attention.k_proj(x).requires_grad
    assert attention.v_proj(x).requires_grad
    with torch.inference_mode():
        attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def test_rs_lora_copies_and_files(tmp_path: Any) -> None:
    model = tiny(use_rslora=True)
    theirs = results(model)
    fuse(model, example())
    close(results(model), theirs)
    twin = copy.deepcopy(model)
    fused = results(twin)
    close(fused, theirs)
    first = twin.base_model.model.model.layers[0].self_attn
    assert first.q_proj._fused_group.layers[0] is first.q_proj
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny().unload(), tmp_path, is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**example()).logits, theirs["logits"], rtol=1e-4, atol=1e-5)


def test_compiled() -> None:
    torch._dynamo.reset()
    model = tiny().eval()
    theirs = model(**example()).logits
    fuse(model, example())
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 32)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(**example()).logits, theirs, rtol=1e-4, atol=1e-5)
