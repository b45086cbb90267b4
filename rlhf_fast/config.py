"""Every setting of the stages and of the run that joins them; each field is a YAML key and a flag of that name.

Field help texts are what `rlhf-fast STAGE --help` prints. Checks that need one config alone are in ``validate``;
reading YAML and flags is in ``config_load.py``.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.errors import UserError, nearest
from rlhf_fast.metrics import RESERVED
from rlhf_fast.text import shown
from rlhf_fast.verdicts import KINDS, Thresholds

DEFAULT_MODEL = "smollm2-135m-instruct"
ALL_LINEAR = "all-linear"
DEFAULT_STAGES = ["sft", "reward", "ppo"]
FLOAT32_MAX = 3.4e38
ADVANTAGE_ESTIMATORS = ("gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline")
ROLLOUT_ENGINES = ("auto", "fast", "transformers")
ROLLOUT_ENGINE_HELP = (
    "What samples responses. fast: this package's loop, on a copy of the adapted weights with the adapter merged; "
    "transformers: its generate, slower and without a copy; auto: fast where a trial shows that the model runs there."
)


DPO_LOSSES = (
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "apo_zero",
    "apo_down",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "discopop",
)
SMOOTHED_DPO_LOSSES = ("sigmoid", "robust", "exo_pair")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, *, path: str | None = None) -> Any:
    """One setting. ``path``: its value is the name of a file or folder, which starts from the current folder ("here")
    or, where it is not there, from that of the YAML that names it ("beside"); `~` is the home folder."""
    metadata = {"help": help, "choices": choices, "path": path}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class StageConfig:
    """What all stages share. In the YAML of `rlhf-fast run` these may stand at the top, for all stages."""

    model_name_or_path: str = option(
        DEFAULT_MODEL,
        "The base: a folder, a hub name, or the built-in default, SmolLM2-135M-Instruct from its PyPI wheel.",
        path="here",
    )
    dtype: str = option(
        "auto",
        "The base's dtype. auto: bfloat16 on a GPU or CPU with instructions for products in it, else float32. Adapters "
        "and heads are always float32.",
        ("auto", "float32", "bfloat16", "float16"),
    )
    attn_implementation: str | None = option(
        None,
        "Attention code of transformers: sdpa, eager, flash_attention_2. Unset: the model's default.",
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")
    allow_pickle_weights: bool = option(False, "Load weights from pickle files (.bin) where no safetensors are there.")
    chat_template: str | None = option(
        None,
        "A chat template (a file, or the Jinja text itself) in place of the tokenizer's own.",
        path="beside",
    )

    load_in_4bit: bool = option(
        False,
        "The weights of the base's linear layers as 4-bit numbers (NF4, by bitsandbytes): a quarter of bfloat16's "
        "memory, slower passes. pip install 'rlhf-fast[4bit]'.",
    )
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: float = option(32.0, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(
        0.0,
        "Dropout before the adapters, in SFT, reward training and DPO. PPO always runs without dropout.",
    )
    lora_target_modules: list[str] = option(
        [ALL_LINEAR],
        "Names of the modules that get an adapter; all-linear: every linear layer of the decoder. The head, "
        "lm_head, and the token embedding, such as embed_tokens, can be named beside it.",
    )
    lora_layers: int | None = option(
        None,
        "Adapters on the top N decoder layers alone; the layers below are then computed once a rollout for all "
        "four roles, unless the token embedding has an adapter. Unset: all layers.",
    )

    dataset_name: str = option(
        "",
        "Training data: a file (JSONL, JSON, CSV, Parquet, also .gz), a folder, a hub name, or demo/NAME.",
        path="beside",
    )
    dataset_split: str = option("train", "Split of the training data.")
    eval_dataset_name: str | None = option(
        None,
        "Held-out data. Unset: eval_size of the training data are held out, by prompt.",
        path="beside",
    )
    eval_dataset_split: str = option("train", "Split of the held-out data.")
    eval_size: float = option(0.1, "Held-out share of the training data (below 1), or their number (1 and above).")
    rename_columns: dict[str, str] = option({}, "Column names to change first: old=new. Example: question=prompt.")
    max_samples: int | None = option(None, "Use the first N rows of the training data alone.")
    strict: bool = option(False, "Stop at the first row that cannot be used, rather than count and drop it.")
    max_unusable_rows: float = option(
        0.5,
        "Stop where more than this share of the rows cannot be used: their structure is wrong, or the chat template "
        "refuses them.",
    )
    special_tokens_in_data: bool = option(
        False,
        "Text in the data that spells a special token, such as <|im_end|>, is that token. Unset: it is ordinary text, "
        "and special tokens come from the chat template alone.",
    )

    learning_rate: float = option(2e-4, "Peak learning rate.")
    lr_scheduler_type: str = option(
        "linear",
        "Schedule after the warm-up.",
        ("linear", "cosine", "constant_with_warmup"),
    )
    warmup_ratio: float = option(0.05, "Share of the steps over which the learning rate rises from 0.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    batch_size: int = option(
        32,
        "Examples per optimisation step, over all processes and accumulation (PPO: episodes per rollout).",
    )
    micro_batch_size: int | None = option(
        None,
        "Examples per forward and backward pass in one process; memory grows with it, results do not change with "
        "it but for rounding. Unset: 8, or what micro_batch_tokens allows.",
    )
    micro_batch_tokens: int | None = option(
        None,
        "In place of micro_batch_size: most tokens per forward and backward pass, prompts and responses together, so "
        "that short sequences make large micro-batches.",
    )
    gradient_checkpointing: bool = option(
        False,
        "Keep only the input of each adapted layer and compute the layer once more in the backward pass: much less "
        "memory, the same gradients, a longer update.",
    )
    max_steps: int | None = option(None, "Stop after this many steps (PPO: rollouts). Unset: num_train_epochs decides.")
    num_train_epochs: float = option(1.0, "Passes over the training data.")
    max_length: int = option(512, "Longest sequence in tokens, prompt and response together.")

    output_dir: str = option("", "Folder for checkpoints, metrics, samples, adapters and the report.", path="here")
    seed: int = option(0, "Seed of every random number.")
    report_to: list[str] = option([], "Trackers beside metrics.jsonl: tensorboard, wandb.")
    run_name: str | None = option(None, "The run's name in the trackers. Unset: the output folder's name.")
    logging_steps: int = option(1, "Steps between two lines of metrics.jsonl.")
    eval_steps: int | None = option(
        None,
        "Steps between two evaluations. Unset: at the start, ten times on the way, and at the end (PPO: start and "
        "end).",
    )
    monitor_actions: dict[str, str] = option(
        {},
        "What to do when the monitor finds something, VERDICT=ACTION: stop; lower_learning_rate (by half); "
        "raise_kl_coef (to twice, PPO); roll_back (to the last checkpoint before it, and half the learning "
        "rate). Unset: it is told.",
    )
    monitor_thresholds: dict[str, float] = option(
        {}, "Thresholds of the monitor, by name; `rlhf-fast monitor --help` lists them."
    )
    save_steps: int | None = option(None, "Steps between two checkpoints. Unset: ten a run.")
    save_total_limit: int = option(2, "Checkpoints kept; older ones are deleted.")
    resume_from_checkpoint: str | None = option(
        None,
        "auto: go on from the newest whole checkpoint of output_dir; or a checkpoint folder.",
        path="here",
    )
    resume_with_changes: bool = option(
        False,
        "Go on from the checkpoint though data, settings, base or version are not those that it was written with; "
        "what has changed holds from there on.",
    )
    overwrite_output_dir: bool = option(False, "Delete an earlier run in output_dir first.")

    config_file = ""  # no setting: the --config file, which the run leaves as it is

    @property
    def monitor_choices(self) -> tuple[str, ...]:
        """The actions that monitor_actions may name."""
        return ("stop", "lower_learning_rate", "roll_back")

    def validate(self) -> None:
        """Raises UserError that names the flag, what was expected and what came."""
        for name, value in vars(self).items():
            if isinstance(value, float):
                require(self, name, abs(value) <= FLOAT32_MAX, "a finite number of float32")
        positive = ["lora_r", "lora_alpha", "learning_rate", "adam_epsilon", "max_grad_norm", "batch_size"]
        positive += ["num_train_epochs", "max_length", "logging_steps", "save_total_limit"]
        for name in positive:
            require(self, name, getattr(self, name) > 0, "above 0")
        require(self, "lora_target_modules", bool(self.lora_target_modules), f"names of modules, or {ALL_LINEAR}")
        optional = ["lora_layers", "micro_batch_size", "micro_batch_tokens"]
        for name in (*optional, "max_steps", "eval_steps", "save_steps", "max_samples"):
            require(self, name, getattr(self, name) is None or getattr(self, name) > 0, "above 0, or unset")
        both = self.micro_batch_size is not None and self.micro_batch_tokens is not None
        require(
            self, "micro_batch_tokens", not both, f"unset where --micro_batch_size is set ({self.micro_batch_size})"
        )
        require(self, "lora_dropout", 0 <= self.lora_dropout < 1, "from 0 to below 1")
        require(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "from 0 to below 1")
        require(self, "weight_decay", self.weight_decay >= 0, "0 or above")
        require(self, "eval_size", self.eval_size >= 0, "0 or above")
        require(self, "max_unusable_rows", 0 <= self.max_unusable_rows < 1, "from 0 to below 1")
        require(self, "seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")
        require(self, "dataset_name", bool(self.dataset_name), "set: a file, a folder, a hub name or demo/NAME")
        require(self, "output_dir", bool(self.output_dir), "set: the folder to write to")
        Thresholds.of(self.monitor_thresholds)
        for verdict, action in self.monitor_actions.items():
            for what, name, known in (("verdict", verdict, list(KINDS)), ("action", action, [*self.monitor_choices])):
                if name not in known:
                    unknown = f"no {what} {shown(name)}{nearest(name, known)}"
                    raise UserError(f"--monitor_actions: {unknown}; there are {', '.join(known)}")
        for tracker in self.report_to:
            require(self, "report_to", tracker in ("tensorboard", "wandb"), "tensorboard, wandb or both")
        for item in dataclasses.fields(self):
            choices = item.metadata["choices"]
            if choices:
                require(self, item.name, getattr(self, item.name) in choices, "one of " + ", ".join(choices))


def require(config: StageConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"--{name} must be {expected}; got {shown(getattr(config, name))}")


@dataclass(kw_only=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning on response tokens alone."""

    num_train_epochs: float = option(2.0, "Passes over the training data.")
    patience: int = option(
        2,
        "Stop when the validation loss has not improved for this many evaluations in a row; the best adapter is "
        "the one kept.",
    )

    def validate(self) -> None:
        super().validate()
        require(self, "patience", self.patience > 0, "above 0")


