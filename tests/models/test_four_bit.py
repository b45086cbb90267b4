"""A base whose linear layers bitsandbytes holds in 4 bits: loading, LoRA layers, merged copies, and a run."""

import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import settings
from torch import Tensor

from rlhf_fast import lora_layers
from rlhf_fast.base_weights import in_four_bits, matrix
from rlhf_fast.cli import main
from rlhf_fast.config import StageConfig
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, load_pretrained

pytest.importorskip("bitsandbytes")
IDS = torch.arange(2, 26).view(2, 12)
MASK = torch.ones_like(IDS)


@pytest.fixture
def stage(tokenizer_folder: Path) -> StageConfig:
    named = {"lora_target_modules": ["all-linear", "embed_tokens"], "model_name_or_path": str(tokenizer_folder)}
    return settings(**named, load_in_4bit=True, dtype="float32")


@pytest.fixture
def base(stage: StageConfig) -> SharedBase:
    base = SharedBase(*load_pretrained(stage, torch.device("cpu")), stage)
    for role in ("sft", "policy"):
        base.add_role(role)
        for name, parameter in base.named_parameters(role).items():
            generator = torch.Generator().manual_seed(len(name) + len(role))
            parameter.data.normal_(0, 0.1, generator=generator)
    return base


def linear_layers(base: SharedBase) -> list[torch.nn.Module]:
    return [module for module in base.model.modules() if hasattr(module, "compute_dtype")]


def gradients(base: SharedBase) -> tuple[Tensor, list[Tensor]]:
    parameters = list(base.named_parameters("policy").values())
    states = base.hidden("policy", IDS, MASK)
    return states, list(torch.autograd.grad((states * torch.linspace(-1, 1, states.shape[-1])).sum(), parameters))


def test_every_linear_layer_is_packed_and_the_rest_is_not(base: SharedBase) -> None:
    layers = linear_layers(base)
    assert len(layers) == 7 * 4 and all(map(in_four_bits, layers))
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)
    assert base.dtype == base.vocabulary.weight.dtype == torch.float32
    assert base.one_pass and base.packs and base.notes == []


def test_states_and_gradients_are_those_of_the_unpacked_weights(base: SharedBase, stage: StageConfig) -> None:
    plain_stage = dataclasses.replace(stage, load_in_4bit=False)
    model, tokenizer = load_pretrained(plain_stage, base.device)
    packed = {
        path.replace(".base_layer", "").removeprefix("base_model.model."): layer
        for path, layer in base.model.named_modules()
        if hasattr(layer, "compute_dtype")
    }
    with torch.no_grad():
        for path, layer in packed.items():
            model.get_submodule(path).weight.copy_(matrix(layer))
    plain = SharedBase(model, tokenizer, plain_stage)
    plain.add_role("policy")
    for name, parameter in plain.named_parameters("policy").items():
        parameter.data.copy_(base.named_parameters("policy")[name])
    states, grads = gradients(base)
    expected, expected_grads = gradients(plain)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_fused_layers_agree_with_pefts_own(base: SharedBase) -> None:
    base.packs = False
    states, grads = gradients(base)
    lora_layers.unfuse(base.model)
    expected, expected_grads = gradients(base)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-3)


def test_a_backward_keeps_no_unpacked_weight(base: SharedBase) -> None:
    layer = base.model.model.layers[1].mlp.up_proj
    kept = []
    x = torch.randn(3, 64, requires_grad=True)
    with base.role("policy"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = layer(x)
    assert all(tensor.numel() < layer.in_features * layer.out_features for tensor in kept)
    assert torch.autograd.grad(output.sum(), x)[0].isfinite().all()


def test_checkpointing_keeps_the_inputs_of_layers_alone(base: SharedBase) -> None:
    plain_states, plain = gradients(base)
    base.config = dataclasses.replace(base.config, gradient_checkpointing=True)
    inputs = []
    for layer in base.decoder.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    states = base.hidden("policy", IDS, MASK)
    assert len(inputs) == 4 and not any(found() is not None for found in inputs)
    found = torch.autograd.grad(
        (states * torch.linspace(-1, 1, states.shape[-1])).sum(), list(base.named_parameters("policy").values())
    )
    assert torch.equal(states, plain_states)
    assert all(map(torch.equal, found, plain))


def test_a_merged_copy_predicts_as_the_adapter_does(base: SharedBase) -> None:
    with base.role("policy"):
        expected = base.model(IDS).logits
    merged = base.merged("policy")
    with merged.in_use():
        found = base.model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert merged.bytes == sum(layer.in_features * layer.out_features * 4 for layer in linear_layers(base))


def test_sft_and_ppo_run_on_it(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sft.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": "yes"}) + "\n" for i in range(1, 9))
    )
    (tmp_path / "length.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    common = ["--model_name_or_path", str(tokenizer_folder), "--dataset_name", str(tmp_path / "sft.jsonl")]
    common += ["--load_in_4bit", "true", "--batch_size", "4", "--micro_batch_size", "2", "--max_steps", "2"]
    common += ["--eval_size", "2", "--max_length", "24", "--lora_r", "2"]
    main(["sft", *common, "--output_dir", str(tmp_path / "sft")])
    adapter = ["--sft_adapter", str(tmp_path / "sft" / "adapter")]
    reward = ["--reward_functions", f"{tmp_path}/length.py:length", "--response_length", "4"]
    main(["ppo", *common, *adapter, *reward, "--output_dir", str(tmp_path / "ppo")])
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert sum("perf/seconds_step" in line for line in lines) == 2


def test_a_base_that_is_quantised_already_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stage = settings(model_name_or_path=str(tmp_path), load_in_4bit=True)
    with pytest.raises(UserError, match=r"--load_in_4bit: the weights of .* are quantised already; leave it out"):
        load_pretrained(stage, torch.device("cpu"))


def test_without_bitsandbytes_it_says_what_to_install(stage: StageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r"--load_in_4bit needs bitsandbytes: pip install 'rlhf-fast\[4bit\]'"):
        load_pretrained(stage, torch.device("cpu"))
