"""Predicts memory and time of a stage on this CPU before its weights are loaded.

Memory is computed from the shapes in config.json and the lengths of the data. Time is measured: the run's passes are
timed on models of the same shapes with two and six layers of random weights, and extrapolated to all layers.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from rlhf_fast.config import STAGES, DPOConfig, PPOConfig, RewardConfig, SFTConfig, StageConfig
from rlhf_fast.data import PairRow, PromptRow, preference_rows, prepare_tokenizer, prompt_rows, sft_rows
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, pretrained, targets
from rlhf_fast.models.attention import SHORT
from rlhf_fast.monitor import print_summary
from rlhf_fast.ops import pairwise_loss
from rlhf_fast.recipes import dpo, ppo, reward, sft
from rlhf_fast.recipes.experience import (
    CRITIC,
    POLICY,
    REWARD,
    SFT,
    response_states,
    set_advantages,
    set_rewards,
    trained_roles,
)
from rlhf_fast.recipes.heap import give_back_memory
from rlhf_fast.recipes.rows import encode_table, open_table
from rlhf_fast.recipes.stage import MICRO_BATCH_SIZE
from rlhf_fast.rollout import Response, generate

ENCODERS: dict[str, Callable[..., Any]] = {
    "sft": sft_rows,
    "reward": preference_rows,
    "dpo": preference_rows,
    "ppo": prompt_rows,
}
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
    itemsize: int  # bytes of a weight in the dtype of the run
    layers: int
    adapted: int  # layers from the lowest adapted one on; all of them with an adapter on the token embedding
    width: int
    query: int
    shared: int  # width of the keys, equal to that of the values
    inner: int
    linear: int  # weights of the adapted linear modules in the layers
    adapter: int  # parameters of one adapter


def plan(config: StageConfig) -> dict[str, float]:
    """Prints the prediction as a table. Returns peak memory in GB and seconds per step, each by phase.

    Raises UserError if the run's device is a GPU, or if config or data would stop the run.
    """
    if torch.cuda.is_available():
        raise UserError("plan predicts runs on a CPU; hide the GPU (CUDA_VISIBLE_DEVICES=) to plan one")
    tokenizer, shape, _ = open_shape(config)
    rows = read_rows(config, tokenizer)
    lengths = [sequence_lengths(config, row) for row in rows]
    parts = micro_batches(config, [sum(row) for row in lengths])
    gc.collect()  # the models that were timed for another stage
    give_back_memory()
    memory = predict_memory(config, shape, lengths, parts)
    seconds = measure_seconds(config, shape, tokenizer, rows, parts)
    show(config, memory, seconds)
    return {f"memory_{name}": value / 1e9 for name, value in memory.items()} | {
        f"seconds_{name}": value for name, value in seconds.items()
    }


def open_shape(config: StageConfig) -> tuple[PreTrainedTokenizerBase, Shape, list[str]]:
    """The prepared tokenizer, the model's sizes, and a line for each change to the tokenizer. Loads no weights."""
    with pretrained.located(config.model_name_or_path) as source:
        tokenizer = pretrained.load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        shape = read_shape(config, model_config)
    text = model_config.get_text_config(decoder=True)
    notes = prepare_tokenizer(tokenizer, vocab_size=text.vocab_size, chat_template=config.chat_template)
    return tokenizer, shape, notes


def read_shape(config: StageConfig, model_config: Any) -> Shape:
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
    names = config.lora_target_modules
    outside: list[Any] = [module for path, module in targets.outside(model).items() if path.split(".")[-1] in names]
    if model.get_input_embeddings() in outside:
        adapted = text.num_hidden_layers
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = pretrained.choose_dtype(config.dtype, torch.device("cpu")).itemsize
    return Shape(
        config=model_config,
        weights=sum(parameter.numel() for parameter in model.parameters()),
        itemsize=itemsize,
        layers=text.num_hidden_layers,
        adapted=adapted,
        width=text.hidden_size,
        query=head * text.num_attention_heads,
        shared=head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        linear=round(share * sum(module.weight.numel() for module in linear)),
        adapter=round(share * config.lora_r * sum(m.in_features + m.out_features for m in linear))
        + config.lora_r * sum(sum(module.weight.shape) for module in outside),
    )


def read_rows(config: StageConfig, tokenizer: Any) -> list[Any]:
    dataset = open_table(config, config.dataset_name, config.dataset_split, config.max_samples)
    encode = ENCODERS[stage_name(config)]
    return encode_table(config, tokenizer, encode, dataset, row_window(config), config.dataset_name)[0]


def row_window(config: StageConfig) -> int:
    """The longest row in tokens: a prompt of PPO leaves room for its response."""
    return config.max_length - (config.response_length if isinstance(config, PPOConfig) else 0)


def sequence_lengths(config: StageConfig, row: Any) -> tuple[int, ...]:
    """The tokens of a row's sequences: one, or the two of a pair. The response to a prompt has its largest length."""
    if isinstance(row, PairRow):
        return len(row.chosen_ids), len(row.rejected_ids)
    return (len(row.input_ids) + (config.response_length if isinstance(config, PPOConfig) else 0),)