@dataclass(kw_only=True)
class RewardConfig(StageConfig):
    """A Bradley-Terry reward model on preference pairs."""

    sft_adapter: str | None = option(
        None, "Adapter folder that the reward adapter starts from. Unset: the bare base.", path="here"
    )
    centre_coef: float = option(0.01, "Weight of the term (r_chosen + r_rejected)^2, which keeps the scores near 0.")
    label_noise_ceiling: float | None = option(
        None,
        "The best accuracy that the labels' noise allows, where it is known; the report draws it.",
    )
    calibration_prompts: int = option(
        64,
        "Prompts of the preference data on which the SFT model's own samples are scored, to shift and scale the "
        "scores to mean 0, standard deviation 1.",
    )
    response_length: int = option(64, "Longest sample in tokens when calibrating.")
    temperature: float = option(1.0, "Sampling temperature when calibrating.")
    rollout_engine: str = option("auto", ROLLOUT_ENGINE_HELP, ROLLOUT_ENGINES)

    def validate(self) -> None:
        super().validate()
        require(self, "centre_coef", self.centre_coef >= 0, "0 or above")
        enough = self.calibration_prompts >= 2
        require(self, "calibration_prompts", enough, "2 or above: a standard deviation needs two samples")
        require(self, "response_length", self.response_length > 0, "above 0")
        room = f"below --max_length ({self.max_length}), which leaves the rest to the prompt"
        require(self, "response_length", self.response_length < self.max_length, room)
        require(self, "temperature", self.temperature > 0, "above 0")
        if self.label_noise_ceiling is not None:
            require(self, "label_noise_ceiling", 0.5 <= self.label_noise_ceiling <= 1, "from 0.5 to 1")


