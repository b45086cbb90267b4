"""Every metric that a run logs: its name, its unit, what it is, and the chart in which the report draws it.

A metric's name is spelled here and nowhere else. Recipes log values by these records, ``metrics.jsonl`` and the
trackers get their names, and the report draws the charts in the order of ``METRICS``. docs/metrics.md is made by

    python -m rlhf_fast.metrics > docs/metrics.md
"""

import re
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Chart:
    """A chart of the report.

    Attributes:
        title: the chart's title; ``{name}`` in it stands for the name of a function: one chart each.
        reading: one sentence that says what good looks like.
        reading_with_level: that sentence where the chart has a level line.
        card: the heading above the chart, where it is not the title.
        below: the chart under which this one is drawn, in the same card.
        height: of the chart, in SVG units.
        bars: the metrics are parts of a whole: a stacked bar a step, not lines.
    """

    title: str
    reading: str
    y_label: str
    reading_with_level: str = ""
    card: str = ""
    below: "Chart | None" = None
    height: int = 236
    bars: bool = False


@dataclass(frozen=True)
class Metric:
    """A metric, or a family of them: ``{name}`` in ``name`` then stands for the name of a function.

    Attributes:
        label: what the chart calls it: in the legend, or beside the level line.
        drawn: as a line; as the lower or upper end of the interval around the first line; as a dashed level line.
    """

    name: str
    unit: str
    help: str
    chart: Chart | None = None
    label: str = ""
    drawn: Literal["line", "low", "high", "level"] = "line"

    @property
    def is_family(self) -> bool:
        return "{name}" in self.name

    def of(self, name: str) -> "Metric":
        """The member of this family that belongs to the function ``name``."""
        return replace(self, name=self.name.format(name=name))

    def named_by(self, found: str) -> str | None:
        """The function's name where ``found`` is the name of a member of this family, else None."""
        before, is_family, after = self.name.partition("{name}")
        match = re.fullmatch(f"{re.escape(before)}(.+){re.escape(after)}", found, re.DOTALL) if is_family else None
        return match[1] if match else None


# ---- all stages ----------------------------------------------------------------------------------------------------

LEARNING_RATE = Metric("lr", "", "Learning rate of this step.")
GRAD_NORM = Metric("grad_norm", "", "Norm of the whole gradient before clipping (PPO: mean over the updates).")
SECONDS_STEP = Metric("perf/seconds_step", "seconds", "Duration of the step, without evaluations and checkpoints.")
TOKENS_PER_SECOND = Metric(
    "perf/tokens_per_second",
    "tokens per second",
    "Response tokens (reward, dpo: tokens of both sides) per second.",
)
PEAK_MEMORY = Metric(
    "perf/peak_memory",
    "GB",
    "Most memory so far: of the GPU, without one of the process.",
    Chart("Peak memory", "Levels off in the first steps; one that goes on climbing will run out.", "GB"),
    "peak memory",
)
TRAINING = [LEARNING_RATE, GRAD_NORM, SECONDS_STEP, TOKENS_PER_SECOND, PEAK_MEMORY]

# ---- sft -----------------------------------------------------------------------------------------------------------

_SFT_LOSS = Chart(
    "Loss",
    "Both lines fall and flatten together; a validation loss that turns upwards is overfitting.",
    "loss (nats per token)",
)
SFT_LOSS = Metric("loss", "nats per token", "Cross-entropy of the batch's response tokens.", _SFT_LOSS, "training")
SFT_EVAL_LOSS = Metric(
    "eval_loss", "nats per token", "Cross-entropy of the held-out rows' response tokens.", _SFT_LOSS, "validation"
)

# ---- reward --------------------------------------------------------------------------------------------------------

