"""Makes the demo's data files: `python -m rlhf_fast.data.demo.make --model FOLDER [--seed 0]`.

Everything starts from one pool of replies that the model itself samples to the hand-written prompts of
`all_prompts.txt`. While it samples, a system prompt and four example exchanges ask for short friendly replies; what is
stored is the user turn and the reply alone, so that fine-tuning on the stored rows teaches the style without the
instructions (context distillation, Askell et al. 2021, section 2.2.2). Demonstrations and preferences share the pool:
the reward model is trained on what the fine-tuned model will say.

Files written beside this one (chat lists, one JSON object a line):
    sft.jsonl           {"messages": [user, assistant]}, one row for each prompt that is not held out: its shortest
                        reply, so that the fine-tuned model is brief and a run on a CPU is too
    preferences.jsonl   {"prompt", "chosen", "rejected", "gold_chosen", "gold_rejected"}
    prompts.jsonl       {"prompt": [user]}: the prompts that PPO may use
    prompts-eval.jsonl  {"prompt": [user]}: held out of every other file
    meta.json           how all of it was made and measured

Preferences are noisy on purpose: P(first is preferred) = sigmoid((gold_first - gold_second) / tau), Bradley and Terry's
model with the gold score as strength. tau is found by bisection so that the mean of max(p, 1 - p), the best expected
accuracy that any scorer can reach on such labels, is CEILING.

The same seed gives the same files on the same machine and versions; elsewhere, sampled replies may differ, since matrix
products round differently.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rlhf_fast.data.demo.gold import gold

FOLDER = Path(__file__).parent
EVAL_PROMPTS = 64
REPLIES_PER_PROMPT = 3  # at most: the shortest is the demonstration too, and three give three pairs
ROUNDS = 4  # of sampling, each for the prompts that still lack replies
MAX_NEW_TOKENS = 40
PAIRS = 960
BATCH_SIZE = 64
# Below 1 because a model of 135M parameters rambles at 1. The fine-tuned model sampled at 1 copies this pool's spread.
TEMPERATURE = 0.7
CEILING = 0.85

STYLE = [
    ("system", "Reply in one short friendly sentence."),
    ("user", "What is a good name for a cat?"),
    ("assistant", "I like Pepper! Is your cat a boy or a girl?"),
    ("user", "How do I make tea?"),
    ("assistant", "Pour boiling water over a tea bag and wait four minutes."),
    ("user", "I am so tired."),
    ("assistant", "I'm sorry to hear that. Be gentle with yourself."),
]


class Reply(NamedTuple):
    text: str
    tokens: int  # without the end token
    score: float  # gold


class Pair(NamedTuple):
    prompt: str
    first: Reply
    second: Reply


def user_turn(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def assistant_turn(reply: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": reply}]


def split_prompts(prompts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Returns (prompts to train on, prompts held out everywhere), each in the order of the file."""
    held_out = set(random.Random(seed).sample(sorted(prompts), EVAL_PROMPTS))
    return [p for p in prompts if p not in held_out], [p for p in prompts if p in held_out]


@torch.inference_mode()
def sample_replies(model: Any, tokenizer: Any, prompts: Sequence[str], seed: int) -> dict[str, list[tuple[str, int]]]:
    """Prompt -> at most REPLIES_PER_PROMPT of (text, tokens without the end token).

    Kept are replies that end by themselves within MAX_NEW_TOKENS, are one line, not empty, and new in the whole pool.
    """
    style = [{"role": role, "content": content} for role, content in STYLE]
    style_ids = tokenizer.apply_chat_template(style, return_tensors="pt", return_dict=True)["input_ids"]
    style_cache = model(style_ids, use_cache=True, logits_to_keep=1).past_key_values
    replies: dict[str, list[tuple[str, int]]] = {prompt: [] for prompt in prompts}
    seen: set[str] = set()
    torch.manual_seed(seed)
    for round_number in range(ROUNDS):
        queue = [prompt for prompt, mine in replies.items() if len(mine) < REPLIES_PER_PROMPT]
        for start in range(0, len(queue), BATCH_SIZE):
            batch = queue[start : start + BATCH_SIZE]
            sampled = generate(model, tokenizer, style, style_ids.shape[1], style_cache, batch)
            for prompt, reply in zip(batch, sampled, strict=True):
                text = tokenizer.decode(reply, skip_special_tokens=True).strip()
                if reply[-1] == tokenizer.eos_token_id and text and "\n" not in text and text.lower() not in seen:
                    seen.add(text.lower())
                    replies[prompt].append((text, len(reply) - 1))
            kept = sum(map(len, replies.values()))
            print(f"round {round_number}: {start + len(batch)} of {len(queue)} prompts, {kept} kept", flush=True)
    return replies


