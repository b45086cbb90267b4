"""What goes wrong with what the training is given: the reward model, the sampler, the length limit."""

import math
import statistics

from rlhf_fast import metrics as m
from rlhf_fast.monitor.detectors.finding import (
    Finding,
    distance_of_score,
    in_words,
    kl_of,
    length_of,
    negative_kl_of,
    score_of,
)
from rlhf_fast.monitor.history import History
from rlhf_fast.verdicts import Thresholds


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
            return Finding(history[m.REWARD_MODEL.name].steps[0], off, names, reason, distance_of_score)
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
    reason = f"the reward model: {in_words([text for _, text, _ in found])}"
    size = max(size for *_, size in found)
    return Finding(accuracy.steps[-1], size, [name for name, *_ in found], reason, score_of)


def sampler_mismatch(history: History, at: Thresholds) -> Finding | None:
    """Sampled and trained log-probs apart, or a KL that stays below 0."""
    gaps = history[m.LOGPROB_GAP.name]
    since = gaps.since(lambda value: value > at.logprob_gap, 3)
    if since is not None:
        gap = statistics.fmean(gaps.values[-3:])
        reason = f"sampled and trained log-probs lie {gap:.3g} nats per token apart, above {at.logprob_gap:g}"
        return Finding(since, gap / at.logprob_gap, [m.LOGPROB_GAP.name], reason, kl_of)
    kl, count = history[m.KL.name], at.negative_kl
    since = kl.since(lambda value: value < 0, count)
    if since is None:
        return None
    recent = kl.values[-count:]
    mean, error = statistics.fmean(recent), kl.noise() / math.sqrt(count)
    if mean > -3 * error or mean > -0.01:
        return None
    reason = f"KL has been below 0 for {count} rollouts in a row ({mean:.3g} nats per response on average)"
    return Finding(since, 1.5, [m.KL.name], reason, negative_kl_of)


def truncation(history: History, at: Thresholds) -> Finding | None:
    """Almost no response has a stop token, on average over the window."""
    series = history[m.TRUNCATED.name]
    recent = series.values[-at.window :]
    if len(recent) < at.window or statistics.fmean(recent) < at.truncated:
        return None
    share = statistics.fmean(recent)
    reason = f"{share:.0%} of the responses reach response_length without a stop token"
    size = share / at.truncated + 0.5
    return Finding(series.steps[-at.window], size, [m.TRUNCATED.name, m.LENGTH_MEAN.name], reason, length_of)
