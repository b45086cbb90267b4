"""Verdicts on a stage: known failures of training whose signs stand in its metrics and samples."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.text import one_line

TITLES = {
    "kl_explosion": "KL explosion",
    "reward_hacking": "Reward hacking",
    "mode_collapse": "Mode collapse",
    "not_learning": "Not learning",
    "useless_critic": "Useless critic",
    "miscalibrated_reward": "Miscalibrated reward",
    "sampler_mismatch": "Sampler and trainer disagree",
    "length_exploitation": "Length exploitation",
    "no_signal": "No signal",
    "truncation": "Truncated responses",
}


@dataclass(frozen=True)
class Verdict:
    """One failure that was found.

    Attributes:
        first_step, last_step: the range of steps in which its signs stand.
        confidence: 0 to 1.
        metrics: names of the metrics that were joined, the deciding one first.
        samples: up to 3 rows of samples.jsonl, the worst first.
        reason: one sentence with the numbers.
        advice: what to try next.
    """

    name: str
    first_step: int
    last_step: int
    confidence: float
    metrics: list[str]
    samples: list[dict[str, Any]]
    reason: str
    advice: str


def read_verdicts(stage_folder: Path) -> list[Verdict]:
    """The verdicts in ``verdicts.json`` of a stage's folder; none where the file is not there.

    Raises:
        UserError: the file is there and holds no verdicts.
    """
    path = Path(stage_folder) / "verdicts.json"
    if not path.exists():
        return []
    try:
        found: list[Mapping[str, Any]] = json.loads(path.read_bytes())["verdicts"]
        return [Verdict(**row) for row in found]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        what = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"{path}: expected verdicts ({what}); remove the file, the next run writes it") from error
