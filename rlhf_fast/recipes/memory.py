"""Error messages for running out of memory: in which phase, on how many tokens, and which setting to lower."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rlhf_fast.config import StageConfig
from rlhf_fast.data import PromptRow
from rlhf_fast.errors import OutOfMemory, is_out_of_memory
from rlhf_fast.recipes.stage import Stage
from rlhf_fast.rollout import Response
from rlhf_fast.text import one_line

MICRO_BATCH = ("micro_batch_tokens", "micro_batch_size")  # exactly one of them is set


@contextmanager
def memory_for(stage: Stage[StageConfig], work: str, lengths: Sequence[int], *settings: str) -> Iterator[None]:
    """Inside, torch's out-of-memory error becomes OutOfMemory, whose message names the step, ``work`` (such as
    "update"), the batch, and the settings to lower.

    ``lengths``: tokens of the batch's sequences. ``settings``: fields of the config, in the order in which to lower
    them. A setting that is unset or 1 cannot be lowered and is left out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        place = "computer" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) else "GPU"
        step = min(stage.step + 1, stage.total)
        values = {name: getattr(stage.config, name) for name in settings}
        lower = ", then ".join(f"--{name} (now {value})" for name, value in values.items() if value not in (None, 1))
        layers = "" if stage.config.lora_layers else "; --lora_layers N trains the top N layers alone, which takes less"
        raise OutOfMemory(
            f"{stage.name} step {step}, {work}: the {place} has no memory for {len(lengths)} rows of up to "
            f"{max(lengths, default=0)} tokens at a time: lower {lower}{layers} ({one_line(str(error), 200)})"
        ) from error


def sampling_lengths(rows: Sequence[PromptRow], response_length: int) -> list[int]:
    """The largest possible lengths, prompt plus response, of sampled responses to ``rows``, in tokens, sorted."""
    return sorted(len(row.input_ids) + response_length for row in rows)


def response_lengths(responses: Sequence[Response]) -> list[int]:
    """The number of tokens of each prompt plus its response."""
    return [len(response.row.input_ids) + len(response.token_ids) for response in responses]