_ACCURACY = Chart(
    "Accuracy on held-out pairs",
    "Rises from 0.5 (a coin) towards 0.7 to 0.8 on human preferences; far above suggests a leak or a shortcut.",
    "pairs ranked right (share)",
    reading_with_level="Rises from 0.5 (a coin) towards the noise ceiling, the best that labels this noisy allow; "
    "above it suggests a leak.",
)
_PAIR_LOSS = Chart(
    "Pairwise loss",
    "Falls from 0.69 (a coin) and flattens; a validation loss that turns upwards is overfitting.",
    "loss (nats per pair)",
)
EVAL_ACCURACY = Metric(
    "eval_accuracy", "share", "Held-out pairs of which the preferred side scores higher.", _ACCURACY, "accuracy"
)
EVAL_ACCURACY_LOW = Metric(
    "eval_accuracy_low", "share", "Lower end of the accuracy's 95% interval (Wilson).", _ACCURACY, drawn="low"
)
EVAL_ACCURACY_HIGH = Metric(
    "eval_accuracy_high", "share", "Upper end of the accuracy's 95% interval (Wilson).", _ACCURACY, drawn="high"
)
NOISE_CEILING = Metric(
    "label_noise_ceiling",
    "share",
    "The setting of that name: the best accuracy that the labels' noise allows.",
    _ACCURACY,
    "noise ceiling",
    drawn="level",
)
PAIR_LOSS = Metric("loss", "nats per pair", "Bradley-Terry loss of the batch.", _PAIR_LOSS, "training")
EVAL_PAIR_LOSS = Metric(
    "eval_loss", "nats per pair", "Bradley-Terry loss of the held-out pairs.", _PAIR_LOSS, "validation"
)
ACCURACY = Metric("accuracy", "share", "Pairs of the batch of which the preferred side scores higher.")
MARGIN = Metric("margin", "score", "Score of the preferred side minus that of the other, mean over the batch.")
EVAL_MARGIN = Metric(
    "eval_margin", "score", "Score of the preferred side minus that of the other, mean over the held-out pairs."
)
EVAL_PAIRS = Metric("eval_pairs", "pairs", "Number of held-out pairs.")
EVAL_LENGTH_CORRELATION = Metric(
    "eval_length_correlation", "-1 to 1", "Correlation of the score difference with the difference in length."
)
EVAL_LENGTH_ACCURACY = Metric(
    "eval_length_accuracy", "share", "Accuracy that length alone reaches: always the longer side, or the shorter."
)
EVAL_CALIBRATION_ERROR = Metric(
    "eval_calibration_error", "share", "Expected calibration error of the predicted probability (10 bins)."
)

# ---- dpo: TRL's names ----------------------------------------------------------------------------------------------

_DPO_LOSS = Chart(
    "DPO loss",
    "Falls and flattens; a validation loss that turns upwards is overfitting.",
    "loss (per pair)",
)
_IMPLICIT_REWARDS = Chart(
    "Implicit rewards",
    "The gap between the lines grows; both may fall, for DPO trains their difference alone.",
    "mean reward",
)
DPO_LOSS = Metric("loss", "", "Loss of the batch, mean over its pairs.", _DPO_LOSS, "training")
EVAL_DPO_LOSS = Metric("eval_loss", "", "Loss of the held-out pairs.", _DPO_LOSS, "validation")
CHOSEN_REWARD = Metric(
    "rewards/chosen",
    "score",
    "beta times the log-ratio of policy to reference of the chosen response, mean over the batch.",
    _IMPLICIT_REWARDS,
    "chosen",
)
REJECTED_REWARD = Metric(
    "rewards/rejected", "score", "The same of the rejected response.", _IMPLICIT_REWARDS, "rejected"
)
REWARD_ACCURACY = Metric(
    "rewards/accuracies", "share", "Pairs of the batch of which the chosen response has the higher reward."
)
REWARD_MARGIN = Metric("rewards/margins", "score", "rewards/chosen minus rewards/rejected.")
CHOSEN_LOGPROB = Metric(
    "logps/chosen", "nats per response", "Log-prob of the chosen response, summed over its tokens; mean over the batch."
)
REJECTED_LOGPROB = Metric("logps/rejected", "nats per response", "The same of the rejected response.")
EVAL_REWARD_ACCURACY = Metric(
    "eval_rewards/accuracies",
    "share",
    "Held-out pairs of which the chosen response has the higher reward.",
    _ACCURACY,
    "accuracy",
)
EVAL_REWARD_ACCURACY_LOW = Metric(
    "eval_rewards/accuracies_low", "share", "Lower end of its 95% interval (Wilson).", _ACCURACY, drawn="low"
)
EVAL_REWARD_ACCURACY_HIGH = Metric(
    "eval_rewards/accuracies_high", "share", "Upper end of its 95% interval (Wilson).", _ACCURACY, drawn="high"
)
EVAL_REWARD_MARGIN = Metric("eval_rewards/margins", "score", "rewards/margins of the held-out pairs.")

