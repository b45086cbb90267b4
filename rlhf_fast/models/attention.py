"""Attention over packed sequences, registered as an attention function of transformers.

A packed batch is one row of N tokens: the live tokens of all sequences, without padding. Linear layers and norms need
no change for such a row. Only attention must know where each sequence begins and ends; it reads that from the
``Layout`` that ``packed`` sets around the forward pass. The mask (causal, sliding window, chunks) is the model's own,
which transformers defines as a function of two positions in a sequence.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_fast.ops import can_attend, short_attention

NAME = "rlhf_fast_packed"
# For sequences of up to this many tokens, the engine's attention was measured to be faster on the CPU than torch's.
SHORT = 512
# Keyword arguments of a model's attention that have no effect here. Any other one that is set is an error.
IGNORED = {
    "sliding_window",  # the mask has it
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "is_causal",  # the mask has it
}


class Layout:
    """The positions of S sequences of ``lengths`` tokens in a packed row and in a padded batch (S, T)."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = lengths
        self.longest = max(lengths, default=0)
        sizes = torch.tensor(lengths, device=device)
        columns = torch.arange(self.longest, device=device)
        self.live = columns < sizes[:, None]  # (S, T)
        self.starts = torch.tensor([0, *accumulate(lengths)])  # (S + 1,) on the CPU
        starts = sizes.cumsum(0) - sizes
        # (S * T,) the packed index of each padded position; padding has index 0, to which no token attends
        self.take = torch.where(self.live, starts[:, None] + columns, 0).reshape(-1)
        self.put = self.live.reshape(-1).nonzero().squeeze(1)  # (N,) the padded position of each packed token
        self.tokens = sum(lengths)

    def pad(self, rows: Tensor) -> Tensor:
        """(heads, N, D) -> (S, heads, T, D); padding has the data of token 0."""
        heads, _, size = rows.shape
        flat = rows.transpose(0, 1).reshape(self.tokens, heads * size)
        padded = flat.index_select(0, self.take).view(len(self.lengths), self.longest, heads, size)
        return padded.transpose(1, 2).contiguous()

    def unpad(self, padded: Tensor) -> Tensor:
        """(S, heads, T, D) -> (N, heads, D)."""
        sequences, heads, longest, size = padded.shape
        flat = padded.transpose(1, 2).reshape(sequences * longest, heads * size)
        return flat.index_select(0, self.put).view(self.tokens, heads, size)


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


def configs_of(body: nn.Module) -> list[Any]:
    """The configs from which the modules of ``body`` read the name of their attention function."""
    found = {id(config): config for module in body.modules() if (config := getattr(module, "config", None))}
    return list(found.values())


@contextlib.contextmanager
def packed(configs: list[Any], layout: Layout) -> Iterator[None]:
    """Inside, the modules with these configs expect a packed row of this layout."""
    before = [config._attn_implementation for config in configs]
    token = _layout.set(layout)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _layout.reset(token)


def _mask(*_: Any, mask_function: Any, device: Any = "cpu", use_vmap: bool = False, **__: Any) -> Tensor:
    """(1, 1, T, T) bool, True = attends: the model's mask between two positions of one sequence."""
    layout = _layout.get()
    assert layout is not None
    return sdpa_mask(
        1, layout.longest, layout.longest, mask_function=mask_function, allow_is_causal_skip=False, use_vmap=use_vmap,
        device=device,
    )  # fmt: skip


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, N, D), key and value (1, shared heads, N, D) -> (1, N, heads, D)."""
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in IGNORED)
    if unknown or dropout:
        raise NotImplementedError(f"attention with {', '.join(unknown or ['dropout'])} is not known")
    layout = _layout.get()
    assert layout is not None and attention_mask is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = attention_mask[0, 0]
    plain = softcap is None and s_aux is None
    if plain and layout.longest <= SHORT and can_attend(query):
        query, key, value = (_unit(tensor[0]) for tensor in (query, key, value))
        return short_attention(query, key, value, mask.contiguous(), layout.starts, scale)[None], None
    query, key, value = (layout.pad(tensor[0]) for tensor in (query, key, value))
    if plain:
        shared = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=shared)
    else:
        out = _explicit(query, key, value, mask, scale, softcap, s_aux)
    return layout.unpad(out)[None], None


def _unit(rows: Tensor) -> Tensor:
    """With contiguous columns."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of padded (S, heads, T, D) tensors, with a softcap on the scores, or with sinks: one more score per
    head in the softmax, without a value.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=3)
    shares = scores.softmax(dim=3)[..., : mask.shape[1]]
    return shares.to(value.dtype) @ value


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
