"""Trials of a loaded model on a few tokens, in place of a list of supported architectures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.errors import UserError
from rlhf_fast.models import layers
from rlhf_fast.models.layers import Decoder

Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # input_ids, attention_mask -> (B, T, H or V)

TOKENS = 8
# Largest relative difference (of the norm) between two computations of the same states, for the median token.
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_CLOSE = 0.1


@contextmanager
def own_code(model: PreTrainedModel) -> Iterator[None]:
    """Inside, an exception of the model's own code becomes a UserError: some models fail in some dtypes or devices."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ImportError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{type(model).__name__} cannot compute in {model.dtype} on the {model.device.type}: {reason}"
        ) from error


def probe(tokenizer: PreTrainedTokenizerBase, rows: int, device: torch.device) -> torch.Tensor:
    """(1, TOKENS) ids, spread over the vocabulary without special tokens, which may stand for an image."""
    text = sorted({i for i in tokenizer.get_vocab().values() if i < rows} - {*tokenizer.added_tokens_decoder})
    text = text or list(range(rows))
    chosen = [text[place * (len(text) - 1) // (TOKENS - 1)] for place in range(TOKENS)]
    return torch.tensor([chosen], device=device)


@torch.no_grad()
def check_context(model: PreTrainedModel, run: Run, ids: torch.Tensor, pad_id: int) -> None:
    """Raises UserError for a model whose states depend on left padding or on later tokens."""
    alone = run(ids, torch.ones_like(ids))[0]
    pads = torch.full_like(ids, pad_id)
    rows = torch.cat([torch.cat([pads, ids], dim=1), torch.cat([ids, ids.flip(1)], dim=1)])
    mask = torch.ones_like(rows)
    mask[0, :TOKENS] = 0
    padded, longer = run(rows, mask)
    if not same_states(longer[:TOKENS], alone):
        raise UserError(
            f"{type(model).__name__}: its tokens see the ones after them, so it is no causal language model; only "
            "decoders can be trained"
        )
    if not same_states(padded[TOKENS:], alone):
        raise UserError(
            f"{type(model).__name__}: its states run through padding, so a prompt would mean something else in every "
            "batch; recurrent models without a mask for padding, and positions counted from it, are not supported"
        )


@torch.no_grad()
def why_not_sample(model: PreTrainedModel, logits: Run, ids: torch.Tensor, pad_id: int) -> str | None:
    """None if transformers' ``generate``, with its cache and positions, has the same logits as a whole forward pass
    (``logits``), which training uses; else the reason."""
    half = ids[:, : TOKENS // 2]
    prompts = torch.cat([ids, torch.cat([torch.full_like(half, pad_id), half], dim=1)])
    mask = torch.ones_like(prompts)
    mask[1, : TOKENS // 2] = 0
    greedy = GenerationConfig(do_sample=False, max_new_tokens=2, min_new_tokens=2, pad_token_id=pad_id)
    greedy.output_logits = greedy.return_dict_in_generate = True
    try:
        drawn = model.generate(input_ids=prompts, attention_mask=mask, generation_config=greedy)
    except Exception as error:  # the model's or transformers' code may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    expected = logits(drawn.sequences, torch.cat([mask, torch.ones_like(mask[:, :2])], dim=1))[:, -3:-1]
    found = torch.stack(drawn.logits, dim=1)
    agree = all(same_states(*row) for row in zip(found, expected, strict=True))
    return None if agree else "its logits with a cache differ"


def same_states(states: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the states (T, H or V) agree within the tolerance of ``expected``'s dtype, for the median token."""
    # the median, because in half precision a mixture of experts may route single tokens differently
    gap = (states.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return gap.median().item() <= CLOSE.get(expected.dtype, HALF_CLOSE)


def why_not_pack(run: Run, run_packed: Run, embedding: nn.Module, ids: torch.Tensor) -> str | None:
    """None if sequences packed in one row have the same states as in a padded batch, and no state depends on another
    sequence; else the reason."""
    rows = torch.cat([ids, ids.flip(1), ids.roll(3, 1)])
    mask = torch.ones_like(rows)
    mask[0, : TOKENS // 2] = mask[2, -TOKENS // 4 :] = 0
    live = mask.bool()
    embedded: list[torch.Tensor] = []

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = embedding.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            found = run_packed(rows, mask)
            (seen,) = torch.autograd.grad(found[1].float().square().sum(), embedded[0])
    except Exception as error:  # the model's code may raise anything for an unknown attention function
        return f"its attention raises {type(error).__name__}"
    finally:
        handle.remove()
    before, own, _ = seen[0].split(live.sum(dim=1).tolist())
    if before.any() or not own.any():  # an exact test: without a dependency the gradient is 0
        return "its layers mix tokens of one row"
    with torch.no_grad():
        expected = run(rows, mask)
    agree = all(same_states(found[row][live[row]], expected[row][live[row]]) for row in range(len(rows)))
    return None if agree else "the hidden states differ"


@torch.no_grad()
def why_not_split(decoder: Decoder, run: Run, ids: torch.Tensor, first: int) -> str | None:
    """None if running the model from layer ``first`` on is bit-exact with the whole forward pass; else the reason."""
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    with layers.learning_outputs(decoder):
        expected = run(ids, mask)
    caught: list[torch.Tensor] = []
    try:
        with layers.stopping_at(decoder, first, caught):
            run(ids, mask)
        with layers.starting_from(decoder, first, caught[0]):
            states = run(ids, mask)
    except Exception as error:  # a layer may raise anything if the layers below it did not run
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None if torch.equal(states, expected) else "the hidden states differ"
