"""The samples of a stage as the report shows them: held-out responses through time, the best and the worst, and
training responses with a colour for each token."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from rlhf_fast.monitor.drawings import spread
from rlhf_fast.monitor.numbers import format_number, format_value, number
from rlhf_fast.monitor.runs import Row, Stage
from rlhf_fast.monitor.words import joined, word_diff
from rlhf_fast.text import printable

MAX_PROMPTS, MAX_EVALUATIONS = 24, 12
ALL_CHARACTERS, MOST_CHARACTERS, FEWEST_CHARACTERS = 700_000, 4000, 300  # of held-out responses; of each
MARKS = {"=": "{}{}", "-": "{}<del>{}</del>", "+": "{}<ins>{}</ins>"}
LEAST_ALIKE = 0.25  # below this share of common words, a response is new and its differences say nothing
MAX_TOKEN_ROWS, MAX_TOKENS = 8, 256
EXTREMES = 3
LEVELS = (0.1, 0.5, 1.5)  # a token's KL or advantage is coloured by how many of these its magnitude reaches
WHY = {
    "first": "first of the batch",
    "highest_kl": "highest KL of its step",
    "highest_score": "highest score of its step",
    "lowest_score": "lowest score of its step",
}


def held_out(stage: Stage) -> dict[str, Any] | None:
    """The same held-out prompts with their responses at each evaluation, paired by index; None without any."""
    rows = [row for row in stage.samples if _is_eval(row) and "index" in row]
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return None
    chosen = spread(steps, MAX_EVALUATIONS)
    at = {step: {row["index"]: row for row in rows if row["step"] == step} for step in chosen}
    first, last = at[chosen[0]], at[chosen[-1]]
    shared = sorted(first.keys() & last.keys())[:MAX_PROMPTS]
    later = chosen[1:]
    if not shared:
        return None
    room = ALL_CHARACTERS // (2 * len(shared) * len(chosen))  # twice: differences hold the first response too
    longest = min(MOST_CHARACTERS, max(FEWEST_CHARACTERS, room))
    return {
        "first": _label(stage.name, chosen[0]),
        "later": [(step, _label(stage.name, step)) for step in later],
        "left_out": len(steps) - len(chosen),
        "rows": [
            {
                "prompt": cut(_text(first[index], "prompt"), longest),
                "first": cut(_text(first[index], "response"), longest),
                "said": said(first[index]),
                "later": [
                    {
                        "step": step,
                        "text": differences(
                            cut(_text(first[index], "response"), longest),
                            cut(_text(at[step][index], "response"), longest),
                        ),
                        "said": said(at[step][index]),
                    }
                    for step in later
                    if index in at[step]
                ],
            }
            for index in shared
        ],
    }


def extremes(stage: Stage) -> list[dict[str, Any]]:
    """The best and the worst responses of the last evaluation, and the training responses of the highest KL."""
    rows = [row for row in stage.samples if _is_eval(row) and number(row.get("score")) is not None]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    ranked = sorted(last, key=lambda row: row["score"])
    groups = []
    if len(ranked) > EXTREMES:
        groups = [("lowest score", ranked[:EXTREMES]), ("highest score", ranked[::-1][:EXTREMES])]
    far = [row for row in stage.samples if row.get("why") == "highest_kl" and number(row.get("kl")) is not None]
    groups.append(("highest KL in training", sorted(far, key=lambda row: row["kl"])[::-1][:EXTREMES]))
    return [sample(row, title) for title, group in groups for row in group]


def sample(row: Row, title: str) -> dict[str, Any]:
    """A row of samples.jsonl as texts."""
    return {
        "title": f"{title}, step {row['step']:,}" if isinstance(row.get("step"), int) else title,
        "prompt": cut(_text(row, "prompt"), MOST_CHARACTERS),
        "response": cut(_text(row, "response"), MOST_CHARACTERS),
        "said": said(row),
    }


def token_samples(stage: Stage) -> list[dict[str, Any]]:
    """Training responses, the latest first, whose tokens have a KL or an advantage; evenly spread over the run."""
    rows = [row for row in stage.samples if isinstance(row.get("tokens"), list) and row["tokens"]]
    rows = spread(rows, MAX_TOKEN_ROWS)
    return [
        sample(row, WHY.get(str(row.get("why")), "training response"))
        | {"tokens": _tokens(row), "left_out": max(0, len(row["tokens"]) - MAX_TOKENS)}
        for row in reversed(rows)
    ]


def _tokens(row: Row) -> list[dict[str, Any]]:
    tokens = row["tokens"][:MAX_TOKENS]
    kl, advantages = (_numbers(row.get(key), len(tokens)) for key in ("token_kl", "token_advantage"))
    found = []
    for place, (text, of_kl, of_advantage) in enumerate(zip(tokens, kl, advantages, strict=True), start=1):
        words = [f"token {place}"]
        words += [] if of_kl is None else [f"KL {of_kl:+.3f} nats"]
        words += [] if of_advantage is None else [f"advantage {of_advantage:+.3f}"]
        found.append({"text": text, "words": ", ".join(words), "kl": level(of_kl), "advantage": level(of_advantage)})
    return found


def _numbers(values: Any, count: int) -> list[float | None]:
    values = values if isinstance(values, list) else []
    return [number(value) for value in values[:count]] + [None] * (count - len(values))


def level(value: float | None) -> int:
    """-3 to 3: the sign of ``value`` times how many of LEVELS its magnitude reaches."""
    if value is None:
        return 0
    return sum(abs(value) >= limit for limit in LEVELS) * (1 if value > 0 else -1)


def level_words() -> list[tuple[int, str]]:
    """What each level stands for, from the lowest to the highest."""
    names = [format_number(limit) for limit in LEVELS]
    between = [f"{a} to {b}" for a, b in zip(names, names[1:], strict=False)]
    below = [f"−{b} to −{a}" for a, b in zip(names, names[1:], strict=False)]
    words = [f"−{names[-1]} or less", *below[::-1], f"within ±{names[0]}", *between, f"{names[-1]} or more"]
    return list(zip(range(-len(LEVELS), len(LEVELS) + 1), words, strict=True))


@lru_cache(maxsize=4096)  # a report that is written again has the earlier evaluations already
def differences(first: str, later: str) -> Markup:
    """``later`` as HTML, with words that ``first`` lacks in <ins> and words that it lost in <del>."""
    parts = word_diff(first, later)
    words, common = sum(len(part) for _, part in parts), sum(len(part) for kind, part in parts if kind == "=")
    if first and later and 2 * common < LEAST_ALIKE * (words + common):  # the common ones are in both texts
        return Markup("<p class='note'>Rewritten: hardly a word is where it was.</p>{}").format(printable(later))
    return Markup("").join(Markup(MARKS[kind]).format(*map(printable, joined(part))) for kind, part in parts)


def cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} characters more)"


def said(row: Row) -> str:
    """The numbers of a sample in words."""
    named = {"score": row.get("score"), "gold": row.get("gold"), "KL": row.get("kl"), "tokens": row.get("length")}
    extra = row.get("extra")
    named |= {str(key): value for key, value in extra.items()} if isinstance(extra, Mapping) else {}
    words = [f"{name} {cut(format_value(value), 60)}" for name, value in named.items() if value is not None]
    return " · ".join([*words, *(["cut off: no stop token"] if row.get("stopped") is False else [])])


def _is_eval(row: Row) -> bool:
    return row.get("split") == "eval" and "response" in row


def _text(row: Row, key: str) -> str:
    return str(row.get(key) or "")


def _label(stage: str, step: int) -> str:
    if stage == "ppo":
        return "SFT model (step 0)" if step == 0 else f"PPO policy, step {step:,}"
    return f"Step {step:,}"
