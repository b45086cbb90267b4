"""A name on the Hugging Face hub, or in its local cache where the hub can't be reached."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import huggingface_hub.constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from rlhf_fast.errors import UserError

SECONDS = 5.0  # to wait for the hub's answer: the libraries' own attempts take half a minute


@contextmanager
def reached(
    name: str, ask: Callable[..., Any], *, kind: str, unknown: str, flags: tuple[ModuleType, ...] = ()
) -> Iterator[Exception | None]:
    """Asks the hub whether it has ``name``. Where it can't be reached, the block runs in offline mode, so that it takes
    what the local cache has; the value is then the reason, else None.

    Args:
        ask: ``HfApi().model_info`` or ``HfApi().dataset_info``.
        kind: "model" or "data set", for the message about a gated one.
        unknown: the message where the hub has no such name, or where it can be no name of the hub.
        flags: further modules that hold HF_HUB_OFFLINE as they read it once, at import.

    Raises UserError where the name is unknown or gated.
    """
    unreachable: Exception | None = None
    try:
        ask(name, timeout=SECONDS)
    except GatedRepoError as error:
        raise UserError(f"{name}: a gated {kind}; ask for access on its page, then run `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(unknown) from error
    except Exception as error:  # DNS, proxy, TLS, time-out, offline mode, a server fault: all mean "use the cache"
        unreachable = error
    holders: list[Any] = [huggingface_hub.constants, *flags]
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        if unreachable is not None:
            for holder in holders:
                holder.HF_HUB_OFFLINE = True
        yield unreachable
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value
