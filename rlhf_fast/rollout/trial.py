"""Tries the fast engine on a few tokens of a base, in place of a list of supported architectures."""

from weakref import WeakKeyDictionary

import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, same_states
from rlhf_fast.rollout.cache import CachedDecoder

READ = 3  # tokens that are decoded one by one
_faults: WeakKeyDictionary[SharedBase, str | None] = WeakKeyDictionary()


def why_not_fast(base: SharedBase) -> str | None:
    """None if the fast engine can run the base, else the reason. Each base is tried once."""
    if base not in _faults:
        _faults[base] = base.why_not_merge() or _try(base)
    return _faults[base]


def _try(base: SharedBase) -> str | None:
    """None if a few tokens, decoded one by one after prompts of two lengths, have the same states as in a whole forward
    pass, else the reason."""
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
    except UserError as error:  # no memory for the copy
        return str(error)
    except Exception as error:  # the model's code may raise anything with this cache
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    agree = all(same_states(*row) for row in zip(torch.stack(states, dim=1), expected, strict=True))
    return None if agree else "its states with this engine's cache differ"
