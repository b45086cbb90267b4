"""Recomputes activations in the backward instead of saving them: outputs of cheap kernels always, whole layers on
request (gradient checkpointing).

Adapted layers save their input for the gradient of A. That input is often a norm's output or a gated feed-forward's
product, which one pass over tensors that are saved anyway recomputes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

Context = contextlib.AbstractContextManager[Any]


class _Output(NamedTuple):
    storage: StorageWeakRef  # keeps the address from being reused by another storage
    version: int
    make: Callable[[], Tensor]


class _Again(NamedTuple):
    make: Callable[[], Tensor]
    shape: torch.Size


_outputs: dict[int, _Output] | None = None  # noted outputs of the current pass, by the address of their storage


def note_output(output: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Notes that ``make`` recomputes ``output`` bit for bit, and returns it. ``make`` may refer only to tensors that
    are saved for the backward anyway."""
    if _outputs is not None and output.requires_grad:
        storage = output.untyped_storage()
        _outputs[storage._cdata] = _Output(StorageWeakRef(storage), output._version, make)
    return output


@contextlib.contextmanager
def cheap_outputs_again() -> Iterator[None]:
    """Inside, noted outputs are not saved for the backward, but recomputed in it."""
    global _outputs
    outer, _outputs = _outputs, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _outputs = outer


def _pack(tensor: Tensor) -> Tensor | _Again:
    assert _outputs is not None
    found = _outputs.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
    # only a contiguous view of the whole storage that has not been written to since
    if found is None or tensor._version != found.version or not tensor.is_contiguous():
        return tensor
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        return tensor
    return _Again(found.make, tensor.shape)


def _unpack(kept: Tensor | _Again) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept.make().view(kept.shape)


@contextlib.contextmanager
def layers_again(layers: Sequence[nn.Module], context: Callable[[], Context], draws: bool) -> Iterator[None]:
    """Inside, each of ``layers`` saves only its input, and the backward recomputes the layer within ``context()``.

    ``draws``: whether a layer draws random numbers, which the recomputation must repeat.
    """

    def contexts() -> tuple[Context, Context]:
        return contextlib.nullcontext(), context()

    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)
    for layer in layers:
        layer.forward = partial(again, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
