"""Our losses by name against those inside TRL's trainers: TRL's own method computes them, on log-probs or logits that a
stand-in of the trainer gives it. In float32, as TRL's clamps are; values and gradients.
"""

import inspect
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gmpo import GMPOTrainer

from rlhf_fast.ops import (
    aggregate,
    cispo_loss,
    clip_fractions,
    clipped_policy_loss,
    dft_loss,
    dpo_loss,
    gmpo_loss,
    gspo_loss,
    importance_weighted_kl,
    linear_cross_entropy,
    linear_logprobs,
    sapo_loss,
    token_kl,
    vespo_loss,
)

ROWS, LENGTH = 5, 7


def accelerator() -> SimpleNamespace:
    """Of one process."""

    def same(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return tensor

    return SimpleNamespace(
        num_processes=1, parallelism_config=None, device=torch.device("cpu"), sync_gradients=True, gather=same,
        gather_for_metrics=same, reduce=same, unwrap_model=same,
    )  # fmt: skip


class StandIn(SimpleNamespace):
    """A trainer's attributes; its class's own methods where it has none."""

    def __init__(self, kind: type, **attributes: Any) -> None:
        self.kind = kind
        model = torch.nn.Identity().eval()
        model.is_gradient_checkpointing = False
        super().__init__(
            accelerator=accelerator(), model=model,
            aux_loss_enabled=False, _total_train_tokens=0, _metrics={"train": MagicMock(), "eval": MagicMock()},
            **attributes,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        static = isinstance(inspect.getattr_static(self.kind, name), staticmethod)
        method = getattr(self.kind, name)
        return method if static else method.__get__(self)


def tokens(seed: int) -> SimpleNamespace:
    """Log-probs < 0 whose ratios lie on both sides of every clip, and one advantage a sequence."""
    generator = torch.Generator().manual_seed(seed)
    old, noise, ref = torch.randn(3, ROWS, LENGTH, generator=generator).unbind()
    mask = (torch.rand(ROWS, LENGTH, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    old = -old.abs() - 0.5
    return SimpleNamespace(
        logprobs=(old + 0.3 * noise).requires_grad_(), old=old, ref=old + 0.2 * ref, mask=mask,
        advantages=torch.randn(ROWS, generator=generator),
    )  # fmt: skip


def grpo(x: SimpleNamespace, kind: type = GRPOTrainer, **settings: Any) -> tuple[Tensor, Any]:
    """TRL's loss in a step of one micro-batch, and its metrics."""
    args = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **settings)
    trainer = StandIn(
        kind, args=args, beta=args.beta, loss_type=args.loss_type, epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high, use_vllm=False,
        vllm_importance_sampling_correction=False, importance_sampling_level=args.importance_sampling_level,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=LENGTH,
        _get_per_token_logps_and_entropies=lambda *args, **options: (x.logprobs, torch.zeros_like(x.logprobs), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": x.mask[:, :1], "prompt_mask": x.mask[:, :1], "completion_ids": x.mask, "completion_mask": x.mask,
        "advantages": x.advantages, "old_per_token_logps": x.old, "ref_per_token_logps": x.ref,
        "num_items_in_batch": x.mask.sum(),
    }  # fmt: skip
    return kind._compute_loss(trainer, None, inputs), trainer._metrics["eval"]


def close(own: Tensor, theirs: Tensor, by: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(own, theirs, rtol=rtol, atol=1e-6)
    grads = [torch.autograd.grad(each.sum(), by, retain_graph=True)[0] for each in (own, theirs)]
    torch.testing.assert_close(*grads, rtol=rtol, atol=1e-6)


CLIP = {"clip_low": 0.2, "clip_high": 0.28}
BY_NAME: dict[str, Any] = {
    "grpo": lambda *x: clipped_policy_loss(*x, **CLIP, aggregation="seq-mean-token-mean"),
    "bnpo": lambda *x: clipped_policy_loss(*x, **CLIP),
    "dapo": lambda *x: clipped_policy_loss(*x, **CLIP),
    "dr_grpo": lambda *x: clipped_policy_loss(*x, **CLIP, num_items=ROWS * LENGTH),
    "cispo": lambda *x: cispo_loss(*x, clip_low=1.0, clip_high=0.28),
    "sapo": sapo_loss,
    "vespo": vespo_loss,
    "luspo": lambda *x: gspo_loss(*x, clip_low=0.2, clip_high=0.28, aggregation="seq-mean-token-sum"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BY_NAME)
def test_loss_types(seed: int, name: str) -> None:
    x = tokens(seed)
    settings: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 1.28 if name == "cispo" else 0.28}
    if name == "luspo":
        settings["importance_sampling_level"] = "sequence"
    theirs, _ = grpo(x, loss_type=name, beta=0.0, **settings)
    own = BY_NAME[name](x.logprobs, x.old, x.advantages[:, None].expand_as(x.old), x.mask)
    close(own.loss, theirs, x.logprobs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("corrected", [False, True])
def test_the_kl_term_and_clip_fractions(seed: int, corrected: bool) -> None:
    x = tokens(seed)
    theirs, metrics = grpo(
        x, loss_type="bnpo", beta=0.3, use_bias_correction_kl=corrected, epsilon=0.2, epsilon_high=0.28, delta=1.4
    )
    args = (x.logprobs, x.old, x.advantages[:, None].expand_as(x.old), x.mask)
    kl = token_kl(x.logprobs, x.ref, x.mask, estimator="k3")
    if corrected:
        kl = importance_weighted_kl(x.logprobs, x.old, x.ref, x.mask)
    close(clipped_policy_loss(*args, **CLIP, dual_clip=1.4).loss + 0.3 * aggregate(kl, x.mask), theirs, x.logprobs)
    logged = {
        call.args[0]: value for call, value in zip(metrics.__getitem__.call_args_list, appended(metrics), strict=True)
    }
    found = clip_fractions(*args, **CLIP)
    assert logged["clip_ratio/low_mean"] == pytest.approx(found.low.item())
    assert logged["clip_ratio/high_mean"] == pytest.approx(found.high.item())
    assert found.low + found.high > 0


def appended(metrics: MagicMock) -> list[Any]:
    return [call.args[0] for call in metrics.__getitem__.return_value.append.call_args_list]


@pytest.mark.parametrize("seed", range(3))
def test_gmpo(seed: int) -> None:
    x = tokens(seed)
    theirs, _ = grpo(x, GMPOTrainer, beta=0.0, epsilon=0.1, epsilon_high=0.2)
    own = gmpo_loss(x.logprobs, x.old, x.advantages[:, None].expand_as(x.old), x.mask, clip_low=0.1, clip_high=0.2)
    close(own.loss, theirs, x.logprobs)
    assert 0 < own.clip_fraction < 1


# ---- preferences ----------------------------------------------------------------------------------------------------


DIVERGENCES = [
    {},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]


class Output(dict[str, Tensor]):
    """Of a model: by name as an attribute too."""

    __getattr__ = dict.__getitem__


def fused(log_probs: Tensor, **more: Tensor) -> Any:
    """What TRL's fused head returns; only the log-probs, 0 where there is no label, enter a loss."""
    rest = dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), torch.zeros_like(log_probs))
    mask = log_probs != 0
    return lambda **inputs: Output(log_probs=log_probs, label_mask=mask, is_top1=mask, **rest, **more)


@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust", "exo_pair", "discopop"])
def test_dpo(options: dict[str, Any], loss_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(6, LENGTH, dtype=torch.long)
    mask[:, :2], mask[2, 5:] = 0, 0
    noise, ref = torch.randn(2, 6, LENGTH - 1, generator=generator)
    ref = -ref.abs() * mask[:, 1:]
    log_probs = (ref - 0.3 * noise.abs() * mask[:, 1:]).requires_grad_()
    smoothing = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    args = DPOConfig(
        output_dir="unused", use_cpu=True, bf16=False, report_to="none", beta=0.7, loss_type=[loss_type],
        label_smoothing=smoothing, **options,
    )  # fmt: skip
    trainer = StandIn(
        DPOTrainer, args=args, beta=args.beta, loss_types=[loss_type], loss_weights=[1.0], label_smoothing=smoothing,
        ld_alpha=None, precompute_ref_logps=False, use_weighting=False, f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef, ref_model=fused(ref),
    )  # fmt: skip
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    theirs = DPOTrainer._compute_loss(trainer, fused(log_probs), inputs, False)
    sums = (*log_probs.sum(-1).chunk(2), *ref.sum(-1).chunk(2))
    own = dpo_loss(*sums, beta=0.7, loss_type=loss_type, label_smoothing=smoothing, **options)
    close(own.loss, theirs, log_probs)


# ---- supervised fine-tuning -----------------------------------------------------------------------------------------


def test_dft_and_label_smoothing() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, LENGTH, 5, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, generator=generator)
    labels = torch.randint(11, (2, LENGTH), generator=generator)
    labels[0, :3] = -100
    targets = labels[:, 1:]
    log_probs = linear_logprobs(hidden[:, :-1], weight, targets)
    for kind in ("dft", "nll"):
        args = SFTConfig(
            output_dir="unused", use_cpu=True, bf16=False, report_to="none", loss_type=kind, label_smoothing_factor=0.1
        )
        trainer = StandIn(
            SFTTrainer, args=args, label_smoother=LabelSmoother(epsilon=0.1), compute_loss_func=None,
        )  # fmt: skip
        model = fused(log_probs, logits=hidden @ weight.T)
        inputs = {"input_ids": labels, "labels": labels, "attention_mask": torch.ones_like(labels)}
        theirs = SFTTrainer.compute_loss(trainer, model, inputs)
        if kind == "dft":
            own = dft_loss(log_probs, targets != -100)
        else:
            own = linear_cross_entropy(hidden[:, :-1], weight, targets, label_smoothing=0.1)
        close(own, theirs, hidden)
