"""What the monitor can find: the names of its verdicts with their words, and the thresholds that can be set."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.errors import UserError, nearest
from rlhf_fast.text import shown


@dataclass(frozen=True)
class Kind:
    """A verdict that the monitor can reach.

    Attributes:
        title: its name for a person.
        meaning: what it means, one sentence.
        advice: what to try next.
    """

    title: str
    meaning: str
    advice: str


KINDS = {
    "kl_explosion": Kind(
        "KL explosion",
        "The policy runs away from the model that it started from.",
        "Go back to the last checkpoint before it; lower the learning rate or raise kl_coef (or lower kl_target).",
    ),
    "reward_hacking": Kind(
        "Reward hacking",
        "The score that is trained on climbs, and what it stands for does not.",
        "Read the samples with the highest scores: they show what the reward overrates. Mend the reward (more data, a "
        "penalty for what is exploited), raise kl_coef, or stop earlier.",
    ),
    "mode_collapse": Kind(
        "Mode collapse",
        "The responses grow alike, whatever the prompt.",
        "Raise kl_coef or set entropy_coef; lower the learning rate; see whether the reward pays for one phrase.",
    ),
    "not_learning": Kind(
        "Not learning",
        "Neither the objective nor the policy moves.",
        "Raise the learning rate; look at grad_norm; lower kl_coef if the KL penalty outweighs the score.",
    ),
    "useless_critic": Kind(
        "Useless critic",
        "The critic's values explain the returns no better than a constant.",
        "Raise value_coef or value_clip, start the critic from a reward model (reward_adapter), or train without a "
        "critic: --advantage_estimator rloo.",
    ),
    "miscalibrated_reward": Kind(
        "Miscalibrated reward model",
        "The reward model's scores are not what PPO takes them for, or do not follow the preferences.",
        "Look at the reward model first: its card, the labels' direction, the length bias; calibrate it on samples of "
        "the SFT model that PPO starts from.",
    ),
    "sampler_mismatch": Kind(
        "Sampler and trainer disagree",
        "The tokens were sampled from another distribution than the one that is trained.",
        "Sample with the temperature that training uses, top_k off and top_p 1; look at the dtype, the padding, the "
        "version of the adapter and the chat template of the sampler.",
    ),
    "length_exploitation": Kind(
        "Length exploitation",
        "The responses get longer, and the score with them.",
        "Balance the lengths of the preference data or penalise length in the reward; compare scores at equal length.",
    ),
    "no_signal": Kind(
        "No signal",
        "All responses get the same score, so that the advantages have nothing to say.",
        "Look at what the reward returns; take harder or easier prompts, or more responses to each.",
    ),
    "truncation": Kind(
        "Truncated responses",
        "Almost no response ends by itself.",
        "Raise response_length; see that the SFT data's answers end in the stop token that sampling looks for, and "
        "that PAD is not EOS.",
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What the monitor found.

    Attributes:
        name: one of KINDS.
        first_step: the first step of the range in which the signs stand.
        last_step: the last step of that range.
        confidence: how sure, 0 to 1; 0.5 at the threshold.
        metrics: names of the metrics that were joined, the deciding one first.
        samples: up to 3 rows of samples.jsonl, the worst first.
        reason: one sentence with the numbers.
        advice: what to try next.
    """

    name: str
    first_step: int
    last_step: int
    confidence: float
    metrics: Sequence[str]
    samples: Sequence[Mapping[str, Any]]
    reason: str
    advice: str

    @property
    def title(self) -> str:
        return KINDS[self.name].title

    def told(self) -> str:
        """The verdict as one line."""
        since = f"{self.title} since step {self.first_step} (confidence {self.confidence:.0%})"
        return f"{since}: {self.reason}. {self.advice}"