# ---- ppo -----------------------------------------------------------------------------------------------------------

SCORES = Metric(
    "objective/scores",
    "score",
    "Reward model plus weighted reward functions, missing-EOS rule applied; mean over the rollout.",
    Chart(
        "Score",
        "Rises, then levels off; it is only a stand-in for what is wanted, so read it beside the gold scores.",
        "mean score",
    ),
    "score",
)
EVAL_SCORES = Metric(
    "eval/scores",
    "score",
    "Mean score on the held-out prompts, without the missing-EOS rule.",
    Chart(
        "Score on held-out prompts",
        "Rises with the score on the training prompts; one that stays behind is overfitting to those prompts.",
        "mean score",
    ),
    "score",
)
_GOLD = Chart(
    "Gold score: {name}",
    "Rises with the score that is trained on; one that falls while that score climbs is reward hacking.",
    "mean score",
)
EVAL_FUNCTION = Metric(
    "eval/{name}", "score", "Mean of an eval function on the held-out prompts.", _GOLD, "held-out prompts"
)
FUNCTION = Metric("objective/{name}", "score", "Mean of an eval function on the rollout.", _GOLD, "training prompts")
_KL = Chart(
    "KL from the reference",
    "Grows slowly and levels off; a sudden jump means that the policy is running away.",
    "KL (nats per response)",
    height=172,
    reading_with_level="Grows, then stays near its target; a sudden multiple of it means that the policy is running "
    "away.",
)
KL = Metric(
    "objective/kl", "nats per response", "Log-ratio of policy to reference, summed over the response.", _KL, "KL"
)
KL_TARGET = Metric("objective/kl_target", "nats per response", "The setting kl_target.", _KL, "target", drawn="level")
KL_COEF = Metric(
    "objective/kl_coef",
    "",
    "Coefficient of the KL penalty in this step.",
    Chart("KL coefficient", "Below: the penalty's coefficient.", "coefficient", below=_KL, height=112),
    "coefficient",
)
ENTROPY = Metric(
    "objective/entropy",
    "nats per response",
    "Minus the sampled response's log-probability: an estimate of the policy's entropy.",
    Chart("Entropy", "Falls slowly; a drop to near zero is a policy that has collapsed.", "nats per response"),
    "entropy",
)
LENGTH_MEAN = Metric(
    "response/length_mean",
    "tokens per response",
    "Mean length of the rollout's responses.",
    Chart(
        "Response length",
        "Stays near where it began; a steady climb means that length is being rewarded.",
        "tokens per response",
    ),
    "response length",
)
DISTINCT_2 = Metric(
    "response/distinct_2",
    "share",
    "Different pairs of neighbouring tokens over all such pairs of the rollout.",
    Chart(
        "Diversity (distinct-2)",
        "Stays level; a fall means that responses repeat themselves or one another.",
        "distinct token pairs (share)",
    ),
    "diversity (distinct-2)",
)
REPETITION = Metric(
    "response/repetition",
    "share",
    "Pairs of neighbouring tokens that stand earlier in the same response, over all such pairs of the rollout.",
    Chart(
        "Repetition and similarity",
        "Stay level; repetition climbs where responses repeat themselves, similarity where they repeat one another.",
        "token pairs (share)",
    ),
    "repetition",
)
SIMILARITY = Metric(
    "response/similarity",
    "share",
    "Chance that a token pair of one response is in another response of the rollout, to another prompt.",
    REPETITION.chart,
    "similarity of the responses",
)
FRAC_REWARD_ZERO_STD = Metric(
    "frac_reward_zero_std",
    "share",
    "Prompts whose responses all have the same score, where each has several: without a critic they teach nothing but "
    "the KL penalty.",
    Chart(
        "Prompts without a signal",
        "Stays low; near 1 the prompts are too easy or too hard, or there are too few responses to each.",
        "prompts with equal scores (share)",
    ),
    "prompts without a signal",
)
EXPLAINED_VARIANCE = Metric(
    "critic/explained_variance",
    "share",
    "Share of the returns' variance that the critic's values explain, where there is a critic.",
    Chart(
        "Critic: explained variance",
        "Climbs above 0 after warm-up, towards 1; at 0 or below the critic helps no more than a constant.",
        "share of variance",
    ),
    "critic: explained variance",
)
CLIP_FRACTION = Metric(
    "policy/clipfrac_avg",
    "share",
    "Tokens whose policy loss is clipped, mean over the updates.",
    Chart(
        "Clipped policy updates",
        "Stays small, about 0.05 to 0.2; much more means that updates are too large for the clip range.",
        "clipped tokens (share)",
    ),
    "clipped policy updates",
)
_SECONDS = Chart(
    "Seconds per step",
    "Level from step to step; the tallest part is the one worth making faster.",
    "seconds per step",
    card="Where the time goes",
    bars=True,
)
SECONDS_ROLLOUT = Metric("perf/seconds_rollout", "seconds", "Time to sample the responses.", _SECONDS, "rollout")
SECONDS_SCORE = Metric("perf/seconds_score", "seconds", "Time to score the responses.", _SECONDS, "score")
SECONDS_UPDATE = Metric("perf/seconds_update", "seconds", "Time to train on the responses.", _SECONDS, "update")
SCORES_STD = Metric("objective/scores_std", "score", "Standard deviation of objective/scores over the rollout.")
SCORE_LENGTH_CORRELATION = Metric(
    "objective/score_length_correlation",
    "-1 to 1",
    "Correlation of a response's score with its number of tokens over the rollout; null where one of them is constant.",
)
REWARD_MODEL = Metric("objective/reward_model", "score", "Mean score of the reward model, where there is one.")
REWARD_MODEL_STD = Metric(
    "objective/reward_model_std", "score", "Standard deviation of the reward model's scores over the rollout."
)
NON_SCORE_REWARD = Metric(
    "objective/non_score_reward",
    "score",
    "The KL penalty as a reward: minus coefficient times KL, mean over the rollout.",
)
RLHF_REWARD = Metric("objective/rlhf_reward", "score", "objective/scores plus objective/non_score_reward.")
REWARD_MEAN = Metric("rewards/{name}/mean", "score", "Mean of a reward function, unweighted, where it did not abstain.")
REWARD_STD = Metric("rewards/{name}/std", "score", "Standard deviation of a reward function over the rollout.")
LOGPROB_GAP = Metric(
    "rollout/logprob_gap",
    "nats per token",
    "Distance of the log-prob that a token was sampled with from the one that is trained, mean over the rollout.",
)
LOGPROB_GAP_MAX = Metric("rollout/logprob_gap_max", "nats per token", "The largest of these distances.")
ABSTAINED = Metric(
    "rewards/abstained", "share", "Responses from which all reward functions abstained; without a reward model."
)
TRUNCATED = Metric("response/truncated", "share", "Responses without a stop token.")
EOS_TOKENS = Metric("val/num_eos_tokens", "responses", "Responses that end with a stop token.")
EPISODES = Metric("episode", "episodes", "Episodes up to and with this step.")
POLICY_LOSS = Metric("loss/policy_avg", "", "Clipped policy loss, mean over the updates.")
VALUE_LOSS = Metric("loss/value_avg", "", "Value loss, mean over the updates, where there is a critic.")
APPROX_KL = Metric(
    "policy/approxkl_avg", "nats per token", "Half the mean square of the log-ratio of policy to rollout policy."
)
TOKEN_ENTROPY = Metric("policy/entropy_avg", "nats per token", "The policy's entropy, mean over the updates.")
VALUE_CLIP_FRACTION = Metric(
    "val/clipfrac_avg", "share", "Tokens whose value loss is clipped, where there is a critic."
)
RATIO = Metric("val/ratio", "", "Probability ratio of the policy to that of the rollout, mean over the updates.")
RATIO_VAR = Metric("val/ratio_var", "", "Variance of val/ratio over the updates.")

