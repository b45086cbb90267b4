"""Samples responses: ``generate``, which the recipes call, and the choice of the engine."""

from collections.abc import Sequence
from weakref import WeakSet

from rlhf_fast.config import ROLLOUT_ENGINES
from rlhf_fast.data import PromptRow
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase
from rlhf_fast.rollout import reference
from rlhf_fast.rollout.generation import Generation, check_call, draws
from rlhf_fast.rollout.response import Response
from rlhf_fast.rollout.trial import why_not_fast

_noted: WeakSet[SharedBase] = WeakSet()  # bases with a note that the fast engine cannot run them


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
    """Samples one response per prompt, in the order of ``rows``, cut after the first stop token.

    Samples from the distribution that is trained: the full softmax at ``temperature``, without top-k, top-p or
    penalties; the model's generation_config is ignored. ``batch_size`` prompts of similar length, padded left, are
    sampled at a time. ``engine``: see ``choose_engine``.
    Raises UserError for an empty prompt, and for a model that would not sample from the trained distribution.
    """
    base.check_sampling()
    check_call(rows, response_length, temperature)
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

    ``auto`` is fast if, in a trial on a few tokens, the fast engine gives the same states as a whole forward pass; else
    it is transformers, and the base's ``notes`` get the reason. Raises UserError if ``fast`` is requested and the trial
    fails.
    """
    if engine not in ROLLOUT_ENGINES:
        raise UserError(f"the rollout engine must be one of {', '.join(ROLLOUT_ENGINES)}; got {engine!r}")
    if engine == "transformers":
        return engine
    fault = why_not_fast(base)
    if fault is None:
        return "fast"
    if engine == "fast":
        raise UserError(f"{type(base.model).__name__}: {fault}: set --rollout_engine auto or transformers")
    if base not in _noted:
        _noted.add(base)
        base.notes.append(f"responses are sampled by transformers' generate, which is slower: {fault}")
    return "transformers"


def _batches(rows: Sequence[PromptRow], batch_size: int) -> list[list[int]]:
    """The indices of the rows of each batch, with prompts of similar length together to reduce padding."""
    by_length = sorted(range(len(rows)), key=lambda place: -len(rows[place].input_ids))
    return [sorted(by_length[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
