"""Every architecture of the table, tiny and random, loaded from a folder: what training requires of each.

The log-probs are those of the functions that the recipes call, and the truth is the model's own logits.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import TABLE, batch, randomise, save_model, settings, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import PromptRow, SFTRow
from rlhf_fast.models import SharedBase, adapters, load_pretrained
from rlhf_fast.models.merge import merge
from rlhf_fast.recipes import experience, ppo, sft
from rlhf_fast.rollout import EpisodeBatch, Response, collate_episodes

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
# Routers and gates; names that PEFT confuses with fused experts; Jamba's dt_proj, whose weight is read without a call.
EXPERTS = {"gate_proj", "up_proj", "down_proj"}
NOT_ADAPTED = {
    "qwen2_moe": {"shared_expert_gate"},
    "qwen3_next": {"shared_expert_gate", *EXPERTS},
    "deepseek_v2": EXPERTS,
    "deepseek_v3": EXPERTS,
    "glm4_moe": EXPERTS,
    "llama4_text": {"router"},
    "phimoe": {"router"},
    "jamba": {"dt_proj"},
    "gemma4_text": {"per_layer_input_gate"},
}
PPO = PPOConfig(output_dir="x", dataset_name="y", temperature=0.7)


class Trained(NamedTuple):
    name: str
    base: SharedBase
    folder: Path


@pytest.fixture(scope="module", params=list(TABLE))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Trained]:
    """A base from disk with adapters on the upper two of its four layers: sft, and the policy that starts as it."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder / "model", tokenizer_folder, request.param)
    config = settings(model_name_or_path=str(folder / "model"), lora_layers=2)
    base = SharedBase(*load_pretrained(config, torch.device("cpu")), config)
    base.add_role("sft")
    randomise(base, "sft", 0)
    base.add_role("policy", copy_of="sft")
    base.add_role("critic", copy_of="sft", head=True)
    yield Trained(request.param, base, folder)


def episodes(base: SharedBase, sizes: list[tuple[int, int]]) -> EpisodeBatch:
    """Prompts and responses of these lengths; episode i is the same whatever the others are."""
    responses = []
    for index, (prompt, answer) in enumerate(sizes):
        ids = torch.randint(2, 258, (prompt + answer,), generator=torch.Generator().manual_seed(index)).tolist()
        row = PromptRow(index, ids[:prompt], "", {}, "")
        responses.append(Response(row=row, token_ids=ids[prompt:], stopped=False, text=""))
    return collate_episodes(responses, base.pad_id, base.device)


@torch.no_grad()
def own_logprobs(base: SharedBase, role: str | None, ids: list[int], temperature: float) -> torch.Tensor:
    """(len(ids) - 1,): the log-prob of each token after the first, from the model's own logits."""
    row = torch.tensor([ids])
    with base.role(role):
        logits = base.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, :-1, : base.vocab_size]
    return (logits.double() / temperature).log_softmax(dim=-1).gather(1, row[0, 1:, None])[:, 0].float()


def test_log_probs_of_ppo_are_the_models_own_whatever_the_padding(trained: Trained) -> None:
    base, sizes = trained.base, [(3, 5), (7, 2), (1, 8)]
    batch = episodes(base, sizes)
    scored = experience.score(base, PPO, batch, "sft")
    for row, (prompt, answer) in enumerate(sizes):
        response = batch.responses[row]
        expected = own_logprobs(base, "policy", response.row.input_ids + response.token_ids, PPO.temperature)
        found = scored.logprobs[row, :answer]
        torch.testing.assert_close(found, expected[prompt - 1 :], rtol=0, atol=1e-4)


def test_the_loss_of_sft_is_the_models_own(trained: Trained) -> None:
    base = trained.base
    ids = episodes(base, [(3, 5)]).input_ids[0].tolist()
    rows = [SFTRow(1, ids, [False] * 3 + [True] * 5, ""), SFTRow(2, ids[:4], [False] * 2 + [True] * 2, "")]
    with torch.no_grad():
        loss = sft.loss_sum(SimpleNamespace(base=base), rows)
    expected = own_logprobs(base, "sft", ids, 1.0)[2:].sum() + own_logprobs(base, "sft", ids[:4], 1.0)[1:].sum()
    torch.testing.assert_close(loss, -expected, rtol=1e-5, atol=1e-4)


