"""What goes wrong with the policy: KL explosion, reward hacking, mode collapse, length exploitation."""

import math
import statistics

from rlhf_fast import metrics as m
from rlhf_fast.metrics import FIXED_OF_PPO
from rlhf_fast.monitor.detectors.finding import Finding, in_words, kl_of, length_of, score_of
from rlhf_fast.monitor.history import Change, History
from rlhf_fast.verdicts import Thresholds

SPANS = (None, 30)  # a change is one since the beginning of the run, or since 30 steps ago


def kl_explosion(history: History, at: Thresholds) -> Finding | None:
    """KL several times its target, or its level of the steps before, twice in a row."""
    series = history[m.KL.name]
    recent = series.values[-2:]
    if len(recent) < 2:
        return None
    length, target = history.latest(m.LENGTH_MEAN.name), history.latest(m.KL_TARGET.name) or None
    level, what, names = math.inf, "", [m.KL.name]
    if target is not None:
        level, what = at.kl_over_target * target, f"{at.kl_over_target:g} times its target of {target:g}"
        names.append(m.KL_TARGET.name)
    elif length is not None:
        level, what = at.kl_per_token * length, f"{at.kl_per_token:g} nat per token"
        names.append(m.LENGTH_MEAN.name)
    since = series.since(lambda value: value > level, 2)
    if since is not None:
        reason = f"at step {series.steps[-1]} KL from the reference is {recent[-1]:.3g} nats per response, above {what}"
        return Finding(since, min(recent) / level, names, reason, kl_of)

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
    return next((found for back in SPANS if (found := _hacking(history, at, back)) is not None), None)


def _hacking(history: History, at: Thresholds, back: int | None) -> Finding | None:
    climb = history[m.SCORES.name].change(at.window, back)
    if climb is None or climb.z < at.z:
        return None
    gold = _gold(history, at, back)
    falling = {name: change for name, change in gold.items() if change.z <= -at.gold_z}
    rising = [name for name, change in gold.items() if change.z >= at.z]
    signs = [] if rising else list(_degenerating(history, at, back))
    if not falling and not signs:
        return None
    said = [f"{name} fell from {change.before:.3g} to {change.now:.3g}" for name, change in falling.items()]
    said += [text for _, text, _ in signs]
    sizes = [-change.z / at.gold_z for change in falling.values()] + [size for _, _, size in signs]
    strongest = max(sizes) + 0.5 * (len(sizes) - 1)
    reason = f"the score climbed from {climb.before:.3g} to {climb.now:.3g} while {in_words(said)}"
    names = [m.SCORES.name, *falling, *(name for name, _, _ in signs)]
    return Finding(climb.since, strongest, names, reason, score_of)


def _gold(history: History, at: Thresholds, back: int | None) -> dict[str, Change]:
    """The changes of eval functions, which are measured and never trained on, and of the score on held-out prompts.

    Evaluations are few and each is the mean of many prompts: of them the first two are compared with the last two, and
    only over the whole run.
    """
    own = FIXED_OF_PPO - {m.EVAL_SCORES.name}
    found = {}
    for name in history.names("objective/") + history.names("eval/"):
        evaluation = name.startswith("eval/")
        if name in own or (evaluation and back is not None):
            continue
        change = history[name].change(2 if evaluation else at.window, back)
        if change is not None:
            found[name] = change
    return found


def _degenerating(history: History, at: Thresholds, back: int | None) -> list[tuple[str, str, float]]:
    """(metric, words, size) of each sign that the texts get worse."""
    window, found = at.window, []
    distinct = history[m.DISTINCT_2.name].change(window, back)
    if distinct is not None and distinct.ratio <= 1 - at.diversity_fall and distinct.z <= -at.z:
        text = _less_diverse(distinct)
        found.append((m.DISTINCT_2.name, text, (1 - distinct.ratio) / at.diversity_fall))
    for metric, words in ((m.REPETITION, "repetition"), (m.SIMILARITY, "similarity of the responses")):
        rise = history[metric.name].change(window, back)
        if rise is not None and rise.difference >= at.repetition_rise and rise.z >= at.z:
            text = f"{words} rose from {rise.before:.2f} to {rise.now:.2f}"
            found.append((metric.name, text, rise.difference / at.repetition_rise))
    length = history[m.LENGTH_MEAN.name].change(window, back)
    if length is not None and length.ratio >= 1 + at.length_change and length.z >= at.z:
        text = f"the responses grew from {length.before:.0f} to {length.now:.0f} tokens"
        found.append((m.LENGTH_MEAN.name, text, (length.ratio - 1) / at.length_change))
    return found


def _less_diverse(distinct: Change) -> str:
    return f"diversity (distinct-2) fell from {distinct.before:.2f} to {distinct.now:.2f}"


def mode_collapse(history: History, at: Thresholds) -> Finding | None:
    """Two of: diversity halved, entropy nearly gone, responses alike."""
    window = at.window
    signs: list[tuple[str, str, float, int]] = []
    distinct = history[m.DISTINCT_2.name].change(window)
    if distinct is not None and distinct.ratio <= at.collapse_diversity:
        text = _less_diverse(distinct)
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
    reason = in_words([text for _, text, _, _ in signs])
    since = max(since for *_, since in signs)
    return Finding(since, size, [name for name, *_ in signs], reason, lambda row: -len(set(str(row.get("response")))))


def length_exploitation(history: History, at: Thresholds) -> Finding | None:
    """Longer responses, a higher score, scores that follow the length in a rollout, and no gold score that rises."""
    return next((found for back in SPANS if (found := _longer(history, at, back)) is not None), None)


def _longer(history: History, at: Thresholds, back: int | None) -> Finding | None:
    window = at.window
    length = history[m.LENGTH_MEAN.name].change(window, back)
    score = history[m.SCORES.name].change(window, back)
    if length is None or score is None or length.ratio < 1 + at.length_change or min(length.z, score.z) < at.z:
        return None
    if any(change.z >= at.z for change in _gold(history, at, back).values()):
        return None
    correlations = history[m.SCORE_LENGTH_CORRELATION.name].values[-3 * window :]
    correlation = statistics.fmean(correlations) if correlations else None
    if correlation is not None and correlation < at.length_correlation:
        return None
    followed = "" if correlation is None else f", and within a rollout they correlate ({correlation:+.2f})"
    reason = (
        f"the responses grew from {length.before:.0f} to {length.now:.0f} tokens while the score climbed from "
        f"{score.before:.3g} to {score.now:.3g}{followed}"
    )
    names = [m.LENGTH_MEAN.name, m.SCORES.name]
    if correlation is not None:
        names.append(m.SCORE_LENGTH_CORRELATION.name)
    return Finding(length.since, (length.ratio - 1) / at.length_change, names, reason, length_of)
