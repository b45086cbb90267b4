"""docs/reward_functions.md: its examples run, and its flags and figures are right."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlhf_fast.config import PPOConfig
from rlhf_fast.rewards.functions import call
from rlhf_fast.rewards.returned import LARGEST

PAGE = (Path(__file__).parents[2] / "docs" / "reward_functions.md").read_text()


def test_the_examples_run() -> None:
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    assert call("correct", names["correct"], ["q", "q"], ["it is 42", "7"], [{"answer": "42"}] * 2) == [1.0, 0.0]
    chat = [{"role": "user", "content": "q"}]
    texts = ["<think>\n</think>4", "4", ""]
    assert call("format_reward", names["format_reward"], [chat] * 3, texts, [{}] * 3) == [1.0, 0.0, None]


def test_its_flags_and_figures_are_the_products() -> None:
    config = {field.name: field.default for field in fields(PPOConfig)}
    assert set(re.findall(r"--(\w+)", PAGE)) - config.keys() == set()
    assert f"({config['reward_timeout']:g}; `null`" in PAGE and f"at most {LARGEST:g}".replace("+", "") in PAGE
    assert len(PAGE.splitlines()) <= 100
