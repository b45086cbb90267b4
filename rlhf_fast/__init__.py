"""rlhf-fast: SFT, reward model and PPO on one frozen base, with fast losses that other trainers can import."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_fast.ops import *  # noqa: F403
    from rlhf_fast.ops import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public names are those of ``rlhf_fast.ops``. The first use imports it, and torch with it: the command line
    does not, so that it starts fast."""
    if name == "__all__" or not name.startswith("_"):
        ops = importlib.import_module("rlhf_fast.ops")
        if name == "__all__" or name in ops.__all__:
            return getattr(ops, name)
    raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *importlib.import_module("rlhf_fast.ops").__all__])
