"""The table of operations: for each op, how to call it on random (B, T) tokens, and the plain formula.

``naive`` is the textbook formula in the dtype of its inputs: in float64 it is the truth, in a half
dtype the code that ours must at least match. It does not handle NaN under the mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from devices import seeded
from torch import Tensor

from rlhf_fast import ops

V, H, RANK = 7, 4, 2
WIDTH, HEADS, TURNED = 18, 2, 8  # of the layers
Tensors = dict[str, Tensor]
Call = Callable[[Tensors, Tensor, Tensor | None], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Op:
    name: str
    run: Call
    naive: Call
    data: dict[str, tuple[int, ...]]  # per-token inputs, with their trailing shape
    grads: tuple[str, ...]  # the inputs that receive a gradient
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)  # inputs without a token dimension
    has_targets: bool = False
    per_token: bool = True  # the outputs are (B, T); else 0-dim
    constants: tuple[str, ...] = ()  # of ``grads``, those whose gradient is partial by design: no gradcheck
    row_wise: bool = False  # a row's result depends on that row alone, to the bit

    @property
    def has_vocabulary(self) -> bool:
        return "logits" in self.data or "bias" in self.shared


@dataclass
class Case:
    x: Tensors
    targets: Tensor
    mask: Tensor


def make(
    op: Op, shape: tuple[int, int] = (3, 5), dtype: torch.dtype = torch.float32, seed: int = 0, vocab: int = V
) -> Case:
    """Random inputs; the mask has gaps, and at least one live token if there are tokens.

    Not float64 unless asked for, which runs the torch reference on every backend.
    """
    generator = seeded(seed)

    def normal(leading: tuple[int, ...], trailing: tuple[int, ...]) -> Tensor:
        size = (*leading, *(vocab if length == V else length for length in trailing))
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x = {name: normal(shape, trailing) for name, trailing in op.data.items()}
    x |= {name: normal((), size) for name, size in op.shared.items()}
    targets = torch.randint(vocab, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[:1, :1] = True
    return Case(x, targets, mask)


def outputs_and_grads(call: Call, op: Op, case: Case, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensors]:
    """Runs ``call`` and the backward of a fixed weighting of its outputs."""
    x = {name: tensor.detach().requires_grad_(name in op.grads) for name, tensor in case.x.items()}
    outputs = call(x, case.targets, mask)
    if not op.grads:
        return outputs, {}
    generator = seeded(1)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.requires_grad:
            weights = torch.rand(output.shape, generator=generator, dtype=torch.float64)
            total = total + (output.double() * weights).sum()
    grads = torch.autograd.grad(total, [x[name] for name in op.grads], materialize_grads=True)
    return tuple(output.detach() for output in outputs), dict(zip(op.grads, grads, strict=True))


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.mean() if mask is None else (values * mask).sum() / mask.sum()


def _pick(log_p: Tensor, targets: Tensor) -> Tensor:
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _lora(x: Tensors) -> tuple[Tensor, Tensor, float]:
    return x["A"], x["B"], 0.5


def _logits(x: Tensors, name: str = "hidden") -> Tensor:
    logits = x[name] @ x["weight"].T
    if "A" in x:
        logits = logits + 0.5 * (x[name] @ x["A"].T) @ x["B"].T
    return logits + x["bias"]


def _naive_logprobs(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    logits = x["logits"] if "logits" in x else _logits(x)
    log_p = (logits / 0.8).log_softmax(-1)
    return _masked(_pick(log_p, targets), mask), _masked(_entropy(log_p), mask)


def _naive_kl(log_p: Tensor, log_r: Tensor, mask: Tensor | None) -> Tensor:
    return _masked((log_p.exp() * (log_p - log_r)).sum(-1), mask)


def _naive_policy_ref(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    log_p, log_r = _logits(x).log_softmax(-1), _logits(x, "ref_hidden").detach().log_softmax(-1)
    logprobs, ref_logprobs = _masked(_pick(log_p, targets), mask), _masked(_pick(log_r, targets), mask)
    return logprobs, ref_logprobs, _masked(_entropy(log_p), mask), _naive_kl(log_p, log_r, mask)


def _naive_ppo(logprobs: Tensor, x: Tensors, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    ratio = (logprobs - x["old_logprobs"]).exp()
    loss = torch.maximum(-x["advantages"] * ratio, -x["advantages"] * ratio.clamp(0.8, 1.2))
    approx_kl = _mean(0.5 * (logprobs - x["old_logprobs"]) ** 2, mask)
    return _mean(loss, mask), approx_kl.detach(), _mean(ratio, mask).detach()


def _k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return (ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs)


def _naive_policy_loss(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    log_p = _logits(x).log_softmax(-1)
    policy, _, ratio_mean = _naive_ppo(_pick(log_p, targets), x, mask)
    kl = _mean(_k3(_pick(log_p, targets), x["ref_logprobs"]), mask)
    return policy + 0.3 * kl - 0.1 * _mean(_entropy(log_p), mask), kl.detach(), ratio_mean


def _run_policy_loss(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    result = ops.linear_policy_loss(
        x["hidden"], x["weight"], targets, x["old_logprobs"], x["advantages"], mask, ref_logprobs=x["ref_logprobs"],
        kl_coef=0.3, entropy_coef=0.1, bias=x["bias"], lora=_lora(x),
    )  # fmt: skip
    return result.loss, result.kl, result.ratio_mean


def _naive_policy_loss_exact(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    reference = {name: tensor for name, tensor in x.items() if name not in ("A", "B")}
    log_p, log_r = _logits(x).log_softmax(-1), _logits(reference, "ref_hidden").detach().log_softmax(-1)
    policy, _, ratio_mean = _naive_ppo(_pick(log_p, targets), x, mask)
    kl = _mean(_naive_kl(log_p, log_r, None), mask)
    return policy + 0.3 * kl - 0.1 * _mean(_entropy(log_p), mask), kl.detach(), ratio_mean


def _run_policy_loss_exact(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    result = ops.linear_policy_loss(
        x["hidden"], x["weight"], targets, x["old_logprobs"], x["advantages"], mask, ref_hidden=x["ref_hidden"],
        kl_coef=0.3, kl_estimator="exact", entropy_coef=0.1, bias=x["bias"], lora=_lora(x),
    )  # fmt: skip
    return result.loss, result.kl, result.ratio_mean


def _run_ppo(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    result = ops.clipped_policy_loss(x["logprobs"], x["old_logprobs"], x["advantages"], mask)
    return result.loss, result.approx_kl, result.ratio_mean


def _naive_value_loss(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    near = x["old_values"] + (x["values"] - x["old_values"]).clamp(-0.2, 0.2)
    return (_mean(0.5 * torch.maximum((x["values"] - x["returns"]) ** 2, (near - x["returns"]) ** 2), mask),)


def _naive_joint(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    policy, _, ratio_mean = _naive_ppo(x["logprobs"], x, mask)
    (value,) = _naive_value_loss(x, targets, mask)
    kl, entropy = _mean(_k3(x["logprobs"], x["ref_logprobs"]), mask), _mean(x["entropy"], mask)
    parts = (policy, value, kl, entropy, ratio_mean)
    return policy + 0.5 * value + 0.3 * kl - 0.1 * entropy, *(part.detach() for part in parts)


def _run_joint(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    result = ops.ppo_loss(**x, mask=mask, value_coef=0.5, kl_coef=0.3, entropy_coef=0.1)
    return result.loss, result.policy_loss, result.value_loss, result.kl, result.entropy, result.ratio_mean


def _naive_gae(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    advantages = torch.zeros_like(x["values"])
    for b in range(advantages.shape[0]):
        value = advantage = advantages.new_zeros(())
        for t in reversed(range(advantages.shape[1])):
            if mask is None or mask[b, t]:
                advantage = x["rewards"][b, t] + 0.9 * value - x["values"][b, t] + 0.9 * 0.95 * advantage
                value = x["values"][b, t]
                advantages[b, t] = advantage
    return advantages, _masked(advantages + x["values"], mask)


def _naive_whiten(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    live = x["x"].numel() if mask is None else mask.sum()
    mean = _masked(x["x"], mask).sum() / live
    variance = _masked((x["x"] - mean) ** 2, mask).sum() / (live - 1)
    return (_masked((x["x"] - mean) / (variance + 1e-8).sqrt(), mask),)


def _naive_aggregate(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Over the sequences with a token that counts, the mean of their token means."""
    if mask is None:
        return (x["values"].mean(),)
    counts = mask.sum(-1)
    return (((x["values"] * mask).sum(-1) / counts.clamp(min=1)).sum() / (counts > 0).sum(),)


