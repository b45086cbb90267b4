"""The fast engine on every architecture of the table: it predicts as transformers does, or says why it does not run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_wrappers import WRAPPERS
from tiny_models import TABLE, randomise, settings, tiny_model
from transformers import AutoTokenizer

from rlhf_fast.data import PromptRow
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, merged
from rlhf_fast.models.pretrained import auto_class
from rlhf_fast.ops import linear_logprobs
from rlhf_fast.rollout import Generation, Response, cache, choose_engine, collate_episodes, generate

MakeRow = Callable[[list[int]], PromptRow]
LENGTHS = [3, 9, 1, 6, 12]
PROMPTS = [[(7 * length + 5 * place) % 250 + 2 for place in range(length)] for length in LENGTHS]


@pytest.fixture(params=[*TABLE, *WRAPPERS])
def any_base(request: pytest.FixtureRequest, folder: Path) -> SharedBase:
    return make(request.param, folder)


def make(architecture: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> SharedBase:
    """Two roles that differ, on the upper layers or on all; nothing stops a response."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if architecture in WRAPPERS:
        config = WRAPPERS[architecture]()
        torch.manual_seed(1)
        model = auto_class(config).from_config(config, dtype=dtype).requires_grad_(False).eval()
    else:
        model = tiny_model(architecture).to(dtype)
    base = SharedBase(model, tokenizer, settings(**changes))
    base.add_role("policy")
    randomise(base, "policy", 0)
    base.add_role("other")
    randomise(base, "other", 1)
    base.stop_ids = []
    return base


def sampled(base: SharedBase, rows: list[PromptRow], engine: str, **changes: float) -> list[Response]:
    torch.manual_seed(0)
    given = {"response_length": 6, "temperature": 1.0, "batch_size": 5, **changes}
    return generate(base, "policy", rows, engine=engine, **given)


def scored(base: SharedBase, responses: list[Response], temperature: float) -> torch.Tensor:
    """(B, R) log-probs as training computes them."""
    episodes = collate_episodes(responses, base.pad_id, base.device)
    with torch.no_grad():
        hidden = base.hidden("policy", episodes.input_ids, episodes.attention_mask)
        head, states = base.vocabulary_of("policy"), episodes.before_response(hidden)
        options = head.options(temperature)
        found = linear_logprobs(
            states, head.weight, episodes.targets, episodes.response_mask, vocab_size=base.vocab_size, **options
        )
    assert isinstance(found, torch.Tensor)
    return found


def test_greedy_tokens_are_those_of_transformers_and_log_probs_those_of_training(
    any_base: SharedBase, row: MakeRow
) -> None:
    base, rows = any_base, [row(ids) for ids in PROMPTS]
    assert choose_engine(base, "auto") == "fast", base.notes
    fast, reference = (sampled(base, rows, engine, temperature=1e-5) for engine in ("fast", "transformers"))
    assert [r.token_ids for r in fast] == [r.token_ids for r in reference]
    for engine in ("fast", "transformers"):
        responses = sampled(base, rows, engine, temperature=0.7)
        drawn = collate_episodes(responses, base.pad_id, base.device).sampled_logprobs
        torch.testing.assert_close(drawn, scored(base, responses, 0.7), rtol=0, atol=2e-4)
        assert drawn.min() < -0.5


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # gemma2's embedding is its head, and scaled
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="_and_".join)
def test_adapters_on_head_and_embedding_are_sampled_with(
    folder: Path, row: MakeRow, architecture: str, names: list[str]
) -> None:
    base = make(architecture, folder, lora_target_modules=["q_proj", *names])
    test_greedy_tokens_are_those_of_transformers_and_log_probs_those_of_training(base, row)


@pytest.fixture
def llama(folder: Path) -> SharedBase:
    return make("llama", folder, lora_layers=2)


# ---- engines -------------------------------------------------------------------------------------------------------


