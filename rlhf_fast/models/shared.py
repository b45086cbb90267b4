"""One frozen base, several roles: each role is a LoRA adapter (PEFT) and, for scores, a scalar head.

The reference policy is the SFT model: the role ``sft`` where there is one, else the bare base (role None). Switching
a role changes which adapter is active, never which parameters train.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.config import ALL_LINEAR, StageConfig
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.models import layers
from rlhf_fast.models.heads import ScoreHead

LORA_IN_A_LAYER = re.compile(r"\.\d+\..*\.lora_[AB]\.weight$")


@dataclass(frozen=True)
class Vocabulary:
    """The language-model head, as the linear ops take it: weight (V, H), bias (V,) or None, softcap or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None


class SharedBase:
    """The frozen model with its adapters and heads. Every module stays in eval mode; see ``dropout``.

    ``stop_ids`` end a response; ``vocab_size`` counts the real tokens, without padded rows of the embedding.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: StageConfig) -> None:
        self.tokenizer = tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        self.stop_ids = _stop_ids(model, tokenizer)
        self.vocab_size = min(max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size)
        self.model = model
        self.config = config
        self.peft: PeftModel | None = None
        self.heads: dict[str, ScoreHead] = {}
        self._trainable: set[str] = set()
        self._in_role = False
        self.notes: list[str] = []
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._list_name, self._layers = layers.decoder_layers(model)
        self._body = layers.decoder(model)
        self._linear_names = layers.linear_names(model)  # before adapters bring linear modules of their own
        self._check_vocabulary()

    # ---- roles -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def roles(self) -> list[str]:
        return [] if self.peft is None else list(self.peft.peft_config)

    def add_role(self, name: str, *, copy_of: str | None = None, head: bool = False, trainable: bool = True) -> None:
        """A new adapter: a copy of another role's (its head too, where both have one), else a fresh one that changes
        nothing yet (B = 0). A copy has the other's rank, scale and modules; ``notes`` says where the config differs.
        """
        lora = self._fresh_config()
        if copy_of is not None:
            asked, lora = lora, self._config_of(copy_of)
            lora.lora_dropout = asked.lora_dropout
            self._note_difference(name, copy_of, asked, lora)
        self._add_adapter(name, lora)
        if copy_of is not None:
            assert self.peft is not None
            state = get_peft_model_state_dict(self.peft, adapter_name=copy_of)
            set_peft_model_state_dict(self.peft, state, adapter_name=name)
        if head:
            self.heads[name] = ScoreHead(self.model.config.hidden_size).to(self.device)
            if copy_of in self.heads:
                self.heads[name].load_state_dict(self.heads[copy_of].state_dict())
        self._mark(name, trainable)

    def load_role(self, name: str, lora: LoraConfig, state: dict[str, torch.Tensor]) -> None:
        """A role from PEFT's own config and tensors (see ``adapters.load_role``), not trainable."""
        for key in state:
            if not LORA_IN_A_LAYER.search(key):
                raise UserError(
                    f"adapter {name}: it holds {key}, and only LoRA matrices of the decoder layers' linear modules can "
                    "be used: whatever else it changes would be lost, or shared with every other role"
                )
        try:
            self._add_adapter(name, lora)
            assert self.peft is not None
            result = set_peft_model_state_dict(self.peft, state, adapter_name=name)
        except (RuntimeError, ValueError) as error:  # other shapes; no module of the names it adapts
            raise UserError(f"adapter {name}: made for another base; {str(error).splitlines()[-1].strip()}") from error
        missing = [key for key in result.missing_keys if f".{name}." in key]
        if missing or result.unexpected_keys:
            raise UserError(
                f"adapter {name}: made for another base; {len(missing)} tensors are missing and "
                f"{len(result.unexpected_keys)} are unknown, such as {(missing + result.unexpected_keys)[0]}"
            )
        self._mark(name, trainable=False)

    def add_head(self, name: str, head: ScoreHead) -> None:
        self.heads[name] = head.to(self.device)
        self._mark(name, name in self._trainable)

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own parameters: LoRA matrices by module name and, where it has a head, ``score.weight``."""
        return dict(self._parameters[role])

    @contextlib.contextmanager
    def role(self, name: str | None) -> Iterator[None]:
        """Inside, the model computes with this adapter; None is the bare base. Roles do not nest: RuntimeError."""
        if name is not None and name not in self.roles:
            raise KeyError(f"no role {name!r}; there are {self.roles}")
        if self._in_role:
            raise RuntimeError(f"role {name!r} was asked for inside another role; leave that one first")
        self._in_role = True
        try:
            if name is not None:
                self._activate(name)
                yield
            else:
                with self.peft.disable_adapter() if self.peft is not None else contextlib.nullcontext():
                    yield
        finally:
            self._in_role = False
            if name is None:
                self._set_requires_grad()

    @contextlib.contextmanager
    def dropout(self, role: str) -> Iterator[None]:
        """Inside, the role's lora_dropout is on. The base's own dropouts never are."""
        modules = [
            module.lora_dropout[role]
            for module in self.model.modules()
            if isinstance(module, LoraLayer) and role in module.lora_dropout
        ]
        for module in modules:
            module.train()
        try:
            yield
        finally:
            for module in modules:
                module.eval()

    # ---- computing ---------------------------------------------------------------------------------------------

    @property
    def first_adapted_layer(self) -> int:
        """Layers below this one have no adapter of any role."""
        adapted = [
            index
            for index, layer in enumerate(self._layers)
            if any(isinstance(module, LoraLayer) for module in layer.modules())
        ]
        return min(adapted, default=len(self._layers))

    @torch.no_grad()
    def trunk(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """The hidden states (B, T, H) that enter the lowest adapted layer: the same for every role. None where the
        lowest layer is adapted itself, so that there is nothing to share."""
        first = self.first_adapted_layer
        if first == 0 or first == len(self._layers):
            return None
        caught: list[torch.Tensor] = []
        with layers.stopping_at(self._layers, first, caught):
            self._run(input_ids, attention_mask)
        return caught[0]

    def hidden(
        self,
        role: str | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        trunk: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states (B, T, H) under a role's adapter. ``input_ids`` and ``attention_mask`` (1 = token) are
        (B, T), padded on either side. With ``trunk`` (see there) only the layers above it are computed."""
        with self.role(role):
            if trunk is None:
                return self._run(input_ids, attention_mask)
            with layers.starting_from(self._layers, self.first_adapted_layer, trunk):
                return self._run(input_ids, attention_mask)

    def scores(
        self,
        role: str,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        trunk: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The role's head on the last live token of each row: (B,) float32."""
        hidden = self.hidden(role, input_ids, attention_mask, trunk)
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * positions).argmax(dim=1)
        return self.heads[role](hidden[torch.arange(len(hidden), device=hidden.device), last])

    @property
    def vocabulary(self) -> Vocabulary:
        head = self.model.get_output_embeddings()
        return Vocabulary(head.weight, getattr(head, "bias", None), _softcap(self.model))

    def _run(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self._body(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return output.last_hidden_state

    # ---- the parts that only this file needs -------------------------------------------------------------------

    def _fresh_config(self) -> LoraConfig:
        config, count = self.config, self.model.config.num_hidden_layers
        known = self._linear_names
        targets = known if config.lora_target_modules == [ALL_LINEAR] else config.lora_target_modules
        for target in targets:
            if target not in known:
                raise UserError(
                    f"--lora_target_modules: no linear module {target!r} in this model's layers"
                    f"{nearest(target, known)}; there are {', '.join(known)}"
                )
        top = config.lora_layers
        if top is not None and top > count:
            raise UserError(f"--lora_layers must be at most {count}, the number of decoder layers; got {top}")
        return LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it by r, so a float is as good
            lora_dropout=config.lora_dropout,
            target_modules=list(targets),
            layers_to_transform=None if top is None else list(range(count - top, count)),
            layers_pattern=None if top is None else [self._list_name],
            fan_in_fan_out=_stores_transposed(self._layers),
            task_type="CAUSAL_LM",
        )

    def _note_difference(self, name: str, copy_of: str, asked: LoraConfig, taken: LoraConfig) -> None:
        for field in ("r", "lora_alpha", "target_modules", "layers_to_transform"):
            wanted, found = getattr(asked, field), getattr(taken, field)
            if wanted != found and set(_listed(wanted)) != set(_listed(found)):
                self.notes.append(f"{name} starts as a copy of {copy_of}: {field} is its {found}, not {wanted}")

    def _config_of(self, role: str) -> LoraConfig:
        assert self.peft is not None
        return LoraConfig(**self.peft.peft_config[role].to_dict())

    def _add_adapter(self, name: str, lora: LoraConfig) -> None:
        with layers.quiet_peft():
            if self.peft is None:
                self.peft = get_peft_model(self.model, lora, adapter_name=name)  # type: ignore[assignment]
            else:
                self.peft.add_adapter(name, lora)
        self.model.eval()

    def _mark(self, name: str, trainable: bool) -> None:
        (self._trainable.add if trainable else self._trainable.discard)(name)
        self._parameters[name] = self._collect(name)
        self._set_requires_grad()

    def _activate(self, name: str) -> None:
        assert self.peft is not None
        if self.peft.active_adapter != name:
            self.peft.set_adapter(name)
            self._set_requires_grad()

    def _set_requires_grad(self) -> None:
        """PEFT lets the active adapter alone train; which roles train is our choice, whichever is active."""
        for role, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(role in self._trainable)

    def _collect(self, role: str) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for module_name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                for part in ("lora_A", "lora_B"):
                    if role in getattr(module, part):
                        found[f"{module_name}.{part}.weight"] = getattr(module, part)[role].weight
        if role in self.heads:
            found["score.weight"] = self.heads[role].weight
        return found

    @torch.no_grad()
    def _check_vocabulary(self) -> None:
        """A model whose logits are not softcap(head(hidden)) would train on wrong log-probs: refused here."""
        ids = torch.arange(4, device=self.device).remainder(self.model.config.vocab_size)[None]
        mask = torch.ones_like(ids)
        vocabulary = self.vocabulary
        expected = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        if not expected.isfinite().all():
            broken = [name for name, weight in self.model.named_parameters() if not weight.isfinite().all()]
            raise UserError(
                f"{self.config.model_name_or_path}: the model's logits are not finite in {self.dtype}; weights with "
                f"NaN or infinity: {', '.join(broken[:3]) or 'none, so try --dtype float32 or bfloat16'}"
            )
        logits = nn.functional.linear(self._run(ids, mask), vocabulary.weight, vocabulary.bias).float()
        if vocabulary.softcap is not None:
            logits = vocabulary.softcap * torch.tanh(logits / vocabulary.softcap)
        if not torch.allclose(logits, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise UserError(
                f"{type(self.model).__name__}: its logits are not a plain linear head (with softcap) on the last "
                "hidden states, so the fused losses would be wrong; this architecture is not supported"
            )


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and those of the model's generation_config (chat models often have a second one)."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = own if isinstance(own, list) else [own]
    stops = {int(token) for token in [tokenizer.eos_token_id, *listed] if token is not None}
    if not stops:
        raise UserError("the tokenizer has no EOS token: a response could never end; set eos_token in its config")
    return sorted(stops)


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, set, tuple)) else [value]


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


def _stores_transposed(decoder_layers: nn.ModuleList) -> bool:
    return any(isinstance(module, layers.Conv1D) for module in decoder_layers.modules())
