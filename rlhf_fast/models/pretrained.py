"""Finds and loads the frozen base: a folder, a built-in name, or a hub name (from the cache when offline)."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_fast.config import StageConfig
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.hub import reached
from rlhf_fast.models import folder, tokens
from rlhf_fast.models.builtin import BUILT_IN

LOADING_NOTES = "rlhf_fast_notes"  # attribute of a model: notes on its weights, for ``SharedBase.notes``
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # their names in safetensors


def load_pretrained(config: StageConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in eval mode, every weight frozen, on ``device``; and its tokenizer.

    Raises UserError for an unknown folder or name, missing safetensors, a model that is no causal language model, or
    remote code without trust_remote_code.
    """
    name = config.model_name_or_path
    dtype = choose_dtype(config.dtype, device)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    extra: dict[str, Any] = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    with located(name) as source:
        folder.check_files(source)
        with loading(name, source, "config.json"):
            model_config = AutoConfig.from_pretrained(source, **common)
        check_config(name, model_config)
        if config.load_in_4bit:
            extra |= four_bits(name, model_config, dtype, device)
        folder.check_sizes(name, model_config)
        with loading(name, source, "the tokenizer"):
            tokenizer = load_tokenizer(source, **common)
            tokens.check_ids(tokenizer, model_config.get_text_config(decoder=True).vocab_size)
        with loading(name, source, "the model that config.json describes"):
            # the setting decides the dtype, not config.json, which says in which dtype the weights are stored
            model = load_weights(
                auto_class(model_config),
                source,
                config=model_config,
                dtype=dtype,
                use_safetensors=None if config.allow_pickle_weights else True,
                **common,
                **extra,
            )
    if config.load_in_4bit:
        for module in model.modules():
            # otherwise a forward without gradient repacks the weight for a product that has no backward
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    # generate() takes unset options from here. A top_k or penalty of the model would make the sampled distribution
    # differ from the trained one.
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return (model if config.load_in_4bit else model.to(device)).eval(), tokenizer


def check_config(name: str, config: Any) -> None:
    """Raises UserError if the config shows that this is no causal language model, before any weight is read."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(f"{name}: it is no causal language model: a {kind} is an encoder with a decoder")
    if getattr(config.get_text_config(decoder=True), "vocab_size", None) is None:
        raise UserError(f"{name}: it is no causal language model: the config of a {kind} has no vocab_size")


def four_bits(name: str, model_config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The from_pretrained arguments that load linear layers in 4 bits. Raises UserError if that is not possible."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs bitsandbytes: pip install 'rlhf-fast[4bit]'")
    if getattr(model_config, "quantization_config", None) is not None:
        raise UserError(f"--load_in_4bit: the weights of {name} are quantised already; leave it out")
    numbers = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": numbers, "device_map": {"": device}}


def auto_class(config: Any) -> Any:
    """transformers' auto class for the model: some text decoders exist only inside an image-text model."""
    wrapper = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if wrapper else AutoModelForCausalLM


