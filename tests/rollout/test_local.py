"""Sampling: the distribution, the end of a response, and independence of padding and batching."""

import math
from collections.abc import Callable

import pytest
import torch

from rlhf_fast.data import PromptRow
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, Vocabulary
from rlhf_fast.ops import linear_logprobs
from rlhf_fast.rollout import Response, collate_episodes, generate

MakeRow = Callable[[list[int]], PromptRow]

PROMPTS = [[40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66], [70, 71]]


def sample(base: SharedBase, rows: list[PromptRow], role: str | None = "policy", **changes: float) -> list[Response]:
    torch.manual_seed(0)
    return generate(base, role, rows, **{"response_length": 8, "temperature": 1.0, "batch_size": 3, **changes})


@pytest.fixture
def forced(base: SharedBase, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[int]]], None]:
    """``forced(rows)``: row i of a batch generates rows[i], whatever the model's logits are."""

    def force(rows: list[list[int]]) -> None:
        calls = iter(range(len(rows[0])))

        def raw(_: Vocabulary, hidden: torch.Tensor) -> torch.Tensor:
            column = next(calls)
            logits = torch.full((len(hidden), 320), -50.0)
            for row, tokens in enumerate(rows):
                logits[row, tokens[column]] = 50.0
            return logits

        monkeypatch.setattr(Vocabulary, "raw", raw)

    return force


def logprobs(base: SharedBase, role: str | None, responses: list[Response], temperature: float) -> torch.Tensor:
    """As scored in training: (B, R), 0 at positions without a token."""
    episodes = collate_episodes(responses, base.pad_id, base.device)
    with torch.no_grad():
        hidden = episodes.before_response(base.hidden(role, episodes.input_ids, episodes.attention_mask))
        scores = linear_logprobs(
            hidden,
            base.vocabulary.weight,
            episodes.targets,
            episodes.response_mask,
            vocab_size=base.vocab_size,
            temperature=temperature,
        )
    assert isinstance(scores, torch.Tensor)
    return scores


# ---- where a response ends -----------------------------------------------------------------------------------------


def test_a_response_is_cut_after_its_first_stop_token(
    base: SharedBase, row: MakeRow, forced: Callable[[list[list[int]]], None]
) -> None:
    base.stop_ids = [1, 7]
    forced([[30, 31, 1, 33, 34], [30, 7, 1, 33, 34], [1, 31, 7, 33, 34], [30, 31, 32, 33, 34]])
    responses = sample(base, [row(ids) for ids in PROMPTS], response_length=5, batch_size=4)
    assert [r.token_ids for r in responses] == [[30, 31, 1], [30, 7], [1], [30, 31, 32, 33, 34]]
    assert [r.stopped for r in responses] == [True, True, True, False]


def test_a_stop_token_at_the_very_end_still_stops(
    base: SharedBase, row: MakeRow, forced: Callable[[list[list[int]]], None]
) -> None:
    forced([[30, 31, 1]])
    (response,) = sample(base, [row([40])], response_length=3)
    assert response.stopped and response.token_ids == [30, 31, 1]


def test_pad_that_was_sampled_is_a_token_and_pad_after_the_end_is_none(
    base: SharedBase, row: MakeRow, forced: Callable[[list[list[int]]], None]
) -> None:
    forced([[0, 30, 0, 31], [30, 1, 55, 55]])
    responses = sample(base, [row([40]), row([41])], response_length=4)
    assert [r.token_ids for r in responses] == [[0, 30, 0, 31], [30, 1]]
    assert [r.stopped for r in responses] == [False, True]
    assert collate_episodes(responses, 0, base.device).response_mask.sum(dim=1).tolist() == [4, 2]


def test_the_text_is_the_response_without_its_stop_token_and_pads(
    base: SharedBase, row: MakeRow, forced: Callable[[list[list[int]]], None]
) -> None:
    ids = base.tokenizer(" hi you").input_ids
    forced([[*ids, 0, 1]])
    (response,) = sample(base, [row([40])], response_length=len(ids) + 2)
    assert response.text == "hi you" and response.row.input_ids == [40]


@pytest.mark.parametrize(("skip", "expected"), [({}, "<think>a</think>b"), ({"skip_special_tokens": True}, "ab")])
def test_other_special_tokens_are_in_the_text_unless_skipped(
    base: SharedBase, row: MakeRow, forced: Callable[[list[list[int]]], None], skip: dict[str, bool], expected: str
) -> None:
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    base.vocab_size = len(base.tokenizer)
    ids = base.tokenizer("<think>a</think>b", add_special_tokens=False).input_ids
    assert len(ids) == 4
    forced([[*ids, 1, 0], [*ids, 40, 41]])
    stopped, cut = sample(base, [row([40])] * 2, response_length=6, **skip)
    assert stopped.text == expected and stopped.token_ids == [*ids, 1]
    assert cut.text == expected + base.tokenizer.decode([40, 41])


