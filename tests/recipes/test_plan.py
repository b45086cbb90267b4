"""`rlhf-fast plan`: what it counts agrees with what a run allocates, and it says what to lower."""

from collections import namedtuple

import psutil
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models import recomputing
from rlhf_fast.recipes import plan, ppo
from rlhf_fast.recipes.stage import Stage

PHASES = ["loading", "rollout", "scoring", "update", "saving"]
OF_STAGE = {"sft": ["loading", "update", "saving"], "reward": ["loading", "update", "calibration", "saving"]}
OF_STAGE["dpo"] = OF_STAGE["sft"]


def planned_shape(config) -> plan.Shape:
    from transformers import AutoConfig

    with plan.pretrained.located(config.model_name_or_path) as source:
        return plan.read_shape(config, AutoConfig.from_pretrained(source))


@pytest.mark.parametrize("names", [[], ["lm_head"], ["embed_tokens", "lm_head"]], ids=len)
def test_shapes_are_those_of_the_model(ppo_config, names):
    for layers in (None, 1):
        config = ppo_config(lora_layers=layers, sft_adapter=None, reward_adapter=None, reward_functions=["f.py:f"])
        config.lora_target_modules = ["all-linear", *names]
        shape, stage = planned_shape(config), Stage("ppo", config)
        assert shape.weights == sum(p.numel() for p in stage.base.model.parameters())
        stage.base.add_role("policy")
        assert shape.adapter == sum(p.numel() for p in stage.base.named_parameters("policy").values())
        assert shape.linear * shape.itemsize == stage.base.merged("policy").bytes
        assert shape.adapted == shape.layers - stage.base.first_adapted_layer


def test_what_a_layer_keeps_is_what_is_counted(ppo_config, monkeypatch):
    """Within a fifth: adapters' inner products and masks are left out."""
    config = ppo_config(
        lora_layers=None, sft_adapter=None, reward_adapter=None, reward_functions=["f.py:f"], num_mini_batches=1
    )
    stage = Stage("ppo", config)
    ppo.add_roles(stage)
    frozen = {p.untyped_storage()._cdata for p in stage.base.model.parameters()}
    seen = {}
    real = recomputing._pack

    def pack(tensor):
        kept = real(tensor)
        if isinstance(kept, torch.Tensor) and kept.untyped_storage()._cdata not in frozen:
            seen[kept.untyped_storage()._cdata] = kept.untyped_storage()
        return kept

    monkeypatch.setattr(recomputing, "_pack", pack)
    lengths = [60, 40, 50, 60]
    mask = torch.tensor([[1] * length + [0] * (60 - length) for length in lengths])
    states = stage.base.hidden_of(["policy", "critic"], mask, mask)
    shape = planned_shape(config)
    counted = shape.layers * plan.kept_bytes(shape, 2 * sum(lengths), 2 * len(lengths), max(lengths))
    assert counted == pytest.approx(sum(storage.nbytes() for storage in seen.values()), rel=0.2)
    assert len(states) == 2


def test_a_plan_names_each_phase_and_the_peak(ppo_config, capsys):
    found = plan.plan(ppo_config(micro_batch_size=None, micro_batch_tokens=200))
    assert [name for name in found if name.startswith("memory")] == [f"memory_{phase}" for phase in PHASES]
    assert found["seconds_step"] == pytest.approx(sum(found[f"seconds_{p}"] for p in ("rollout", "scoring", "update")))
    out = capsys.readouterr().out
    assert all(phase in out for phase in PHASES) and "s a step" in out


@pytest.mark.parametrize("stage", OF_STAGE)
def test_stages_without_ppo_are_planned(sft_config, reward_config, dpo_config, capsys, stage):
    found = plan.plan({"sft": sft_config, "reward": reward_config, "dpo": dpo_config}[stage]())
    assert [name for name in found if name.startswith("memory")] == [f"memory_{phase}" for phase in OF_STAGE[stage]]
    assert found["seconds_step"] == found["seconds_update"] > 0
    assert f"plan of {stage}" in capsys.readouterr().out


def test_the_largest_micro_batch_has_the_longest_rows_of_a_batch(sft_config, ppo_config):
    lengths = [10, 20, 30, 40]
    assert plan.tokens_of_largest(sft_config(batch_size=4), lengths, 2) == 70  # sorted by length: 30 and 40
    assert plan.tokens_of_largest(ppo_config(batch_size=4), lengths, 2) == pytest.approx(2 * 25 + 2 * 125**0.5 * 2**0.5)
    assert plan.tokens_of_largest(ppo_config(batch_size=4), lengths, 4) == 100


def test_memory_grows_with_what_it_should(ppo_config):
    def update(**settings) -> float:
        config = ppo_config(lora_layers=None, batch_size=32, **settings)
        parts = plan.micro_batches(config, [40] * 32)
        return plan.predict_memory(config, planned_shape(config), [(40,)] * 32, parts)["update"]

    large, small = update(micro_batch_size=32), update(micro_batch_size=None, micro_batch_tokens=80)
    assert large > small
    assert update(micro_batch_size=32, gradient_checkpointing=True) < large


def test_without_a_critic_every_phase_after_loading_takes_less(ppo_config):
    def predicted(**settings) -> dict[str, float]:
        config = ppo_config(batch_size=8, num_generations=4, **settings)
        return plan.predict_memory(config, planned_shape(config), [(40,)] * 8, [4, 4])

    critic, alone = predicted(), predicted(advantage_estimator="rloo")
    assert all(alone[phase] < critic[phase] - 1e4 for phase in PHASES if phase != "loading")
    assert plan.plan(ppo_config(num_generations=4, advantage_estimator="rloo"))["seconds_update"] > 0


def test_what_does_not_fit_is_told_with_the_setting_to_lower(ppo_config, monkeypatch):
    machine = namedtuple("machine", "total")(10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    seconds = {"rollout": 1.0, "scoring": 1.0, "update": 1.0, "step": 3.0}
    for phase, setting in {"loading": "--dtype", "rollout": "--rollout_engine", "update": "--gradient_check"}.items():
        with pytest.raises(UserError, match=f"{phase} does not fit into this machine's 0.0 GB: .*{setting}"):
            plan.show(ppo_config(), dict.fromkeys(PHASES, 1.0) | {phase: 2e6}, seconds)
