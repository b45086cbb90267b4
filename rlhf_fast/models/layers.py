"""Where a transformers model keeps its decoder layers, and running them from the middle."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_fast.errors import UserError


class Decoder(NamedTuple):
    """The text decoder of a model, which a multimodal wrapper holds beside its other towers."""

    body: nn.Module  # takes token ids and returns the last hidden states
    path: str  # of ``layers`` in the whole model: "model.layers", "model.language_model.layers", ...
    layers: nn.ModuleList
    outputs: dict[nn.Module, int | None]  # layer -> items of the tuple that it returns, None for a bare tensor

    @property
    def list_name(self) -> str:
        return self.path.rsplit(".", 1)[-1]


def find_decoder(model: PreTrainedModel) -> Decoder:
    """The one module that holds the token embedding and a list of num_hidden_layers modules.

    Raises UserError where there is not exactly one.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    embedding = model.get_input_embeddings()
    found = [
        Decoder(body, f"{path}.{name}", child, {})
        for path, body in model.named_modules()
        if body is not model and any(module is embedding for module in body.modules())
        for name, child in body.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__}: expected one list of {count} decoder layers beside the token embedding, found "
            f"{len(found)}; this architecture is not supported (docs/models.md lists those that are tested)"
        )
    return found[0]


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Inside, PEFT wraps models without a warning that is between it and transformers alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


@contextlib.contextmanager
def learning_outputs(decoder: Decoder) -> Iterator[None]:
    """Inside, ``decoder.outputs`` is filled from the layers that run: ``starting_from`` and ``stopping_at`` return the
    same in their place."""

    def learn(module: nn.Module, args: Any, output: Any) -> None:
        decoder.outputs[module] = len(output) if isinstance(output, (tuple, list)) else None

    handles = [layer.register_forward_hook(learn) for layer in decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def starting_from(decoder: Decoder, first: int, states: torch.Tensor) -> Iterator[None]:
    """Inside: layers below ``first`` pass their input on, and layer ``first`` gets ``states`` (B, T, H) instead.

    The model's own forward still makes masks and position embeddings, so this is bit-exact with the full forward for
    any architecture whose layers take and return the hidden states first and share nothing else with one another.
    """

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    handle = decoder.layers[first].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        with _passing_on(decoder, slice(0, first)):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def stopping_at(decoder: Decoder, first: int, caught: list[torch.Tensor]) -> Iterator[None]:
    """Inside: ``caught`` receives the hidden states that enter layer ``first``; it and those above pass them on."""

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_states(args, kwargs))

    handle = decoder.layers[first].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with _passing_on(decoder, slice(first, None)):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _passing_on(decoder: Decoder, part: slice) -> Iterator[None]:
    passing = list(decoder.layers[part])
    for layer in passing:
        layer.forward = _pass_on(decoder.outputs[layer])
    try:
        yield
    finally:
        for layer in passing:
            del layer.forward


def _pass_on(items: int | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        states = _states(args, kwargs)
        return states if items is None else (states, *[None] * (items - 1))

    return forward


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]