@dataclass(kw_only=True)
class DPOConfig(StageConfig):
    """DPO on preference pairs, against the SFT model."""

    sft_adapter: str | None = option(
        None,
        "The SFT model's adapter folder: the policy starts from it, and it is the reference. Unset: the bare base is "
        "the SFT model.",
        path="here",
    )
    beta: float = option(0.1, "Strength of the pull to the reference; the implicit reward is beta times the log-ratio.")
    loss_type: str = option(
        "sigmoid",
        "Loss of a pair. sigmoid: DPO. For ipo the log-probs are means over the response tokens, for the others sums.",
        DPO_LOSSES,
    )
    label_smoothing: float = option(
        0.0,
        f"Probability that a preference is labelled wrongly; for loss_type {', '.join(SMOOTHED_DPO_LOSSES)}.",
    )
    learning_rate: float = option(5e-5, "Peak learning rate.")

    def validate(self) -> None:
        super().validate()
        require(self, "beta", self.beta > 0, "above 0")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "from 0 to below 0.5")
        smoothed = self.loss_type in SMOOTHED_DPO_LOSSES
        require(self, "label_smoothing", smoothed or self.label_smoothing == 0, f"0 with --loss_type {self.loss_type}")
        smooth = self.loss_type != "exo_pair" or self.label_smoothing > 0
        require(self, "label_smoothing", smooth, "above 0 with --loss_type exo_pair")


