"""Out of memory, told as what it is: in which work, on how many tokens, and which setting to lower."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rlhf_fast.config import StageConfig
from rlhf_fast.data import PromptRow
from rlhf_fast.errors import OutOfMemory, is_out_of_memory
from rlhf_fast.recipes.stage import Stage
from rlhf_fast.rollout import Response
from rlhf_fast.text import one_line

MICRO_BATCH = ("micro_batch_tokens", "micro_batch_size")  # one of them is set


def give_back_memory() -> None:
    """Between two phases: returns freed memory to the system, which glibc keeps in pieces. The next phase has other
    sizes, which would not fit into them. With another C library nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def memory_for(stage: Stage[StageConfig], work: str, lengths: Sequence[int], *settings: str) -> Iterator[None]:
    """Around one pass of the model over sequences of ``lengths`` tokens, named ``work`` ("update").

    Raises OutOfMemory in place of torch's error: the step, the work, the batch, and ``settings`` (names of the config's
    fields, the first to lower first) with their values. One that is unset or 1 cannot be lowered and is left out.
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
    """What sampling responses to ``rows`` can make: prompts and responses together, in tokens, the longest last."""
    return sorted(len(row.input_ids) + response_length for row in rows)


def response_lengths(responses: Sequence[Response]) -> list[int]:
    """Tokens of each prompt and its response together."""
    return [len(response.row.input_ids) + len(response.token_ids) for response in responses]
