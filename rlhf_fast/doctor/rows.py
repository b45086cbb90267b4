"""Checks of a stage's rows: unusable, cut, repeated, held out, and how many steps they make."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_fast.config import PPOConfig, RewardConfig
from rlhf_fast.data import DataReport, PairRow, SFTRow
from rlhf_fast.data.encode import PROMPT_BEYOND_WINDOW, PROMPT_TOO_LONG, SAME_TOKENS
from rlhf_fast.data.formats import SAME_SIDES
from rlhf_fast.doctor.findings import Check, Finding, note, ok, share, warning
from rlhf_fast.doctor.subject import StageData

ELSEWHERE = {PROMPT_TOO_LONG, PROMPT_BEYOND_WINDOW, SAME_TOKENS, SAME_SIDES}  # other checks count them
FEW_PAIRS, FEW_STEPS = 100, 10


def unusable_rows(data: StageData) -> Finding:
    reports = data.reports
    total = sum(report.total for report in reports)
    reasons = {reason: count for reason, count in dropped(reports).items() if reason not in ELSEWHERE}
    if not reasons:
        return ok(f"each of {total} rows can be used{data.scope}")
    wrong = sum(report.unusable for report in reports)
    first = [
        f"{count} {reason} (first: {report.place(report.first[reason])})"
        for report in reports
        for reason, count in report.dropped.items()
        if reason in reasons
    ]
    found = f"{share(sum(reasons.values()), total)} rows are left out{data.scope}: {'; '.join(first[:4])}"
    why = "What is left out is not trained on, and often shows a wrong column or a broken file."
    change = "Look at the rows named. --strict true stops at the first."
    return warning(found, why, change) if wrong or sum(reasons.values()) > 0.05 * total else note(found, why, change)


def dropped(reports: Sequence[DataReport]) -> Counter[str]:
    return sum((Counter(report.dropped) for report in reports), Counter())


def truncation(data: StageData) -> Finding | None:
    """Rows that are cut to --max_length; pairs whose sides are equal after that."""
    if isinstance(data.config, PPOConfig):
        return None
    kept = sum(report.kept for report in data.reports)
    cut, long = sum(report.truncated for report in data.reports), dropped(data.reports)[PROMPT_TOO_LONG]
    same = dropped(data.reports)[SAME_TOKENS]
    window = f"--max_length {data.config.max_length}"
    found = f"{share(cut, kept)} rows are cut to {window}{data.scope}"
    if long:
        found += f"; of {long} more the prompt alone fills it, and they are left out"
    if same:
        found += f"; {same} pairs are the same tokens once cut, and are left out"
    if not cut and not long:
        return ok(f"no row of {kept} is longer than {window}{data.scope}")
    why = "A cut answer has no end to learn, and a pair may differ in the part that is gone."
    change = "Raise --max_length, or leave out the long rows."
    return warning(found, why, change) if cut + long + same > 0.05 * (kept + long + same) else note(found, why, change)


def prompt_window(data: StageData) -> Finding | None:
    """Prompts that leave no room for a response of response_length tokens."""
    config, report = data.config, data.sampled
    if report is None or not isinstance(config, PPOConfig | RewardConfig):
        return None
    long = report.dropped.get(PROMPT_BEYOND_WINDOW, 0)
    room = config.max_length - config.response_length
    if not long:
        return ok(f"each of {report.kept} prompts fits into {room} tokens (max_length - response_length){data.scope}")
    found = f"{share(long, report.kept + long)} prompts are longer than {room} tokens and are left out{data.scope}"
    why = "The policy is never trained on long prompts and meets them in use."
    change = f"Raise --max_length (now {config.max_length}), or lower --response_length."
    return warning(found, why, change) if long > 0.05 * report.kept else note(found, why, change)


def duplicates(data: StageData) -> Finding:
    """Rows that are there more than once in the training split."""
    counts = Counter(map(content, data.rows))
    repeated = len(data.rows) - len(counts)
    if not repeated:
        return ok(f"no training row of {len(data.rows)} repeats another{data.scope}")
    key, times = counts.most_common(1)[0]
    first = next(row.index for row in data.rows if content(row) == key)
    found = (
        f"{share(repeated, len(data.rows))} training rows repeat another{data.scope}; row {first} is there {times} x"
    )
    why = "A repeated row counts as many times in every epoch: the model learns it by heart."
    change = "Leave out the repetitions, unless the weight is meant."
    return warning(found, why, change) if repeated > 0.05 * len(data.rows) else note(found, why, change)


def content(row: Any) -> tuple[Any, ...]:
    """What makes two rows the same row."""
    if isinstance(row, PairRow):
        return tuple(row.chosen_ids), tuple(row.rejected_ids)
    return (tuple(row.input_ids), str(row.columns)) if not isinstance(row, SFTRow) else (tuple(row.input_ids),)


def leakage(data: StageData) -> Finding | None:
    """Held-out rows whose prompt is trained on, word for word or but for case and white space."""
    if not data.held_out and not data.leaked:
        return None
    trained = {asked(data, row) for row in data.rows}
    alike = [row for row in data.held_out if asked(data, row) in trained]
    held = len(data.held_out) + len(data.leaked)
    if not alike and not data.leaked:
        return ok(f"no prompt of {held} held-out rows is trained on{data.scope}")
    parts = []
    if data.leaked:
        parts.append(
            f"{share(len(data.leaked), held)} held-out rows have a prompt that is trained on, and are left out (first: "
            f"row {data.leaked[0].index} of {data.config.eval_dataset_name})"
        )
    if alike:
        parts.append(
            f"{share(len(alike), held)} have one that differs from a trained one in case and white space alone, and "
            f"stay (first: row {alike[0].index})"
        )
    why = "Figures on prompts that were trained on are too good."
    return warning("; ".join(parts) + data.scope, why, "Hold out other prompts.")


def asked(data: StageData, row: Any) -> str:
    """The prompt's text, in lower case, with single spaces."""
    ids = prompt_ids(row)
    return " ".join(data.tokenizer.decode(ids, skip_special_tokens=True).lower().split())


