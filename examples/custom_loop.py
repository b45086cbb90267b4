"""A policy-gradient loop of one's own on the tiny built-in model: sampling, rewards, and a loss of this package.

python examples/custom_loop.py
"""

import torch

from rlhf_fast.config import StageConfig
from rlhf_fast.data import PromptRow
from rlhf_fast.models import SharedBase, load_pretrained
from rlhf_fast.ops import linear_policy_loss
from rlhf_fast.rollout import Generation, collate_episodes

TEMPERATURE = 1.0


def main(steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    config = StageConfig(model_name_or_path="tiny-random", lora_r=4)
    base = SharedBase(*load_pretrained(config, torch.device("cpu")), config)
    base.add_role("policy")
    optimizer = torch.optim.AdamW(base.named_parameters("policy").values(), lr=1e-2)
    texts = ["hello", "say something", "a longer prompt than these"] * 8
    rows = [PromptRow(i, base.tokenizer(text).input_ids, text, {}, text) for i, text in enumerate(texts)]
    means = []
    for step in range(steps):
        generation = Generation(base, "policy", rows, response_length=16, temperature=TEMPERATURE)
        while generation.live:
            generation.step()  # or choose tokens from generation.logits and call generation.append
        episodes = collate_episodes(generation.responses(), base.pad_id, base.device)

        scores = torch.tensor([response.text.count("o") for response in episodes.responses], dtype=torch.float32)
        advantages = ((scores - scores.mean()) / (scores.std() + 1e-6))[:, None].expand_as(episodes.sampled_logprobs)

        for _ in range(4):
            hidden = base.hidden("policy", episodes.input_ids, episodes.attention_mask)
            result = linear_policy_loss(
                episodes.before_response(hidden),
                base.vocabulary.weight,
                episodes.targets,
                episodes.sampled_logprobs,
                advantages,
                episodes.response_mask,
                vocab_size=base.vocab_size,
                **base.vocabulary.options(TEMPERATURE),
            )
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()
        means.append(scores.mean().item())
        print(f"step {step + 1}: score {means[-1]:.2f}, ratio {result.ratio_mean.item():.3f}")
    return means


if __name__ == "__main__":
    main()
