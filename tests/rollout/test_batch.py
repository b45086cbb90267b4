"""Episodes as one batch: positions of prompts, responses and masks, worked by hand."""

from collections.abc import Callable

import pytest
import torch

from rlhf_fast.data import PromptRow
from rlhf_fast.rollout import EpisodeBatch, Response, collate_episodes

MakeRow = Callable[[list[int]], PromptRow]

PAD = 9


@pytest.fixture
def episodes(row: MakeRow) -> EpisodeBatch:
    """Prompts of 2, 3 and 1 tokens; responses of 3, 1 and 2, the last one not stopped and with a PAD in it."""
    responses = [
        Response(row([11, 12]), [21, 22, 1], True, ""),
        Response(row([13, 14, 15]), [1], True, ""),
        Response(row([16]), [PAD, 23], False, ""),
    ]
    return collate_episodes(responses, PAD, torch.device("cpu"))


def test_prompts_stand_left_and_responses_right_of_one_column(episodes: EpisodeBatch) -> None:
    assert episodes.input_ids.tolist() == [
        [PAD, 11, 12, 21, 22, 1],
        [13, 14, 15, 1, PAD, PAD],
        [PAD, PAD, 16, PAD, 23, PAD],
    ]
    assert episodes.attention_mask.tolist() == [
        [0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
    ]
    assert episodes.targets.tolist() == [[21, 22, 1], [1, PAD, PAD], [PAD, 23, PAD]]
    assert episodes.response_mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert episodes.stopped.tolist() == [True, True, False]
    assert episodes.input_ids.dtype == episodes.attention_mask.dtype == episodes.targets.dtype == torch.int64
    assert episodes.response_mask.dtype == episodes.stopped.dtype == torch.bool


def test_a_tokens_logits_come_from_the_position_before_it(episodes: EpisodeBatch) -> None:
    """The values at the columns of [.., 2, 3, 4] are those that the responses' columns 3, 4, 5 are predicted from."""
    columns = torch.arange(6).expand(3, 6)
    assert episodes.before_response(columns).tolist() == [[2, 3, 4]] * 3
    assert episodes.before_response(episodes.input_ids).tolist() == [[12, 21, 22], [15, 1, PAD], [16, PAD, 23]]
    assert episodes.before_response(torch.zeros(3, 6, 8)).shape == (3, 3, 8)


def test_one_episode_of_one_token_is_as_narrow_as_it_can_be(row: MakeRow) -> None:
    episodes = collate_episodes([Response(row([5]), [1], True, "")], PAD, torch.device("cpu"))
    assert episodes.input_ids.tolist() == [[5, 1]]
    assert episodes.before_response(episodes.input_ids).tolist() == [[5]]
    assert episodes.response_mask.tolist() == [[True]]


def test_ids_are_integers_where_a_prompt_or_a_response_is_empty_too(row: MakeRow) -> None:
    for prompt, answer in (([], [1]), ([5], [])):
        episodes = collate_episodes([Response(row(prompt), answer, True, "")], PAD, torch.device("cpu"))
        assert episodes.input_ids.dtype == episodes.targets.dtype == episodes.attention_mask.dtype == torch.int64
        assert episodes.input_ids.tolist() == [[*prompt, *answer]]


def test_the_rows_keep_their_order(episodes: EpisodeBatch) -> None:
    assert [response.token_ids for response in episodes.responses] == [[21, 22, 1], [1], [PAD, 23]]
