"""Which modules get an adapter, on blocks made for this test: by structure, not by a list of architectures."""

import pytest
import torch
from tiny_models import MakeBase, settings, tiny_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase
from rlhf_fast.models.layers import Decoder
from rlhf_fast.models.targets import find_targets


def targets_of(layer: nn.Module) -> tuple[set[str], set[str], list[str]]:
    """(linear, gates, fused) of a decoder of this one layer, by their path inside it."""
    found = find_targets(Decoder(nn.Module(), "layers", nn.ModuleList([layer]), {}))
    start = len("layers.0.")
    return {path[start:] for path in found.linear}, {path[start:] for path in found.gates}, found.fused


def block(**parts: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def expert() -> nn.Module:
    return block(gate_proj=nn.Linear(8, 16), up_proj=nn.Linear(8, 16), down_proj=nn.Linear(16, 8))


def test_experts_that_are_linear_modules_are_adapted_and_their_router_is_not() -> None:
    experts = nn.ModuleList([expert() for _ in range(4)])
    mlp = block(experts=experts, switch=nn.Linear(8, 4), shared=expert(), mixer=nn.Linear(8, 1))
    linear, gates, fused = targets_of(block(mlp=mlp, self_attn=block(k_proj=nn.Linear(8, 4))))
    assert gates == {"mlp.switch", "mlp.mixer"} and fused == []
    assert "self_attn.k_proj" in linear  # four outputs too, but not part of the mixture
    assert {"mlp.experts.3.gate_proj", "mlp.shared.down_proj"} <= linear
    assert len(linear) == 1 + 5 * 3


def test_fused_experts_are_named_and_the_shape_of_their_router_tells_it() -> None:
    experts = block()
    experts.gate_up_proj = nn.Parameter(torch.zeros(6, 8, 32))
    experts.down_proj = nn.Parameter(torch.zeros(6, 16, 8))
    experts.down_proj_bias = nn.Parameter(torch.zeros(6, 8))
    mlp = block(experts=experts, chooser=nn.Linear(8, 6), dense=nn.Linear(8, 8))
    linear, gates, fused = targets_of(block(mlp=mlp))
    assert (linear, gates) == ({"mlp.dense"}, {"mlp.chooser"})
    assert fused == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("name", ["gate", "router", "shared_expert_gate", "expert_router"])
def test_a_gate_is_told_by_its_name_and_gate_proj_is_none(name: str) -> None:
    mlp = block(**{name: nn.Linear(8, 5), "gate_proj": nn.Linear(8, 5), "gate_up_proj": nn.Linear(8, 5)})
    inner = block(**{name: block(weights=nn.Linear(8, 5))})
    linear, gates, _ = targets_of(block(mlp=mlp, other=inner))
    assert gates == {f"mlp.{name}", f"other.{name}.weights"}
    assert linear == {"mlp.gate_proj", "mlp.gate_up_proj"}


def test_a_convolution_is_no_expert() -> None:
    assert targets_of(block(conv=nn.Conv1d(8, 8, 4), out=nn.Linear(8, 8)))[2] == []


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("qwen2_moe", "shared_expert_gate", r"'shared_expert_gate' gets no adapter \(a router or a gate\)"),
        ("phimoe", "router", r"'router' gets no adapter \(a router or a gate\)"),
        ("glm4_moe", "down_proj", r"'down_proj' gets no adapter \(PEFT takes this name for the fused experts\)"),
        ("qwen3_moe", "gate", "no linear module 'gate'"),
        ("llama", "o_prj", r"no linear module 'o_prj'.*did you mean 'o_proj'"),
    ],
)
def test_modules_that_get_none_are_refused_by_name(
    bare_base: MakeBase, architecture: str, name: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as error:
        bare_base(architecture, lora_target_modules=["q_proj", name]).add_role("policy")
    assert "\n" not in str(error.value)


def test_an_empty_list_of_modules_is_refused(bare_base: MakeBase) -> None:
    with pytest.raises(UserError, match="--lora_target_modules must name a module: all-linear, or some of down_proj"):
        bare_base(lora_target_modules=[]).add_role("policy")


def test_nothing_is_noted_where_the_user_chose_the_modules(bare_base: MakeBase) -> None:
    assert bare_base("qwen3_moe").notes != []
    assert bare_base("qwen3_moe", lora_target_modules=["q_proj"]).notes == []


def test_a_module_whose_weight_is_read_past_it_gets_no_adapter(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        down = layer.mlp.down_proj
        layer.mlp.act_fn.forward = lambda x: nn.functional.silu(x)
        layer.mlp.forward = lambda x, mlp=layer.mlp, down=down: nn.functional.linear(
            nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x), down.weight
        )
    base = SharedBase(model, tokenizer, settings())
    base.add_role("policy")
    assert base.notes == ["not adapted, the model reads its weight without calling it: down_proj"]
    assert not any("down_proj" in name for name in base.named_parameters("policy"))
