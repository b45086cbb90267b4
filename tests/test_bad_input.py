"""Typical mistakes on the command line: one line that says what is wrong, and exit code 2."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlhf_fast.models.builtin import tiny_model


def rows(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def chat(number: int) -> dict:
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}]}


LONG = "x" * 100
FILES = {
    "misspelt.jsonl": rows({"promt": "a", "completion": "b"}),
    "no_completion.jsonl": rows({"prompt": "a"}),
    "empty.jsonl": "",
    "one.jsonl": rows({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}),
    "one_pair.jsonl": rows({"prompt": "a", "chosen": "b", "rejected": "c"}),
    "gap.jsonl": rows(*({"prompt": f"q{i}", "completion": "b" if i else None} for i in range(8))),
    "gaps.jsonl": rows(*({"prompt": f"q{i}", "completion": ""} for i in range(8))),
    "same.jsonl": rows(*({"prompt": f"q{i}", "chosen": "b", "rejected": "c" if i else "b"} for i in range(8))),
    "all_same.jsonl": rows({"prompt": "a", "chosen": "b", "rejected": "b"}),
    "long.jsonl": rows(*({"prompt": LONG if i == 0 else f"q{i}", "completion": "b"} for i in range(8))),
    "all_long.jsonl": rows({"prompt": LONG, "completion": "b", "chosen": "b", "rejected": "c"}),
    "number.jsonl": rows({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 7}),
    "broken.jsonl": rows({"prompt": "a", "completion": "b"}) + '{"prompt": \n',
    "chat.jsonl": rows(*(chat(i) for i in range(8))),
    "key.yaml": "batch_sise: 3\n",
    "section.yaml": "output_dir: out\nsft:\n  patiense: 3\n",
    "syntax.yaml": "sft: [a\n",
    "type.yaml": "batch_size: many\n",
    "rewards.py": """
import sys
def right(prompts, completions): return [1.0] * len(completions)
def kaputt(prompts, completions): raise ValueError("kaputt")
def few(prompts, completions): return [1.0]
def nan(prompts, completions): return [float("nan")] * len(completions)
def nothing(prompts, completions): pass
""",
    "syntax.py": "def f(:\n",
    "exits.py": "raise SystemExit(3)\n",
    "a_file": "",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the tiny model, each with the fault that its name describes."""
    folder, tiny = tmp_path_factory.mktemp("models"), tiny_model()

    def copy(name: str) -> Path:
        return shutil.copytree(tiny, folder / name)

    def without(name: str, key: str) -> None:
        path = copy(name) / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings[key]
        path.write_text(json.dumps(settings))

    (copy("no_weights") / "model.safetensors").unlink()
    (copy("damaged_weights") / "model.safetensors").write_bytes(b"not a tensor")
    (copy("broken_config") / "config.json").write_text("{")
    (copy("other_type") / "config.json").write_text('{"model_type": "t5"}')
    for file in copy("no_tokenizer").glob("*token*"):
        file.unlink()
    without("no_pad", "pad_token")
    without("no_eos", "eos_token")
    (copy("no_template") / "chat_template.jinja").unlink()
    (folder / "nothing").mkdir()

    model = AutoModelForCausalLM.from_pretrained(tiny)
    pickled = copy("pickled")
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    model.save_pretrained(copy("infinite"))

    small = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=48, eos_token_id=1, bos_token_id=1)
    GPT2LMHeadModel(small).save_pretrained(folder / "gpt2")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "gpt2")
    return folder


