"""Stop ids of another tokenizer, and tokens without a row in the embedding."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import settings, tiny_model
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast, tokenizer_folder: object) -> PreTrainedTokenizerFast:
    """A tokenizer that a test may change: 258 tokens, PAD 0, EOS 1."""
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def base_of(tokenizer: PreTrainedTokenizerFast, eos: object = 1, **changes: int) -> SharedBase:
    model = tiny_model("llama", **changes)
    model.generation_config = GenerationConfig(eos_token_id=eos)
    return SharedBase(model, tokenizer, settings())


@pytest.mark.parametrize(
    ("eos", "said"),
    [
        ([1, 70], "id 70 of the model's generation_config: it is 'e', and no special token"),
        (70, "it is 'e'"),
        ([270], "id 270 of the model's generation_config: it is no token of the tokenizer"),
        ([1, 128009], "id 128009"),
    ],
)
def test_a_stop_id_that_is_text_or_unknown_is_left_out_and_named(
    own: PreTrainedTokenizerFast, eos: object, said: str
) -> None:
    base = base_of(own, eos)
    assert base.stop_ids == [1] and len(base.notes) == 1 and said in base.notes[0]


def test_special_and_added_tokens_stay_stop_ids(own: PreTrainedTokenizerFast) -> None:
    own.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    own.add_tokens(["<over>"])
    base = base_of(own, [1, 258, 259])
    assert (base.stop_ids, base.notes) == ([1, 258, 259], [])


def test_ordinary_tokens_beyond_the_embedding_are_refused(own: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"has 8 tokens beyond the 250 rows .*such as '.' \(id 250\)") as error:
        base_of(own, vocab_size=250)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_beyond_the_embedding_are_refused_where_they_will_be_used(
    own: PreTrainedTokenizerFast, special: bool
) -> None:
    own.add_tokens(["<turn>"], special_tokens=special)
    if special:
        own.chat_template += "<turn>"
    with pytest.raises(UserError, match=r"'<turn>' \(id 258\)"):
        base_of(own, vocab_size=258)


def test_a_special_token_that_no_text_needs_is_said_and_refused_in_the_data(own: PreTrainedTokenizerFast) -> None:
    """As <image_soft_token> of Gemma 3's text models."""
    own.add_special_tokens({"additional_special_tokens": ["<image>"]})
    base = base_of(own, vocab_size=258)
    assert len(base.notes) == 1 and "'<image>' (258)" in base.notes[0]
    base.check_tokens("data.jsonl", 3, [5, 257])
    with pytest.raises(UserError, match=r"data.jsonl, row 3: the token '<image>' \(id 258\) lies beyond the 258 rows"):
        base.check_tokens("data.jsonl", 3, [5, 258])


def test_the_command_line_names_the_row_that_holds_such_a_token(
    command: Callable[..., Any], own: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tiny_model("llama", vocab_size=258).save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "q", "completion": f"see {end}"} for end in ("this", "<image>", "that")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--model_name_or_path {tmp_path / 'model'} --dataset_name rows.jsonl --eval_size 0"
    flags += " --special_tokens_in_data true"  # else it is ordinary text
    outcome = command("sft", flags)
    assert outcome.code == 2 and "rows.jsonl, row 2: the token '<image>' (id 258)" in outcome.err