def test_in_bfloat16_both_engines_tell_what_they_sampled_with(folder: Path, row: MakeRow) -> None:
    base = make("llama", folder, torch.bfloat16)
    for engine in ("fast", "transformers"):
        responses = sampled(base, [row(ids) for ids in PROMPTS], engine)
        drawn = collate_episodes(responses, base.pad_id, base.device).sampled_logprobs
        assert (drawn - scored(base, responses, 1.0)).abs().mean() < 0.05


def test_what_the_fast_engine_gets_wrong_is_left_to_transformers_with_a_note(
    llama: SharedBase, row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.PreallocatedLayer, "get_seq_length", lambda self, *args: self.length + 1)
    assert [choose_engine(llama, "auto") for _ in range(2)] == ["transformers"] * 2
    notes = [note for note in llama.notes if "transformers" in note]
    assert len(notes) == 1 and notes[0].startswith("responses are sampled by transformers' generate, which is slower: ")
    assert len(sampled(llama, [row([5, 6])], "auto")[0].token_ids) == 6
    with pytest.raises(UserError, match="LlamaForCausalLM: .*: set --rollout_engine auto or transformers"):
        sampled(llama, [row([5, 6])], "fast")
    with pytest.raises(UserError, match="LlamaForCausalLM: .*: use generate, which has another engine"):
        Generation(llama, "policy", [row([5, 6])], response_length=3)


def test_an_engine_that_there_is_not_is_named(llama: SharedBase) -> None:
    with pytest.raises(UserError, match="must be one of auto, fast, transformers; got 'vllm'"):
        choose_engine(llama, "vllm")


# ---- the rows ------------------------------------------------------------------------------------------------------


def test_a_rows_response_depends_on_the_seed_and_not_on_the_batch(llama: SharedBase, row: MakeRow) -> None:
    rows = [row(ids) for ids in PROMPTS]
    whole, again, small = (sampled(llama, rows, "fast", batch_size=size) for size in (5, 5, 2))
    assert whole == again
    assert [r.token_ids for r in small] == [r.token_ids for r in whole]
    assert [r.row for r in small] == rows
    assert len({tuple(r.token_ids) for r in whole}) == 5
    torch.manual_seed(1)
    other = generate(llama, "policy", rows, response_length=6, temperature=1.0, batch_size=5, engine="fast")
    assert [r.token_ids for r in other] != [r.token_ids for r in whole]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom", "bamba", "qwen3_next", "lfm2"])
def test_rows_that_are_finished_leave_and_the_others_go_on_as_before(
    architecture: str, folder: Path, row: MakeRow
) -> None:
    base = make(architecture, folder)
    rows = [row(PROMPTS[place % 5] + [place + 2]) for place in range(12)]
    expected = sampled(base, rows, "fast", response_length=12, batch_size=12)
    base.stop_ids = sorted({token for r in expected for token in r.token_ids})[::5]
    torch.manual_seed(0)
    generation = Generation(base, "policy", rows, response_length=12)
    sizes = []
    while generation.live:
        sizes.append(len(generation.batch))
        assert generation.logits.shape == (sizes[-1], base.vocab_size)
        live = generation.live
        assert generation.step().rows == live
    assert sizes[0] == 12 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1
    for found, whole in zip(generation.responses(), expected, strict=True):
        end = next((i for i, token in enumerate(whole.token_ids) if token in base.stop_ids), None)
        assert found.token_ids == whole.token_ids[: None if end is None else end + 1]
        assert found.stopped == (end is not None) and len(found.logprobs) == len(found.token_ids)


def test_one_row_one_token_and_all_rows_stopping_at_once(llama: SharedBase, row: MakeRow) -> None:
    (one,) = sampled(llama, [row([5])], "fast", response_length=1)
    assert len(one.token_ids) == len(one.logprobs) == 1
    llama.stop_ids = list(range(llama.vocab_size))
    responses = sampled(llama, [row(ids) for ids in PROMPTS], "fast")
    assert all(r.stopped and len(r.token_ids) == 1 for r in responses)
    assert Generation(llama, "policy", [], response_length=3).responses() == []