MISTAKES = {
    # data
    "misspelt column": ("sft", "--dataset_name misspelt.jsonl", "misspelt.jsonl: .*'promt' .did you mean 'prompt'"),
    "misspelt prompt": ("ppo", "--dataset_name misspelt.jsonl", "misspelt.jsonl: .*'promt' .did you mean 'prompt'"),
    "missing column": ("sft", "--dataset_name no_completion.jsonl", r"expected the columns .*; found \['prompt'\]"),
    "no pairs": ("reward", "--dataset_name sft.jsonl", "sft.jsonl: expected the columns chosen and rejected"),
    "empty file": ("sft", "--dataset_name empty.jsonl", "empty.jsonl: the file is empty"),
    "one row, sft": ("sft", "--dataset_name one.jsonl", "one.jsonl, --eval_size 0.1: cannot hold out 1 of 1 rows"),
    "one row, reward": ("reward", "--dataset_name one.jsonl", "one.jsonl, --eval_size 0.1: cannot hold out"),
    "one row, ppo": ("ppo", "--dataset_name one.jsonl", "one.jsonl, --eval_size 0.1: cannot hold out"),
    "no responses": ("sft", "--dataset_name gaps.jsonl", "no usable row .*8 dropped: empty response .first: row 1"),
    "no preference": ("reward", "--dataset_name all_same.jsonl", "no usable row .*1 dropped: chosen and rejected are"),
    "long prompts, sft": ("sft", "--dataset_name all_long.jsonl", "no usable row .*the prompt fills the window"),
    "long prompts, reward": ("reward", "--dataset_name all_long.jsonl", "no usable row .*the prompt fills the window"),
    "long prompts, ppo": ("ppo", "--dataset_name all_long.jsonl", "no usable row .*prompt is longer than the window"),
    "wrong type": (
        "sft",
        "--dataset_name number.jsonl --strict true",
        "number.jsonl, row 2: completion: expected a string",
    ),
    "broken line": ("sft", "--dataset_name broken.jsonl", "broken.jsonl: line 2: broken JSON"),
    "no data file": ("sft", "--dataset_name stf.jsonl", "stf.jsonl: no such file or folder .did you mean 'sft.jsonl'"),
    "no demo": ("sft", "--dataset_name demo/sfft", "demo/sfft: .*did you mean 'demo/sft'"),
    "rename": ("sft", "--rename_columns promt=prompt", "sft.jsonl: no column 'promt' to rename .did you mean 'prompt'"),
    "held out = trained on": ("sft", "--eval_dataset_name sft.jsonl", "every held-out prompt is trained on"),
    "eval_size": ("sft", "--eval_size 50", "sft.jsonl, --eval_size 50: cannot hold out 50 of 12 rows"),
    # model and tokenizer
    "no model folder": ("sft", "--model_name_or_path ./no_model", "no model folder ./no_model"),
    "misspelt model": ("sft", "--model_name_or_path /{models}/gtp2", "no model folder .*gtp2 .did you mean 'gpt2'"),
    "no config": ("sft", "--model_name_or_path {models}/nothing", "nothing is a folder without config.json"),
    "broken config": ("sft", "--model_name_or_path {models}/broken_config", "broken_config.*not a valid JSON file"),
    "no weights": ("sft", "--model_name_or_path {models}/no_weights", "no .*safetensors in .*no_weights"),
    "damaged weights": ("sft", "--model_name_or_path {models}/damaged_weights", "damaged_weights: .* is damaged"),
    "pickled weights": ("sft", "--model_name_or_path {models}/pickled", "set --allow_pickle_weights true if you trust"),
    "infinite weight": ("sft", "--model_name_or_path {models}/infinite", "not finite .*layers.0.mlp.up_proj.weight"),
    "no language model": ("sft", "--model_name_or_path {models}/other_type", "other_type: it is no causal language"),
    "no tokenizer": ("sft", "--model_name_or_path {models}/no_tokenizer", "no tokenizer in .*no_tokenizer"),
    "no EOS": ("sft", "--model_name_or_path {models}/no_eos", "no_eos has no EOS token.*set eos_token"),
    "no chat template": (
        "sft",
        "--model_name_or_path {models}/no_template --dataset_name chat.jsonl",
        "chat.jsonl, row 1: .*no chat template; give one with --chat_template FILE",
    ),
    "template file": ("sft", "--chat_template no.jinja", "--chat_template no.jinja: no such file"),
    "short window": ("sft", "--model_name_or_path {models}/gpt2", "--max_length must be at most 48, .*; got 64"),
    "attention": ("sft", "--attn_implementation flush", "cannot load the model tiny-random: .*flush"),
    # adapters
    "lora module": ("sft", "--lora_target_modules q_prj", "--lora_target_modules: .*'q_prj' .*did you mean 'q_proj'"),
    "lora layers": ("sft", "--lora_layers 40", "--lora_layers must be at most 4, .*; got 40"),
    "no sft adapter": ("reward", "--sft_adapter no_such", "no adapter folder no_such"),
    "no adapter in it": ("reward", "--sft_adapter .", "adapter_config.json is missing"),
    "other base": (
        "reward",
        "--model_name_or_path {models}/gpt2 --max_length 48 --sft_adapter {sft}",
        "adapter sft: made for another base",
    ),
    "sft adapter for reward": ("ppo", "--reward_adapter {sft}", "no score head in adapter_model.safetensors"),
    "reward adapter for sft": ("ppo", "--sft_adapter {reward}", "holds a reward model"),
    # settings
    "flag": ("sft", "--learning_rat 1", "unknown flag --learning_rat .did you mean '--learning_rate'"),
    "number": ("sft", "--learning_rate fast", "--learning_rate must be a number; got 'fast'"),
    "yaml key": ("sft", "--config key.yaml", "key.yaml: unknown key 'batch_sise' .did you mean 'batch_size'"),
    "yaml section": ("run", "--config section.yaml", "unknown key 'sft.patiense' .did you mean 'sft.patience'"),
    "yaml syntax": ("sft", "--config syntax.yaml", "syntax.yaml, line 2, column 1: not valid YAML"),
    "yaml type": ("sft", "--config type.yaml", "type.yaml: batch_size must be a whole number; got 'many'"),
    "no yaml": ("sft", "--config type.yml", "type.yml: no such config file .did you mean 'type.yaml'"),
    "response_length, ppo": ("ppo", "--response_length 64", "--response_length must be below --max_length .64.*got 64"),
    "response_length, reward": ("reward", "--response_length 64", "--response_length must be below --max_length .64"),
    "mini-batches": ("ppo", "--num_mini_batches 4", "--num_mini_batches 4 needs as many micro-batches; .* makes 2"),
    "wandb": ("sft", "--report_to wandb", "--report_to wandb: .*pip install wandb"),
    "tracker": ("sft", "--report_to mlflow", "--report_to must be tensorboard, wandb or both"),
    # reward functions
    "function raises": ("ppo", "--reward_functions rewards.py:kaputt", r"kaputt raised ValueError: kaputt .*line 4\)"),
    "function counts": ("ppo", "--reward_functions rewards.py:few", "few must return one number a completion: 4, got"),
    "function NaN": ("ppo", "--reward_functions rewards.py:nan", "nan must return finite numbers; got nan for compl"),
    "function None": ("ppo", "--reward_functions rewards.py:nothing", "nothing must return a list, .*got None"),
    "no function file": ("ppo", "--reward_functions reward.py:right", "reward.py:right: no file reward.py"),
    "no function": ("ppo", "--eval_functions rewards.py:rihgt", "no function 'rihgt' .*did you mean 'right'"),
    "function syntax": ("ppo", "--reward_functions syntax.py:f", "syntax.py cannot be imported: SyntaxError"),
    "function exits": ("ppo", "--reward_functions exits.py:f", r"exits.py cannot be imported: SystemExit: 3 .*line 1"),
    # folders
    "output is a file": ("sft", "--output_dir a_file", "--output_dir a_file is a file; name a folder"),
    "output under a file": ("sft", "--output_dir a_file/out", "cannot be made under the file .*a_file"),
    "no checkpoint": ("sft", "--resume_from_checkpoint out/checkpoint-7", "no folder out/checkpoint-7; checkpoints of"),
    "no adapter to merge": ("merge", "--adapter no_such --output_dir out", "no adapter folder no_such"),
    "merge into a file": ("merge", "--adapter {sft} --output_dir a_file", "--output_dir a_file is a file"),
    "merge dtype": ("merge", "--adapter {sft} --output_dir out --dtype fp32", "--dtype must be one of .*'fp32'"),
}

