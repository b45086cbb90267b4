from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import CHAT_TEMPLATE, SPECIAL, build_tokenizer

from rlhf_fast.data import prepare_tokenizer
from rlhf_fast.errors import UserError


def test_pad_equal_to_eos_becomes_the_likeliest_unused_special_token(tokenizer: Any):
    size = len(tokenizer)
    (note,) = prepare_tokenizer(tokenizer, vocab_size=size)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert "PAD was '<|im_end|>'" in note and "PAD is now '<|endoftext|>'" in note
    assert len(tokenizer) == size, "the embedding would have to grow"


def test_a_pad_that_is_not_eos_is_kept(tokenizer: Any):
    tokenizer.pad_token = "<|repo|>"
    assert prepare_tokenizer(tokenizer, vocab_size=len(tokenizer)) == []
    assert tokenizer.pad_token == "<|repo|>"


def test_a_pad_outside_the_embedding_is_replaced(tokenizer: Any):
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == size
    prepare_tokenizer(tokenizer, vocab_size=size)
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<eos>", "<|repo|>", "<|unk|>", "<pad>"], "<pad>"),
        (["<eos>", "<|repo|>", "<|unk|>"], "<|unk|>"),
        (["<eos>", "<|repo|>", "<|reserved_0|>", "<|im_start|>"], "<|reserved_0|>"),
        (["<eos>", "<|repo|>"], "<|repo|>"),
        (["<eos>", "<|im_start|>", "<|im_end|>"], "<|pad|>"),
        (["<eos>"], "<|pad|>"),
    ],
)
def test_tokens_in_use_are_passed_over(special: list[str], expected: str):
    tokenizer = build_tokenizer(special, eos_token="<eos>", bos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    prepare_tokenizer(tokenizer, vocab_size=300)
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id < 300 and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_without_a_free_row_the_highest_ordinary_token_is_used():
    tokenizer = build_tokenizer(["<eos>"], eos_token="<eos>")
    size, before = len(tokenizer), tokenizer("a\n\nb")["input_ids"]
    (note,) = prepare_tokenizer(tokenizer, vocab_size=size)
    assert "there was no PAD" in note and "an ordinary token" in note
    assert tokenizer.pad_token_id == 256 and len(tokenizer) == size
    assert tokenizer("a\n\nb")["input_ids"] == before


def test_chat_template_from_a_file_and_from_a_string(tokenizer: Any, tmp_path: Path):
    tokenizer.pad_token = "<|repo|>"
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert prepare_tokenizer(tokenizer, vocab_size=300, chat_template=str(path)) == [f"chat template: {path}"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[x]"
    assert prepare_tokenizer(tokenizer, vocab_size=300, chat_template="{{ messages[0]['content'] }}!") == [
        "chat template: the string given"
    ]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"


def test_a_pad_is_chosen_with_the_new_template_in_view(tokenizer: Any):
    prepare_tokenizer(tokenizer, vocab_size=300, chat_template="<|endoftext|>{{ messages[0]['content'] }}")
    assert tokenizer.pad_token == "<|unk|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("nowhere.jinja", "--chat_template nowhere.jinja: no such file"),
        ("{% for m in messages %}", "the template fails on one user turn"),
        ("{{ raise_exception('no users') }}", "no users"),
    ],
)
def test_broken_templates(tokenizer: Any, template: str, expected: str):
    with pytest.raises(UserError, match="--chat_template") as caught:
        prepare_tokenizer(tokenizer, vocab_size=300, chat_template=template)
    assert expected in str(caught.value)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(UserError, match="has no EOS token"):
        prepare_tokenizer(build_tokenizer(SPECIAL), vocab_size=300)
