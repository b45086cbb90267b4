"""Predicts memory and time of a PPO run on this CPU before its weights are loaded.

Memory is computed from the shapes in config.json and the lengths of the data. Time is measured: the run's passes are
timed on models of the same shapes with two and six layers of random weights, and extrapolated to all layers.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from transformers import AutoConfig, GenerationConfig

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import PromptRow, Reading, load_dataset, prepare_tokenizer, prompt_rows
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, pretrained
from rlhf_fast.models.attention import SHORT
from rlhf_fast.monitor import print_summary
from rlhf_fast.recipes import ppo
from rlhf_fast.recipes.experience import CRITIC, POLICY, REWARD, SFT, response_states, set_advantages, set_rewards
from rlhf_fast.recipes.stage import MICRO_BATCH_SIZE
from rlhf_fast.rollout import Response, generate

DEPTHS = (2, 6)  # layers of the models that are timed
REPEATS = 3  # of each timing; the fastest is used
SAMPLED = 8  # tokens of the timed rollout
# Measured on x86-64 Linux: bytes that stay allocated after loading and trials, and the factor of fragmentation.
LEFT_BEHIND, PIECES = 140e6, 1.25
LOGITS = 48 << 20  # the logits buffer of the ops with an lm head


@dataclass
class Shape:
    """Sizes of a model, from its config.json; weights are counted on the meta device."""

    config: Any
    weights: int
    stored_bytes: int  # on disk
    itemsize: int  # bytes of a weight in the dtype of the run
    layers: int
    adapted: int  # layers with adapters
    width: int
    query: int
    shared: int  # width of the keys, equal to that of the values
    inner: int
    linear: int  # weights of the adapted linear modules
    adapter: int  # parameters of one adapter


def plan(config: PPOConfig) -> dict[str, float]:
    """Prints the prediction as a table. Returns peak memory in GB and seconds per step, each by phase.

    Raises UserError if the run's device is a GPU, or if config or data would stop the run.
    """
    if torch.cuda.is_available():
        raise UserError("plan predicts runs on a CPU; hide the GPU (CUDA_VISIBLE_DEVICES=) to plan one")
    with pretrained.located(config.model_name_or_path) as source:
        tokenizer = pretrained.load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        shape = read_shape(config, model_config, source)
    text = model_config.get_text_config(decoder=True)
    prepare_tokenizer(tokenizer, vocab_size=text.vocab_size, chat_template=config.chat_template)
    lengths = [length + config.response_length for length in prompt_lengths(config, tokenizer)]
    parts = micro_batches(config, lengths)
    memory = predict_memory(config, shape, lengths, parts)
    seconds = measure_seconds(config, shape, tokenizer, lengths, parts)
    show(config, memory, seconds)
    return {f"memory_{name}": value / 1e9 for name, value in memory.items()} | {
        f"seconds_{name}": value for name, value in seconds.items()
    }


def read_shape(config: PPOConfig, model_config: Any, source: str) -> Shape:
    text = model_config.get_text_config(decoder=True)
    with torch.device("meta"):
        model = pretrained.auto_class(model_config).from_config(model_config)
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    ]
    adapted = min(config.lora_layers or text.num_hidden_layers, text.num_hidden_layers)
    share = adapted / text.num_hidden_layers
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    stored = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    weights = sum(parameter.numel() for parameter in model.parameters())
    itemsize = pretrained.choose_dtype(config.dtype, torch.device("cpu")).itemsize
    return Shape(
        config=model_config,
        weights=weights,
        stored_bytes=stored or weights * 4,
        itemsize=itemsize,
        layers=text.num_hidden_layers,
        adapted=adapted,
        width=text.hidden_size,
        query=head * text.num_attention_heads,
        shared=head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        linear=round(share * sum(module.weight.numel() for module in linear)),
        adapter=round(share * config.lora_r * sum(m.in_features + m.out_features for m in linear)),
    )


def prompt_lengths(config: PPOConfig, tokenizer: Any) -> list[int]:
    dataset = load_dataset(
        config.dataset_name,
        split=config.dataset_split,
        rename=config.rename_columns,
        limit=config.max_samples,
        strict=config.strict,
    )
    rows, _ = prompt_rows(
        dataset,
        tokenizer,
        max_length=config.max_length - config.response_length,
        source=config.dataset_name,
        reading=Reading(config.strict, config.max_unusable_rows, config.special_tokens_in_data),
    )
    return [len(row.input_ids) for row in rows]


def micro_batches(config: PPOConfig, lengths: Sequence[int]) -> list[int]:
    """The number of rows of each micro-batch of a step, assuming sequences of mean length."""
    size = config.micro_batch_size or MICRO_BATCH_SIZE
    if config.micro_batch_tokens is not None:
        size = max(1, int(config.micro_batch_tokens / statistics.mean(lengths)))
    whole, rest = divmod(config.batch_size, size)
    return [size] * whole + [rest] * (rest > 0)


def predict_memory(config: PPOConfig, shape: Shape, lengths: Sequence[int], parts: Sequence[int]) -> dict[str, float]:
    """Peak bytes by phase. This process, which has read the data, serves as the estimate of the run's code and data."""
    process = psutil.Process().memory_info().rss
    weights = shape.weights * shape.itemsize
    mapped = weights == shape.stored_bytes or shape.itemsize == 4  # the weights are used from the mapped file
    loading = process + weights + (0 if mapped else shape.stored_bytes)
    roles = 2 + (config.reward_adapter is not None) + (config.sft_adapter is not None)
    # of policy and critic: Adam's two moments, and the snapshot of the previous step (parameters and two moments)
    trained = 2 * shape.adapter * 4
    standing = process + weights + LEFT_BEHIND + roles * shape.adapter * 4 + 2 * trained + 3 * trained
    longest, mean = max(lengths), statistics.mean(lengths)
    rows = min(config.rollout_batch_size, config.batch_size)
    cache = rows * longest * 2 * shape.shared * shape.layers * shape.itemsize
    copy = 0 if config.rollout_engine == "transformers" else shape.linear * shape.itemsize
    count = max(parts)
    # the micro-batch with the most tokens, estimated as mean + 2 standard deviations
    tokens = count * mean + 2 * statistics.pstdev(lengths) * math.sqrt(count)
    if count == len(lengths):
        tokens = sum(lengths)
    trunk = config.batch_size * mean * shape.width * shape.itemsize if shape.adapted < shape.layers else 0
    kept = kept_bytes(shape, 2 * tokens, 2 * count, longest)
    entering = 2 * tokens * shape.width * shape.itemsize
    if config.gradient_checkpointing:
        activations = shape.adapted * entering + 2 * kept
    else:
        activations = shape.adapted * kept + 2 * entering
    return {
        "loading": loading,
        "rollout": standing + copy + cache,
        "scoring": standing + trunk + 2 * kept + LOGITS,
        "update": standing + trunk + PIECES * activations + trained + LOGITS,
        "saving": standing + trained,
    }