METRICS: dict[str, list[Metric]] = {
    "sft": [SFT_LOSS, SFT_EVAL_LOSS, *TRAINING],
    "reward": [
        EVAL_ACCURACY,
        EVAL_ACCURACY_LOW,
        EVAL_ACCURACY_HIGH,
        NOISE_CEILING,
        PAIR_LOSS,
        EVAL_PAIR_LOSS,
        ACCURACY,
        MARGIN,
        EVAL_MARGIN,
        EVAL_PAIRS,
        EVAL_LENGTH_CORRELATION,
        EVAL_LENGTH_ACCURACY,
        EVAL_CALIBRATION_ERROR,
        *TRAINING,
    ],
    "dpo": [
        EVAL_REWARD_ACCURACY,
        EVAL_REWARD_ACCURACY_LOW,
        EVAL_REWARD_ACCURACY_HIGH,
        DPO_LOSS,
        EVAL_DPO_LOSS,
        CHOSEN_REWARD,
        REJECTED_REWARD,
        REWARD_ACCURACY,
        REWARD_MARGIN,
        CHOSEN_LOGPROB,
        REJECTED_LOGPROB,
        EVAL_REWARD_MARGIN,
        EVAL_PAIRS,
        EVAL_LENGTH_CORRELATION,
        *TRAINING,
    ],
    "ppo": [
        SCORES,
        EVAL_SCORES,
        EVAL_FUNCTION,
        FUNCTION,
        KL,
        KL_TARGET,
        KL_COEF,
        ENTROPY,
        LENGTH_MEAN,
        DISTINCT_2,
        REPETITION,
        SIMILARITY,
        FRAC_REWARD_ZERO_STD,
        EXPLAINED_VARIANCE,
        CLIP_FRACTION,
        SECONDS_ROLLOUT,
        SECONDS_SCORE,
        SECONDS_UPDATE,
        SCORES_STD,
        SCORE_LENGTH_CORRELATION,
        REWARD_MODEL,
        REWARD_MODEL_STD,
        NON_SCORE_REWARD,
        RLHF_REWARD,
        REWARD_MEAN,
        REWARD_STD,
        ABSTAINED,
        LOGPROB_GAP,
        LOGPROB_GAP_MAX,
        TRUNCATED,
        EOS_TOKENS,
        EPISODES,
        POLICY_LOSS,
        VALUE_LOSS,
        APPROX_KL,
        TOKEN_ENTROPY,
        VALUE_CLIP_FRACTION,
        RATIO,
        RATIO_VAR,
        *TRAINING,
    ],
}
# Names of metrics that a PPO run has whatever its functions are called; "step" is the key of each line.
FIXED_OF_PPO = {metric.name for metric in METRICS["ppo"] if not metric.is_family} | {"step"}
# What an eval function cannot be called: its metrics would have the names of others.
RESERVED = {name.partition("/")[2] for name in FIXED_OF_PPO if name.startswith(("objective/", "eval/"))}


