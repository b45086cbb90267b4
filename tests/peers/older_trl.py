"""TRL 1.15, whose head needs Triton: without the patch it cannot train on a CPU, so there is nothing to compare with.
Not collected by name: `make test-peers` runs it where that version is installed."""

from pathlib import Path

import pytest
import torch
import trl
from conftest import llama
from test_trl import ROWS, model_folder, run
from transformers import PreTrainedTokenizerFast

from rlhf_fast.integrations import trl as integration

__all__ = ["model_folder"]  # a fixture


def test_version() -> None:
    assert trl.__version__.startswith("1.15.")


@pytest.mark.parametrize("kind", ROWS)
def test_training(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_folder: Path) -> None:
    with integration.patched(strict=True) as report:
        logged = run(kind, False, tmp_path, tokenizer, model_folder, rows=8)
    assert report.left["trl.trainer.utils._use_triton"] == f"not in trl {trl.__version__}"
    assert (report.calls["chunked_log_probs"] >= 3) is (kind != "Reward")
    assert all(step["grad_norm"] > 0 for step in logged[:3])
    if kind == "SFT":
        assert logged[0]["loss"] == pytest.approx(mean_loss(tokenizer), rel=1e-4)
    if kind == "DPO":
        assert logged[0]["rewards/margins"] == 0 < logged[2]["rewards/margins"]


def mean_loss(tokenizer: PreTrainedTokenizerFast) -> float:
    """Of all completions, each with its end, from the model's logits in float64."""
    model, losses = llama(tokenizer).double(), []
    for prompt, completion in zip(ROWS["SFT"]["prompt"], ROWS["SFT"]["completion"], strict=True):
        asked, answered = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        logp = model(input_ids=torch.tensor([asked + answered])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        losses.append(-logp.gather(-1, torch.tensor(answered)[:, None])[:, 0])
    return float(torch.cat(losses).mean())