def micro_batches(config: StageConfig, lengths: Sequence[int]) -> list[int]:
    """The number of rows of each micro-batch of a step, assuming rows of mean length."""
    size = config.micro_batch_size or MICRO_BATCH_SIZE
    if config.micro_batch_tokens is not None:
        size = max(1, int(config.micro_batch_tokens / statistics.mean(lengths)))
    whole, rest = divmod(config.batch_size, size)
    return [size] * whole + [rest] * (rest > 0)


def predict_memory(
    config: StageConfig, shape: Shape, lengths: Sequence[Sequence[int]], parts: Sequence[int]
) -> dict[str, float]:
    """Peak bytes by phase. This process, which has read the data, serves as the estimate of the run's code and data."""
    process = psutil.Process().memory_info().rss
    weights = shape.weights * shape.itemsize
    given = [getattr(config, name, None) is not None for name in ("sft_adapter", "reward_adapter")]
    trains = len(trained_roles(config)) if isinstance(config, PPOConfig) else 1  # in one pass
    # Adam's two moments, and the snapshot of the previous step (parameters and two moments)
    trained = trains * shape.adapter * 4
    standing = process + weights + LEFT_BEHIND + (trains + sum(given)) * shape.adapter * 4 + 5 * trained
    count, longest = max(parts) * len(lengths[0]), max(map(max, lengths))
    tokens = tokens_of_largest(config, [sum(row) for row in lengths], max(parts))
    kept = kept_bytes(shape, trains * tokens, trains * count, longest)
    entering = trains * tokens * shape.width * shape.itemsize
    if config.gradient_checkpointing:
        activations = shape.adapted * entering + 2 * kept
    else:
        activations = shape.adapted * kept + 2 * entering
    update = standing + PIECES * activations + trained + LOGITS

    def sampling(config: PPOConfig | RewardConfig, together: int) -> float:
        copy = 0 if config.rollout_engine == "transformers" else shape.linear * shape.itemsize
        return standing + copy + together * longest * 2 * shape.shared * shape.layers * shape.itemsize

    found = {"loading": process + weights}
    if isinstance(config, PPOConfig):
        mean = statistics.mean(map(sum, lengths))
        trunk = config.batch_size * mean * shape.width * shape.itemsize if shape.adapted < shape.layers else 0
        found["rollout"] = sampling(config, min(config.rollout_batch_size, config.batch_size))
        found["scoring"] = standing + trunk + 2 * kept + LOGITS
        update += trunk
    found["update"] = update
    if isinstance(config, RewardConfig):
        found["calibration"] = sampling(config, 2 * max(parts))
    return found | {"saving": standing + trained}


def tokens_of_largest(config: StageConfig, lengths: Sequence[int], count: int) -> float:
    """The tokens of the micro-batch with the most of them, of ``count`` rows. All stages but PPO sort a batch by
    length, so that it has the longest rows of the batch."""
    share = 1.0 if isinstance(config, PPOConfig) else min(1.0, count / config.batch_size)
    drawn = sorted(lengths)[-math.ceil(share * len(lengths)) :]
    if len(drawn) == count:
        return sum(drawn)
    return count * statistics.mean(drawn) + 2 * statistics.pstdev(drawn) * math.sqrt(count)


def kept_bytes(shape: Shape, tokens: float, rows: int, longest: int) -> float:
    """Bytes that one adapted layer saves for the backward: the inputs of norms, attention, output projection and gated
    product. Attention over sequences that are not short is padded to the longest row."""
    per_token = 2 * shape.width + shape.query + 2 * shape.inner
    attention = (tokens if longest <= SHORT else rows * longest) * (shape.query + 2 * shape.shared)
    return (tokens * per_token + attention) * shape.itemsize