# ---- what is sampled from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", None])
def test_at_a_tiny_temperature_the_choice_is_the_argmax_of_an_unpadded_forward(
    base: SharedBase, row: MakeRow, role: str | None
) -> None:
    rows = [row(ids) for ids in PROMPTS]
    responses = sample(base, rows, role, temperature=1e-4)
    assert [response.row for response in responses] == rows
    for response in responses:
        ids, greedy = list(response.row.input_ids), []
        for _ in response.token_ids:
            with torch.no_grad(), base.role(role):
                logits = base.model(input_ids=torch.tensor([ids])).logits[0, -1, :258]
            greedy.append(int(logits.argmax()))
            ids.append(greedy[-1])
        assert response.token_ids == greedy
        assert response.stopped or len(greedy) == 8
    assert len({tuple(response.token_ids) for response in responses}) == 4


def test_roles_differ_in_what_they_say(base: SharedBase, row: MakeRow) -> None:
    rows = [row(ids) for ids in PROMPTS]
    policy, bare = sample(base, rows), sample(base, rows, None)
    assert [r.token_ids for r in policy] != [r.token_ids for r in bare]


def test_rows_of_the_embedding_that_are_no_tokens_are_never_sampled(base: SharedBase, row: MakeRow) -> None:
    base.model.lm_head.weight.copy_(torch.zeros_like(base.model.lm_head.weight))  # all 320 equally likely
    responses = sample(base, [row([40])] * 64, response_length=16, batch_size=64)
    tokens = [token for response in responses for token in response.token_ids]
    assert len(tokens) > 500 and max(tokens) < 258
    assert len(set(tokens)) > 150  # and no top_k removes any


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_distribution_sampled_is_the_one_that_training_scores(
    base: SharedBase, row: MakeRow, temperature: float
) -> None:
    """The first tokens of many responses against log-probs of the same prompt, padded and alone."""
    count = 3000
    base.model.lm_head.weight.mul_(0.2)
    rows = [row([40, 41, 42])] * count + [row([50, 51, 52, 53, 54, 55])]  # the longer one makes all others padded
    responses = sample(base, rows, temperature=temperature, response_length=1, batch_size=len(rows))[:count]
    seen = torch.bincount(torch.tensor([response.token_ids[0] for response in responses]), minlength=258) / count
    with torch.no_grad(), base.role("policy"):
        logits = base.model(input_ids=torch.tensor([[40, 41, 42]])).logits[0, -1, :258]
    expected = (logits / temperature).softmax(dim=0)
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((seen - expected).abs() < 5 * spread + 1 / count).all()
    others = (logits / (temperature * 1.3)).softmax(dim=0)
    assert not ((seen - others).abs() < 5 * spread + 1 / count).all()  # the check tells temperatures apart


def test_log_probs_of_what_was_sampled_are_finite_and_the_same_padded_or_alone(base: SharedBase, row: MakeRow) -> None:
    responses = sample(base, [row(ids) for ids in PROMPTS], temperature=0.7, batch_size=4)
    together = logprobs(base, "policy", responses, 0.7)
    assert together.isfinite().all() and (together <= 0).all()
    for place, response in enumerate(responses):
        alone = logprobs(base, "policy", [response], 0.7)[0]
        torch.testing.assert_close(together[place, : len(alone)], alone, rtol=0, atol=2e-4)
        with torch.no_grad(), base.role("policy"):
            ids = torch.tensor([response.row.input_ids + response.token_ids])
            logits = base.model(input_ids=ids).logits[0, len(response.row.input_ids) - 1 : -1, :258]
        by_hand = (logits / 0.7).log_softmax(dim=-1).gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(alone, by_hand, rtol=0, atol=5e-4)  # of logits up to 60
    assert together.min() > -math.log(1e9)


def test_a_prompt_of_no_tokens_is_refused(base: SharedBase, row: MakeRow) -> None:
    with pytest.raises(UserError, match="prompts of no tokens in rows 1: nothing predicts the first token") as error:
        sample(base, [row([5]), row([])])
    assert "\n" not in str(error.value)


def test_the_same_seed_gives_the_same_responses_and_order_is_kept(base: SharedBase, row: MakeRow) -> None:
    rows = [row(ids) for ids in PROMPTS]
    first, second = sample(base, rows, batch_size=2), sample(base, rows, batch_size=2)
    assert [r.token_ids for r in first] == [r.token_ids for r in second]
    assert [r.row.input_ids for r in first] == PROMPTS
    assert sample(base, []) == []


def test_sampling_leaves_the_roles_trainable_and_without_gradients(base: SharedBase, row: MakeRow) -> None:
    for role in ("policy", None):
        sample(base, [row([40])], role)
    parameters = base.named_parameters("policy").values()
    assert all(p.requires_grad and p.grad is None for p in parameters)
