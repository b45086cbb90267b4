"""Sampling responses: the one call of the recipes, and the choice of the engine that runs it."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from rlhf_fast.config import ROLLOUT_ENGINES
from rlhf_fast.data import PromptRow
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, same_states
from rlhf_fast.rollout import reference
from rlhf_fast.rollout.cache import CachedDecoder
from rlhf_fast.rollout.generation import Generation, draws
from rlhf_fast.rollout.response import Response

READ = 3  # tokens that are read one by one in the trial
_faults: WeakKeyDictionary[SharedBase, str | None] = WeakKeyDictionary()  # why the fast engine cannot run a base


def generate(
    base: SharedBase,
    role: str | None,
    rows: Sequence[PromptRow],
    *,
    response_length: int,
    temperature: float,
    batch_size: int,
    skip_special_tokens: bool = False,
    engine: str = "auto",
) -> list[Response]:
    """One sampled response a prompt, in the order of ``rows``, cut at the first stop token.

    The distribution sampled from is the one that is trained: the full softmax at ``temperature``, without top-k, top-p
    or penalties, whatever the model folder's generation_config says. ``batch_size`` prompts, of like lengths and
    padded left, are answered at a time. ``engine``: see ``choose_engine``.
    Raises UserError for a prompt of no tokens, after which nothing could be predicted, and for a model whose samples
    do not follow the log-probs that are trained.
    """
    base.check_sampling()
    empty = [str(row.index) for row in rows if not row.input_ids]
    if empty:
        raise UserError(f"prompts of no tokens in rows {', '.join(empty)}: nothing predicts the first token there")
    if not rows:
        return []
    fast = choose_engine(base, engine) == "fast"
    merged = base.merged(role) if fast else None
    uniforms = draws(len(rows), response_length) if fast else None
    responses: dict[int, Response] = {}
    for places in _batches(rows, batch_size):
        part = [rows[place] for place in places]
        if merged is not None and uniforms is not None:
            generation = Generation(
                base,
                role,
                part,
                response_length=response_length,
                temperature=temperature,
                merged=merged,
                uniforms=uniforms[places],
            )
            while generation.live:
                generation.step()
            found = generation.responses(skip_special_tokens=skip_special_tokens)
        else:
            found = reference.generate_batch(
                base,
                role,
                part,
                response_length=response_length,
                temperature=temperature,
                skip_special_tokens=skip_special_tokens,
            )
        responses |= dict(zip(places, found, strict=True))
    return [responses[place] for place in range(len(rows))]


def choose_engine(base: SharedBase, engine: str) -> str:
    """``fast`` or ``transformers``, for one of ``ROLLOUT_ENGINES``.

    ``auto`` is fast where a trial on a few tokens shows it to predict as a whole forward pass does; else the base's
    ``notes`` get the reason. Raises UserError where ``fast`` is asked for and cannot be had.
    """
    if engine not in ROLLOUT_ENGINES:
        raise UserError(f"the rollout engine must be one of {', '.join(ROLLOUT_ENGINES)}; got {engine!r}")
    if engine == "transformers":
        return engine
    if base not in _faults:
        _faults[base] = _why_not_fast(base)
        if _faults[base] is not None and engine == "auto":
            base.notes.append(f"responses are sampled by transformers' generate, which is slower: {_faults[base]}")
    fault = _faults[base]
    if fault is not None and engine == "fast":
        raise UserError(f"{type(base.model).__name__}: {fault}: set --rollout_engine auto or transformers")
    return "fast" if fault is None else "transformers"


def _why_not_fast(base: SharedBase) -> str | None:
    """None where a few tokens, read one by one after prompts of two lengths, have the states of a whole pass."""
    fault = base.why_not_merge()
    if fault is not None:
        return fault
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
    except Exception as error:  # whatever a model's own code does with this cache
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    agree = all(same_states(*row) for row in zip(torch.stack(states, dim=1), expected, strict=True))
    return None if agree else "its states with this engine's cache are others"


def _batches(rows: Sequence[PromptRow], batch_size: int) -> list[list[int]]:
    """Places of the rows of each batch: the longest prompts together, so that there is little padding."""
    by_length = sorted(range(len(rows)), key=lambda place: -len(rows[place].input_ids))
    return [sorted(by_length[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
