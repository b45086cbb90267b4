"""The contestants: one entry is one row of the tables. To add a row, add an entry."""

from collections.abc import Mapping
from dataclasses import dataclass, field

BF16, FP32 = "bfloat16", "float32"
SHORT = {BF16: "bf16", FP32: "fp32"}


@dataclass(frozen=True)
class Row:
    """Rows run and stand in the tables in their order here; ``key`` is what --only takes.

    Args:
        stage: ppo, sft, reward, or rollout (sampling alone).
        who: rlhf-fast, trl, agilerl or peft: whose code runs, and in which environment.
        flags: settings beyond those of the work, each with its value ("" where it has none).
        memory: what the row shares, in the table of that; None: not in it.
        speed: whether it stands in the table of speed too.
        rounds, steps: unset, those of the run and of the work.
    """

    key: str
    name: str
    stage: str
    who: str
    dtype: str
    flags: Mapping[str, str] = field(default_factory=dict)
    memory: str | None = None
    speed: bool = True
    rounds: int | None = None
    steps: int | None = None


def micro_batch(size: int, layers: int | None = None) -> dict[str, str]:
    return {"micro_batch_size": str(size)} | ({"lora_layers": str(layers)} if layers else {})


TOP = 8  # decoder layers with adapters where the trunk below them is cached
TRUNK = f"rlhf-fast, adapters on the top {TOP} layers"
LEAST_MEMORY, CHECKPOINTING = "rlhf-fast, set for memory", {"gradient_checkpointing": "true"}
ONE_BASE, SEPARATE_REWARD = "rlhf-fast", "rlhf-fast, a reward model of its own"

ROWS = (
    Row(
        "trl-four-bf16-4",
        "TRL",
        "ppo",
        "trl",
        BF16,
        micro_batch(4) | {"own_reference": ""},
        memory="four models (TRL)",
        speed=False,
        rounds=1,
    ),
    Row("trl-bf16-4", "TRL", "ppo", "trl", BF16, micro_batch(4), memory="policy and reference on one base (TRL)"),
    Row("trl-bf16-16", "TRL", "ppo", "trl", BF16, micro_batch(16)),
    Row("agilerl-speed-bf16", "AgileRL, set for speed", "ppo", "agilerl", BF16, steps=2),
    Row("agilerl-memory-bf16", "AgileRL, set for memory", "ppo", "agilerl", BF16, {"least_memory": ""}, steps=2),
    Row(
        "ours-separate-reward-bf16-4",
        SEPARATE_REWARD,
        "ppo",
        "rlhf-fast",
        BF16,
        micro_batch(4),
        memory="policy, reference and critic on one base",
        speed=False,
        rounds=1,
    ),
    Row("ours-bf16-4", ONE_BASE, "ppo", "rlhf-fast", BF16, micro_batch(4), memory="all four roles on one base"),
    Row("ours-bf16-16", ONE_BASE, "ppo", "rlhf-fast", BF16, micro_batch(16)),
    Row("ours-memory-bf16", LEAST_MEMORY, "ppo", "rlhf-fast", BF16, micro_batch(16) | CHECKPOINTING),
    Row(
        "ours-trunk-bf16-4",
        TRUNK,
        "ppo",
        "rlhf-fast",
        BF16,
        micro_batch(4, TOP),
        memory=f"the same, adapters on the top {TOP} layers, trunk cached",
        speed=False,
        rounds=1,
    ),
    Row("ours-trunk-bf16-16", TRUNK, "ppo", "rlhf-fast", BF16, micro_batch(16, TOP)),
    Row("trl-fp32-4", "TRL", "ppo", "trl", FP32, micro_batch(4), rounds=1),
    Row("trl-fp32-16", "TRL", "ppo", "trl", FP32, micro_batch(16)),
    Row("ours-fp32-4", ONE_BASE, "ppo", "rlhf-fast", FP32, micro_batch(4)),
    Row("ours-fp32-16", ONE_BASE, "ppo", "rlhf-fast", FP32, micro_batch(16)),
    Row("ours-memory-fp32", LEAST_MEMORY, "ppo", "rlhf-fast", FP32, micro_batch(16) | CHECKPOINTING),
    *(
        Row(f"{key}-{stage}-{SHORT[dtype]}", name, stage, who, dtype, rounds=1, steps=4)
        for stage in ("sft", "reward")
        for dtype in (BF16, FP32)
        for key, name, who in (("trl", "TRL", "trl"), ("ours", ONE_BASE, "rlhf-fast"))
    ),
    *(
        Row(f"peft-rollout-{SHORT[dtype]}", "generate of transformers", "rollout", "peft", dtype, rounds=1, steps=4)
        for dtype in (BF16, FP32)
    ),
)
