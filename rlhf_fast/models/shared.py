"""One frozen base with several roles. A role is a LoRA adapter (PEFT) and, for scores, a scalar head.

The reference policy is the SFT model: the role ``sft`` if there is one, else the bare base (role None). Switching the
role changes which adapter is active, never which parameters train.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast import lora_layers
from rlhf_fast.config import ALL_LINEAR, StageConfig
from rlhf_fast.errors import UserError
from rlhf_fast.models import (
    identity,
    layers,
    measure,
    targets,
    tokens,
    vocabulary,
)
from rlhf_fast.models.forward import Again, Forward
from rlhf_fast.models.heads import ScoreHead
from rlhf_fast.models.lora import Adaptable, differences
from rlhf_fast.models.merged import Merged, why_not_merge
from rlhf_fast.models.pretrained import LOADING_NOTES
from rlhf_fast.models.vocabulary import Vocabulary

LORA_IN_A_LAYER = re.compile(r"\.\d+\..*\.lora_[AB]\.weight$")
LORA_OUTSIDE = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


class SharedBase:
    """The frozen model with its adapters and heads. Every module stays in eval mode; see ``dropout``.

    Attributes:
        stop_ids: tokens that end a response.
        vocab_size: the number of tokens, without padded rows of the embedding.
        notes: lines for the user about surprising facts of the model.
        decoder: the text decoder.
        probe: (1, T) a few tokens of text for trials.

    Raises UserError if a trial on the probe (``measure``) shows that the model cannot be trained correctly.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: StageConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.pad_id = int(tokenizer.pad_token_id)
        self.rows = model.get_input_embeddings().weight.shape[0]
        self.notes: list[str] = [*getattr(model, LOADING_NOTES, []), *tokens.check_ids(tokenizer, self.rows)]
        self.stop_ids, notes = tokens.stop_ids(model, tokenizer, self.rows)
        self.notes += notes
        self.peft: PeftModel | None = None
        self.one_pass = False  # whether rows of several roles can go through the model together
        self.heads: dict[str, ScoreHead] = {}
        self._trainable: set[str] = set()
        self._in_role = False
        self._role: str | None = None  # inside ``role``
        self._dropping: str | None = None  # inside ``dropout``
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._forward = Forward(model, config, self._as_now)
        self.decoder = self._forward.decoder
        self.probe = measure.probe(tokenizer, self.rows, self.device)
        with measure.own_code(model):
            self._softcap, self._scale = self._measure_logits()
        self._forward.exchange()
        lora_layers.exchange_plain(model)
        self.vocab_size = min(max(tokenizer.get_vocab().values()) + 1, self.vocabulary.weight.shape[0])
        found = targets.find_targets(self.decoder)  # before adapters add their own linear modules
        with targets.noting_calls(found) as called, measure.own_code(model):
            measure.check_context(model, self._forward.padded, self.probe, self.pad_id)
        embedding = model.get_input_embeddings()
        reason = measure.why_not_pack(self._forward.padded, self._forward.packed, embedding, self.probe)
        self.packs = reason is None
        if reason is not None:
            self.notes.append(
                f"{type(model).__name__} cannot compute sequences packed without padding ({reason}), so padding is "
                "computed too, which is right but slower"
            )
        self._sampling_fault = measure.why_not_sample(model, self._logits, self.probe, self.pad_id)
        self._adaptable = Adaptable(model, self.decoder, found, targets.left_out(model, found, called))
        # a mixture sorts tokens by expert: with another role's tokens, the rows of its products would be others
        self._mixture = bool(found.fused)
        self._splits: dict[int, bool] = {}
        self._linear = targets.inside(self.decoder, found.linear)
        self.fingerprint = identity.fingerprint(self._linear)
        if ALL_LINEAR in config.lora_target_modules:
            self.notes += self._adaptable.notes()

    def check_tokens(self, source: str, row: int, ids: Sequence[int]) -> None:
        """Raises UserError, naming ``source`` and ``row``, if a token has no row in the embedding."""
        highest = max(ids, default=0)
        if highest >= self.rows:
            raise UserError(
                f"{source}, row {row}: the token {self.tokenizer.convert_ids_to_tokens(highest)!r} (id {highest}) lies "
                f"beyond the {self.rows} rows of the model's embedding; take it out of the text"
            )

    def check_sampling(self) -> None:
        """Raises UserError if the model would sample from other log-probs than those that are trained."""
        if self._sampling_fault is not None:
            raise UserError(
                f"{type(self.model).__name__} cannot be sampled as it is trained ({self._sampling_fault}): only SFT "
                "works"
            )

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
        """Adds an adapter: a copy of another role's (and of its head, if both have one), else a new one with B = 0.

        A copy has the other role's rank, scale and modules; ``notes`` says where they differ from the config.
        """
        lora = self._adaptable.config(self.config)
        if copy_of is not None:
            asked, lora = lora, self._config_of(copy_of)
            lora.lora_dropout = asked.lora_dropout
            self.notes += [f"{name} starts as a copy of {copy_of}: {line}" for line in differences(asked, lora)]
        try:
            self._add_adapter(name, lora)
        except ValueError as error:  # PEFT refuses some state-space models
            reason = " ".join(str(error).split())
            raise UserError(f"{type(self.model).__name__}: PEFT cannot adapt this model: {reason}") from error
        if copy_of is not None:
            source = self._collect(copy_of)
            with torch.no_grad():
                for path, parameter in self._collect(name).items():
                    parameter.copy_(source[path])
        if head:
            self.heads[name] = ScoreHead(self.vocabulary.weight.shape[1]).to(self.device)
            if copy_of in self.heads:
                self.heads[name].load_state_dict(self.heads[copy_of].state_dict())
        self._mark(name, trainable)

    def load_role(
        self, name: str, lora: LoraConfig, state: dict[str, torch.Tensor], *, same_base: bool = False
    ) -> None:
        """Adds a role from PEFT's config and tensors (see ``adapters.load_role``), not trainable.

        ``same_base``: they are known to be made for this base, so an error message blames the adapter's files."""
        fault = "damaged, or its config is not the one it was trained with" if same_base else "made for another base"
        outside = tuple(f"{path}.{part}" for path in targets.outside(self.model) for part in LORA_OUTSIDE)
        if getattr(lora, "ensure_weight_tying", False) and any("lora_embedding_" in key for key in state):
            raise UserError(
                f"adapter {name}: its config ties the adapters of head and token embedding (ensure_weight_tying), "
                "which is not supported: train it without"
            )
        for key in state:
            if not LORA_IN_A_LAYER.search(key) and not key.endswith(outside):
                raise UserError(
                    f"adapter {name}: it holds {key}, and only LoRA matrices of the decoder layers' linear modules, of "
                    "the head and of the token embedding can be used: whatever else it changes would be lost, or "
                    "shared with every other role"
                )
        try:
            self._add_adapter(name, lora)
            assert self.peft is not None
            result = set_peft_model_state_dict(self.peft, state, adapter_name=name)
        except (RuntimeError, ValueError) as error:  # other shapes; no module of the names it adapts
            raise UserError(f"adapter {name}: {fault}; {str(error).splitlines()[-1].strip()}") from error
        except (TypeError, AttributeError, LookupError, re.error) as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise UserError(f"adapter {name}: PEFT cannot use its adapter_config.json: {reason}") from error
        missing = [key for key in result.missing_keys if f".{name}." in f"{key}."]
        if missing or result.unexpected_keys:
            raise UserError(
                f"adapter {name}: {fault}; {len(missing)} tensors are missing and "
                f"{len(result.unexpected_keys)} are unknown, such as {(missing + result.unexpected_keys)[0]}"
            )
        gates = sorted({key.split(".lora_")[0].split(".")[-1] for key in state if targets.in_gate(key)})
        if gates:
            self.notes.append(f"adapter {name} adapts routers or gates ({', '.join(gates)}), and so do its copies")
        self._mark(name, trainable=False)

    def add_head(self, name: str, head: ScoreHead) -> None:
        self.heads[name] = head.to(self.device)
        self._mark(name, name in self._trainable)

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own parameters: LoRA matrices by module name and, where it has a head, ``score.weight``."""
        return dict(self._parameters[role])

    @contextlib.contextmanager
    def role(self, name: str | None) -> Iterator[None]:
        """Inside, the model computes with this adapter; None is the bare base. RuntimeError if already in a role."""
        self._check_role(name)
        if self._in_role:
            raise RuntimeError(f"role {name!r} was asked for inside another role; leave that one first")
        self._in_role, self._role = True, name
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
        """Inside, the role's lora_dropout is active. The base's own dropout never is."""
        modules = [
            module.lora_dropout[role]
            for module in self.model.modules()
            if isinstance(module, LoraLayer) and role in module.lora_dropout
        ]
        for module in modules:
            module.train()
        self._dropping = role
        try:
            yield
        finally:
            self._dropping = None
            for module in modules:
                module.eval()

    def merged(self, role: str | None) -> Merged:
        """The role's adapter merged into copies of the weights that it adapts.

        Raises UserError if the copies do not fit into memory, or if a module cannot be merged (``why_not_merge``).
        """
        self._check_role(role)
        return Merged(self.model, role)

    def why_not_merge(self) -> str | None:
        """None if every adapted module can be copied with its adapter merged; else the reason."""
        return why_not_merge(self.model)

    # ---- computing ---------------------------------------------------------------------------------------------

    @property
    def first_adapted_layer(self) -> int:
        """See ``Forward``."""
        return self._forward.first_adapted_layer

    @torch.no_grad()
    def trunk(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """The hidden states (B, T, H) that enter the lowest adapted layer, which are the same for every role. None if
        that is the first layer, so that there is nothing to share, or if the model cannot start there."""
        first = self.first_adapted_layer
        if first == 0 or first == len(self.decoder.layers) or not self._splits[first]:
            return None
        caught: list[torch.Tensor] = []
        with layers.stopping_at(self.decoder, first, caught):
            return self._states(input_ids, attention_mask, caught=caught)[0]

    def hidden(
        self,
        role: str | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        trunk: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states (B, T, H) under a role's adapter. ``input_ids`` and ``attention_mask`` (1 = token) are
        (B, T), padded on either side. With the result of ``trunk``, only the layers above it are computed.

        If the model allows it (``packs``), padding is not computed, and its states are 0.
        """
        with self.role(role):
            return self._states(input_ids, attention_mask, trunk)[0]

    def hidden_of(
        self,
        roles: Sequence[str | None],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        trunk: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """``hidden`` of each role, in one pass if the model allows it (``one_pass``): the base's products take the rows
        of all roles together, and each adapter takes its role's rows."""
        if len(roles) == 1 or not self.one_pass:
            return tuple([self.hidden(role, input_ids, attention_mask, trunk) for role in roles])
        for role in roles:
            self._check_role(role)
        return tuple(self._states(input_ids, attention_mask, trunk, roles=roles).unbind())

    def scores(
        self,
        role: str,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        trunk: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The role's head on the last live token of each row: (B,) float32."""
        return self.heads[role](last_states(self.hidden(role, input_ids, attention_mask, trunk), attention_mask))

    @property
    def vocabulary(self) -> Vocabulary:
        """The language-model head of the bare base."""
        return self.vocabulary_of(None)

    def vocabulary_of(self, role: str | None) -> Vocabulary:
        """The language-model head, with the role's adapter on it if there is one."""
        head, lora = self.model.get_output_embeddings(), None
        if isinstance(head, LoraLayer) and role in head.lora_A:
            lora = (head.lora_A[role].weight, head.lora_B[role].weight, head.scaling[role])
        return Vocabulary(head.weight, getattr(head, "bias", None), self._softcap, self._scale, lora)

    def _states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        trunk: torch.Tensor | None = None,
        *,
        roles: Sequence[str | None] = (),
        caught: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The last hidden states under each of ``roles``, (R, B, T, H); without roles, under the active adapter,
        (1, B, T, H). ``caught``: a list to which the pass appends other states, which are then returned instead."""
        run, size = self._forward.packed if self.packs else self._forward.padded, input_ids.shape
        if not roles:
            return run(input_ids, attention_mask, trunk, caught)[None]
        rows = int(attention_mask.sum()) if self.packs else attention_mask.numel()
        input_ids, attention_mask = (tensor.repeat(len(roles), 1) for tensor in (input_ids, attention_mask))
        trunk = None if trunk is None else trunk.repeat(len(roles), 1, 1)
        with lora_layers.roles([(role, rows) for role in roles]):
            return run(input_ids, attention_mask, trunk, caught).view(len(roles), *size, -1)

    def _as_now(self) -> Again:
        """Enters the roles, or the role, and the dropout of now."""
        roles, role, dropping = lora_layers.given_roles(), self._role, self._dropping

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.role(role) if roles is None else lora_layers.roles(roles))
                if dropping is not None:
                    stack.enter_context(self.dropout(dropping))
                yield

        return Again(context, draws=dropping is not None)

    def _logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.logits(self._forward.padded(input_ids, attention_mask))

    # ---- private -----------------------------------------------------------------------------------------------

    def _check_role(self, role: str | None) -> None:
        if role is not None and role not in self.roles:
            raise KeyError(f"no role {role!r}; there are {self.roles}")

    def _config_of(self, role: str) -> LoraConfig:
        assert self.peft is not None
        return LoraConfig(**self.peft.peft_config[role].to_dict())

    def _add_adapter(self, name: str, lora: LoraConfig) -> None:
        with layers.quiet_peft():
            if self.peft is None:
                self.peft = get_peft_model(self.model, lora, adapter_name=name)  # type: ignore[assignment]
            else:
                self.peft.add_adapter(name, lora)
        if identity.fingerprint(self._linear) != self.fingerprint:
            raise UserError(f"adapter {name}: PEFT changes the base to make it (init_lora_weights), which roles share")
        self.model.eval()
        self._fuse()
        self._check_split()

    def _fuse(self) -> None:
        """Makes ``lora_linear`` compute the adapted layers, and layers with the same input in one call."""
        embedding = self.model.get_input_embeddings()
        if isinstance(embedding, Embedding):
            embedding.__class__ = lora_layers.EmbeddingByRole
        found = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer) and module is not embedding
        }
        left = lora_layers.fuse(found)
        fused = {name: layer for name, layer in found.items() if name not in left}
        calls = lora_layers.group(fused, lambda: self._forward.padded(self.probe, torch.ones_like(self.probe)))
        self.one_pass = not (left or self._mixture) and calls.sizes <= {self.probe.numel()}

    def _check_split(self) -> None:
        """Tries once per starting layer whether the model can be run from the first adapted layer on."""
        first = self.first_adapted_layer
        if 0 < first < len(self.decoder.layers) and first not in self._splits:
            with self.role(None):
                reason = measure.why_not_split(self.decoder, self._forward.padded, self.probe, first)
            self._splits[first] = reason is None
            if reason is not None:
                self.notes.append(
                    f"{type(self.model).__name__} cannot be run from decoder layer {first} on ({reason}): the layers "
                    "below are computed for every role, which is right, but not as fast as --lora_layers makes it"
                )

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
        """Sets requires_grad by role, because PEFT sets it only for the active adapter."""
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
                for part in ("lora_embedding_A", "lora_embedding_B"):
                    if role in getattr(module, part):
                        found[f"{module_name}.{part}"] = getattr(module, part)[role]
        if role in self.heads:
            found["score.weight"] = self.heads[role].weight
        return found

    @torch.no_grad()
    def _measure_logits(self) -> tuple[float | None, float]:
        """The head's softcap and scale. Raises UserError if the logits are not finite or not those of a linear head."""
        ids = self.probe
        mask = torch.ones_like(ids)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if not logits.isfinite().all():
            broken = [name for name, weight in self.model.named_parameters() if not weight.isfinite().all()]
            raise UserError(
                f"{self.config.model_name_or_path}: the model's logits are not finite in {self.dtype}; weights with "
                f"NaN or infinity: {', '.join(broken[:3]) or 'none, so try --dtype float32 or bfloat16'}"
            )
        head = self.model.get_output_embeddings()
        raw = nn.functional.linear(self._forward.padded(ids, mask), head.weight, getattr(head, "bias", None))
        return vocabulary.measure(self.model, raw, logits)


def last_states(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T, H) -> (B, H): the state of the last live token of each row."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * positions).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
