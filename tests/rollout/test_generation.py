"""The fast engine on every architecture of the table: it predicts as transformers does, or says why it does not run."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_models import TABLE, randomise, settings, tiny_model  # noqa: E402
from transformers import AutoTokenizer

from rlhf_fast.data import PromptRow
from rlhf_fast.models import SharedBase
from rlhf_fast.ops import linear_logprobs
from rlhf_fast.rollout import Response, choose_engine, collate_episodes, generate

MakeRow = Callable[[list[int]], PromptRow]
LENGTHS = [3, 9, 1, 6, 12]
PROMPTS = [[(7 * length + 5 * place) % 250 + 2 for place in range(length)] for length in LENGTHS]


@pytest.fixture(params=list(TABLE))
def any_base(request: pytest.FixtureRequest, folder: Path) -> SharedBase:
    return make(request.param, folder)


def make(architecture: str, folder: Path, **changes: int) -> SharedBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = SharedBase(tiny_model(architecture), tokenizer, settings(**changes))
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
        options = base.vocabulary.options(temperature)
        states, weight = episodes.before_response(hidden), base.vocabulary.weight
        found = linear_logprobs(
            states, weight, episodes.targets, episodes.response_mask, vocab_size=base.vocab_size, **options
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
