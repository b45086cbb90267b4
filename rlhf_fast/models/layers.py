"""Finds the decoder layers of a transformers model, and runs the model from or up to one of them."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_fast.errors import UserError


class Decoder(NamedTuple):
    """The text decoder of a model. In a multimodal model it is a submodule, next to the other encoders."""

    body: nn.Module  # takes token ids and returns the last hidden states
    path: str  # path of ``layers`` in the whole model: "model.layers", "model.language_model.layers", ...
    layers: nn.ModuleList
    outputs: dict[nn.Module, int | None]  # layer -> length of the tuple that it returns; None for a tensor

    @property
    def list_name(self) -> str:
        return self.path.rsplit(".", 1)[-1]


def find_decoder(model: PreTrainedModel) -> Decoder:
    """The decoder: the module that contains the token embedding and a list of num_hidden_layers modules.

    Raises UserError if there is not exactly one such module.
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
    """Inside, suppresses PEFT's FutureWarning about a transformers attribute, which users cannot act on, and its
    warnings about adapters on tied or saved embeddings, which are treated right here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", ".*(tie_word_embeddings|save_embedding_layers)")
        yield


@contextlib.contextmanager
def learning_outputs(decoder: Decoder) -> Iterator[None]:
    """Inside, records in ``decoder.outputs`` what each layer returns, so that ``starting_from`` and ``stopping_at`` can
    replace layers by functions that return the same structure."""

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
    """Inside, layers below ``first`` return their input, and layer ``first`` gets ``states`` (B, T, H) as its input.

    The model's forward still computes masks and position embeddings. So the result is bit-exact with the full forward
    for any architecture whose layers take and return the hidden states first and share nothing else.
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
    """Inside, appends the input of layer ``first`` to ``caught``. This layer and those above it return their input."""

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
