"""Data sets, chat templates, masks and batches.

The path of a row: load and rows (a file to rows); foreign, formats and turns (columns to a prompt and its responses);
encode with conversation, answers, chat and special (to tokens); collate.
"""

from rlhf_fast.data.chat import end_of_turn
from rlhf_fast.data.collate import IGNORE_INDEX, collate_pairs, collate_prompts, collate_sft, split_train_eval
from rlhf_fast.data.encode import PairRow, PromptRow, Reading, SFTRow, preference_rows, prompt_rows, sft_rows
from rlhf_fast.data.load import DEMO_NAMES, load_dataset
from rlhf_fast.data.report import DataReport
from rlhf_fast.data.sampler import batch_indices, epoch_order
from rlhf_fast.data.tokenizer import prepare_tokenizer

__all__ = [
    "DEMO_NAMES",
    "IGNORE_INDEX",
    "DataReport",
    "PairRow",
    "PromptRow",
    "Reading",
    "SFTRow",
    "batch_indices",
    "collate_pairs",
    "collate_prompts",
    "collate_sft",
    "end_of_turn",
    "epoch_order",
    "load_dataset",
    "preference_rows",
    "prepare_tokenizer",
    "prompt_rows",
    "sft_rows",
    "split_train_eval",
]
