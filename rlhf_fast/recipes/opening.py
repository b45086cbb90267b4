"""Creates base and tokenizer, optimizer and schedule of a stage."""

from collections.abc import Callable, Sequence

import torch
from transformers import get_scheduler

from rlhf_fast.config import StageConfig
from rlhf_fast.data import end_of_turn, prepare_tokenizer
from rlhf_fast.models import SharedBase, pretrained
from rlhf_fast.recipes.identity import base_digest


def open_base(config: StageConfig, device: torch.device, say: Callable[[str], None]) -> tuple[SharedBase, str]:
    """The shared base with a prepared tokenizer, and the digest of its weights."""
    model, tokenizer = pretrained.load_pretrained(config, device)
    for note in prepare_tokenizer(
        tokenizer, vocab_size=len(model.get_input_embeddings().weight), chat_template=config.chat_template
    ):
        say(note)
    pretrained.check_window(model, config.max_length)
    digest = base_digest(model)
    base = SharedBase(model, tokenizer, config)
    closing = end_of_turn(tokenizer)
    if closing is not None and closing not in base.stop_ids:
        base.stop_ids = sorted([*base.stop_ids, closing])
        say(f"responses also end at {tokenizer.convert_ids_to_tokens(closing)!r}, as the chat template does")
    return base, digest


def open_optimizer(
    config: StageConfig, parameters: Sequence[torch.nn.Parameter], total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and its schedule over ``total_steps``."""
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, eps=config.adam_epsilon, weight_decay=config.weight_decay, fused=True
    )
    factor = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(config.warmup_ratio * total_steps),
        num_training_steps=total_steps + 1,
    ).lr_lambdas[0]
    # transformers' factor is 0 at step 0 and after the last step; counting from 1, no step trains with rate 0
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: factor(done + 1))