def _naive_gspo(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    log_ratio = x["logprobs"] - x["old_logprobs"]
    live = torch.ones_like(log_ratio) if mask is None else mask.to(log_ratio.dtype)
    ratio = ((log_ratio * live).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)).exp()
    losses = torch.maximum(-x["advantages"] * ratio, -x["advantages"] * ratio.clamp(0.8, 1.2))
    return _naive_aggregate({"values": losses}, targets, mask)


def _naive_cispo(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    weights = (x["logprobs"] - x["old_logprobs"]).exp().clamp(0.5, 2.0).detach()
    return (_mean(-weights * x["advantages"] * x["logprobs"], mask),)


def _naive_sapo(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    ratio = (x["logprobs"] - x["old_logprobs"]).exp()
    temperature = torch.where(x["advantages"] > 0, 1.0, 1.05).to(ratio.dtype)
    gate = 4 / temperature / (1 + (-temperature * (ratio - 1)).exp())
    return _naive_aggregate({"values": -x["advantages"] * gate}, targets, mask)


def _naive_vespo(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    log_w = _masked(x["logprobs"] - x["old_logprobs"], mask).sum(-1, keepdim=True).detach()
    k, decay = (torch.where(x["advantages"] >= 0, *pair).to(log_w.dtype) for pair in ((2.0, 3.0), (3.0, 2.0)))
    weights = (k * log_w + decay * (1 - log_w.exp())).exp()
    return (_mean(-weights * x["advantages"] * x["logprobs"], mask),)


def _naive_gmpo(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    log_ratio = x["logprobs"] - x["old_logprobs"]
    live = torch.ones_like(log_ratio) if mask is None else mask.to(log_ratio.dtype)
    near = log_ratio.clamp(-0.4, 0.4)
    log_ratio = torch.where(x["advantages"] > 0, torch.minimum(log_ratio, near), torch.maximum(log_ratio, near))
    count = live.sum(-1).clamp(min=1)
    losses = -(x["advantages"] * live).sum(-1) / count * ((log_ratio * live).sum(-1) / count).exp()
    return (losses.sum() / live.any(-1).sum(),)


def _naive_dppo(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    rise = x["logprobs"].detach().exp() - x["old_logprobs"].exp()
    inside = torch.where(x["advantages"] > 0, rise <= 0.2, rise >= -0.1)
    weights = (x["logprobs"] - x["old_logprobs"]).exp().clamp(max=3.0).detach()
    return (_mean(-weights * x["advantages"] * x["logprobs"] * inside, mask),)


def _naive_weights(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    return (_masked((x["logprobs"] - x["rollout_logprobs"]).exp().clamp(0.5, 2.0), mask),)


HEAD = {"weight": (V, H), "bias": (V,)}
LORA = {"A": (RANK, H), "B": (V, RANK)}

OPS = [
    Op(
        "masked_logprobs",
        lambda x, targets, mask: ops.masked_logprobs(x["logits"], targets, mask, temperature=0.8, return_entropy=True),
        _naive_logprobs,
        {"logits": (V,)},
        ("logits",),
        has_targets=True,
        row_wise=True,
    ),
    Op(
        "exact_kl",
        lambda x, targets, mask: (ops.exact_kl(x["logits"], x["ref_logits"], mask),),
        lambda x, targets, mask: (_naive_kl(x["logits"].log_softmax(-1), x["ref_logits"].log_softmax(-1), mask),),
        {"logits": (V,), "ref_logits": (V,)},
        ("logits",),
        row_wise=True,
    ),
    Op(
        "linear_logprobs",
        lambda x, targets, mask: ops.linear_logprobs(
            x["hidden"], x["weight"], targets, mask, bias=x["bias"], lora=_lora(x), temperature=0.8, return_entropy=True
        ),
        _naive_logprobs,
        {"hidden": (H,)},
        ("hidden", "weight", "bias", "A", "B"),
        HEAD | LORA,
        has_targets=True,
    ),
    Op(
        "linear_cross_entropy",
        lambda x, targets, mask: (
            ops.linear_cross_entropy(
                x["hidden"],
                x["weight"],
                targets if mask is None else targets.long().masked_fill(mask == 0, -100),
                bias=x["bias"],
                lora=_lora(x),
            ),
        ),  # fmt: skip
        lambda x, targets, mask: (_mean(-_pick(_logits(x).log_softmax(-1), targets), mask),),
        {"hidden": (H,)},
        ("hidden", "weight", "bias", "A", "B"),
        HEAD | LORA,
        has_targets=True,
        per_token=False,
    ),
    Op(
        "linear_policy_ref",
        lambda x, targets, mask: ops.linear_policy_ref(
            x["hidden"], x["ref_hidden"], x["weight"], targets, mask, bias=x["bias"]
        ),
        _naive_policy_ref,
        {"hidden": (H,), "ref_hidden": (H,)},
        ("hidden", "weight", "bias"),
        HEAD,
        has_targets=True,
        constants=("weight", "bias"),  # the reference reads them too, and is a constant
    ),
    Op(
        "linear_policy_loss",
        _run_policy_loss,
        _naive_policy_loss,
        {"hidden": (H,), "old_logprobs": (), "advantages": (), "ref_logprobs": ()},
        ("hidden", "weight", "bias", "A", "B"),
        HEAD | LORA,
        has_targets=True,
        per_token=False,
    ),
    Op(
        "linear_policy_loss",
        _run_policy_loss_exact,
        _naive_policy_loss_exact,
        {"hidden": (H,), "ref_hidden": (H,), "old_logprobs": (), "advantages": ()},
        ("hidden", "weight", "bias", "A", "B"),
        HEAD | LORA,
        has_targets=True,
        per_token=False,
        constants=("weight", "bias"),
    ),
    Op(
        "token_kl",
        lambda x, targets, mask: (ops.token_kl(x["logprobs"], x["ref_logprobs"], mask, estimator="k3"),),
        lambda x, targets, mask: (_masked(_k3(x["logprobs"], x["ref_logprobs"]), mask),),
        {"logprobs": (), "ref_logprobs": ()},
        ("logprobs",),
        row_wise=True,
    ),
    Op(
        "gae",
        lambda x, targets, mask: ops.gae(x["rewards"], x["values"], mask, gamma=0.9, lam=0.95),
        _naive_gae,
        {"rewards": (), "values": ()},
        (),
    ),
    Op(
        "masked_whiten",
        lambda x, targets, mask: (ops.masked_whiten(x["x"], mask),),
        _naive_whiten,
        {"x": ()},
        ("x",),
    ),
    Op(
        "aggregate",
        lambda x, targets, mask: (ops.aggregate(x["values"], mask, aggregation="seq-mean-token-mean"),),
        _naive_aggregate,
        {"values": ()},
        ("values",),
        per_token=False,
    ),
    Op(
        "clipped_policy_loss",
        _run_ppo,
        lambda x, targets, mask: _naive_ppo(x["logprobs"], x, mask),
        {"logprobs": (), "old_logprobs": (), "advantages": ()},
        ("logprobs",),
        per_token=False,
    ),
    Op(
        "gspo_loss",
        lambda x, targets, mask: (ops.gspo_loss(**x, mask=mask, clip_low=0.2, clip_high=0.2).loss,),
        _naive_gspo,
        {"logprobs": (), "old_logprobs": (), "advantages": ()},
        ("logprobs",),
        per_token=False,
    ),
    Op(
        "cispo_loss",
        lambda x, targets, mask: (ops.cispo_loss(**x, mask=mask, clip_low=0.5, clip_high=1.0).loss,),
        _naive_cispo,
        {"logprobs": (), "old_logprobs": (), "advantages": ()},
        ("logprobs",),
        per_token=False,
    ),
    Op(
        "sapo_loss",
        lambda x, targets, mask: (ops.sapo_loss(**x, mask=mask).loss,),
        _naive_sapo,
        {"logprobs": (), "old_logprobs": (), "advantages": ()},
        ("logprobs",),
        per_token=False,
    ),
    Op(
        "vespo_loss",
        lambda x, targets, mask: (ops.vespo_loss(**x, mask=mask).loss,),
        _naive_vespo,
        {"logprobs": (), "old_logprobs": (), "advantages": ()},
        ("logprobs",),
        per_token=False,
        constants=("logprobs",),
    ),
    Op(
        "gmpo_loss",
        lambda x, targets, mask: (ops.gmpo_loss(**x, mask=mask).loss,),
        _naive_gmpo,
        {"logprobs": (), "old_logprobs": (), "advantages": ()},
        ("logprobs",),
        per_token=False,
    ),
    Op(
        "dppo_loss",
        lambda x, targets, mask: (ops.dppo_loss(**x, mask=mask, clip_low=0.1, clip_high=0.2, max_ratio=3.0).loss,),
        _naive_dppo,
        {"logprobs": (), "old_logprobs": (), "advantages": ()},
        ("logprobs",),
        per_token=False,
        constants=("logprobs",),
    ),
    Op(
        "truncated_importance_weights",
        lambda x, targets, mask: (ops.truncated_importance_weights(**x, mask=mask, low=0.5),),
        _naive_weights,
        {"logprobs": (), "rollout_logprobs": ()},
        (),
    ),
    Op(
        "clipped_value_loss",
        lambda x, targets, mask: (ops.clipped_value_loss(x["values"], x["old_values"], x["returns"], mask).loss,),
        _naive_value_loss,
        {"values": (), "old_values": (), "returns": ()},
        ("values",),
        per_token=False,
    ),
    Op(
        "ppo_loss",
        _run_joint,
        _naive_joint,
        dict.fromkeys(
            ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs"), ()
        ),
        ("logprobs", "values", "entropy"),
        per_token=False,
    ),
]


# ---- layers: rows in, rows out, in the dtype of the input; no mask --------------------------------------------------


def _naive_norm(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    hidden = x["hidden"]
    return ((1 + x["weight"]) * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt(),)


def _gated(activation: str, naive: Callable[[Tensor], Tensor]) -> Op:
    return Op(
        "gated_activation",
        lambda x, targets, mask: (ops.gated_activation(x["gate"], x["up"], activation=activation),),
        lambda x, targets, mask: (naive(x["gate"]) * x["up"],),
        {"gate": (WIDTH,), "up": (WIDTH,)},
        ("gate", "up"),
        row_wise=True,
    )


def _naive_rotary(x: Tensors, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Pair by pair: (x_j, x_k) times a matrix."""
    columns = list(x["x"].unbind(-1))
    cos, sin = (x[name].unsqueeze(-2) for name in ("cos", "sin"))
    for j, k in zip(range(TURNED // 2), range(TURNED // 2, TURNED), strict=True):
        first, second = columns[j], columns[k]
        columns[j] = first * cos[..., j] - second * sin[..., j]
        columns[k] = second * cos[..., k] + first * sin[..., k]
    return (torch.stack(columns, -1),)


LAYERS = [
    Op(
        "rms_norm",
        lambda x, targets, mask: (ops.rms_norm(x["hidden"], x["weight"], eps=1e-5, offset=1.0),),
        _naive_norm,
        {"hidden": (WIDTH,)},
        ("hidden", "weight"),
        {"weight": (WIDTH,)},
        row_wise=True,
    ),
    _gated("silu", lambda x: x / (1 + (-x).exp())),
    _gated("gelu_tanh", lambda x: x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()) / 2),
    _gated("gelu", lambda x: x * (1 + (x / 2**0.5).erf()) / 2),
    _gated("relu", lambda x: x * (x > 0)),
    Op(
        "rotary_embedding",
        lambda x, targets, mask: (ops.rotary_embedding(x["x"].transpose(1, 2), x["cos"], x["sin"]).transpose(1, 2),),
        _naive_rotary,
        {"x": (HEADS, WIDTH), "cos": (TURNED,), "sin": (TURNED,)},
        ("x",),
        row_wise=True,
    ),
]
# once each
LAYER_OPS = [LAYERS[0], LAYERS[1], LAYERS[-1]]
