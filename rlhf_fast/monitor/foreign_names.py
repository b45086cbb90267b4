"""What TRL, verl and OpenRLHF call the metrics that we log: their name, ours, and what differs.

A name is in a table only where the meaning is the same. The table in docs/monitor.md is made by

    python -m rlhf_fast.monitor.foreign_names
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import rlhf_fast.metrics as metrics  # "from rlhf_fast import metrics" would import torch
from rlhf_fast.metrics import Metric
from rlhf_fast.monitor.numbers import number

OURS = "rlhf-fast"
LENGTH = metrics.LENGTH_MEAN.name


@dataclass(frozen=True)
class Counterpart:
    """Our metric for one of theirs.

    Attributes:
        name: our name.
        note: what differs all the same.
        per_token: theirs is a mean over tokens, ours a sum over the response: it is multiplied by the mean length of
            the responses of the same step, and keeps its own name where that is missing.
    """

    name: str
    note: str = ""
    per_token: bool = False


def _same(metric: Metric, note: str = "") -> Counterpart:
    return Counterpart(metric.name, note)


def _kl(note: str) -> Counterpart:
    return Counterpart(metrics.KL.name, f"nats per token, times the mean length; {note}", per_token=True)


TRL = {
    "learning_rate": _same(metrics.LEARNING_RATE),
    "eval_reward": _same(metrics.EVAL_SCORES),
}
# of GRPO and RLOO; SFT and DPO call other things "entropy" and KTO calls something else "kl"
TRL_ONLINE = TRL | {
    "reward": _same(metrics.SCORES),
    "reward_std": Counterpart("objective/scores_std"),
    "kl": _kl("estimator k3"),
    "entropy": _same(metrics.TOKEN_ENTROPY),
    "completions/mean_length": _same(metrics.LENGTH_MEAN),
    "completion_length": _same(metrics.LENGTH_MEAN, "earlier versions"),
    "completions/clipped_ratio": _same(metrics.TRUNCATED),
    "clip_ratio/region_mean": _same(metrics.CLIP_FRACTION),
    "clip_ratio": _same(metrics.CLIP_FRACTION, "earlier versions, with use_liger_kernel"),
    "policy_loss": _same(metrics.POLICY_LOSS),
    "sampling/sampling_logp_difference/mean": _same(metrics.LOGPROB_GAP),
    "sampling/sampling_logp_difference/max": _same(metrics.LOGPROB_GAP_MAX),
    "step_time": _same(metrics.SECONDS_STEP),
}
VERL = {
    "critic/score/mean": _same(metrics.SCORES),
    "critic/rewards/mean": _same(metrics.RLHF_REWARD),
    "actor/reward_kl_penalty": _kl("a mean over responses of their means"),
    "critic/kl": _kl("a mean over responses of their means; earlier versions"),
    "actor/kl_loss": _kl("estimator kl_loss_type, during the updates; where no penalty is in the reward"),
    "actor/reward_kl_penalty_coeff": _same(metrics.KL_COEF),
    "critic/kl_coeff": _same(metrics.KL_COEF, "earlier versions"),
    "actor/kl_coef": _same(metrics.KL_COEF, "coefficient of the KL loss"),
    "actor/entropy": _same(metrics.TOKEN_ENTROPY),
    "actor/entropy_loss": _same(metrics.TOKEN_ENTROPY, "where there is no actor/entropy"),
    "actor/ppo_kl": _same(metrics.APPROX_KL, "estimator k1, which may be negative"),
    "actor/pg_clipfrac": _same(metrics.CLIP_FRACTION),
    "actor/pg_loss": _same(metrics.POLICY_LOSS),
    "actor/grad_norm": _same(metrics.GRAD_NORM, "the actor's alone"),
    "actor/lr": _same(metrics.LEARNING_RATE),
    "critic/vf_loss": _same(metrics.VALUE_LOSS),
    "critic/vf_clipfrac": _same(metrics.VALUE_CLIP_FRACTION),
    "critic/vf_explained_var": _same(metrics.EXPLAINED_VARIANCE),
    "response_length/mean": _same(metrics.LENGTH_MEAN),
    "response_length/clip_ratio": _same(metrics.TRUNCATED, "responses of the longest length that is allowed"),
    "timing_s/gen": _same(metrics.SECONDS_ROLLOUT),
    "perf/time_per_step": _same(metrics.SECONDS_STEP),
    "perf/max_memory_allocated_gb": _same(metrics.PEAK_MEMORY),
}
OPENRLHF = {
    "reward": _same(metrics.SCORES),
    "rollout/reward_std": Counterpart("objective/scores_std"),
    "return": _same(metrics.RLHF_REWARD),
    "kl": _kl("a mean over responses of their means; with the KL as a loss, that of the updates"),
    "entropy_loss": _same(metrics.TOKEN_ENTROPY),
    "ppo_kl": _same(metrics.APPROX_KL, "estimator k1, which may be negative"),
    "ppo_clip_ratio": _same(metrics.CLIP_FRACTION),
    "policy_loss": _same(metrics.POLICY_LOSS),
    "critic_loss": _same(metrics.VALUE_LOSS),
    "response_length": _same(metrics.LENGTH_MEAN),
    "truncated": _same(metrics.TRUNCATED),
    "actor_lr": _same(metrics.LEARNING_RATE),
    "actor_grad_norm": _same(metrics.GRAD_NORM, "the actor's alone"),
    "timing/generation": _same(metrics.SECONDS_ROLLOUT),
    "timing/ppo_train": _same(metrics.SECONDS_UPDATE),
    "timing/step_total": _same(metrics.SECONDS_STEP),
}
TABLES = {"trl": TRL_ONLINE, "verl": VERL, "openrlhf": OPENRLHF}
# Names that one trainer alone logs. Those of TRL's PPO are ours, beside "epoch" and "eps".
SIGNS = {
    "verl": ("actor/", "critic/score/", "critic/rewards/", "response_length/", "val-core/", "val-aux/"),
    "openrlhf": ("actor_lr", "critic_lr", "response_length", "loss_mean", "acc_mean", "gpt_loss", "reject_reward"),
    "trl": ("learning_rate", "epoch", "completions/", "train_runtime", "eval_runtime"),
}


def kind_of(names: Iterable[str]) -> str:
    """The trainer whose metrics have these names: ``verl``, ``openrlhf``, ``trl``, or ``rlhf-fast`` for no other."""
    found = list(names)
    for kind, signs in SIGNS.items():
        if any(name == sign or (sign.endswith("/") and name.startswith(sign)) for name in found for sign in signs):
            return kind
    return OURS


def renamed(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of one step under our names; a name without counterpart stays as it is.

    Args:
        kind: one of :func:`kind_of`.
        values: their names and values. Prefixes of wandb and TensorBoard (``train/``; for TRL also ``eval/``, which
            stands for ``eval_``) are taken off.
    """
    found = {_plain(kind, name): value for name, value in values.items()}
    table = TABLES.get(kind, {})
    lengths = [found[theirs] for theirs, ours in table.items() if ours.name == LENGTH and theirs in found]
    if kind == "trl" and not lengths:
        table = TRL
    for theirs, ours in table.items():
        if theirs not in found or ours.name in found or (ours.per_token and not lengths):
            continue
        found[ours.name] = found.pop(theirs) * (lengths[0] if ours.per_token else 1)
    return found


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are finite numbers; the others are gaps."""
    numbers = {name: number(value) for name, value in values.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _plain(kind: str, name: str) -> str:
    name = name.removeprefix("train/")
    return f"eval_{name.removeprefix('eval/')}" if kind == "trl" and name.startswith("eval/") else name


def markdown() -> str:
    """The tables of docs/monitor.md."""
    lines = ["| trainer | its name | ours | what differs |", "| --- | --- | --- | --- |"]
    for title, table in (("TRL", TRL_ONLINE), ("verl", VERL), ("OpenRLHF", OPENRLHF)):
        lines += [f"| {title} | `{theirs}` | `{ours.name}` | {ours.note} |" for theirs, ours in table.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