def generate(
    model: Any, tokenizer: Any, style: list[dict[str, str]], style_length: int, style_cache: Any, batch: Sequence[str]
) -> list[list[int]]:
    """Samples one reply to each prompt: token ids up to and with the end token, or MAX_NEW_TOKENS of them.

    Written out instead of `model.generate` so that rows which have ended leave the batch: it halves the time.
    """
    chats = [style + user_turn(prompt) for prompt in batch]
    rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    width = max(map(len, rows))
    # Padding stands between the shared turns and the prompt, so that column j < style_length is the same in every row.
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row[style_length:] for row in rows])
    mask = torch.tensor([[1] * style_length + [0] * (width - len(r)) + [1] * (len(r) - style_length) for r in rows])
    cache = DynamicCache(
        [
            (layer.keys.expand(len(batch), -1, -1, -1), layer.values.expand(len(batch), -1, -1, -1))
            for layer in style_cache.layers
        ]
    )
    replies: list[list[int]] = [[] for _ in batch]
    live = torch.arange(len(batch))  # which replies the rows of ids, mask and cache belong to
    for step in range(MAX_NEW_TOKENS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
        ids = torch.multinomial((logits[:, -1] / TEMPERATURE).softmax(-1), 1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        for row, token in zip(live.tolist(), ids[:, 0].tolist(), strict=True):
            if tokenizer.eos_token_id not in replies[row]:
                replies[row].append(token)
        if step % 4 == 3:  # not at every step: it copies the cache
            keep = torch.tensor([tokenizer.eos_token_id not in replies[row] for row in live.tolist()]).nonzero()[:, 0]
            if len(keep) == 0:
                break
            ids, mask, live = ids[keep], mask[keep], live[keep]
            cache.batch_select_indices(keep)
    return replies


def score_replies(sampled: dict[str, list[tuple[str, int]]]) -> dict[str, list[Reply]]:
    return {
        prompt: [Reply(text, tokens, gold([prompt], [text])[0]) for text, tokens in mine]
        for prompt, mine in sampled.items()
    }


def draw_pairs(replies: dict[str, list[Reply]], seed: int) -> list[Pair]:
    """PAIRS of all pairs of replies to one prompt, a prompt's pairs side by side."""
    every = [Pair(prompt, *pair) for prompt, mine in replies.items() for pair in combinations(mine, 2)]
    if len(every) < PAIRS:
        raise ValueError(f"expected {PAIRS} pairs of replies, got {len(every)}: too few replies ended, raise ROUNDS")
    return [every[i] for i in sorted(random.Random(f"pairs {seed}").sample(range(len(every)), PAIRS))]


def sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def ceiling(margins: Sequence[float], tau: float) -> float:
    """The expected accuracy of the scorer that knows the gold margins, on labels drawn with this tau."""
    return statistics.fmean(sigmoid(abs(margin) / tau) for margin in margins)


def find_tau(margins: Sequence[float], target: float) -> float:
    """The tau at which `ceiling` is the target. Bisection: the ceiling falls from 1 to 1/2 as tau grows."""
    low, high = 1e-6, 1e6
    if not ceiling(margins, high) < target < ceiling(margins, low):
        raise ValueError(f"no tau gives a ceiling of {target}: too many of the {len(margins)} pairs are tied")
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ceiling(margins, middle) > target else (low, middle)
    return low


def label(pairs: Sequence[Pair], tau: float, seed: int) -> list[dict[str, Any]]:
    """Draws which reply of each pair is preferred."""
    noise = random.Random(f"labels {seed}")
    rows = []
    for prompt, first, second in pairs:
        first_wins = noise.random() < sigmoid((first.score - second.score) / tau)
        chosen, rejected = (first, second) if first_wins else (second, first)
        rows.append(
            {
                "prompt": user_turn(prompt),
                "chosen": assistant_turn(chosen.text),
                "rejected": assistant_turn(rejected.text),
                "gold_chosen": chosen.score,
                "gold_rejected": rejected.score,
            }
        )
    return rows


def length_shortcut(pairs: Sequence[Pair], rows: Sequence[dict[str, Any]]) -> float:
    """Held-out accuracy of a logistic regression that sees only the two lengths (and their squares).

    The first half of the pairs trains it, the second half tests it; a prompt's pairs stand together, so at most one
    prompt is in both. Near 0.5 is wanted: then a reward model cannot do well by counting words.
    """
    lengths = torch.tensor([[pair.first.tokens, pair.second.tokens] for pair in pairs], dtype=torch.float64) / 10
    features = torch.stack([lengths[:, 0] - lengths[:, 1], lengths[:, 0] ** 2 - lengths[:, 1] ** 2], dim=1)
    first_won = [row["chosen"][0]["content"] == pair.first.text for pair, row in zip(pairs, rows, strict=True)]
    labels = torch.tensor(first_won, dtype=torch.float64)
    half = len(pairs) // 2
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(features[:half] @ weight, labels[:half])
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((features[half:] @ weight.detach() > 0) == labels[half:].bool()).double().mean().item()


def measure(replies: dict[str, list[Reply]], pairs: Sequence[Pair], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a reader should know of the data before trusting a figure made on it. Lengths are in tokens."""
    everyone = [reply for mine in replies.values() for reply in mine]
    scores = [reply.score for reply in everyone]
    lengths = [float(reply.tokens) for reply in everyone]
    cuts = statistics.quantiles(lengths, n=20)
    best_of_2 = statistics.fmean(abs(pair.first.score - pair.second.score) / 2 for pair in pairs)
    return {
        "replies": len(everyone),
        "length_quantiles": {"5%": cuts[0], "25%": cuts[4], "50%": cuts[9], "75%": cuts[14], "95%": cuts[18]},
        "gold_mean": statistics.fmean(scores),
        "gold_sd": statistics.stdev(scores),
        "labels_flipped": statistics.fmean(row["gold_chosen"] < row["gold_rejected"] for row in rows),
        "pairs_tied": statistics.fmean(pair.first.score == pair.second.score for pair in pairs),
        "gold_length_correlation": statistics.correlation(scores, lengths),
        "length_only_accuracy": length_shortcut(pairs, rows),
        "best_of_2_gain_in_sd": best_of_2 / statistics.stdev(scores),
    }


def write_lines(name: str, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (FOLDER / name).write_text(text, encoding="utf-8")


def write_files(
    sampled: dict[str, list[tuple[str, int]]], held_out: Sequence[str], model_name: str, seed: int
) -> dict[str, Any]:
    """Turns `sample_replies`' result into the data files; returns what it wrote to meta.json."""
    replies = score_replies(sampled)
    pairs = draw_pairs(replies, seed)
    margins = [pair.first.score - pair.second.score for pair in pairs]
    tau = find_tau(margins, CEILING)
    preferences = label(pairs, tau, seed)
    demonstrations = [
        {"messages": user_turn(prompt) + assistant_turn(min(mine, key=lambda reply: reply.tokens).text)}
        for prompt, mine in replies.items()
        if mine
    ]
    write_lines("sft.jsonl", demonstrations)
    write_lines("preferences.jsonl", preferences)
    write_lines("prompts.jsonl", [{"prompt": user_turn(prompt)} for prompt in replies])
    write_lines("prompts-eval.jsonl", [{"prompt": user_turn(prompt)} for prompt in held_out])
    meta = {
        "model": model_name,
        "seed": seed,
        "temperature": TEMPERATURE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tau": tau,
        "ceiling": ceiling(margins, tau),
        "prompts": len(replies),
        "prompts_eval": len(held_out),
        "sft": len(demonstrations),
        "preferences": len(pairs),
        **measure(replies, pairs, preferences),
    }
    (FOLDER / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the demo's data files from a model's own samples.")
    parser.add_argument("--model", required=True, help="folder or name of the chat model that samples the replies")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the samples and the label noise")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    prompts = (FOLDER / "all_prompts.txt").read_text(encoding="utf-8").splitlines()
    train, held_out = split_prompts(prompts, arguments.seed)
    sampled = sample_replies(model, tokenizer, train, arguments.seed)
    meta = write_files(sampled, held_out, Path(arguments.model).name, arguments.seed)
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
