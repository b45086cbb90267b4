"""Whether the fast engine computes a base right, tried on a few tokens: better than a list of architectures."""

from weakref import WeakKeyDictionary

import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, same_states
from rlhf_fast.rollout.cache import CachedDecoder

READ = 3  # tokens that are read one by one
_faults: WeakKeyDictionary[SharedBase, str | None] = WeakKeyDictionary()


def why_not_fast(base: SharedBase) -> str | None:
    """None where the fast engine can run the base, else the reason; tried once for each base."""
    if base not in _faults:
        _faults[base] = base.why_not_merge() or _try(base)
    return _faults[base]


def _try(base: SharedBase) -> str | None:
    """None where a few tokens, read one by one after prompts of two lengths, have the states of a whole pass."""
    role = base.roles[-1] if base.roles else None
    ids = base.probe
    length = ids.shape[1]
    mask = torch.ones(2, 2 * length, dtype=torch.long, device=base.device)
    mask[1, :length] = 0
    rows = torch.cat([torch.cat([ids, ids.flip(1)], dim=1), torch.cat([torch.full_like(ids, base.pad_id), ids], dim=1)])
    with torch.no_grad():
        expected = base.hidden(role, rows, mask)[:, -READ - 1 :]
    try:
        decoder = CachedDecoder(base, base.merged(role), mask[:, :-READ], READ)
        states = [decoder.read(ids) for ids in rows.split([2 * length - READ, *[1] * READ], dim=1)]
    except UserError as error:  # no room for the copy
        return str(error)
    except Exception as error:  # whatever a model's own code does with this cache
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    agree = all(same_states(*row) for row in zip(torch.stack(states, dim=1), expected, strict=True))
    return None if agree else "its states with this engine's cache are others"
