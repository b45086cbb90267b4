"""A resume continues the same run: changed inputs are refused by name, or applied from there on if asked for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_lines import write_jsonl
from safetensors.torch import load_file
from test_checkpoint import seal

from rlhf_fast.recipes.identity import base_digest, tokenizer_digest

AUTO = "--resume_from_checkpoint auto --max_steps 4"


@pytest.fixture
def begun(command, tmp_path):
    """``begun(stage)``: two steps are done in ``out``."""

    def begin(stage: str) -> None:
        assert command(stage, "--save_steps 1 --eval_size 2").code == 0

    return begin


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


DATA = {
    "sft": ("sft.jsonl", {"prompt": "new", "completion": "row"}),
    "reward": ("pairs.jsonl", {"prompt": "new", "chosen": "a", "rejected": "b"}),
    "ppo": ("prompts.jsonl", {"prompt": "new"}),
}


@pytest.mark.parametrize("stage", DATA)
def test_a_row_more_is_refused_and_the_same_file_under_another_name_is_not(stage, begun, command, tmp_path):
    begun(stage)
    name, row = DATA[stage]
    shutil.copy(tmp_path / name, tmp_path / "same.jsonl")
    with (tmp_path / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    outcome = command(stage, f"{AUTO} --eval_size 2")
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert "out/checkpoint-2 is of another run: training data (10 rows, " in last and "-> 11 rows" in last
    assert "--resume_with_changes true" in last
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    assert command(stage, f"{AUTO} --eval_size 2 --dataset_name same.jsonl").code == 0


def test_a_column_that_reward_functions_take_is_part_of_the_data(command, tmp_path):
    (tmp_path / "f.py").write_text("def f(prompts, completions, answer): return [1.0] * len(prompts)\n")
    flags = "--reward_functions f.py:f --eval_size 0"
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"q{i}", "answer": "a"} for i in range(8)])
    assert command("ppo", f"{flags} --save_steps 1").code == 0
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"q{i}", "answer": "b"} for i in range(8)])
    outcome = command("ppo", f"{flags} {AUTO}")
    assert outcome.code == 2 and "training data (8 rows, " in outcome.err


CHANGES = {
    "learning rate": ("sft", "--learning_rate 0.5", "learning_rate (0.0002 -> 0.5)"),
    "seed": ("sft", "--seed 3", "seed (0 -> 3)"),
    "two": ("sft", "--weight_decay 9 --lora_alpha 8", "lora_alpha (32.0 -> 8.0), weight_decay (0.0 -> 9.0)"),
    "dtype": ("sft", "--dtype bfloat16", "dtype of the base (float32 -> bfloat16)"),
    "template": ("sft", "--chat_template '{{{{ messages }}}}'", "tokenizer or chat template ("),
    "no adapter": ("reward", "--sft_adapter {sft}", "sft adapter (none -> "),
    "lora_r": ("sft", "--lora_r 4", "does not fit this config's adapters"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_named(case, begun, command):
    stage, flags, message = CHANGES[case]
    begun(stage)
    outcome = command(stage, f"{AUTO} --eval_size 2 {flags}")
    assert outcome.code == 2 and message in outcome.err.splitlines()[-1]
    if case == "lora_r":
        assert "(lora_r (16 -> 4))" in outcome.err.splitlines()[-1]


def test_another_base_of_the_same_shape_is_named(begun, command, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_fast.models.builtin import tiny_model

    begun("sft")
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(tmp_path / "other")
    shutil.copytree(tiny_model(), tmp_path / "same")
    outcome = command("sft", f"{AUTO} --eval_size 2 --model_name_or_path ./other")
    assert outcome.code == 2 and "is of another run: base (" in outcome.err
    assert command("sft", f"{AUTO} --eval_size 2 --model_name_or_path ./same").code == 0


def test_what_ends_a_response_is_part_of_the_run(command, tmp_path):
    from rlhf_fast.models.builtin import tiny_model

    shutil.copytree(tiny_model(), tmp_path / "model")
    flags = "--eval_size 2 --save_steps 1 --model_name_or_path ./model"
    assert command("ppo", f"{flags}").code == 0
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 1]}))
    outcome = command("ppo", f"{AUTO} {flags}")
    assert outcome.code == 2 and "is of another run: stop tokens ([1] -> [0, 1])" in outcome.err


def test_modules_in_another_order_are_the_same(begun, command):
    assert command("sft", "--save_steps 1 --eval_size 2 --lora_target_modules q_proj,up_proj").code == 0
    assert command("sft", f"{AUTO} --eval_size 2 --lora_target_modules up_proj,q_proj").code == 0


def test_how_a_tokenizer_splits_and_joins_is_part_of_it():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2}

    def digest(merges=(), normalizer=None, decoder=None, padding=False) -> str:
        backend = Tokenizer(models.BPE(vocabulary, list(merges)))
        backend.normalizer, backend.decoder = normalizer or backend.normalizer, decoder or backend.decoder
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a")
        tokenizer(["a", "ab"], padding=padding)
        return tokenizer_digest(tokenizer)

    other = [{"merges": [("a", "b")]}, {"normalizer": normalizers.Lowercase()}, {"decoder": decoders.Fuse()}]
    assert len({digest(), *(digest(**change) for change in other)}) == 4
    assert digest(padding=True) == digest()


def test_buffers_that_are_saved_are_part_of_the_base():
    from transformers import AutoModelForCausalLM

    from rlhf_fast.models.builtin import tiny_model

    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    digests = []
    for value in (0.0, 1.0):
        model.register_buffer("bias_of_a_router", torch.full((3,), value))
        model.register_buffer("scratch", torch.rand(3), persistent=False)
        digests.append(base_digest(model))
    assert digests[0] != digests[1]
    model.register_buffer("scratch", torch.rand(3), persistent=False)
    assert base_digest(model) == digests[1]


def test_another_version_is_named(begun, command, monkeypatch):
    begun("sft")
    monkeypatch.setattr("rlhf_fast.__version__", "9.9")
    assert "version of rlhf-fast (0.1.0 -> 9.9)" in command("sft", f"{AUTO} --eval_size 2").err


def test_changes_that_are_asked_for_hold_and_are_recorded(begun, command, tmp_path):
    begun("ppo")
    flags = "--learning_rate 0.5 --kl_coef 0.7 --warmup_ratio 0 --kl_target null"
    outcome = command("ppo", f"{AUTO} --eval_size 2 --resume_with_changes true {flags}")
    assert outcome.code == 0 and "changed from here on: " in outcome.err and "kl_coef (0.05 -> 0.7)" in outcome.err
    later = [line for line in lines(tmp_path / "out") if line["step"] > 2 and "lr" in line]
    assert [line["lr"] for line in later] == [0.5, 0.5]
    assert [line["objective/kl_coef"] for line in later] == [0.7, 0.7]
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["learning_rate"] == 0.5


def test_a_longer_run_needs_no_leave_and_says_so(begun, command, tmp_path):
    begun("sft")
    outcome = command("sft", f"{AUTO} --eval_size 2 --micro_batch_size 1")
    assert outcome.code == 0
    assert "sft: changed from here on: micro_batch_size (2 -> 1), max_steps (2 -> 4)" in outcome.err
    assert not [line for line in lines(tmp_path / "out") if line["step"] > 4]


def test_a_checkpoint_that_notes_nothing_is_taken_and_told(begun, command, tmp_path):
    begun("sft")
    path = tmp_path / "out" / "checkpoint-2"
    state = json.loads((path / "state.json").read_text())
    del state["identity"]
    (path / "state.json").write_text(json.dumps(state))
    seal(path)
    outcome = command("sft", f"{AUTO} --eval_size 2 --weight_decay 1")
    assert outcome.code == 0 and "noted no data and settings: they are not compared" in outcome.err


def test_the_best_adapter_is_that_of_the_course_that_went_on(command, tmp_path):
    """The discarded steps kept improving; the resumed run does not improve after step 3."""
    flags = "--save_steps 1 --save_total_limit 9 --eval_steps 1 --max_steps 6 --eval_size 2 --lr_scheduler_type "
    flags += "constant_with_warmup --learning_rate 0.001"
    assert command("sft", flags).code == 0
    out = tmp_path / "out"
    third = load_file(out / "checkpoint-3" / "sft" / "adapter_model.safetensors")
    abandoned = load_file(out / "adapter" / "adapter_model.safetensors")
    resume = f"{flags.replace('0.001', '1e-30')} --resume_from_checkpoint out/checkpoint-3 --patience 50"
    outcome = command("sft", f"{resume} --resume_with_changes true")
    assert outcome.code == 0
    figures = json.loads((out / "summary.json").read_text())["figures"]
    assert figures["validation_loss"]["note"] == "best, at step 3"
    kept = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(tensor.equal(third[name]) for name, tensor in kept.items())
    assert any(not tensor.equal(abandoned[name]) for name, tensor in kept.items())


def test_without_the_folder_best_the_adapter_comes_from_the_checkpoint(begun, command, tmp_path):
    begun("sft")
    shutil.rmtree(tmp_path / "out" / "best")
    assert command("sft", "--eval_size 2 --resume_from_checkpoint auto").code == 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_goes_on_is_not_a_finished_one(begun, command, monkeypatch, tmp_path):
    from rlhf_fast.recipes.stage import Stage

    def stop(*arguments: object) -> float:
        raise KeyboardInterrupt

    begun("sft")
    assert (tmp_path / "out" / "summary.json").is_file()
    monkeypatch.setattr(Stage, "update", stop)
    assert command("sft", f"{AUTO} --eval_size 2").code == 130
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_finished_stage_of_a_run_is_passed_over_only_with_its_settings(command, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "{model_name_or_path: tiny-random, batch_size: 4, max_steps: 2, max_length: 64, output_dir: w, stages: [sft], "
        "sft: {dataset_name: sft.jsonl}}"
    )
    assert command("run", "--config run.yaml").code == 0
    resumed = "--config run.yaml --resume_from_checkpoint auto"
    outcome = command("run", resumed)
    assert outcome.code == 0 and "sft: has finished before, skipped" in outcome.err
    outcome = command("run", f"{resumed} --learning_rate 1")
    assert outcome.code == 2 and "sft has finished with other settings: learning_rate (0.0002 -> 1.0)" in outcome.err
