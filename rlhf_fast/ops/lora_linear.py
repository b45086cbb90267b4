"""Linear layers with LoRA adapters: one call for several layers with the same input, and for rows of several roles."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._dispatch import implementation, implements
from ._linear import LoRA, Product, autocasted, checked_lora, without_autocast
from ._native import Term
from ._op import once_differentiable
from ._products import linear, matmul, sum_of_products, summed_over_rows
from ._rows import accumulation_dtype, as_rows

Loras = Sequence[LoRA | None]  # one a layer


@overload
def lora_linear(
    hidden: Tensor,
    weights: Tensor,
    loras: LoRA | None | Loras,
    *,
    biases: Tensor | None = None,
    dropout: float = 0.0,
    rows: Sequence[int] | None = None,
) -> Tensor: ...
@overload
def lora_linear(
    hidden: Tensor,
    weights: Sequence[Tensor],
    loras: Loras | Sequence[Loras],
    *,
    biases: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    rows: Sequence[int] | None = None,
) -> tuple[Tensor, ...]: ...
def lora_linear(
    hidden: Tensor,
    weights: Tensor | Sequence[Tensor],
    loras: Any,
    *,
    biases: Any = None,
    dropout: float = 0.0,
    rows: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """hidden weight^T + bias + scale * (dropout(hidden) A^T) B^T, for one layer or several that read the same hidden.

    The backward keeps hidden once for all layers, and hidden A^T. A frozen weight needs no gradient product. Products
    are in the dtype of hidden and summed in float32; A and B are cast to that dtype once per call. (Hu et al., "LoRA",
    2021.)

    Args:
        hidden: (..., I), float64, float32, bfloat16 or float16.
        weights: (O, I), dtype of hidden, any strides; or a sequence of them, such as the projections to query, key
            and value. Inside torch.autocast hidden and weights are cast to its dtype, as F.linear does.
        loras: (A (r, I), B (O, r), scale), or None for no adapter; for a sequence of weights, a sequence of these. With
            ``rows``, one such entry per segment of rows. A and B may have another dtype than hidden, such as float32.
        biases: (O,), or None; for a sequence of weights, one for each.
        dropout: probability that an entry of an adapter's input is set to 0, in [0, 1). Each adapter has its own mask,
            drawn with torch's generator; the other entries are multiplied by 1 / (1 - dropout).
        rows: the number of consecutive rows of hidden, flattened to (N, I), in each segment; their sum is N. Each
            segment has its own entry of ``loras``.

    Returns:
        (..., O) in the dtype of hidden; a tuple of them for a sequence of weights. Gradients have the dtype of their
        tensor; those of A and B are summed over the rows in float32.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or value.
    """
    op = "lora_linear"
    segments = [loras] if rows is None else loras
    if isinstance(weights, Tensor):
        segments = [[lora] for lora in segments] if _is_list(segments) else segments
        given = _checked(op, hidden, [weights], segments, [biases], dropout, rows)
    else:
        given = _checked(op, hidden, weights, segments, biases, dropout, rows)
    outputs = implementation(op, hidden)(given)
    outputs = tuple(output.reshape(*hidden.shape[:-1], output.shape[1]) for output in outputs)
    return outputs[0] if isinstance(weights, Tensor) else outputs


class Adapter(NamedTuple):
    layer: int
    start: int  # rows [start, stop) of hidden
    stop: int
    down: Tensor  # A, (r, I)
    up: Tensor  # B, (O, r)
    scale: float
    kept: Tensor | None  # (stop - start, I) bool, False = dropped; None = no dropout


class Inputs(NamedTuple):
    hidden: Tensor  # (N, I)
    weights: list[Tensor]  # (O, I) each
    biases: list[Tensor | None]  # (O,)
    adapters: list[Adapter]  # sorted by rows, then by layer


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _checked(
    op: str, hidden: Tensor, weights: Any, segments: Any, biases: Any, dropout: float, rows: Sequence[int] | None
) -> Inputs:
    _checks.floating(op, hidden=hidden)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{op}: hidden must have shape (..., I), I at least 1; got {tuple(hidden.shape)}")
    if not _is_list(weights) or not weights:
        raise TypeError(f"{op}: weights must be a tensor (O, I) or a sequence of at least one; got {weights!r}")
    count = len(weights)
    biases = [None] * count if biases is None else biases
    if not _is_list(biases) or len(biases) != count:
        raise ValueError(f"{op}: biases must have one entry for each of the {count} weights; got {_sized(biases)}")
    _checks.is_number(op, dropout=dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must be in [0, 1); got {dropout!r}")
    hidden_dtype, features = hidden.dtype, hidden.shape[-1]
    hidden = as_rows(autocasted(hidden))
    weights, biases = list(weights), list(biases)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name, bias_name = ("weight", "bias") if count == 1 else (f"weights[{layer}]", f"biases[{layer}]")
        _checks.floating(op, **{name: weight})
        if weight.dim() != 2 or weight.shape[1] != features:
            raise ValueError(
                f"{op}: {name} must have shape (O, {features}) (I as in hidden); got {tuple(weight.shape)}"
            )
        _checks.same_device(op, hidden=hidden, **{name: weight})
        weights[layer] = autocasted(weight)
        if weights[layer].dtype != hidden.dtype:
            raise TypeError(
                f"{op}: {name} must be {hidden_dtype} like hidden; got {weight.dtype}; cast one of the two (inside "
                "torch.autocast both are cast, but for float64)"
            )
        if bias is not None:
            _checks.floating(op, **{bias_name: bias})
            _checks.shaped(op, (weight.shape[0],), "one entry a row of weight", **{bias_name: bias})
            _checks.same_device(op, hidden=hidden, **{bias_name: bias})
            biases[layer] = bias.to(hidden.dtype)
    bounds = _bounds(op, hidden.shape[0], segments, rows)
    adapters = []
    for loras, (start, stop) in zip(segments, bounds, strict=True):
        if not _is_list(loras) or len(loras) != count:
            raise ValueError(f"{op}: loras must have one entry for each of the {count} weights; got {_sized(loras)}")
        for layer, lora in enumerate(loras):
            if lora is None:
                continue
            down, up, scale = checked_lora(op, hidden, weights[layer].shape[0], lora)
            kept = None
            if dropout and stop > start:
                kept = torch.empty(stop - start, features, dtype=torch.bool, device=hidden.device)
                kept.bernoulli_(1 - dropout)
            adapters.append(Adapter(layer, start, stop, down, up, scale / (1 - dropout), kept))
    return Inputs(hidden, weights, biases, adapters)


def _bounds(op: str, count: int, segments: Any, rows: Sequence[int] | None) -> list[tuple[int, int]]:
    """[start, stop) of each segment's rows."""
    if rows is None:
        return [(0, count)]
    if not _is_list(segments) or len(segments) != len(rows):
        raise ValueError(f"{op}: loras must have one entry for each of the {len(rows)} rows; got {_sized(segments)}")
    if any(not isinstance(number, int) or number < 0 for number in rows) or sum(rows) != count:
        raise ValueError(f"{op}: rows must be numbers >= 0 whose sum is {count}, the rows of hidden; got {list(rows)}")
    bounds, start = [], 0
    for number in rows:
        bounds.append((start, start + number))
        start += number
    return bounds