SAID = {
    "a row without a response": ("sft", "--dataset_name gap.jsonl", "1 dropped: empty response (first: row 1)"),
    "chosen is rejected": ("reward", "--dataset_name same.jsonl", "1 dropped: chosen and rejected are the same"),
    "a long prompt, sft": ("sft", "--dataset_name long.jsonl", "1 dropped: the prompt fills the window (first: row 1)"),
    "a long prompt, ppo": ("ppo", "--dataset_name long.jsonl", "1 dropped: the prompt is longer than the window"),
    "no PAD": ("sft", "--model_name_or_path {models}/no_pad", "there was no PAD, EOS is '<end>': PAD is now '<pad>'"),
    "trusted pickle": ("sft", "--model_name_or_path {models}/pickled --allow_pickle_weights true", "step 2, kept"),
    "nothing held out, sft": ("sft", "--eval_size 0", "no held-out rows (--eval_size 0)"),
    "nothing held out, ppo": ("ppo", "--eval_size 0", "8 episodes"),
    "one pair": ("reward", "--eval_size 0 --dataset_name one_pair.jsonl", "same score; scores are shifted and not"),
    "a batch above the data": ("sft", "--batch_size 20", "--batch_size 20 is more than the 11 training rows"),
}


@pytest.fixture
def typed(command, models, tiny_adapters, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    places = {name: "{" + name + "}" for name in tiny_adapters}
    return lambda stage, flags: command(
        stage, flags.format(models=models, **(tiny_adapters if stage == "merge" else places))
    )


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case, typed):
    stage, flags, message = MISTAKES[case]
    outcome = typed(stage, flags)
    assert outcome.code == 2, outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("rlhf-fast: error: ")
    assert re.search(message, last), last
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


@pytest.mark.filterwarnings("error::UserWarning", "error::FutureWarning")
@pytest.mark.parametrize("case", SAID)
def test_what_can_be_put_right_is_said_and_the_run_goes_on(case, typed):
    stage, flags, text = SAID[case]
    outcome = typed(stage, flags)
    assert outcome.code == 0, outcome.err
    assert text in outcome.out + outcome.err


def test_debug_shows_the_traceback_and_the_message(typed):
    outcome = typed("ppo", "--reward_functions rewards.py:kaputt --debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err and 'raise ValueError("kaputt")' in outcome.err
    assert outcome.err.splitlines()[-1].startswith("rlhf-fast: error: reward function kaputt raised")


def test_a_finished_run_is_not_overwritten(command, tmp_path):
    assert command("sft").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    outcome = command("sft")
    assert outcome.code == 2 and "out holds another run" in outcome.err
    outcome = command("sft", "--overwrite_output_dir true --resume_from_checkpoint auto")
    assert outcome.code == 2 and "contradict each other" in outcome.err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_folder_without_write_permission(command, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    outcome = command("sft")
    assert outcome.code == 2 and f"--output_dir out: no permission to write in {tmp_path}" in outcome.err
