"""One function for each verdict of the monitor: the history of a run -> a finding, or None.

Each joins several metrics, since one alone misleads, and compares with where the run began and with its own noise.
A detector whose metrics are not there finds nothing.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_fast import metrics as m
from rlhf_fast.metrics import FIXED_OF_PPO
from rlhf_fast.monitor.history import Change, History, Row
from rlhf_fast.verdicts import Thresholds


@dataclass(frozen=True)
class Finding:
    """The signs of one verdict at one step.

    ``since``: the first step at which they stand. ``size``: how far past the threshold, 1 at it. ``worst``: the key by
    which the samples that show it are sorted, highest first.
    """

    since: int
    size: float
    metrics: Sequence[str]
    reason: str
    worst: Callable[[Row], float]


def score_of(row: Row) -> float:
    return _number(row.get("score"))


def kl_of(row: Row) -> float:
    return _number(row.get("kl"))


def length_of(row: Row) -> float:
    return _number(row.get("length", len(str(row.get("response", "")))))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else -math.inf


def kl_explosion(history: History, at: Thresholds) -> Finding | None:
    """KL several times its target, or its level of the steps before, twice in a row."""
    series = history[m.KL.name]
    recent = series.values[-2:]
    if len(recent) < 2:
        return None
    length, target = history.latest(m.LENGTH_MEAN.name), history.latest(m.KL_TARGET.name)
    if target is not None:
        level, what = at.kl_over_target * target, f"{at.kl_over_target:g} times its target of {target:g}"
    elif length is not None:
        level, what = at.kl_per_token * length, f"{at.kl_per_token:g} nats per token"
    else:
        level, what = math.inf, ""
    since = series.since(lambda value: value > level, 2)
    if since is not None:
        reason = f"KL from the reference is {min(recent):.3g} nats per response or more, above {what}"
        return Finding(since, min(recent) / level, [m.KL.name, m.KL_TARGET.name], reason, kl_of)

    floor = target if target is not None else 0.3 * length if length is not None else 1.0
    before = series.values[-12:-2]
    if len(before) < 5:
        return None
    usual = statistics.median(before)
    spread = statistics.median(abs(value - usual) for value in before) / 0.6745
    jump = max(at.kl_jump * usual, usual + 8 * spread, floor)
    if min(recent) <= jump:
        return None
    reason = f"KL from the reference jumped from {usual:.3g} to {recent[-1]:.3g} nats per response within two steps"
    return Finding(series.steps[-2], min(recent) / jump, [m.KL.name], reason, kl_of)


def reward_hacking(history: History, at: Thresholds) -> Finding | None:
    """The score climbs while a gold score falls; or, where no gold score rises with it, while the texts degenerate."""
    window = int(at.window)
    climb = history[m.SCORES.name].change(window)
    if climb is None or climb.z < at.z:
        return None
    gold = {name: change for name in _gold(history) if (change := _gold_change(history, name, window)) is not None}
    falling = {name: change for name, change in gold.items() if change.z <= -at.z}
    rising = [name for name, change in gold.items() if change.z >= at.z]
    signs = [] if rising else list(_degenerating(history, at))
    if not falling and not signs:
        return None
    said = [f"{name} fell from {change.before:.3g} to {change.now:.3g}" for name, change in falling.items()]
    said += [text for _, text, _ in signs]
    sizes = [-change.z / at.z for change in falling.values()] + [size for _, _, size in signs]
    strongest = max(sizes) + 0.5 * (len(sizes) - 1)
    reason = f"the score climbed from {climb.before:.3g} to {climb.now:.3g} while {_and(said)}"
    names = [m.SCORES.name, *falling, *(name for name, _, _ in signs)]
    return Finding(climb.since, strongest, names, reason, score_of)


def _gold(history: History) -> list[str]:
    """The metrics of eval functions, which are measured and never trained on; and the score on held-out prompts."""
    own = FIXED_OF_PPO - {m.EVAL_SCORES.name}
    return [name for name in history.names("objective/") + history.names("eval/") if name not in own]


def _gold_change(history: History, name: str, window: int) -> Change | None:
    """Evaluations are few and each is the mean of many prompts: then two values are enough at each end."""
    count = 2 if name.startswith("eval/") else window
    return history[name].change(count)


def _degenerating(history: History, at: Thresholds) -> list[tuple[str, str, float]]:
    """(metric, words, size) of each sign that the texts get worse."""
    window, found = int(at.window), []
    distinct = history[m.DISTINCT_2.name].change(window)
    if distinct is not None and distinct.ratio <= 1 - at.diversity_fall and distinct.z <= -at.z:
        text = f"diversity (distinct-2) fell from {distinct.before:.2f} to {distinct.now:.2f}"
        found.append((m.DISTINCT_2.name, text, (1 - distinct.ratio) / at.diversity_fall))
    for metric, words in ((m.REPETITION, "repetition"), (m.SIMILARITY, "similarity of the responses")):
        rise = history[metric.name].change(window)
        if rise is not None and rise.difference >= at.repetition_rise and rise.z >= at.z:
            text = f"{words} rose from {rise.before:.2f} to {rise.now:.2f}"
            found.append((metric.name, text, rise.difference / at.repetition_rise))
    length = history[m.LENGTH_MEAN.name].change(window)
    if length is not None and length.ratio >= 1 + at.length_change and length.z >= at.z:
        text = f"the responses grew from {length.before:.0f} to {length.now:.0f} tokens"
        found.append((m.LENGTH_MEAN.name, text, (length.ratio - 1) / at.length_change))
    return found


def mode_collapse(history: History, at: Thresholds) -> Finding | None:
    """Two of: diversity halved, entropy nearly gone, responses alike."""
    window = int(at.window)
    signs: list[tuple[str, str, float, int]] = []
    distinct = history[m.DISTINCT_2.name].change(window)
    if distinct is not None and distinct.ratio <= at.collapse_diversity:
        text = f"diversity (distinct-2) fell from {distinct.before:.2f} to {distinct.now:.2f}"
        signs.append((m.DISTINCT_2.name, text, at.collapse_diversity / max(distinct.ratio, 0.05), distinct.since))
    entropy = history[m.TOKEN_ENTROPY.name].change(window)
    if entropy is not None and entropy.ratio <= at.collapse_entropy:
        text = f"the entropy fell from {entropy.before:.2f} to {entropy.now:.2f} nats per token"
        signs.append((m.TOKEN_ENTROPY.name, text, at.collapse_entropy / max(entropy.ratio, 0.05), entropy.since))
    alike = [(metric, history[metric.name].change(window)) for metric in (m.SIMILARITY, m.REPETITION)]
    for metric, rise in alike:
        if rise is not None and rise.difference >= at.collapse_similarity and rise.z >= at.z:
            text = f"{metric.label} rose from {rise.before:.2f} to {rise.now:.2f}"
            signs.append((metric.name, text, rise.difference / at.collapse_similarity, rise.since))
            break
    if len(signs) < 2:
        return None
    size = statistics.fmean(size for _, _, size, _ in signs) + 0.5 * (len(signs) - 2)
    reason = _and([text for _, text, _, _ in signs])
    since = max(since for *_, since in signs)
    return Finding(since, size, [name for name, *_ in signs], reason, lambda row: -len(set(str(row.get("response")))))


def not_learning(history: History, at: Thresholds) -> Finding | None:
    """PPO: no gain of score and hardly any KL over many steps. Other stages: a loss that does not fall."""
    patience, window = int(at.patience), int(at.window)
    kl, length = history.last(m.KL.name, patience), history.latest(m.LENGTH_MEAN.name)
    if kl and m.SCORES.name in history.names("objective/scores"):
        scores = history[m.SCORES.name]
        gain = scores.change(window)
        still = at.still_kl * (length or 20)
        moved = max(statistics.fmean(kl[-window:]), 0.0)
        if gain is None or gain.z >= 2 or moved >= still or no_signal(history, at) is not None:
            return None
        reason = (
            f"over {len(scores.values)} steps the score went from {gain.before:.3g} to {gain.now:.3g} and KL is "
            f"{moved:.2g} nats per response: the policy has hardly changed"
        )
        names = [m.SCORES.name, m.KL.name]
        return Finding(scores.steps[-patience], min(still / max(moved, still / 5), 5), names, reason, score_of)
    loss = history["loss"]
    if history.names("objective/") or len(loss.values) < max(patience, 2 * window):
        return None
    third = max(window, len(loss.values) // 3)
    fall = loss.change(min(third, len(loss.values) // 2))
    if fall is None or fall.z < -2:
        return None
    reason = f"over {len(loss.values)} steps the loss went from {fall.before:.3g} to {fall.now:.3g}"
    return Finding(loss.steps[0], 1.5, ["loss"], reason, score_of)


def useless_critic(history: History, at: Thresholds) -> Finding | None:
    """Explained variance below 0 by more than its noise after a warm-up, or at 0, and not on its way up."""
    series, window = history[m.EXPLAINED_VARIANCE.name], int(at.critic_window)
    recent = series.values[-window:]
    if len(series.values) < int(at.critic_warmup) + window:
        return None
    mean, error = statistics.fmean(recent), statistics.stdev(recent) / math.sqrt(window)
    constant = max(map(abs, recent)) < at.critic_rise / 4
    rising = statistics.fmean(recent[window // 2 :]) > statistics.fmean(recent[: window // 2]) + at.critic_rise
    if rising or not (constant or mean + 2 * error < 0):
        return None
    reason = f"the critic's explained variance is {mean:.2f} on average over the last {window} steps"
    size = 2.0 if constant else min(-mean / (2 * error) if error > 0 else 4, 4)
    return Finding(series.steps[-window], size, [m.EXPLAINED_VARIANCE.name, m.VALUE_LOSS.name], reason, score_of)


def miscalibrated_reward(history: History, at: Thresholds) -> Finding | None:
    """PPO: the first rollouts' scores are not about 0 with standard deviation 1. Reward model: its probabilities or its
    order of the held-out pairs are wrong, or length alone explains them."""
    means, deviations = history.first(m.REWARD_MODEL.name, 3), history.first(m.REWARD_MODEL_STD.name, 3)
    if len(means) == len(deviations) == 3:
        mean, deviation = statistics.fmean(means), statistics.fmean(deviations)
        off = max(abs(mean) / at.reward_mean, abs(math.log(max(deviation, 1e-6))) / math.log(at.reward_std))
        if off > 1:
            reason = (
                f"the reward model's scores of the first rollouts have mean {mean:.2f} and standard deviation "
                f"{deviation:.2f} instead of 0 and 1"
            )
            names = [m.REWARD_MODEL.name, m.REWARD_MODEL_STD.name]
            return Finding(history[m.REWARD_MODEL.name].steps[0], off, names, reason, lambda row: abs(score_of(row)))
    return _miscalibrated_pairs(history, at)


def _miscalibrated_pairs(history: History, at: Thresholds) -> Finding | None:
    accuracy = history[m.EVAL_ACCURACY.name]
    high, pairs = history.latest(m.EVAL_ACCURACY_HIGH.name), history.latest(m.EVAL_PAIRS.name)
    if len(accuracy.values) < 2 or high is None or not pairs:  # the first evaluation is before training
        return None
    found: list[tuple[str, str, float]] = []
    if high < 0.5:
        text = f"it prefers the rejected side: accuracy {accuracy.values[-1]:.1%} on {pairs:.0f} held-out pairs"
        found.append((m.EVAL_ACCURACY.name, text, 0.5 / max(high, 0.1)))
    error, allowed = history.latest(m.EVAL_CALIBRATION_ERROR.name), at.calibration_error + 1 / math.sqrt(pairs)
    if error is not None and error > allowed:
        text = f"its probabilities are off by {error:.2f} on average (expected calibration error)"
        found.append((m.EVAL_CALIBRATION_ERROR.name, text, error / allowed))
    length, correlation = history.latest(m.EVAL_LENGTH_ACCURACY.name), history.latest(m.EVAL_LENGTH_CORRELATION.name)
    if length is not None and correlation is not None and abs(correlation) > 0.7 and accuracy.values[-1] <= length:
        text = f"its scores follow the length (correlation {correlation:+.2f}), which alone is right as often"
        found.append((m.EVAL_LENGTH_CORRELATION.name, text, abs(correlation) / 0.7))
    if not found:
        return None
    reason = f"the reward model: {_and([text for _, text, _ in found])}"
    size = max(size for *_, size in found)
    return Finding(accuracy.steps[-1], size, [name for name, *_ in found], reason, score_of)


def sampler_mismatch(history: History, at: Thresholds) -> Finding | None:
    """Sampled and trained log-probs apart, or a KL that stays below 0."""
    gaps = history[m.LOGPROB_GAP.name]
    since = gaps.since(lambda value: value > at.logprob_gap, 3)
    if since is not None:
        gap = statistics.fmean(gaps.values[-3:])
        reason = f"sampled and trained log-probs lie {gap:.3g} nats per token apart, above {at.logprob_gap:g}"
        return Finding(since, gap / at.logprob_gap, [m.LOGPROB_GAP.name, m.KL.name], reason, kl_of)
    kl, count = history[m.KL.name], int(at.negative_kl)
    since = kl.since(lambda value: value < 0, count)
    if since is None:
        return None
    recent = kl.values[-count:]
    mean, error = statistics.fmean(recent), kl.noise() / math.sqrt(count)
    if mean > -3 * error or mean > -0.01:
        return None
    reason = f"KL has been below 0 for {count} rollouts in a row ({mean:.3g} nats per response on average)"
    return Finding(since, 1.5, [m.KL.name, m.LOGPROB_GAP.name], reason, lambda row: -kl_of(row))


def length_exploitation(history: History, at: Thresholds) -> Finding | None:
    """Longer responses, a higher score, scores that follow the length in a rollout, and no gold score that rises."""
    window = int(at.window)
    length, score = history[m.LENGTH_MEAN.name].change(window), history[m.SCORES.name].change(window)
    if length is None or score is None or length.ratio < 1 + at.length_change or length.z < at.z or score.z < at.z:
        return None
    if any((c := _gold_change(history, name, window)) is not None and c.z >= at.z for name in _gold(history)):
        return None
    correlations = history[m.SCORE_LENGTH_CORRELATION.name].values
    correlation = statistics.fmean(correlations[-3 * window :]) if correlations else None
    if correlation is not None and correlation < at.length_correlation:
        return None
    followed = "" if correlation is None else f", and within a rollout they correlate ({correlation:+.2f})"
    reason = (
        f"the responses grew from {length.before:.0f} to {length.now:.0f} tokens while the score climbed from "
        f"{score.before:.3g} to {score.now:.3g}{followed}"
    )
    names = [m.LENGTH_MEAN.name, m.SCORES.name, m.SCORE_LENGTH_CORRELATION.name]
    return Finding(length.since, (length.ratio - 1) / at.length_change, names, reason, length_of)


def no_signal(history: History, at: Thresholds) -> Finding | None:
    """All scores of a rollout, or of almost every prompt, are equal; or the gradient is 0."""
    prompts = f"{at.equal_scores:.0%} or more of the prompts have responses that all score the same"
    signs: list[tuple[m.Metric, Callable[[float], bool], str]] = [
        (m.SCORES_STD, lambda value: value <= 1e-6, "all responses of a rollout have the same score"),
        (m.FRAC_REWARD_ZERO_STD, lambda value: value >= at.equal_scores, prompts),
        (m.GRAD_NORM, lambda value: value == 0, "the gradient is 0"),
    ]
    for metric, silent, reason in signs:
        since = history[metric.name].since(silent, int(at.window))
        if since is not None:
            return Finding(since, 3.0, [metric.name, m.SCORES.name], f"{reason}, since step {since}", score_of)
    return None


def truncation(history: History, at: Thresholds) -> Finding | None:
    """Almost no response has a stop token, in every rollout of the window."""
    series, window = history[m.TRUNCATED.name], int(at.window)
    since = series.since(lambda value: value >= at.truncated, window)
    if since is None:
        return None
    share = statistics.fmean(series.values[-window:])
    reason = f"{share:.0%} of the responses reach response_length without a stop token"
    size = share / at.truncated + 0.5
    return Finding(since, size, [m.TRUNCATED.name, m.LENGTH_MEAN.name], reason, length_of)


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


DETECTORS: dict[str, Callable[[History, Thresholds], Finding | None]] = {
    detector.__name__: detector
    for detector in (
        kl_explosion,
        reward_hacking,
        mode_collapse,
        not_learning,
        useless_critic,
        miscalibrated_reward,
        sampler_mismatch,
        length_exploitation,
        no_signal,
        truncation,
    )
}