def _at(default: float, help: str, *, least: float = 0) -> Any:
    """``least``: the smallest value of a count; any other threshold must be above it."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a sign counts.

    Changes are measured against the run's own noise: "z" is a change over its standard error. Steps are those that are
    logged (logging_steps).
    """

    window: int = _at(5, "Steps whose mean is compared: the first so many and the last so many.", least=2)
    z: float = _at(3.0, "A rise or fall counts from so many standard errors on.")

    kl_over_target: float = _at(3.0, "KL explosion: KL above so many times kl_target.")
    kl_per_token: float = _at(1.0, "KL explosion without a target: nats per token.")
    kl_jump: float = _at(4.0, "KL explosion: KL above so many times its median of the 10 steps before.")

    gold_z: float = _at(4.0, "Reward hacking: a gold score has fallen from so many standard errors on.")
    diversity_fall: float = _at(0.25, "Reward hacking: distinct_2 lower by this share.")
    repetition_rise: float = _at(0.15, "Reward hacking: repetition or similarity higher by so much.")
    length_change: float = _at(0.3, "Reward hacking, length exploitation: responses longer by this share.")

    collapse_diversity: float = _at(0.5, "Mode collapse: distinct_2 below this share of where it began.")
    collapse_entropy: float = _at(0.35, "Mode collapse: entropy per token below this share of where it began.")
    collapse_similarity: float = _at(0.3, "Mode collapse: similarity or repetition higher by so much.")

    patience: int = _at(20, "Not learning: steps since the start of the run without a gain.", least=4)
    still_kl: float = _at(0.005, "Not learning: KL below so many nats per token.")
    loss_fall: float = _at(
        0.02, "Not learning, in SFT, reward training and DPO: the loss lower by less than this share."
    )

    critic_warmup: int = _at(10, "Useless critic: steps that are not counted.", least=1)
    critic_window: int = _at(10, "Useless critic: steps over which explained variance is averaged.", least=4)

    critic_below: float = _at(0.1, "Useless critic: explained variance below 0 by more than this and its noise.")
    critic_stuck: float = _at(0.005, "Useless critic: or no farther than this from 0 at each of these steps.")

    reward_mean: float = _at(1.0, "Miscalibrated reward model: mean of the first rollouts' scores off 0 by so much.")
    reward_std: float = _at(
        3.0, "Miscalibrated reward model: their standard deviation above this, or below 1 over this.", least=1
    )
    calibration_error: float = _at(
        0.15, "Miscalibrated reward model: expected calibration error above this plus 1/sqrt(pairs)."
    )

    logprob_gap: float = _at(0.05, "Sampler mismatch: nats per token between sampled and trained log-probs.")
    negative_kl: int = _at(5, "Sampler mismatch: rollouts in a row with a KL below 0.", least=2)

    length_correlation: float = _at(0.3, "Length exploitation: correlation of score and length in a rollout.")

    equal_scores: float = _at(0.95, "No signal: share of prompts whose responses all score the same.")
    truncated: float = _at(0.9, "Truncation: share of responses without a stop token.")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Thresholds":
        """Thresholds with some set by name; UserError for an unknown name or a value out of its range."""
        fields = {item.name: item for item in dataclasses.fields(cls)}
        for name, value in settings.items():
            if name not in fields:
                raise UserError(f"no threshold of the monitor is called {shown(name)}{nearest(name, list(fields))}")
            count, least = isinstance(fields[name].default, int), fields[name].metadata["least"]
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (value != int(value) or value < least if count else value <= least):
                expected = f"a whole number from {least} on" if count else f"a number above {least}"
                raise UserError(f"the monitor's threshold {name} must be {expected}; got {shown(value)}")
        whole = {name: int(value) for name, value in settings.items() if isinstance(fields[name].default, int)}
        return cls(**{**settings, **whole})


def markdown() -> str:
    """docs/verdicts.md."""
    lines = [
        "# Verdicts of the monitor",
        "",
        "Made by `python -m rlhf_fast.verdicts > docs/verdicts.md`; change `rlhf_fast/verdicts.py` and make it again.",
        "[Debugging](debugging.md) says how to use them.",
        "",
        "| name | what it means | what to try |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{name}` | **{kind.title}.** {kind.meaning} | {kind.advice} |" for name, kind in KINDS.items()]
    lines += [
        "",
        "## Thresholds",
        "",
        "A step is one that is logged (`--logging_steps`). z is a change over its standard error, which comes from the",
        "run's own noise.",
        "Set them with `--monitor_thresholds NAME=NUMBER,...` in a run, `rlhf-fast monitor RUN --NAME NUMBER`, or",
        "`Monitor({name: number})`.",
        "",
        "| name | default | what |",
        "| --- | --- | --- |",
    ]
    for item in dataclasses.fields(Thresholds):
        lines.append(f"| `{item.name}` | {item.default:g} | {item.metadata['help']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
