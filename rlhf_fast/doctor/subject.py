"""What the checks look at: a stage's tokenizer and rows, and its model with all roles."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, StageConfig
from rlhf_fast.config_load import ADAPTER_MAKERS
from rlhf_fast.data import DataReport, PairRow, PromptRow, SFTRow, prompt_rows
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters
from rlhf_fast.recipes.experience import CRITIC, POLICY, REWARD, SFT
from rlhf_fast.recipes.opening import open_base
from rlhf_fast.recipes.plan import ENCODERS, Shape, open_shape, row_window
from rlhf_fast.recipes.rows import encode_table, hold_out, open_table
from rlhf_fast.recipes.stage import seeded
from rlhf_fast.rollout import Response, generate

Row = SFTRow | PairRow | PromptRow
SECONDS = 10.0  # for encoding one data set: of a larger one, the first rows are looked at
ALWAYS, TRIAL = 2000, 200  # rows that are read in any case; rows that are timed
ROWS, SAMPLED = 4, 24  # rows on which the model is tried; tokens of a sampled response
STAND_IN_STD = 0.02  # of lora_B in a random adapter, so that it changes what the base computes


@dataclass
class StageData:
    """A stage's tokenizer and rows. ``rows``: of the training split; ``held_out``: of the other. ``reports`` has the
    report of each data set that was read, the training data first. ``seen`` and ``total``: the training data's rows
    that were read, of how many. ``leaked``: held-out rows whose prompt is trained on, which a run leaves out.
    ``sampled``: of the reward stage, the prompts of its calibration; of PPO, all its prompts."""

    name: str
    config: StageConfig
    tokenizer: PreTrainedTokenizerBase
    shape: Shape
    tokenizer_notes: list[str]
    table: Any
    rows: list[Any]
    held_out: list[Any]
    reports: list[DataReport]
    seen: int
    total: int
    leaked: list[Any] = field(default_factory=list)
    sampled: DataReport | None = None

    @property
    def report(self) -> DataReport:
        return self.reports[0]

    @property
    def scope(self) -> str:
        """How many rows were read, if not all."""
        return "" if self.seen == self.total else f" (of the first {self.seen} rows of {self.total})"

    def steps(self) -> int:
        """Optimisation steps of the stage; of PPO, rollouts."""
        config = self.config
        size = config.batch_size // (config.num_generations if isinstance(config, PPOConfig) else 1)
        rows = len(self.rows) * self.total / max(1, self.seen)
        return config.max_steps or math.ceil(rows * config.num_train_epochs / size)


def read_stage(name: str, config: StageConfig) -> StageData:
    """Reads a stage's data as the stage does. Raises UserError where the stage would."""
    tokenizer, shape, notes = open_shape(config)
    encode, window = ENCODERS[name], row_window(config)
    whole = open_table(config, config.dataset_name, config.dataset_split, config.max_samples)
    count = readable(config, tokenizer, encode, whole, window)
    table = whole.select(range(count)) if count < len(whole) else whole
    rows, report = encode_table(config, tokenizer, encode, table, window, config.dataset_name)
    data = StageData(name, config, tokenizer, shape, notes, table, rows, [], [report], count, len(whole))
    if config.eval_dataset_name is None:
        data.rows, data.held_out = hold_out(config, rows)
    else:
        other = open_table(config, config.eval_dataset_name, config.eval_dataset_split, None)
        few = readable(config, tokenizer, encode, other, window)
        other = other.select(range(few)) if few < len(other) else other
        held_out, held_report = encode_table(config, tokenizer, encode, other, window, config.eval_dataset_name)
        trained = {row.prompt_key for row in rows}
        data.held_out = [row for row in held_out if row.prompt_key not in trained]
        data.leaked = [row for row in held_out if row.prompt_key in trained]
        data.reports.append(held_report)
    if isinstance(config, RewardConfig):
        room, source = config.max_length - config.response_length, f"{config.dataset_name}, prompts to sample from"
        data.sampled = encode_table(config, tokenizer, prompt_rows, table, room, source)[1]
    elif isinstance(config, PPOConfig):
        data.sampled = report
    return data


