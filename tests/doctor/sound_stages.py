"""Settings and sound rows of each stage, for the tiny model."""

from typing import Any

TINY = {"model_name_or_path": "tiny-random", "dtype": "float32", "lora_r": 2, "max_length": 64, "batch_size": 4}
OWN = {"sft": {}, "reward": {"response_length": 8}, "dpo": {}, "ppo": {"response_length": 8}}


def chat(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows_of(stage: str, count: int = 12) -> list[dict[str, Any]]:
    """Sound rows; in the pairs the shorter response is chosen as often as the longer."""
    made = []
    for number in range(count):
        asked = f"q{number}" + " and so on" * (number % 3)
        sides = [f"yes {number}", "no"]
        row = {
            "sft": {"messages": chat(asked) + chat(f"answer {number}", "assistant")},
            "ppo": {"prompt": chat(asked), "number": number},
        }
        pair = {"prompt": chat(asked)}
        for name, text in zip(("chosen", "rejected"), sides if number % 2 else sides[::-1], strict=True):
            pair[name] = chat(text, "assistant")
        made.append(row.get(stage, pair))
    return made
