"""Forward passes through the decoder, from the tokens or from a layer on, with or without the padding."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel

from rlhf_fast.config import StageConfig
from rlhf_fast.models import attention, elementwise, layers, recomputing

Context = Callable[[], contextlib.AbstractContextManager[None]]


class Again(NamedTuple):
    """What the recomputation of a layer in the backward needs to give the same as the forward pass."""

    context: Context  # enters the adapters of the forward pass
    draws: bool  # whether the layer draws random numbers, for dropout


class Forward:
    """``as_now`` tells, during a pass, what holds for it: see ``Again``."""

    def __init__(self, model: PreTrainedModel, config: StageConfig, as_now: Callable[[], Again]) -> None:
        self.decoder = layers.find_decoder(model)
        self._model, self._config, self._as_now = model, config, as_now
        self._attention_configs = attention.configs_of(self.decoder.body)
        self._exchanged: Context = contextlib.nullcontext

    def exchange(self) -> None:
        """From now on, this project's operations compute norms, gated activations and rotary embeddings."""
        elementwise.exchange(self.decoder.body)
        self._exchanged = elementwise.Rotary(self.decoder.body).exchanged

    @property
    def first_adapted_layer(self) -> int:
        """The index of the lowest decoder layer with an adapter of any role; the number of layers if there is none; 0
        with an adapter on the token embedding, which changes the input of every layer."""
        if isinstance(self._model.get_input_embeddings(), LoraLayer):
            return 0
        for index, layer in enumerate(self.decoder.layers):
            if any(isinstance(module, LoraLayer) for module in layer.modules()):
                return index
        return len(self.decoder.layers)

    def padded(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        trunk: torch.Tensor | None = None,
        caught: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The last hidden states (B, T, H). ``trunk``: (B, T, H), the states that enter the first adapted layer, where
        the pass then starts. ``caught``: a list to which a hook on the layers appends other states, which are returned
        instead."""
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return self._through_body(input_ids, attention_mask, positions, trunk, caught)

    def packed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        trunk: torch.Tensor | None = None,
        caught: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Like ``padded``, but computes only live tokens; the states of padding are 0."""
        index = attention_mask.reshape(-1).nonzero().squeeze(1)
        positions = (attention_mask.long().cumsum(dim=1) - 1).reshape(-1)[index]
        ids = input_ids.reshape(-1)[index][None]
        if trunk is not None:
            trunk = trunk.reshape(-1, trunk.shape[-1])[index][None]
        layout = attention.Layout(attention_mask.sum(dim=1).tolist(), input_ids.device)
        states = self._through_body(ids, torch.ones_like(ids), positions[None], trunk, caught, layout)[0]
        padded = states.new_zeros(attention_mask.numel(), states.shape[1]).index_copy(0, index, states)
        return padded.view(*attention_mask.shape, -1)

    def _through_body(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        trunk: torch.Tensor | None,
        caught: list[torch.Tensor] | None,
        layout: attention.Layout | None = None,
    ) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._computing(layout))
            if trunk is not None:
                stack.enter_context(layers.starting_from(self.decoder, self.first_adapted_layer, trunk))
            if torch.is_grad_enabled() and self._config.gradient_checkpointing:
                adapted, now = list(self.decoder.layers)[self.first_adapted_layer :], self._as_now()
                stack.enter_context(recomputing.layers_again(adapted, self._again(layout, now.context), now.draws))
            elif torch.is_grad_enabled():
                stack.enter_context(recomputing.cheap_outputs_again())
            output = self.decoder.body(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
        return output.last_hidden_state if caught is None else caught[0]

    @contextlib.contextmanager
    def _computing(self, layout: attention.Layout | None) -> Iterator[None]:
        packed = contextlib.nullcontext() if layout is None else attention.packed(self._attention_configs, layout)
        with self._exchanged(), packed:
            yield

    def _again(self, layout: attention.Layout | None, adapters: Context) -> Context:
        @contextlib.contextmanager
        def again() -> Iterator[None]:
            with self._computing(layout), adapters():
                yield

        return again
