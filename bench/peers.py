"""The other libraries' functions, found when a contestant first runs; Missing says how to install one."""

import functools
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from rlhf_fast.bench.workload import Missing

PACKAGES = ("trl", "liger-kernel", "flash-attn", "quack-kernels", "cut-cross-entropy")


def versions() -> dict[str, str | None]:
    return {package: installed_version(package) for package in PACKAGES}


def selective_log_softmax() -> Callable[..., Tensor]:
    return _load("trl", "trl.trainer.utils", "selective_log_softmax")


@functools.cache
def liger_grpo(kl_coef: float) -> Callable[..., Any]:
    """All sequences in one chunk, its fastest setting. Not compiled: its loss is only a few numbers per token."""
    loss = _load("liger-kernel", "liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    return loss(beta=kl_coef, use_ref_model=kl_coef > 0, compiled=False, chunk_size=1 << 30, loss_type="bnpo")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """torch's chunked function. Its default chunks take many times as long as these."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise Missing(f"not in torch {torch.__version__}; torch 2.13 has it")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    return torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options)


def liger_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each token. It writes the gradient over the logits, already in the forward pass."""
    function = _on_gpu("liger-kernel", "liger_kernel.transformers.functional", "liger_cross_entropy", logits)
    return function(logits, targets, reduction="none")


def flash_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    function = _on_gpu("flash-attn", "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", logits)
    return function(logits, targets, inplace_backward=True)[0]


def quack_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    function = _on_gpu("quack-kernels", "quack.cross_entropy", "cross_entropy", logits)
    return function(logits, targets, reduction="none", inplace_backward=True)


def liger_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean loss."""
    name = "liger_fused_linear_cross_entropy"
    return _on_gpu("liger-kernel", "liger_kernel.transformers.functional", name, hidden)(hidden, weight, targets)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean loss."""
    function = _on_gpu("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", hidden)
    return function(hidden, weight, targets)


def peft_linear(hidden: Tensor, weights: list[Tensor], loras: list[tuple[Tensor, Tensor, float]]) -> list[Tensor]:
    """Each layer by PEFT's own forward; its modules hold the tensors themselves."""
    return [
        _peft_layer(weight, down, up, scale)(hidden) for weight, (down, up, scale) in zip(weights, loras, strict=True)
    ]


@functools.lru_cache(maxsize=16)
def _peft_layer(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> torch.nn.Module:
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    config, rank = _load("peft", "peft", "LoraConfig"), down.shape[0]
    layer: Any = _load("peft", "peft.tuners.lora.layer", "Linear")(
        base, "default", config=config(r=rank), r=rank, lora_alpha=scale * rank
    )
    for module, tensor in ((layer.lora_A, down), (layer.lora_B, up)):
        del module["default"].weight
        module["default"].weight = tensor  # not a Parameter, so that autograd.grad finds the leaf itself
    return layer


def _on_gpu(package: str, module: str, name: str, like: Tensor) -> Any:
    if not like.is_cuda:
        raise Missing(f"{package}'s {name} runs on a GPU alone")
    return _load(package, module, name)


@functools.cache
def _load(package: str, module: str, name: str) -> Any:
    installed = installed_version(package)
    if installed is None:
        raise Missing(f"not installed: pip install {package}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Missing(f"{package} {installed} gives no {name} ({error}): pip install -U {package}") from error


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
