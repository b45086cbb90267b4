"""Logs of other trainers: their formats, our names, and what cannot be read."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rlhf_fast.errors import UserError
from rlhf_fast.metrics import METRICS
from rlhf_fast.monitor import read_log
from rlhf_fast.monitor.foreign_names import TABLES, kind_of, markdown, renamed

ROOT = Path(__file__).parents[2]
GRPO = {
    "loss": 0.01, "grad_norm": 0.5, "learning_rate": 1e-6, "epoch": 0.1, "reward": 0.75, "reward_std": 0.2, "kl": 0.02,
    "entropy": 0.4, "completions/mean_length": 50.0, "completions/clipped_ratio": 0.125, "clip_ratio/region_mean": 0.0,
    "clip_ratio/low_min": 0.0, "frac_reward_zero_std": 0.5, "rewards/correct/mean": 0.75,
    "sampling/sampling_logp_difference/mean": 0.01,
}  # fmt: skip
GRPO_AS_OURS = {
    "loss": 0.01, "grad_norm": 0.5, "lr": 1e-6, "epoch": 0.1, "objective/scores": 0.75, "objective/scores_std": 0.2,
    "objective/kl": 1.0, "policy/entropy_avg": 0.4, "response/length_mean": 50.0, "response/truncated": 0.125,
    "policy/clipfrac_avg": 0.0, "clip_ratio/low_min": 0.0, "frac_reward_zero_std": 0.5, "rewards/correct/mean": 0.75,
    "rollout/logprob_gap": 0.01,
}  # fmt: skip
VERL = {
    "actor/ppo_kl": -0.001,
    "actor/reward_kl_penalty": 0.02,
    "critic/score/mean": 0.5,
    "response_length/mean": 200.0,
}
VERL_AS_OURS = {
    "policy/approxkl_avg": -0.001, "objective/kl": 4.0, "objective/scores": 0.5, "response/length_mean": 200.0,
}  # fmt: skip
OPENRLHF = {
    "policy_loss": -0.01,
    "reward": 0.25,
    "kl": 0.005,
    "response_length": 100.0,
    "actor_lr": 5e-7,
    "values": 0.1,
}
OPENRLHF_AS_OURS = {
    "loss/policy_avg": -0.01, "objective/scores": 0.25, "objective/kl": 0.5, "response/length_mean": 100.0, "lr": 5e-7,
    "values": 0.1,
}  # fmt: skip


def write_lines(path: Path, lines: list[Any], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + end, encoding="utf-8")
    return path


def write_state(folder: Path, history: list[dict[str, Any]]) -> Path:
    return write_lines(folder / "trainer_state.json", [{"global_step": 2, "log_history": history}])


def write_events(folder: Path, values: dict[str, float], step: int) -> None:
    writer = EventFileWriter(str(folder))
    for tag, value in values.items():
        writer.add_event(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))
    writer.close()


def test_trainer_state_of_the_newest_checkpoint(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-9", [{**GRPO, "step": 1}])
    history = [{**GRPO, "step": 1}, {**GRPO, "kl": None, "step": 2}, {"eval_reward": 0.5, "epoch": 0.2, "step": 2}]
    write_state(tmp_path / "checkpoint-10", history)
    log = read_log(tmp_path)
    assert (log.kind, log.path) == ("trl", tmp_path / "checkpoint-10" / "trainer_state.json")
    without_kl = {name: value for name, value in GRPO_AS_OURS.items() if name != "objective/kl"}
    assert log.rows == [{"step": 1, **GRPO_AS_OURS}, {"step": 2, **without_kl, "epoch": 0.2, "eval/scores": 0.5}]


def test_what_other_trainers_of_trl_call_by_the_same_words_stays() -> None:
    assert renamed("trl", {"entropy": 1.5, "learning_rate": 0.1}) == {"entropy": 1.5, "lr": 0.1}  # SFT
    assert renamed("trl", {"kl": 0.3, "rewards/chosen": 0.1}) == {"kl": 0.3, "rewards/chosen": 0.1}  # KTO
    ppo = {"objective/kl": 3.0, "val/ratio": 1.0, "eps": 2.0, "lr": 0.1}
    assert renamed(kind_of({*ppo, "epoch"}), ppo) == ppo


def test_verl_writes_jsonl_and_lines_on_the_console(tmp_path: Path) -> None:
    lines: list[Any] = [{"step": step, "data": {**VERL, "val-aux/x": None}} for step in (1, 2)]
    jsonl = write_lines(tmp_path / "run.jsonl", [*lines, '{"step": 3, "da'], end="")
    values = [f"{name}:np.float64({value})" for name, value in VERL.items()]
    shown = " - ".join([*values, "actor/grad_norm:nan", "training/note:word"])
    noise = ["\x1b[36m(TaskRunner pid=7)\x1b[0m Training Progress:  50%|  | 1/2\r", "step: none"]
    printed = [f"\x1b[36m(TaskRunner pid=7)\x1b[0m step:{step} - {shown}" for step in (1, 2, 3)]
    console = write_lines(tmp_path / "console.log", [*noise, *printed], end="")
    for path in (jsonl, console):
        log = read_log(path)
        assert log.kind == "verl"
        assert log.rows == [{"step": 1, **VERL_AS_OURS}, {"step": 2, **VERL_AS_OURS}]


def test_openrlhf_on_the_console_and_in_event_files(tmp_path: Path) -> None:
    printed = {**OPENRLHF, "critic_loss": float("nan")}
    console = write_lines(tmp_path / "out.log", [f"(A pid=1) 12:00 INFO ✨ Global step 4: {printed}", "Episode [1/2]"])
    log = read_log(console)
    assert (log.kind, log.rows) == ("openrlhf", [{"step": 4, **OPENRLHF_AS_OURS}])
    write_events(tmp_path / "tb" / "run", {f"train/{name}": value for name, value in OPENRLHF.items()}, step=4)
    log = read_log(tmp_path / "tb")
    assert log.kind == "openrlhf" and log.rows == [pytest.approx({"step": 4, **OPENRLHF_AS_OURS})]


def test_an_event_file_that_is_being_written(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/learning_rate": 0.5, "eval/reward": 2.0, "train/loss": 1.0}, step=7)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    log = read_log(path)
    assert (log.kind, log.rows) == ("trl", [{"step": 7, "lr": 0.5, "eval/scores": 2.0}])
    write_events(tmp_path / "a", {"x": 1.0}, step=1)
    with pytest.raises(UserError, match="of one run, got those of 2: give one of"):
        read_log(tmp_path)


def test_exports_of_wandb(tmp_path: Path) -> None:
    history = [{"_step": 5, "train/global_step": 1, "train/loss": 0.5, "train/epoch": 0.1, "_runtime": 3}]
    history += [{"_step": 6, "_runtime": 4, "train/grad_norm": 2.0}]
    log = read_log(write_lines(tmp_path / "history.jsonl", history))
    assert (log.kind, log.rows) == ("trl", [{"step": 1, "loss": 0.5, "epoch": 0.1, "grad_norm": 2.0}])
    header = '"Step","run 1 - train/reward","run 1 - train/reward__MIN","run 1 - train/actor_lr"'
    log = read_log(write_lines(tmp_path / "chart.csv", [header, "1,0.5,0.1,", "2,NaN,,0.25", "3,0"], end=""))
    assert (log.kind, log.rows) == ("openrlhf", [{"step": 1, "objective/scores": 0.5}, {"step": 2, "lr": 0.25}])


def test_a_run_of_ours_is_its_last_stage(run_folder: Path) -> None:
    log = read_log(run_folder)
    assert (log.kind, log.path) == ("rlhf-fast", run_folder / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in log.rows] == list(range(101))
    assert "eval/gold" in log.rows[10] and "critic/explained_variance" not in log.rows[42]
    assert log.samples[0]["response"].startswith("It is wide \x1b[0m")
    assert read_log(run_folder / "ppo" / "samples.jsonl").samples == log.samples


def test_samples_of_trl_and_verl(tmp_path: Path) -> None:
    table = {"step": [3], "prompt": ["1+1?"], "completion": ["2"], "correct": [1.0], "advantage": [0.5]}
    write_state(tmp_path / "trl", [{**GRPO, "step": 3}])
    (tmp_path / "trl" / "completions").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "trl" / "completions" / "completions_00003.parquet")
    shared = {"split": "train", "step": 3, "prompt": "1+1?", "response": "2"}
    assert read_log(tmp_path / "trl").samples == [{**shared, "advantage": 0.5, "score": 1.0, "extra": {"correct": 1.0}}]
    write_lines(tmp_path / "verl" / "3.jsonl", [{"input": "1+1?", "output": "2", "score": 1.0, "gts": "2", "step": 3}])
    assert read_log(tmp_path / "verl").samples == [{**shared, "score": 1.0, "extra": {"gts": "2"}}]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.log",
            "hello\nworld\n",
            "expected lines such as 'step:12 - actor/kl_loss:0.01 - ...' (verl).*got none",
        ),
        ("a.json", '{"loss": 1}', 'expected a list "log_history"'),
        ("trainer_state.json", '{"log_his', "got no whole JSON text"),
        ("a.jsonl", '{"loss": 1}\n', 'expected a whole number under "step" or "_step"'),
        ("a.jsonl", '{"step": 1}\nx\n{"step": 2}\n', "line 2: expected a JSON object"),
        ("a.csv", "a,b\n1,2\n", r"expected a column of steps .*, got the columns \['a', 'b'\]"),
        ("a.csv", "Step,x - kl,y - kl\n1,2,3\n", "expected the columns of one run, got those of 2"),
        ("a.csv", "step,kl\nx,1\n", "row 2: expected a whole number as step, got 'x'"),
        ("a.parquet", "no parquet", "expected the parquet of TRL's log_completions"),
    ],
)
def test_what_cannot_be_read_is_one_line(name: str, text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=expected.replace("(verl)", r"\(verl\)")) as error:
        read_log(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_folders_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none of these in it"):
        read_log(tmp_path)
    with pytest.raises(UserError, match="no such file or folder; expected a run or stage folder"):
        read_log(tmp_path / "none")


def test_tables_name_our_metrics_and_the_page_has_them() -> None:
    ours = {metric.name for stage in METRICS.values() for metric in stage}
    assert {counterpart.name for table in TABLES.values() for counterpart in table.values()} <= ours
    assert markdown() in (ROOT / "docs" / "monitor.md").read_text(encoding="utf-8")
