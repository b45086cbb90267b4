"""What goes wrong with the training: not learning, a useless critic, no signal."""

import math
import statistics
from collections.abc import Callable

from rlhf_fast import metrics as m
from rlhf_fast.monitor.detectors.finding import Finding, score_of
from rlhf_fast.monitor.history import History
from rlhf_fast.verdicts import Thresholds


def not_learning(history: History, at: Thresholds) -> Finding | None:
    """PPO: no gain of score and hardly any KL over many steps. Other stages: a loss that does not fall."""
    patience, window = at.patience, at.window
    kl, length = history.last(m.KL.name, patience), history.latest(m.LENGTH_MEAN.name)
    if kl and m.SCORES.name in history.names("objective/scores"):
        scores = history[m.SCORES.name]
        gain = scores.change(window)
        still = at.still_kl * (length or 20)
        moved = max(statistics.fmean(kl[-window:]), 0.0)
        if (
            len(scores.values) < patience
            or gain is None
            or gain.z >= 2
            or moved >= still
            or no_signal(history, at) is not None
        ):
            return None
        reason = (
            f"over {len(scores.values)} steps the score went from {gain.before:.3g} to {gain.now:.3g} and KL is "
            f"{moved:.2g} nats per response: the policy has hardly changed"
        )
        names = [m.SCORES.name, m.KL.name]
        return Finding(scores.steps[-patience], min(still / max(moved, still / 5), 5), names, reason, score_of)
    return None if history.names("objective/") else _flat_loss(history, at)


def _flat_loss(history: History, at: Thresholds) -> Finding | None:
    """Neither the loss nor the held-out loss has fallen by more than a little."""
    loss, held_out = history["loss"], history["eval_loss"].values
    count = len(loss.values)
    fall = loss.change(max(at.window, count // 3)) if count >= max(at.patience, 2 * at.window) else None
    if fall is None or fall.z < -2 or fall.ratio < 1 - at.loss_fall:
        return None
    if len(held_out) > 1 and min(held_out[1:]) < (1 - at.loss_fall) * held_out[0]:
        return None
    reason = f"over {count} steps the loss went from {fall.before:.3g} to {fall.now:.3g}"
    names = ["loss", "eval_loss"] if len(held_out) > 1 else ["loss"]
    return Finding(loss.steps[0], 1.5, names, reason, score_of)


def useless_critic(history: History, at: Thresholds) -> Finding | None:
    """Explained variance clearly below 0 after a warm-up and not on its way up, or stuck at 0."""
    series, window = history[m.EXPLAINED_VARIANCE.name], at.critic_window
    recent = series.values[-window:]
    if len(series.values) < at.critic_warmup + window or no_signal(history, at) is not None:
        return None
    mean, error = statistics.fmean(recent), statistics.stdev(recent) / math.sqrt(window)
    rise = statistics.fmean(recent[window // 2 :]) - statistics.fmean(recent[: window // 2])
    stuck = max(map(abs, recent)) < at.critic_stuck
    if not stuck and (mean + 2 * error > -at.critic_below or rise > 4 * error):  # 4: twice the error of the rise
        return None
    reason = f"the critic's explained variance is {mean:.2f} on average over the last {window} steps"
    size = 2.0 if stuck else min(-mean / (at.critic_below + 2 * error), 4)
    return Finding(series.steps[-window], size, [m.EXPLAINED_VARIANCE.name, m.VALUE_LOSS.name], reason, score_of)


def no_signal(history: History, at: Thresholds) -> Finding | None:
    """All scores of a rollout, or of almost every prompt, are equal; or the gradient is 0."""
    prompts = f"{at.equal_scores:.0%} or more of the prompts have responses that all score the same"
    signs: list[tuple[m.Metric, Callable[[float], bool], str]] = [
        (m.SCORES_STD, lambda value: value <= 1e-6, "all responses of a rollout have the same score"),
        (m.FRAC_REWARD_ZERO_STD, lambda value: value >= at.equal_scores, prompts),
        (m.GRAD_NORM, lambda value: value == 0, "the gradient is 0"),
    ]
    for metric, silent, reason in signs:
        since = history[metric.name].since(silent, at.window)
        if since is not None:
            return Finding(since, 3.0, [metric.name, m.SCORES.name], f"{reason}, since step {since}", score_of)
    return None