def test_a_loop_of_ones_own_may_choose_the_tokens(llama: SharedBase, row: MakeRow) -> None:
    rows = [row(ids) for ids in PROMPTS[:2]]
    generation = Generation(llama, "policy", rows, response_length=4)
    while generation.live:
        logprobs = generation.logits.log_softmax(dim=1)
        best = logprobs.max(dim=1)
        generation.append(best.indices, best.values)
    greedy = sampled(llama, rows, "transformers", response_length=4, temperature=1e-5)
    responses = generation.responses()
    assert [r.token_ids for r in responses] == [r.token_ids for r in greedy]
    found = collate_episodes(responses, llama.pad_id, llama.device).sampled_logprobs
    torch.testing.assert_close(found, scored(llama, responses, 1.0), rtol=0, atol=1e-4)


def test_logits_that_are_not_finite_are_an_error(llama: SharedBase, row: MakeRow) -> None:
    generation = Generation(llama, "policy", [row([5])], response_length=4)
    generation.logits.fill_(float("nan"))
    with pytest.raises(UserError, match="its logits are not finite in torch.float32"):
        generation.step()


def test_calls_that_cannot_be_are_refused_by_a_line(llama: SharedBase, row: MakeRow) -> None:
    for changes, error in (
        ({"response_length": 0}, "response_length must be 1 or above; got 0"),
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
    ):
        with pytest.raises(ValueError, match=error):
            sampled(llama, [row([5])], "fast", **changes)
    with pytest.raises(UserError, match="prompts of no tokens in rows 1"):
        Generation(llama, "policy", [row([])], response_length=1)
    generation = Generation(llama, "policy", [row([5]), row([6])], response_length=1)
    with pytest.raises(ValueError, match=r"must have shape \(2,\), one a row of `batch`; got \(3,\) and \(2,\)"):
        generation.append(torch.zeros(3, dtype=torch.long), torch.zeros(2))
    generation.step()
    with pytest.raises(ValueError, match="every row is finished"):
        generation.step()


# ---- merged adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_merged_into_copies_and_the_base_is_as_it_was(
    architecture: str, dtype: torch.dtype, folder: Path
) -> None:
    base = make(architecture, folder, dtype)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    modules = list(base.model.modules())
    ids = torch.randint(2, 258, (2, 7))
    expected = base.hidden("policy", ids, torch.ones_like(ids))
    twin = base.merged("policy")
    with pytest.raises(RuntimeError, match="in the middle"), twin.in_use():
        found = base.decoder.body(input_ids=ids).last_hidden_state
        assert list(base.model.modules()) != modules
        raise RuntimeError("in the middle")
    close = {torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(found, expected, rtol=0, atol=close)
    assert list(base.model.modules()) == modules
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.state_dict().items())
    adapted = [m.base_layer.weight for m in modules if hasattr(m, "lora_A") and "policy" in m.lora_A]
    assert twin.bytes == sum(weight.nbytes for weight in adapted) > 0


def test_without_a_role_the_bare_base_is_sampled(llama: SharedBase) -> None:
    ids = torch.randint(2, 258, (2, 7))
    twin = llama.merged(None)
    with torch.no_grad(), twin.in_use():
        found = llama.decoder.body(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, llama.hidden(None, ids, torch.ones_like(ids)), rtol=0, atol=1e-4)
    assert twin.bytes == 0


def test_a_copy_that_does_not_fit_is_said_in_a_line(llama: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10

    monkeypatch.setattr(merged.psutil, "virtual_memory", Memory)
    with pytest.raises(UserError, match=r"needs 0\.00 GB .*: set --rollout_engine transformers, .*--lora_layers"):
        llama.merged("policy")


def test_a_module_that_nothing_is_merged_into_is_left_to_transformers(
    llama: SharedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "_plain", lambda layer: False)
    assert choose_engine(llama, "auto") == "transformers"
    assert re.search("is a (Plain)?Linear, which an adapter is not merged into", llama.notes[-1])
    with pytest.raises(UserError, match="set --rollout_engine transformers"):
        llama.merged("policy")