def test_the_first_step_has_no_kl_and_a_gradient_for_every_matrix(trained: Trained) -> None:
    base = trained.base
    scored = experience.score(base, PPO, episodes(base, [(3, 5), (7, 2), (6, 8)]), "sft")
    assert torch.equal(scored.logprobs, scored.ref_logprobs) and scored.logprobs.abs().max() > 0
    experience.check_start([scored], base.dtype)
    scored.advantages = torch.where(scored.mask, torch.linspace(-1, 1, scored.mask.shape[1]), 0.0)
    stage: Any = SimpleNamespace(base=base, config=PPO, backward=lambda loss: loss.backward())
    part = ppo.losses(stage, scored, scored.mask.sum())
    assert part["approx_kl"] == 0.0
    parameters = base.named_parameters("policy")
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    for role in ("policy", "critic"):
        for parameter in base.named_parameters(role).values():
            parameter.grad = None


def test_the_trunk_is_bit_exact(trained: Trained) -> None:
    base = trained.base
    for side in ("left", "right"):
        input_ids, mask = batch([9, 3, 7], side)
        trunk = base.trunk(input_ids, mask)
        assert trunk is not None
        for role in ("policy", None):
            with torch.no_grad():
                assert torch.equal(base.hidden(role, input_ids, mask, trunk), base.hidden(role, input_ids, mask))


def test_what_is_sampled_follows_the_log_probs_that_are_trained(trained: Trained) -> None:
    """Greedy continuations of a padded batch are the likeliest tokens of the same states."""
    base = trained.base
    input_ids, mask = batch([7, 3], "left")
    with base.role("policy"):
        rows = base.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=287,
        )
    for row, live in zip(rows, mask, strict=True):
        ids = row[int((live == 0).sum()) :]
        with torch.no_grad(), base.role("policy"):
            logits = base.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -4:-1]
        assert (logits.max(dim=-1).values - logits.gather(1, ids[-3:, None])[:, 0]).max() <= 1e-4


def test_the_merged_model_gives_the_same_logits(trained: Trained) -> None:
    base, folder = trained.base, trained.folder
    adapters.save_role(base, "policy", folder / "policy")
    base.tokenizer.save_pretrained(folder / "policy")
    merged = AutoModelForCausalLM.from_pretrained(merge(str(folder / "policy"), str(folder / "merged")))
    input_ids, mask = batch([6, 6], "right")
    with torch.no_grad():
        with base.role("policy"):
            expected = base.model(input_ids=input_ids, attention_mask=mask).logits
        found = merged(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    with torch.no_grad(), base.role(None):
        assert (base.model(input_ids=input_ids, attention_mask=mask).logits - expected).abs().max() > 1e-2


def test_every_linear_module_of_the_upper_layers_is_adapted_but_routers_and_gates(trained: Trained) -> None:
    base = trained.base
    linear = {
        name
        for name, module in tiny_model(trained.name).named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and re.search(r"\.[23]\.", name)
    }
    left_out = NOT_ADAPTED.get(trained.name, set())
    adapted = {name.rsplit(".", 2)[0] for name in base.named_parameters("policy")}
    assert adapted == {name for name in linear if name.rsplit(".", 1)[-1] not in left_out}
    assert {name for note in base.notes for name in re.findall(r"\w+", note.partition(":")[2])} == left_out


def test_experts_that_get_no_adapter_are_named(trained: Trained) -> None:
    fused = [name for name, p in trained.base.model.named_parameters() if "experts." in name and p.dim() == 3]
    notes = [note for note in trained.base.notes if note.startswith("the experts (")]
    assert len(notes) == (1 if fused else 0)
    assert all(re.search(r"\d+\.(.*)", name)[1] in notes[0] for name in fused)


def test_the_docs_list_the_architectures_that_are_tested() -> None:
    text = DOCS.read_text(encoding="utf-8")
    listed = re.search(r"<!-- tested -->\n(.*?)<!-- /tested -->", text, re.DOTALL)
    assert listed is not None
    assert sorted(re.findall(r"`([\w-]+)`", listed.group(1))) == sorted(TABLE)