def kept_bytes(shape: Shape, tokens: float, rows: int, longest: int) -> float:
    """Bytes that one adapted layer saves for the backward: the inputs of norms, attention, output projection and gated
    product. Attention over sequences that are not short is padded to the longest row."""
    per_token = 2 * shape.width + shape.query + 2 * shape.inner
    attention = (tokens if longest <= SHORT else rows * longest) * (shape.query + 2 * shape.shared)
    return (tokens * per_token + attention) * shape.itemsize


def measure_seconds(
    config: PPOConfig, shape: Shape, tokenizer: Any, lengths: Sequence[int], parts: Sequence[int]
) -> dict[str, float]:
    rows = [round(statistics.mean(lengths))] * max(parts)
    timed = [time_passes(small_base(config, shape, tokenizer, depth), config, rows) for depth in DEPTHS]
    few, many = DEPTHS
    share = config.batch_size / max(parts)

    def whole(name: str, layers: float) -> float:
        each = max(0.0, timed[1][name] - timed[0][name]) / (many - few)
        return max(0.0, timed[0][name] - few * each) + layers * each

    passes = 4 if config.reward_adapter is not None else 3
    below = shape.layers - shape.adapted  # layers that are computed once for all roles
    seconds = {
        "rollout": whole("prompt", shape.layers) + (config.response_length - 1) * whole("token", shape.layers),
        "scoring": share * whole("scoring", shape.adapted + below / passes),
        "update": config.num_ppo_epochs * share * whole("update", shape.adapted),
    }
    if len(parts) == 1:  # the first epoch trains on the states of the scoring
        seconds["update"] -= whole("forward", shape.adapted)
    seconds["rollout"] *= math.ceil(config.batch_size / config.rollout_batch_size)
    return seconds | {"step": sum(seconds.values())}


