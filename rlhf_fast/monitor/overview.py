"""The first lines of the report: did the run work, is anything wrong, what to try next."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_fast import metrics
from rlhf_fast.monitor.detectors.finding import in_words
from rlhf_fast.monitor.figures import GAIN, entry_of, score_words
from rlhf_fast.monitor.numbers import format_number, number
from rlhf_fast.monitor.runs import STAGES, Row, Run, Stage
from rlhf_fast.monitor.texts import sample
from rlhf_fast.monitor.verdict import Verdict

Link = tuple[str, str]
WORKED, UNCLEAR, FAILED, RUNNING = "worked", "unclear", "failed", "running"


def sentences(run: Run) -> list[str]:
    """Three sentences: did it work, is anything wrong, what to try next."""
    outcome, worked = _outcome(run.stages[-1])
    found = [(stage, verdict) for stage in run.stages for verdict in stage.verdicts or ()]
    found.sort(key=lambda pair: pair[1].confidence, reverse=True)
    if found:
        named = in_words([f"{verdict.title} ({STAGES[stage.name]}, {_steps(verdict)})" for stage, verdict in found])
        wrong = f"Something looks wrong: {named}."
        return [worked, wrong, f"Try next: {found[0][1].advice}"]
    if any(stage.verdicts is not None for stage in run.stages):
        wrong = "None of the known failures was found in the metrics and samples."
    else:
        wrong = "Nobody has looked for known failures in this run, so read the charts and the samples below."
    return [worked, wrong, f"Try next: {_advice(run.stages[-1].name, outcome)}"]


def _outcome(stage: Stage) -> tuple[str, str]:
    """Whether the last stage reached what it is for, and the sentence with its figures."""
    if not stage.figures:
        return RUNNING, _so_far(stage)
    if stage.name == "sft":
        return _of_sft(stage.figures)
    if stage.name == "ppo":
        return _of_ppo(stage.figures)
    return _of_pairs(stage)


def _so_far(stage: Stage) -> str:
    where = f"{STAGES[stage.name]} is at step {stage.last_step:,}" if stage.last_step is not None else "It has begun"
    names = {"sft": metrics.SFT_LOSS, "reward": metrics.PAIR_LOSS, "dpo": metrics.DPO_LOSS, "ppo": metrics.SCORES}
    name = names[stage.name].name
    values = [value for row in stage.metrics if (value := number(row.get(name))) is not None]
    if len(values) < 2:
        return f"{where}: too early to say whether it works."
    what = "score" if stage.name == "ppo" else "training loss"
    first, last = _short(values[0]), _short(values[-1])
    return f"{where} and has not ended yet; its {what} went from {first} to {last} so far."


def _of_sft(figures: Row) -> tuple[str, str]:
    keys = ("validation_loss_first", "validation_loss")
    before, after = (number(entry_of(figures.get(key)).get("value")) for key in keys)
    if before is None or after is None:
        return UNCLEAR, "Fine-tuning has ended; without held-out rows there is no figure that says whether it worked."
    change = f"from {_short(before)} to {_short(after)} nats per token"
    if after < before:
        return WORKED, f"It worked: the loss on held-out rows, which is better the lower it is, fell {change}."
    return FAILED, f"It did not work: the loss on held-out rows, which should fall, went {change}."


def _of_ppo(figures: Row) -> tuple[str, str]:
    """Judged by the first gold score, which is not trained on; without one, by the score itself."""
    gains = {key.removesuffix(GAIN): entry_of(value) for key, value in figures.items() if key.endswith(GAIN)}
    names = sorted(gains, key=lambda name: name == "scores")
    if not names:
        return UNCLEAR, "PPO has ended; without held-out prompts there is no figure that says whether it worked."
    outcome, words = _gain(score_words(names[0]), gains[names[0]])
    start = {WORKED: "It worked", UNCLEAR: "It is not clear that it worked", FAILED: "It did not work"}[outcome]
    trained = gains.get("scores", {})
    if names[0] == "scores":
        words += "; it is the score that was trained on, so read some samples before you believe it"
    elif outcome != WORKED and (number(trained.get("low")) or 0) > 0:
        gain = _short(number(trained.get("value")) or 0)
        words += f"; the score that was trained on rose by {gain} all the same"
    return outcome, f"{start}: {words}."


def _gain(name: str, figure: Row) -> tuple[str, str]:
    value, low, high = (number(figure.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return UNCLEAR, f"there is no figure of the {name}'s gain"
    interval = f"95% interval {_short(low)} to {_short(high)}"
    change = "rose" if value > 0 else "fell" if value < 0 else "changed"
    words = f"on held-out prompts the {name} {change} by {_short(abs(value))} ({interval})"
    if low > 0:
        return WORKED, words
    if high < 0:
        return FAILED, words
    return UNCLEAR, f"{words}, which may be chance, since the interval holds 0"


def _of_pairs(stage: Stage) -> tuple[str, str]:
    figure = entry_of(stage.figures.get("accuracy"))
    value, low, high = (number(figure.get(key)) for key in ("value", "low", "high"))
    what = "the reward model" if stage.name == "reward" else "the policy"
    if value is None or low is None or high is None:
        return UNCLEAR, "The stage has ended; without held-out pairs there is no figure that says whether it worked."
    words = f"{what} ranks {value:.0%} of held-out pairs right (95% interval {low:.0%} to {high:.0%}; a coin has 50%)"
    if low > 0.5:
        return WORKED, f"It worked: {words}."
    if high < 0.5:
        return FAILED, f"It did not work: {words}."
    return UNCLEAR, f"It is not clear that it worked: {words}."


def _advice(stage: str, outcome: str) -> str:
    if outcome == RUNNING:
        return "wait for the next evaluation; `rlhf-fast report RUN --follow` keeps this page up to date."
    if outcome == WORKED:
        return {
            "sft": "go on to the reward model and PPO, or to DPO.",
            "reward": "go on to PPO with this reward model.",
            "dpo": "read answers of the new policy, then train longer or merge the adapter (`rlhf-fast merge`).",
            "ppo": "read the samples below; if they please, train longer or merge the adapter (`rlhf-fast merge`).",
        }[stage]
    if outcome == FAILED:
        return {
            "sft": "a lower learning rate, and look for mistakes in the data.",
            "reward": "look whether chosen and rejected are swapped in the data.",
            "dpo": "look whether chosen and rejected are swapped in the data, or a lower learning rate.",
            "ppo": "a higher kl_coef or a lower kl_target, and a better reward: this one does not lead where you want.",
        }[stage]
    return {
        "sft": "set --eval_size, so that there are held-out rows.",
        "reward": "more pairs or more steps; more held-out pairs (--eval_size) make the interval narrower.",
        "dpo": "more pairs or more steps; more held-out pairs (--eval_size) make the interval narrower.",
        "ppo": "more steps; more held-out prompts (--eval_prompts) make the interval narrower.",
    }[stage]


def verdict_list(stages: Sequence[Stage], links: Mapping[str, Mapping[str, Link]]) -> Iterator[dict[str, Any]]:
    """The verdicts of all stages, the surest first. ``links``: stage -> metric name -> id and title of its chart."""
    found = [(verdict, stage) for stage in stages for verdict in stage.verdicts or ()]
    for verdict, stage in sorted(found, key=lambda pair: pair[0].confidence, reverse=True):
        title = verdict.title
        yield {
            "title": title,
            "stage": STAGES[stage.name],
            "mark": stage.mark,
            "steps": _steps(verdict),
            "sure": f"{_sure(verdict.confidence)} ({verdict.confidence:.0%})",
            "reason": verdict.reason,
            "advice": verdict.advice,
            "metrics": [(name, links.get(stage.name, {}).get(name)) for name in verdict.metrics],
            "samples": [sample(row, "Sample") for row in verdict.samples],
        }


def _steps(verdict: Verdict) -> str:
    if verdict.first_step == verdict.last_step:
        return f"step {verdict.first_step:,}"
    return f"steps {verdict.first_step:,} to {verdict.last_step:,}"


def _sure(confidence: float) -> str:
    return "almost certain" if confidence >= 0.9 else "likely" if confidence >= 0.6 else "possible"


def _short(value: float) -> str:
    return format_number(value, 3)