def load_tokenizer(source: str, **extra: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, without ``local_files_only``, which would be saved with it."""
    tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer


def load_weights(kind: Any, source: str, *, fresh: tuple[str, ...] = (), **extra: Any) -> PreTrainedModel:
    """A model of the auto class ``kind`` with all weights from ``source``, except ``fresh``.

    Raises UserError for a missing tensor, which transformers would fill with random values. ``LOADING_NOTES`` names
    tensors that the model does not have.
    """
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # no table of missing and unexpected tensors: reported below
    transformers.utils.logging.disable_progress_bar()  # a base loads in seconds, and stages have their own bars
    try:
        with read_to_convert(extra["dtype"]):
            # ignore_mismatched_sizes, because the error below names the weight
            model, found = kind.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **extra)
    finally:
        transformers.utils.logging.set_verbosity(level)
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{source}: {name} is {tuple(there)} there and must be {tuple(wanted)}, as its config.json says"
        )
    missing = sorted(set(found["missing_keys"]) - set(fresh))
    if missing:
        raise UserError(
            f"{source}: no weights for {_some(missing)}, which would be random; save the whole model, or copy it again"
        )
    unexpected = sorted(found["unexpected_keys"])
    folder.check_tensors(source, model, unexpected)
    if unexpected:
        note = f"{source}: weights that a {type(model).__name__} has no place for are not used: {_some(unexpected)}"
        setattr(model, LOADING_NOTES, [note])
    return model


@contextlib.contextmanager
def read_to_convert(dtype: torch.dtype | str) -> Iterator[None]:
    """Inside, transformers reads a safetensors file without any tensor of ``dtype`` one tensor at a time. Mapped, its
    pages would be resident beside the converted weights until all of them are loaded. Other files stay mapped: the
    weights are used from there."""

    def open_file(path: Any, **options: Any) -> Any:
        file = safe_open(path, **options)
        stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # not a mapping
        mapped = dtype not in STORED or STORED[dtype] in stored
        return file if mapped else safe_open(path, **options | {"backend": "pread"})

    transformers.modeling_utils.safe_open = open_file
    try:
        yield
    finally:
        transformers.modeling_utils.safe_open = safe_open


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def loading(name: str, source: str, what: str) -> Iterator[None]:
    """Inside, transformers reads ``what`` from the user's files. Any exception becomes a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot load the model {name}: {_advice(source, what, error)}") from error


def check_window(model: PreTrainedModel, max_length: int) -> None:
    """Raises UserError if ``max_length`` exceeds the model's max_position_embeddings.

    Beyond it, learned positions fail deep inside the model, and rotary ones give wrong results without an error.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and max_length > window:
        raise UserError(
            f"--max_length must be at most {window}, the positions that this model knows (max_position_embeddings of "
            f"its config.json); got {max_length}"
        )


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU or CPU with instructions for bfloat16 products, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu.get_capabilities().get("avx512_bf16", False)  # every processor with AMX has it too
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def located(name: str) -> Iterator[str]:
    """Yields the source to load ``name`` from: the folder of a built-in name, the folder itself, or the hub name. For a
    hub name, the block runs in offline mode if the hub can't be reached and the cache has the model.

    Raises UserError for a missing folder (naming the most similar one), or a hub name that neither the cache nor the
    hub has.
    """
    path = Path(name)
    if name in BUILT_IN:
        yield str(BUILT_IN[name]())
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is a folder without config.json: expected a model as save_pretrained writes it")
        yield name
    elif (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "/" in name and path.parent.is_dir()
    ):
        folders = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"no model folder {name}{nearest(path.name, folders)}")
    else:
        near = nearest(name, list(BUILT_IN))
        places = f"neither a folder here, built in ({', '.join(BUILT_IN)}), nor a public model of the hub"
        ask, unknown = huggingface_hub.HfApi().model_info, f"no model {name!r}: {places}{near}"
        with reached(name, ask, kind="model", unknown=unknown) as unreachable:
            if unreachable is not None and not _is_cached(name):
                reason = str(unreachable).splitlines()[0] if str(unreachable) else type(unreachable).__name__
                raise UserError(
                    f"no model {name!r}: not a folder here, not in the hub's cache, and the hub can't be reached "
                    f"({reason}){near}"
                ) from unreachable
            yield name


def _is_cached(name: str) -> bool:
    return isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)


def _advice(source: str, what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it brings Python code of its own; read that code, then set --trust_remote_code true to run it"
    place = Path(source)
    if place.is_dir() and not list(place.glob("*.safetensors")):
        if list(place.glob("*.bin")):
            return "it has no safetensors, only pickle files (.bin); set --allow_pickle_weights true if you trust them"
        return f"no *.safetensors in {place}"
    if isinstance(error, SafetensorError):
        return f"a *.safetensors file in it is damaged ({text}); download or copy it again"
    if "for this kind of AutoModel" in text:
        return "it is no causal language model"
    if place.is_dir() and not [*place.glob("tokenizer*"), *place.glob("vocab*"), *place.glob("*.model")]:
        return f"no tokenizer in {place} (tokenizer.json, tokenizer_config.json); copy the one it was trained with"
    if isinstance(error, KeyError):
        return f"{what}: a name that transformers does not know: {text[:300]}"
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        text = f"transformers cannot use it ({type(error).__name__}: {text})"
    return f"{what}: {text[:300]}"