def charts(stage: str) -> dict[Chart, list[Metric]]:
    """The charts of a stage, in the report's order, each with the metrics that it draws."""
    found: dict[Chart, list[Metric]] = {}
    for metric in METRICS[stage]:
        if metric.chart is not None:
            found.setdefault(metric.chart, []).append(metric)
    return found


def declared(stage: str, metric: Metric) -> Metric:
    """``metric``, which the stage is about to log; ValueError where it is not of ``METRICS[stage]``."""
    if metric not in METRICS[stage] and not any(family.named_by(metric.name) for family in METRICS[stage]):
        raise ValueError(f"{stage} logs {metric}, which is not in METRICS[{stage!r}] of rlhf_fast/metrics.py")
    return metric


def stage_of(names: Set[str]) -> str:
    """The stage whose metrics have these names: the one that alone has some of them, else ``sft``."""
    fixed = {stage: {metric.name for metric in METRICS[stage] if not metric.is_family} for stage in METRICS}
    for stage in ("ppo", "dpo", "reward"):
        own = fixed[stage] - set().union(*(fixed[other] for other in METRICS if other != stage))
        if own & names:
            return stage
    return "sft"


def markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Made by `python -m rlhf_fast.metrics > docs/metrics.md`; change `rlhf_fast/metrics.py` and make it again.",
        "",
        "Each line of `metrics.jsonl` has `step` and some of these; the trackers (`--report_to`) get the same names. A",
        "value that is not finite is null. `{name}` stands for the name of a reward or eval function. What reward",
        "functions give to `log_metric` is logged under their own names beside these.",
    ]
    for stage, declared in METRICS.items():
        lines += ["", f"## {stage}", "", "| name | unit | what | chart of the report |", "| --- | --- | --- | --- |"]
        for metric in declared:
            chart = (metric.chart.card or metric.chart.title) if metric.chart else ""
            lines.append(f"| `{metric.name}` | {metric.unit} | {metric.help} | {chart} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