def small_base(config: PPOConfig, shape: Shape, tokenizer: Any, depth: int) -> SharedBase:
    """The run's model and roles with only ``depth`` layers, of random weights, all adapted."""
    small = AutoConfig.for_model(**shape.config.to_dict())
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    dtype = pretrained.choose_dtype(config.dtype, torch.device("cpu"))
    model = pretrained.auto_class(small).from_config(small, dtype=dtype).eval().requires_grad_(False)
    model.generation_config = GenerationConfig()
    base = SharedBase(model, tokenizer, replace(config, lora_layers=None))
    base.stop_ids = []
    for role in (SFT, REWARD) if config.reward_adapter is not None else (SFT,):
        base.add_role(role, head=role == REWARD, trainable=False)
    base.add_role(POLICY, copy_of=SFT)
    base.add_role(CRITIC, head=True)
    return base


def time_passes(base: SharedBase, config: PPOConfig, lengths: Sequence[int]) -> dict[str, float]:
    """Seconds of reading the prompts of a rollout, of one more token, and of one micro-batch's scoring and update."""
    prompts = [max(1, length - config.response_length) for length in lengths]
    asked = min(config.batch_size, config.rollout_batch_size)
    rows = [PromptRow(0, [1] * prompts[0], "", {}, "") for _ in range(asked)]

    def sample(tokens: int) -> Callable[[], Any]:
        return lambda: generate(base, POLICY, rows, response_length=tokens, temperature=1.0, batch_size=asked)

    sampled = [fastest(sample(tokens)) for tokens in (1, 1 + SAMPLED)]
    responses = [
        Response(PromptRow(0, [1] * prompt, "", {}, ""), [1] * config.response_length, False, "") for prompt in prompts
    ]
    stage: Any = SimpleNamespace(base=base, config=config, backward=torch.Tensor.backward)
    experience = ppo.scored(stage, responses, SFT)
    set_rewards([experience], torch.ones(len(responses)), config, kl_coef=0.0, group=None)
    set_advantages([experience], config, group=None)
    tokens = experience.mask.sum()
    return {
        "prompt": sampled[0],
        "token": (sampled[1] - sampled[0]) / SAMPLED,
        "scoring": fastest(lambda: ppo.scored(stage, responses, SFT)),
        "forward": fastest(lambda: response_states(base, [POLICY, CRITIC], experience.episodes, None)),
        "update": fastest(lambda: ppo.losses(stage, experience, tokens)),
    }


def fastest(run: Callable[[], Any]) -> float:
    run()
    best = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def show(config: PPOConfig, memory: dict[str, float], seconds: dict[str, float]) -> None:
    room = psutil.virtual_memory().total
    rows = [
        (name, f"{size / 1e9:.2f} GB", f"{seconds[name]:.1f} s a step" if name in seconds else "")
        for name, size in memory.items()
    ]
    peak = max(memory, key=memory.__getitem__)
    fits = f"in {peak}; this machine has {room / 1e9:.1f} GB"
    rows.append(("peak", f"{memory[peak] / 1e9:.2f} GB", f"{fits}; {seconds['step']:.1f} s a step"))
    print_summary(f"plan of ppo: {config.model_name_or_path}", rows)
    if memory[peak] > room:
        raise UserError(f"{peak} does not fit into this machine's {room / 1e9:.1f} GB: {advice(config, peak)}")


def advice(config: PPOConfig, phase: str) -> str:
    """The setting to lower first."""
    if phase == "rollout":
        return "set --rollout_engine transformers, or lower --rollout_batch_size"
    if phase in ("scoring", "update"):
        if phase == "update" and not config.gradient_checkpointing:
            return "set --gradient_checkpointing true, or lower --micro_batch_size or --micro_batch_tokens"
        return "lower --micro_batch_size or --micro_batch_tokens, then --lora_layers"
    return "set --dtype bfloat16, or take a smaller model"