def prompt_ids(row: Any) -> list[int]:
    if isinstance(row, PairRow):
        return row.chosen_ids[: len(row.chosen_ids) - row.chosen_response_length]
    return row.input_ids[: row.response_mask.index(1)] if isinstance(row, SFTRow) else row.input_ids


def held_out(data: StageData) -> Finding:
    count = len(data.held_out)
    if not count:
        return warning(
            "no row is held out",
            "Without held-out rows nothing shows whether the stage learns more than its data by heart.",
            "Set --eval_size or --eval_dataset_name.",
        )
    if isinstance(data.held_out[0], PairRow) and count < FEW_PAIRS:
        return note(
            f"{count} pairs are held out",
            f"The 95% interval of an accuracy of 75% is then {2 * 1.96 * (0.75 * 0.25 / count) ** 0.5:.0%} wide.",
            "Hold out some hundred pairs (--eval_size).",
        )
    return ok(f"{count} rows are held out, {len(data.rows)} are trained on{data.scope}")


def steps(data: StageData) -> Finding:
    config, count = data.config, data.steps()
    found = f"{count} steps of {config.batch_size} over {len(data.rows)} training rows{data.scope}"
    if config.batch_size > len(data.rows) and data.seen == data.total and not isinstance(config, PPOConfig):
        why = "Every batch then holds some rows more than once."
        return warning(found, why, f"Lower --batch_size ({config.batch_size}), or give more data.")
    if count < FEW_STEPS:
        why = "The learning rate rises and falls within these steps; little can be learnt in so few."
        return note(found, why, "Raise --num_train_epochs or --max_steps, or lower --batch_size.")
    return ok(found)


CHECKS: list[Check] = [unusable_rows, truncation, prompt_window, duplicates, leakage, held_out, steps]