def readable(
    config: StageConfig, tokenizer: PreTrainedTokenizerBase, encode: Callable[..., Any], table: Any, window: int
) -> int:
    """How many of the table's rows can be encoded in about SECONDS."""
    if len(table) <= ALWAYS:
        return len(table)
    start = time.perf_counter()
    with contextlib.suppress(UserError):  # of the first rows alone; reading all of them says what is wrong
        encode_table(config, tokenizer, encode, table.select(range(TRIAL)), window, "")
    each = (time.perf_counter() - start) / TRIAL
    return min(len(table), max(ALWAYS, int(SECONDS / each)))


@dataclass
class OpenStage:
    """A stage's model with the roles that it has at its start.

    ``reference``: the role of the SFT model, None for the bare base. ``stage``: what the recipes' functions take as
    their stage. ``stand_ins``: adapters that an earlier stage of the run will make, random here.
    """

    data: StageData
    base: SharedBase
    reference: str | None
    stage: Any
    stand_ins: list[str]

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def config(self) -> Any:
        return self.data.config

    @property
    def spread(self) -> list[Any]:
        """Four training rows of different lengths."""
        return spread(self.data.rows)

    @functools.cached_property
    def responses(self) -> list[Response]:
        """Short responses of PPO's policy to four prompts of different lengths, held-out ones if there are so many."""
        config = self.config
        rows = spread(self.data.held_out if len(self.data.held_out) >= ROWS else self.data.rows)
        with seeded(config.seed):
            return generate(
                self.base,
                POLICY,
                rows,
                response_length=min(SAMPLED, config.response_length),
                temperature=config.temperature,
                batch_size=len(rows),
                engine=config.rollout_engine,
                skip_special_tokens=config.reward_skip_special_tokens,
            )


def spread(rows: list[Any]) -> list[Any]:
    """ROWS rows from the shortest to the longest."""
    by_length = sorted(rows, key=lambda row: len(row.chosen_ids if isinstance(row, PairRow) else row.input_ids))
    if len(by_length) <= ROWS:
        return by_length
    return [by_length[place * (len(by_length) - 1) // (ROWS - 1)] for place in range(ROWS)]


@contextlib.contextmanager
def opened(data: StageData, made_before: set[str]) -> Iterator[OpenStage]:
    """The stage's model and roles. ``made_before``: the stages that run before this one in the same run."""
    config = data.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with seeded(config.seed):
        base, _ = open_base(config, device, lambda line: None)
        if isinstance(config, PPOConfig) and config.ignore_eos:
            base.stop_ids = []
        stage = SimpleNamespace(
            base=base,
            config=config,
            name=data.name,
            step=0,
            total=1,
            accelerator=SimpleNamespace(num_processes=1),
            backward=torch.Tensor.backward,
        )
        found = OpenStage(data, base, None, stage, [])
        add_roles(found, made_before)
        yield found


def add_roles(opened: OpenStage, made_before: set[str]) -> None:
    """The roles of the stage, as its recipe adds them."""
    base, config = opened.base, opened.config
    for role, setting in ((SFT, "sft_adapter"), (REWARD, "reward_adapter")):
        folder = getattr(config, setting, None)
        if folder is None:
            continue
        if Path(folder).is_dir() or ADAPTER_MAKERS[setting] not in made_before:
            adapters.load_role(base, role, folder, want_head=role == REWARD)
        else:
            add_stand_in(base, role)
            opened.stand_ins.append(f"--{setting} {folder}")
    opened.reference = SFT if SFT in base.roles else None
    if isinstance(config, RewardConfig):
        base.add_role(REWARD, copy_of=opened.reference, head=True)
    elif isinstance(config, DPOConfig):
        base.add_role(POLICY, copy_of=opened.reference)
    elif isinstance(config, PPOConfig):
        base.add_role(POLICY, copy_of=opened.reference)
        if config.has_critic:
            base.add_role(CRITIC, copy_of=REWARD if REWARD in base.roles else opened.reference, head=True)
    else:
        base.add_role(SFT)


def add_stand_in(base: SharedBase, role: str) -> None:
    """A random adapter in place of one that is not trained yet."""
    base.add_role(role, head=role == REWARD, trainable=False)
    with torch.no_grad():
        for name, parameter in base.named_parameters(role).items():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=STAND_IN_STD)
