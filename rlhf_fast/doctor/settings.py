"""Checks of a stage's settings, which need neither data nor model."""

import math
from types import SimpleNamespace
from typing import Any

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, StageConfig
from rlhf_fast.doctor.findings import Check, Finding, note, ok, warning
from rlhf_fast.recipes.ppo import check_mini_batches
from rlhf_fast.recipes.stage import MICRO_BATCH_SIZE

# What is usual for LoRA adapters: peak learning rates, and examples a step.
LEARNING_RATES = {SFTConfig: (1e-4, 3e-4), RewardConfig: (5e-5, 3e-4), DPOConfig: (5e-6, 1e-4), PPOConfig: (1e-5, 3e-4)}
BATCH_SIZES = {SFTConfig: (16, 128), RewardConfig: (16, 512), DPOConfig: (16, 512), PPOConfig: (32, 2048)}
FAR = 5  # times outside of the usual range, from which a note becomes a warning
TEMPERATURES = (0.3, 1.5)
MOST_UPDATES, FEWEST_EPISODES = 16, 8


def learning_rate(config: StageConfig) -> Finding:
    why = "Adapters at too high a rate forget the base; at too low a rate they learn nothing in the time given."
    return usual(config, "learning_rate", LEARNING_RATES[type(config)], why)


def batch_size(config: StageConfig) -> Finding:
    why = "Small batches make noisy steps; large ones make few of them."
    return usual(config, "batch_size", BATCH_SIZES[type(config)], why)


def usual(config: StageConfig, name: str, bounds: tuple[float, float], why: str) -> Finding:
    value, (low, high) = getattr(config, name), bounds
    found = f"--{name} {value:g}; usual with adapters is {low:g} to {high:g}"
    if low <= value <= high:
        return ok(found)
    far = not low / FAR <= value <= high * FAR
    change = "Take a usual value, unless shorter runs have shown that this one works on this base."
    return warning(found, why, change) if far else note(found, why, change)


def temperature(config: StageConfig) -> Finding | None:
    if not isinstance(config, PPOConfig | RewardConfig):
        return None
    low, high = TEMPERATURES
    found = (
        f"--temperature {config.temperature:g} divides the logits of sampling, scoring and training alike; top-k is "
        "off and top-p is 1"
    )
    if low <= config.temperature <= high:
        return ok(found)
    why = "Near 0 all samples of a prompt are alike, and there is nothing to compare; far above 1 they are noise."
    return warning(found, why, "Take 0.7 to 1.")


def missing_eos(config: StageConfig) -> Finding | None:
    if not isinstance(config, PPOConfig):
        return None
    why = "Without a loss for it the policy learns that an answer need not end."
    change = "Leave --missing_eos_penalty at 1, or set --missing_eos_score -1; leave --ignore_eos unset."
    if config.ignore_eos:
        return warning("--ignore_eos true: no response ends before response_length", why, change)
    if config.missing_eos_score is not None:
        found = f"a response without a stop token scores {config.missing_eos_score:g}"
        bad = config.missing_eos_score >= 0
    else:
        found = f"{config.missing_eos_penalty:g} is subtracted from the score of a response without a stop token"
        bad = config.missing_eos_penalty == 0
    if bad:
        return warning(f"{found}; the mean score of a calibrated reward model is 0", why, change)
    return ok(found)


def kl_penalty(config: StageConfig) -> Finding | None:
    if not isinstance(config, PPOConfig):
        return None
    target = "fixed" if config.kl_target is None else f"steered to a KL of {config.kl_target:g} nats a response"
    found = f"--kl_coef {config.kl_coef:g}, {target}"
    if config.kl_coef == 0:
        why = "Without a penalty the policy leaves the SFT model until it has found what fools the reward."
        stays = "" if config.kl_target is None else "; the controller multiplies it, so it stays 0"
        return warning(found + stays, why, "Set --kl_coef 0.05 and --kl_target 6.")
    episodes = (config.max_steps or 0) * config.batch_size
    if config.kl_target is not None and 0 < 0.2 * episodes < 0.2 * config.kl_horizon:
        grows = math.exp(0.2 * episodes / config.kl_horizon)
        why = "The controller cannot reach the target: beta changes by a fifth within kl_horizon episodes."
        return note(
            f"{found}; in the run's {episodes} episodes --kl_horizon {config.kl_horizon:g} lets beta grow {grows:.2f} "
            "times at most",
            why,
            "Lower --kl_horizon to a tenth of the run's episodes, or choose --kl_coef yourself (--kl_target null).",
        )
    return ok(found)


def mini_batches(config: StageConfig) -> Finding | None:
    if not isinstance(config, PPOConfig):
        return None
    if config.micro_batch_tokens is None:
        parts = math.ceil(config.batch_size / (config.micro_batch_size or MICRO_BATCH_SIZE))
        stage: Any = SimpleNamespace(config=config, accelerator=SimpleNamespace(num_processes=1))
        check_mini_batches(stage, parts)
    updates = config.num_ppo_epochs * config.num_mini_batches
    each = config.batch_size / config.num_mini_batches
    found = (
        f"{updates} updates a rollout: --num_ppo_epochs {config.num_ppo_epochs} x --num_mini_batches "
        f"{config.num_mini_batches} of {each:g} episodes"
    )
    change = "Lower --num_mini_batches or --num_ppo_epochs, or raise --batch_size."
    if updates > MOST_UPDATES:
        why = "The samples grow stale: the ratio is clipped for most tokens, and the KL jumps."
        return warning(found, why, change)
    if each < FEWEST_EPISODES:
        return note(found, "The gradient of few episodes is mostly noise.", change)
    return ok(found)


CHECKS: list[Check] = [learning_rate, batch_size, temperature, missing_eos, kl_penalty, mini_batches]
