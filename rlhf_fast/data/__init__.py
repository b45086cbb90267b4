"""Data sets, chat templates, masks and batches.

The modules in the order of the data flow:

1. load, rows: read a file into rows.
2. foreign, formats, turns: convert the columns of a row to a prompt and its responses.
3. encode, conversation, answers, chat, special: convert these to tokens.
4. collate: batches.
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
