"""The work that every contestant does: model, prompts, pairs and settings, as files that each of them reads."""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

import rlhf_fast

DEMO = Path(rlhf_fast.__file__).parent / "data" / "demo" / "preferences.jsonl"


@dataclass
class Work:
    """Settings alike for all. Every step trains on the same ``batch_size`` prompts or rows, so that steps, contestants
    and rounds do the same work. Token counts are sums over that batch. ``train_micro_batch``: of SFT and reward."""

    model: str
    batch_size: int = 16
    prompt_tokens: tuple[int, int] = (8, 32)  # the shortest and longest prompt
    response_length: int = 32
    ppo_epochs: int = 4
    max_length: int = 128
    train_micro_batch: int = 8
    lora_r: int = 16
    learning_rate: float = 1e-5
    steps: int = 3  # of which the first is a warm-up
    pad_token: str = ""
    prompts: str = ""
    sft: str = ""
    reward: str = ""
    data: str = ""
    tokens: dict[str, int] = field(default_factory=dict)
    shape: dict[str, int] = field(default_factory=dict)


def quick(model: str) -> Work:
    """For a tiny model, one step, seconds."""
    return Work(model, 4, (8, 96), 8, 2, 256, 2, 4, steps=1)


def without_paths(work: Work) -> dict[str, Any]:
    """What of the work a results file keeps: nothing of this machine's folders."""
    return asdict(work) | {"model": Path(work.model).name, "prompts": "", "sft": "", "reward": ""}


def prepare(work: Work, data: Path | None, folder: Path) -> Path:
    """Fills ``work`` in and writes its files into ``folder``; returns WORK.json. ``data``: JSONL of HH-RLHF
    transcripts, also .gz; None: the demo's preferences. Raises SystemExit where too few rows fit."""
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    vocabulary = tokenizer.get_vocab()
    work.pad_token = next(token for token in ("<|endoftext|>", "<pad>", tokenizer.eos_token) if token in vocabulary)
    pairs = list(read_pairs(data or DEMO))
    work.data = data.name if data else f"{DEMO.parent.name}/{DEMO.name} of the package"

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    low, high = work.prompt_tokens
    prompts = [text for text in dict.fromkeys(pair["question"] for pair in pairs) if low <= count(text) <= high]
    fitting = [
        pair
        for pair in pairs
        if max(count(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")) < work.max_length
    ]
    chosen_prompts, rows = spread(prompts, work.batch_size, work.data), spread(fitting, work.batch_size, work.data)
    work.prompts = write(folder / "prompts.jsonl", [{"prompt": text} for text in chosen_prompts])
    work.sft = write(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    work.reward = write(
        folder / "pairs.jsonl", [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in rows]
    )
    asked = sum(count(row["prompt"]) for row in rows)
    sides = {side: sum(count(row["prompt"] + row[side]) + 1 for row in rows) for side in ("chosen", "rejected")}  # EOS
    work.tokens = {
        "prompts": sum(count(text) for text in chosen_prompts),
        "responses": work.batch_size * work.response_length,
        "sft": sides["chosen"],
        "sft_trained": sides["chosen"] - asked,
        "reward": sum(sides.values()),
    }
    work.shape = shape(work.model)
    path = folder / "work.json"
    path.write_text(json.dumps(asdict(work), indent=1) + "\n")
    return path


def read_pairs(path: Path) -> Iterator[dict[str, str]]:
    """``question``, the first thing that the person says; ``prompt``, all that stands before the answers; the answers
    ``chosen`` and ``rejected``. From transcripts, or from chat turns with a ``prompt``."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            row = json.loads(line)
            if "prompt" in row:
                question = row["prompt"][-1]["content"]
                chosen, rejected = (f" {row[side][0]['content']}" for side in ("chosen", "rejected"))
                yield {"question": question, "prompt": question, "chosen": chosen, "rejected": rejected}
                continue
            prompt, mark, chosen = row["chosen"].rpartition("\n\nAssistant:")
            if mark and chosen.strip() and row["rejected"].startswith(prompt + mark):
                rejected = row["rejected"].removeprefix(prompt + mark)
                question = prompt.partition("\n\nAssistant:")[0].partition("Human:")[2].strip()
                if rejected.strip() and rejected != chosen:
                    yield {"question": question, "prompt": prompt + mark, "chosen": chosen, "rejected": rejected}


def spread(rows: Sequence[Any], count: int, source: str) -> list[Any]:
    """``count`` of the rows, at even distances."""
    if len(rows) < count:
        raise SystemExit(
            f"{source}: {len(rows)} rows have the wanted length, and a batch needs {count}; name other --data"
        )
    return [rows[i * len(rows) // count] for i in range(count)]


def write(path: Path, rows: Sequence[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shape(model: str) -> dict[str, int]:
    """Weights in the linear layers of one decoder layer (attention and gated MLP), layers, hidden units, vocabulary."""
    config = AutoConfig.from_pretrained(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head * (config.num_attention_heads + config.num_key_value_heads)
    return {
        "layer": attention + 3 * config.hidden_size * config.intermediate_size,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
    }
