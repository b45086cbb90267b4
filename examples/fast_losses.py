"""A GRPO update of one's own, with plain torch and with this package's losses: the same loss, and the time of both.

python examples/fast_losses.py [FOLDER OF A MODEL]

Without a folder the model is a small random one with the vocabulary of a real one.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_fast import group_advantages, linear_logprobs, linear_policy_loss

PROMPTS, SAMPLES, PROMPT, RESPONSE = 2, 4, 32, 64
CLIP, KL_COEF = 0.2, 0.04


def naive_update(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["ids"]).logits[:, PROMPT - 1 : -1].float()
    logprobs = logits.log_softmax(-1).gather(-1, batch["targets"][..., None]).squeeze(-1)
    ratio = (logprobs - batch["old_logprobs"]).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    policy = -torch.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
    gap = batch["ref_logprobs"] - logprobs
    kl = gap.exp() - 1 - gap
    return ((policy + KL_COEF * kl) * batch["mask"]).sum() / batch["mask"].sum()


def fast_update(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    hidden = model.model(batch["ids"]).last_hidden_state[:, PROMPT - 1 : -1]
    constants = (batch["targets"], batch["old_logprobs"], batch["advantages"], batch["mask"])
    kl = {"ref_logprobs": batch["ref_logprobs"], "kl_coef": KL_COEF}
    clip = {"clip_low": CLIP, "clip_high": CLIP}
    return linear_policy_loss(hidden, model.lm_head.weight, *constants, **kl, **clip).loss


def sampled(model: PreTrainedModel) -> dict[str, Tensor]:
    """Responses that are random tokens, with random rewards: the times do not depend on them."""
    ids = torch.randint(model.config.vocab_size, (PROMPTS * SAMPLES, PROMPT + RESPONSE))
    targets, mask = ids[:, PROMPT:], torch.arange(RESPONSE) < torch.randint(1, RESPONSE, (len(ids), 1))
    advantages = group_advantages(torch.rand(len(ids)), SAMPLES)[:, None].expand_as(targets)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[:, PROMPT - 1 : -1]
        old = linear_logprobs(hidden, model.lm_head.weight, targets, mask)
    reference = old + 0.1 * torch.randn_like(old)
    return {"ids": ids, "targets": targets, "mask": mask, "advantages": advantages, "old_logprobs": old,
            "ref_logprobs": reference}  # fmt: skip


def timed(update: Callable[..., Tensor], model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[float, float]:
    seconds = []
    for _ in range(4):  # the first one warms up
        model.zero_grad()
        start = time.perf_counter()
        loss = update(model, batch)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return loss.item(), min(seconds[1:])


def main(folder: str | None = None) -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    small = LlamaConfig(vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    model = AutoModelForCausalLM.from_pretrained(folder) if folder else LlamaForCausalLM(small)
    model.lm_head.weight.requires_grad_(False)  # as under LoRA adapters
    batch = sampled(model)
    results = {update.__name__: timed(update, model, batch) for update in (naive_update, fast_update)}
    for name, (loss, seconds) in results.items():
        print(f"{name}: loss {loss:.6f}, {seconds:.2f} s")
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