def _sized(value: Any) -> str:
    return f"{len(value)}" if _is_list(value) else type(value).__name__


# ---- the torch reference --------------------------------------------------------------------------------------------


@implements("lora_linear", "torch")
def reference(inputs: Inputs) -> list[Tensor]:
    """-> (N, O) of each layer, computed in full precision and rounded once."""
    wide = accumulation_dtype(inputs.hidden.dtype)
    hidden = inputs.hidden.to(wide)
    outputs = []
    for layer, (weight, bias) in enumerate(zip(inputs.weights, inputs.biases, strict=True)):
        output = Product.apply(hidden, weight.to(wide))
        if bias is not None:
            output = output + bias
        for adapter in inputs.adapters:
            if adapter.layer == layer:
                part = _seen(hidden[adapter.start : adapter.stop], adapter.kept)
                delta = Product.apply(Product.apply(part, adapter.down.to(wide)), adapter.up.to(wide))
                output = output + adapter.scale * F.pad(delta, (0, 0, adapter.start, hidden.shape[0] - adapter.stop))
        outputs.append(output.to(inputs.hidden.dtype))
    return outputs


# ---- the fused implementation ---------------------------------------------------------------------------------------
#
# The A of all adapters on the same rows are stacked: hidden [A_q; A_k; A_v]^T is one product, and so are the gradient
# of the stack and that of its input. An adapter with dropout has its own masked input, so it forms a stack by itself.
# The products with B, and those of the gradient of hidden, accumulate in their output.


class Place(NamedTuple):
    number: int  # among all adapters
    layer: int
    scale: float
    columns: slice  # of hidden [A_1; A_2; ...]^T of the stack


class Stack(NamedTuple):
    """Adapters that multiply the same input, from rows [start, stop) of hidden."""

    start: int
    stop: int
    places: list[Place]


@implements("lora_linear", "fused")
def fused(inputs: Inputs) -> tuple[Tensor, ...]:
    adapters = inputs.adapters
    if not adapters and not torch.is_grad_enabled():
        return tuple(linear(inputs.hidden, *layer) for layer in zip(inputs.weights, inputs.biases, strict=True))
    tensors = [*inputs.weights, *inputs.biases, *[each.kept for each in adapters]]
    tensors += [*[each.down for each in adapters], *[each.up for each in adapters]]
    outputs: tuple[Tensor, ...] = _LoraLinear.apply(_stacks(adapters), inputs.hidden, *tensors)
    return outputs


def _stacks(adapters: list[Adapter]) -> list[Stack]:
    stacks: list[Stack] = []
    for number, adapter in enumerate(adapters):
        rows = (adapter.start, adapter.stop)
        if not stacks or adapter.kept is not None or stacks[-1][:2] != rows:
            stacks.append(Stack(*rows, []))
        places = stacks[-1].places
        first = places[-1].columns.stop if places else 0
        places.append(Place(number, adapter.layer, adapter.scale, slice(first, first + adapter.down.shape[0])))
    return stacks