def measure_seconds(
    config: StageConfig, shape: Shape, tokenizer: Any, rows: Sequence[Any], parts: Sequence[int]
) -> dict[str, float]:
    by_length = sorted(rows, key=lambda row: sum(sequence_lengths(config, row)))
    drawn = [by_length[(2 * i + 1) * len(rows) // (2 * max(parts))] for i in range(max(parts))]  # at even distances
    time_passes: Any = time_ppo if isinstance(config, PPOConfig) else time_training
    timed = [time_passes(small_base(config, shape, tokenizer, depth), config, drawn) for depth in DEPTHS]
    few, many = DEPTHS
    share = config.batch_size / max(parts)
    below = shape.layers - shape.adapted  # layers without adapters

    def each(name: str) -> float:
        return max(0.0, timed[1][name] - timed[0][name]) / (many - few)

    def whole(name: str, layers: float) -> float:
        return max(0.0, timed[0][name] - few * each(name)) + layers * each(name)

    if not isinstance(config, PPOConfig):
        seconds = {"update": share * (whole("update", shape.adapted) + below * each("forward"))}
        return seconds | {"step": seconds["update"]}
    # the roles that share the layers below the adapters: the trained ones, the reference, the reward model
    roles = len(trained_roles(config)) + 1 + (config.reward_adapter is not None)
    seconds = {
        "rollout": whole("prompt", shape.layers) + (config.response_length - 1) * whole("token", shape.layers),
        "scoring": share * whole("scoring", shape.adapted + below / roles),
        "update": config.num_ppo_epochs * share * whole("update", shape.adapted),
    }
    if len(parts) == 1:  # the first epoch trains on the states of the scoring
        seconds["update"] -= whole("forward", shape.adapted)
    seconds["rollout"] *= math.ceil(config.batch_size / config.rollout_batch_size)
    return seconds | {"step": sum(seconds.values())}


def small_base(config: StageConfig, shape: Shape, tokenizer: Any, depth: int) -> SharedBase:
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
    if isinstance(config, PPOConfig):
        for role in (SFT, REWARD) if config.reward_adapter is not None else (SFT,):
            base.add_role(role, head=role == REWARD, trainable=False)
        base.add_role(POLICY, copy_of=SFT)
        if config.has_critic:
            base.add_role(CRITIC, head=True)
    elif isinstance(config, DPOConfig):
        base.add_role(SFT, trainable=False)
        base.add_role(POLICY, copy_of=SFT)
    else:
        base.add_role(stage_name(config), head=isinstance(config, RewardConfig))
    return base


def time_training(
    base: SharedBase, config: SFTConfig | RewardConfig | DPOConfig, rows: Sequence[Any]
) -> dict[str, float]:
    """Seconds of one micro-batch of SFT, reward training or DPO, and of one role's pass without gradient."""
    stage: Any = SimpleNamespace(base=base, config=config)

    def loss() -> torch.Tensor:
        if isinstance(config, SFTConfig):
            return sft.loss_sum(stage, rows)
        if isinstance(config, DPOConfig):
            return dpo.pair_losses(base, config, rows, SFT)[0].loss.mean()
        return pairwise_loss(*reward.score_pairs(stage, rows))

    passes = 2 if isinstance(config, DPOConfig) else 1  # policy and reference
    return {"update": fastest(lambda: loss().backward()), "forward": fastest(torch.no_grad()(loss)) / passes}


def time_ppo(base: SharedBase, config: PPOConfig, rows: Sequence[PromptRow]) -> dict[str, float]:
    """Seconds of reading the prompts of a rollout, of one more token, and of one micro-batch's scoring and update."""
    asked = [rows[i % len(rows)] for i in range(min(config.batch_size, config.rollout_batch_size))]

    def sample(tokens: int) -> Callable[[], Any]:
        return lambda: generate(base, POLICY, asked, response_length=tokens, temperature=1.0, batch_size=len(asked))

    sampled = [fastest(sample(tokens)) for tokens in (1, 1 + SAMPLED)]
    responses = [Response(row, [1] * config.response_length, False, "") for row in rows]
    stage: Any = SimpleNamespace(base=base, config=config, backward=torch.Tensor.backward)
    experience = ppo.scored(stage, responses, SFT)
    # any advantages will do; without a critic its values are 0
    set_rewards([experience], torch.ones(len(responses)), config, kl_coef=0.0, group=None)
    set_advantages([experience], config, group=None)
    tokens = experience.mask.sum()
    return {
        "prompt": sampled[0],
        "token": (sampled[1] - sampled[0]) / SAMPLED,
        "scoring": fastest(lambda: ppo.scored(stage, responses, SFT)),
        "forward": fastest(lambda: response_states(base, trained_roles(config), experience.episodes, None)),
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


def stage_name(config: StageConfig) -> str:
    return next(name for name, kind in STAGES.items() if isinstance(config, kind))


def show(config: StageConfig, memory: dict[str, float], seconds: dict[str, float]) -> None:
    room = psutil.virtual_memory().total
    rows = [
        (name, f"{size / 1e9:.2f} GB", f"{seconds[name]:.1f} s a step" if name in seconds else "")
        for name, size in memory.items()
    ]
    peak = max(memory, key=memory.__getitem__)
    fits = f"in {peak}; this machine has {room / 1e9:.1f} GB"
    rows.append(("peak", f"{memory[peak] / 1e9:.2f} GB", f"{fits}; {seconds['step']:.1f} s a step"))
    print_summary(f"plan of {stage_name(config)}: {config.model_name_or_path}", rows)
    if memory[peak] > room:
        raise UserError(f"{peak} does not fit into this machine's {room / 1e9:.1f} GB: {advice(config, peak)}")


def advice(config: StageConfig, phase: str) -> str:
    """The setting to lower first."""
    if phase == "calibration":
        return "set --rollout_engine transformers, or lower --micro_batch_size or --response_length"
    if phase == "rollout":
        return "set --rollout_engine transformers, or lower --rollout_batch_size"
    if phase in ("scoring", "update"):
        if phase == "update" and not config.gradient_checkpointing:
            return "set --gradient_checkpointing true, or lower --micro_batch_size or --micro_batch_tokens"
        return "lower --micro_batch_size or --micro_batch_tokens, then --lora_layers"
    return "set --dtype bfloat16, or take a smaller model"
