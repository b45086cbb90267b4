"""Checks of preference pairs: length, labels that contradict each other, sides that are equal."""

from rlhf_fast.data import PairRow
from rlhf_fast.data.encode import SAME_TOKENS
from rlhf_fast.data.formats import SAME_SIDES
from rlhf_fast.doctor.findings import Check, Finding, note, ok, share, warning
from rlhf_fast.doctor.rows import dropped
from rlhf_fast.doctor.subject import StageData
from rlhf_fast.recipes.pairs import length_difference
from rlhf_fast.rewards.quality import wilson

SHORTCUT = 0.65  # accuracy of length alone that leaves a reward model little reason to learn more


def length_bias(data: StageData) -> Finding:
    """How often the longer response is the chosen one."""
    pairs = [*data.rows, *data.held_out]
    differences = [length_difference(row) for row in pairs]
    right = sum(1.0 if difference > 0 else 0.5 if difference == 0 else 0.0 for difference in differences)
    low, high = wilson(right, len(pairs))
    found = (
        f"the longer response is the chosen one in {right / len(pairs):.1%} of {len(pairs)} pairs (95% interval "
        f"{low:.1%} to {high:.1%}){data.scope}"
    )
    why = "A reward model takes the shortcut, and PPO then writes answers of another length, not better ones."
    change = "Balance the pairs by length; watch eval_length_correlation, and response/length_mean in PPO."
    if low > SHORTCUT or high < 1 - SHORTCUT:
        return warning(found, why, change)
    return ok(found) if low <= 0.5 <= high else note(found, why, change)


def label_agreement(data: StageData) -> Finding:
    """Whether the same two responses to a prompt are labelled both ways."""
    rows: list[PairRow] = [*data.rows, *data.held_out]
    labels: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for row in rows:
        labels.setdefault((tuple(row.chosen_ids), tuple(row.rejected_ids)), row.index)
    contradicted = [
        sorted((index, labels[rejected, chosen]))
        for (chosen, rejected), index in labels.items()
        if (rejected, chosen) in labels and chosen < rejected  # each pair once
    ]
    if not contradicted:
        return ok(f"no pair of {len(rows)} is labelled both ways{data.scope}")
    first, second = contradicted[0]
    found = (
        f"{len(contradicted)} pairs of {len(rows)} are there with both labels{data.scope}; first: rows {first} and "
        f"{second} prefer opposite sides"
    )
    why = "Such pairs teach nothing and cap the accuracy that any reward model can reach."
    change = "Keep the label of the majority, or leave such pairs out."
    return warning(found, why, change) if len(contradicted) > 0.01 * len(rows) else note(found, why, change)


def equal_sides(data: StageData) -> Finding:
    counts, total = dropped(data.reports), sum(report.total for report in data.reports)
    same, cut = counts[SAME_SIDES], counts[SAME_TOKENS]
    if not same + cut:
        return ok(f"chosen and rejected differ in each of {total} pairs{data.scope}")
    first = next(report for report in data.reports if {SAME_SIDES, SAME_TOKENS} & report.first.keys())
    row = next(first.place(index) for reason, index in first.first.items() if reason in (SAME_SIDES, SAME_TOKENS))
    found = (
        f"{share(same + cut, total)} pairs have equal sides, {cut} of them once cut to --max_length, and are left out"
        f"{data.scope}; first: {row}"
    )
    why = "A pair of equal responses has no preference in it; many of them show a mistake where the pairs were made."
    change = "Look at how the pairs were made, and at --max_length."
    return warning(found, why, change) if same + cut > 0.01 * total else note(found, why, change)


CHECKS: list[Check] = [length_bias, label_agreement, equal_sides]