class _LoraLinear(torch.autograd.Function):
    """Takes the tensors of ``_parts``, flattened in that order."""

    @staticmethod
    def forward(ctx: Any, stacks: list[Stack], hidden: Tensor, *tensors: Tensor | None) -> Any:
        weights, biases, kept, downs, ups = _parts(tensors, stacks)
        ups = [up.to(hidden.dtype) for up in ups]
        added: list[list[Term]] = [[] for _ in weights]
        stacked: list[Tensor] = []
        for start, stop, places in stacks:
            own = [downs[place.number].to(hidden.dtype) for place in places]
            stack = own[0] if len(own) == 1 else torch.cat(own)
            inner = matmul(_seen(_rows(hidden, start, stop), kept[places[0].number]), stack.T)
            for number, layer, scale, columns in places:
                added[layer].append(Term(_columns(inner, columns), ups[number].T, start, scale))
            stacked += [stack, inner]
        outputs = [
            sum_of_products([*terms, Term(hidden, weight.T)], bias)
            for terms, weight, bias in zip(added, weights, biases, strict=True)
        ]
        ctx.stacks = stacks
        ctx.save_for_backward(hidden, *weights, *kept, *ups, *stacked)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad(), without_autocast(grads[0]):
            found = _gradients(ctx, grads)
        return None, *once_differentiable("rlhf_fast.lora_linear has no second derivative", found)


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    hidden, *tensors = ctx.saved_tensors
    stacks, layers = ctx.stacks, len(grads)
    count = sum(len(stack.places) for stack in stacks)
    weights, kept, ups = tensors[:layers], tensors[layers : layers + count], tensors[layers + count :][:count]
    stacked = iter(tensors[layers + 2 * count :])
    wants_hidden, *wants = ctx.needs_input_grad[1:]
    wants_weight, wants_bias, _, wants_down, wants_up = _parts(wants, stacks)

    terms = [Term(grad, weight) for grad, weight in zip(grads[1:], weights[1:], strict=True)]
    dropped: list[tuple[int, int, Tensor]] = []  # rows and what an adapter with dropout adds to their gradient
    grad_downs: list[Tensor | None] = [None] * count
    grad_ups: list[Tensor | None] = [None] * count
    for (start, stop, places), stack, inner in zip(stacks, stacked, stacked, strict=True):
        trained = [place.number for place in places if wants_down[place.number]]
        inner_grads = []
        for number, layer, scale, columns in places:
            grad = _rows(grads[layer], start, stop)
            if wants_up[number]:
                grad_ups[number] = summed_over_rows(_columns(inner, columns), grad).mul_(scale).T
            if trained or wants_hidden:
                inner_grads.append(matmul(grad, ups[number]).mul_(scale))
        if not inner_grads:
            continue
        inner_grad, mask = torch.cat(inner_grads, 1) if len(inner_grads) > 1 else inner_grads[0], kept[places[0].number]
        if trained:
            both = summed_over_rows(inner_grad, _seen(_rows(hidden, start, stop), mask))
            for place in places:
                grad_downs[place.number] = both[place.columns] if wants_down[place.number] else None
        if wants_hidden and mask is None:
            terms.append(Term(inner_grad, stack, start))
        elif wants_hidden:
            dropped.append((start, stop, matmul(inner_grad, stack).masked_fill_(~mask, 0.0)))
    grad_hidden = sum_of_products([*terms, Term(grads[0], weights[0])]) if wants_hidden else None
    for start, stop, part in dropped:
        assert grad_hidden is not None
        grad_hidden[start:stop] += part
    return (
        grad_hidden,
        *[matmul(grad.T, hidden) if want else None for grad, want in zip(grads, wants_weight, strict=True)],
        *[grad.sum(0) if want else None for grad, want in zip(grads, wants_bias, strict=True)],
        *[None] * count,
        *grad_downs,
        *grad_ups,
    )


def _parts(flat: Sequence[Any], stacks: list[Stack]) -> tuple[list[Any], ...]:
    """Splits a flat sequence into weights and biases, one per layer, and kept, downs and ups, one per adapter."""
    count = sum(len(stack.places) for stack in stacks)
    layers = (len(flat) - 3 * count) // 2
    sizes = (layers, layers, count, count, count)
    return tuple(list(flat[end - size : end]) for end, size in zip(itertools.accumulate(sizes), sizes, strict=True))


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """tensor[start:stop]. Skips the slice, which takes microseconds, in the usual case that it is the whole tensor."""
    return tensor if stop - start == tensor.shape[0] else tensor[start:stop]


def _columns(tensor: Tensor, columns: slice) -> Tensor:
    return tensor if columns.stop - columns.start == tensor.shape[1] else tensor[:, columns]


def _seen(hidden: Tensor, kept: Tensor | None) -> Tensor:
    """hidden with the dropped entries set to 0; the factor 1 / (1 - dropout) is in the adapter's scale."""
    return hidden if kept is None else hidden.masked_fill(~kept, 0.0)