@dataclass(kw_only=True)
class PPOConfig(StageConfig):
    """PPO with a KL leash to the SFT model."""

    sft_adapter: str | None = option(
        None,
        "The SFT model's adapter folder: the policy starts from it and is held near it. Unset: the bare base is "
        "the SFT model.",
        path="here",
    )
    reward_adapter: str | None = option(
        None, "The reward model's adapter folder. Unset: reward_functions alone.", path="here"
    )
    reward_functions: list[str] = option(
        [],
        "Python rewards f(prompts, completions, **columns) -> list of numbers, as FILE.py:NAME or MODULE:NAME; "
        "added to the reward model's score. Functions written for TRL run unchanged.",
        path="beside",
    )
    reward_weights: list[float] = option([], "Weights of the reward functions, one each. Unset: 1 each.")
    reward_timeout: float | None = option(
        600.0,
        "Seconds that one call of a reward or eval function may take. Unset (null): no limit.",
    )
    reward_skip_special_tokens: bool = option(
        False,
        "Leave special tokens such as <think> out of the text that reward functions get. The closing stop token and "
        "padding are always left out.",
    )
    eval_functions: list[str] = option(
        [],
        "Python scorers of the same form that are measured on every rollout and evaluation, never trained on: a gold "
        "scorer, to see the reward model being fooled.",
        path="beside",
    )

    learning_rate: float = option(1e-4, "Peak learning rate of the policy and the critic.")
    lr_scheduler_type: str = option(
        "constant_with_warmup",
        "Schedule after the warm-up.",
        ("linear", "cosine", "constant_with_warmup"),
    )
    adam_epsilon: float = option(1e-5, "AdamW's epsilon.")
    batch_size: int = option(64, "Episodes per rollout, over all processes; a multiple of num_generations.")
    num_generations: int = option(1, "Responses sampled to each prompt of a rollout.")
    num_ppo_epochs: int = option(4, "Passes over each rollout.")
    num_mini_batches: int = option(1, "Optimiser steps per pass over a rollout.")
    rollout_batch_size: int = option(64, "Responses sampled at a time in one process.")
    rollout_engine: str = option("auto", ROLLOUT_ENGINE_HELP, ROLLOUT_ENGINES)
    response_length: int = option(64, "Longest response in tokens.")
    ignore_eos: bool = option(
        False,
        "Stop tokens are sampled like any other and end no response: each has response_length tokens. For benchmarks.",
    )
    temperature: float = option(
        1.0,
        "Sampling temperature; it divides the logits of sampling, scoring and training alike.",
    )

    advantage_estimator: str = option(
        "gae",
        "gae: from a critic's values. The others train no critic: the reward of a whole response beside those of the "
        "other responses to its prompt (num_generations of them), for reinforce++ beside those of the whole rollout.",
        ADVANTAGE_ESTIMATORS,
    )
    kl_estimator: str = option("k1", "Estimator of the per-token KL in the reward.", ("k1", "k2", "k3", "abs"))
    kl_coef: float = option(0.05, "KL coefficient beta at the start.")
    kl_target: float | None = option(
        6.0,
        "Sequence KL in nats that the adaptive controller steers to. Unset (null): beta stays fixed.",
    )
    kl_horizon: float = option(10000.0, "Episodes over which the controller corrects a KL error.")
    gamma: float = option(1.0, "GAE's discount.")
    lam: float = option(0.95, "GAE's lambda.")
    whiten_rewards: bool = option(False, "Divide the per-token rewards by their standard deviation, the mean kept.")
    scale_scores: bool = option(
        False,
        "Divide the scores by the standard deviation of all scores so far (running moments).",
    )
    clip_low: float = option(0.2, "Policy ratio is clipped below 1 - clip_low.")
    clip_high: float = option(0.2, "Policy ratio is clipped above 1 + clip_high.")
    value_clip: float = option(0.2, "Values are clipped to this distance from the rollout's values.")
    value_coef: float = option(0.1, "Weight of the value loss.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    missing_eos_penalty: float = option(
        1.0,
        "Subtracted from the score of a response that has no stop token within response_length.",
    )
    missing_eos_score: float | None = option(
        None,
        "Fixed score of a response without a stop token, in place of the penalty.",
    )
    eval_prompts: int = option(64, "Held-out prompts answered at each evaluation.")

    def validate(self) -> None:
        super().validate()
        positive = ["num_ppo_epochs", "num_mini_batches", "rollout_batch_size", "response_length"]
        positive += ["temperature", "kl_horizon", "value_clip", "eval_prompts", "num_generations"]
        for name in self.eval_functions:
            short = name.rpartition(":")[2]
            require(self, "eval_functions", short not in RESERVED, f"named otherwise: {short!r} is a metric of its own")
        if self.reward_weights:
            count = len(self.reward_functions)
            fits = len(self.reward_weights) == count
            require(self, "reward_weights", fits, f"one number a reward function: {count}")
        longest = 1e8
        timely = self.reward_timeout is None or 0 < self.reward_timeout <= longest
        require(self, "reward_timeout", timely, f"above 0 and at most {longest:g} seconds, or null for no limit")
        fast_enough = self.kl_horizon > 0.2 * self.batch_size
        require(
            self,
            "kl_horizon",
            fast_enough,
            f"above a fifth of --batch_size ({self.batch_size}): beta would turn negative",
        )
        for name in positive:
            require(self, name, getattr(self, name) > 0, "above 0")
        room = f"below --max_length ({self.max_length}), which leaves the rest to the prompt"
        require(self, "response_length", self.response_length < self.max_length, room)
        require(self, "kl_target", self.kl_target is None or self.kl_target > 0, "above 0, or null for a fixed kl_coef")
        for name in ("kl_coef", "value_coef", "entropy_coef", "missing_eos_penalty", "clip_low", "clip_high"):
            require(self, name, getattr(self, name) >= 0, "0 or above")
        for name in ("gamma", "lam"):
            require(self, name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        if self.reward_adapter is None and not self.reward_functions:
            raise UserError("PPO needs a reward: set --reward_adapter FOLDER, --reward_functions FILE.py:NAME, or both")
        for name in ("num_mini_batches", "num_generations"):
            divisor = getattr(self, name)
            require(self, "batch_size", self.batch_size % divisor == 0, f"a multiple of --{name} ({divisor})")
        if not self.has_critic:
            estimator = f"--advantage_estimator {self.advantage_estimator}"
            alone = self.num_generations == 1 and self.advantage_estimator != "reinforce++"
            compares = f"2 or above with {estimator}, which compares the responses to one prompt"
            require(self, "num_generations", not alone, compares)
            for name in ("gamma", "lam", "whiten_rewards", "value_clip", "value_coef"):
                default = getattr(PPOConfig, name)
                unset = f"left at {default}, its default, with {estimator}, which has no use for it"
                require(self, name, getattr(self, name) == default, unset)

    @property
    def monitor_choices(self) -> tuple[str, ...]:
        return (*super().monitor_choices, "raise_kl_coef")

    @property
    def has_critic(self) -> bool:
        return self.advantage_estimator == "gae"


@dataclass(kw_only=True)
class RunConfig:
    """The stages in a row. StageConfig's fields at the top of the YAML hold for all stages; a stage's own win."""

    sft: SFTConfig
    reward: RewardConfig
    dpo: DPOConfig
    ppo: PPOConfig
    output_dir: str
    stages: list[str] = option(DEFAULT_STAGES, "Stages to run, in this order; DPO needs no reward model: sft,dpo.")

    config_file = ""  # as in StageConfig


STAGES: dict[str, type[StageConfig]] = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig}
