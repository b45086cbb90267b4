"""Where a transformers decoder keeps its layers, and running it from the middle."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError


def decoder(model: PreTrainedModel) -> nn.Module:
    """The body without the language-model head."""
    return getattr(model, model.base_model_prefix)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its attribute name (``layers``, ``h``, ...).

    Raises UserError where there is not exactly one list of num_hidden_layers modules.
    """
    count = model.config.num_hidden_layers
    lists = [
        (name, child)
        for name, child in decoder(model).named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(lists) != 1:
        raise UserError(
            f"{type(model).__name__}: expected one list of {count} decoder layers in its body, found {len(lists)}; "
            "Llama-, Qwen-, Mistral-, GPT-2- and GPT-NeoX-style models are known to work"
        )
    return lists[0]


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Inside, PEFT wraps models without a warning that is between it and transformers alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def linear_names(model: PreTrainedModel) -> list[str]:
    """The names of the linear modules inside a decoder layer, e.g. ``q_proj``, sorted."""
    _, layers = decoder_layers(model)
    return sorted(
        {name.rsplit(".", 1)[-1] for name, part in layers.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
    )


@contextlib.contextmanager
def starting_from(layers: nn.ModuleList, first: int, states: torch.Tensor) -> Iterator[None]:
    """Inside: layers below ``first`` pass their input on, and layer ``first`` gets ``states`` (B, T, H) instead.

    The model's own forward still makes masks and position embeddings, so this is bit-exact with the full forward for
    any architecture whose layers take and return the hidden states first.
    """
    below = list(layers[:first])

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (states, *args[1:])

    handle = layers[first].register_forward_pre_hook(replace)
    for layer in below:
        layer.forward = _pass_on
    try:
        yield
    finally:
        handle.remove()
        for layer in below:
            del layer.forward


@contextlib.contextmanager
def stopping_at(layers: nn.ModuleList, first: int, caught: list[torch.Tensor]) -> Iterator[None]:
    """Inside: ``caught`` receives the hidden states that enter layer ``first``; it and those above pass them on."""

    def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])

    handle = layers[first].register_forward_pre_hook(catch)
    above = list(layers[first:])
    for layer in above:
        layer.forward = _pass_on
    try:
        yield
    finally:
        handle.remove()
        for layer in above:
            del layer.forward


def _pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states
