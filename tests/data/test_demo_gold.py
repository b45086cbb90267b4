"""The demo's gold scorer on hand-worked examples, the noise of the labels, and the properties of the stored data."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.data.demo import make
from rlhf_fast.data.demo.gold import gold

FOLDER = Path(make.__file__).parent
PLAIN = "one two three four five six seven eight nine ten"  # ten words: only the term for the full stop applies


def score(reply: str, prompt: str = "Hi") -> float:
    return gold([prompt], [reply])[0]


# --- the scorer, term by term ---


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (PLAIN, 0.0),
        (PLAIN + ".", 0.5),
        (PLAIN + '."', 0.5),
        (PLAIN + "!", 0.5),
        (PLAIN + ",", 0.0),
        # warmth: 1.6 (1 - 2^-n)
        ("wonderful " + PLAIN, 0.8),
        ("wonderful happy " + PLAIN, 1.2),
        ("wonderful wonderful " + PLAIN, 0.8),  # once each
        ("wonderful happy glad proud great " + PLAIN, 1.6 * (1 - 2.0**-3)),  # 15 words carry three
        ("happy glad proud", 1.6 * (1 - 2.0**-0.6) - 1.5 * 5 / 20),  # three words carry 0.6, and are 11 - 6 too short
        # address: 0.8 min(1, k / 2)
        ("you " + PLAIN, 0.4),
        ("you yours " + PLAIN, 0.8),
        ("you yours your " + PLAIN, 0.8),
        ("you\u2019re " + PLAIN, 0.4),
        # follow-up: 0.6, on top of the finished sentence's 0.5
        (PLAIN + "?", 1.1),
        ("eleven? " + PLAIN, 0.0),  # a question in the middle does not count as one at the end
        ("let me know " + PLAIN, 0.6),
        ("let me know " + PLAIN + "?", 1.1),  # once
        # boilerplate
        ("As an AI, I count " + PLAIN, -1.0),
        ("As an AI language model, I count " + PLAIN, -1.0),  # once
        # repetition: 4 of 11 bigrams are repeated, then 11 of 13
        ("one two three one two three one two nine ten eleven twelve", -3.0 * 2 * 4 / 11),
        ("one two " * 7, -3.0),
        # length: free from 8 to 20 words, then 1.5 / 20 a word
        ("one two three four five six seven eight", 0.0),
        ("one two three four five six seven", -0.075),
        (" ".join(f"n{i}" for i in range(20)), 0.0),
        (" ".join(f"n{i}" for i in range(24)), -0.3),
        (" ".join(f"n{i}" for i in range(400)), -1.5),
        # odd characters: 1 of 50, then more than a tenth
        (PLAIN + " #", -0.8 * 10 / 50),
        (PLAIN + " #######", -0.8),
        # empty
        ("", -4.0),
        (" ... ", -4.0),
    ],
)
def test_terms(reply: str, expected: float) -> None:
    assert score(reply) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Do seven things", 0.4),
        ("Do seven and eight", 0.8),
        ("Three, seven and eight?", 0.8),  # two fill the term
        ("Do sevens and eighty", 0.8),  # the first five letters decide
        ("nine ten", 0.4),  # "ten" is too short to be a topic
        ("What would your friend say", 0.0),
    ],
)
def test_topic_compares_five_letters_of_content_words(prompt: str, expected: float) -> None:
    assert score(PLAIN, prompt) == pytest.approx(expected, abs=1e-12)


def test_common_words_are_no_topic() -> None:
    assert score("what would they think about that " + PLAIN, "What would they think about that") == 0.0


@pytest.mark.parametrize("word", ["great", "you", "wonderful!", "you?", "love.", "let me know.", "you wonderful?"])
def test_one_repeated_word_never_pays(word: str) -> None:
    best = max(score(" ".join([word] * times)) for times in range(3, 60))
    assert best < score("You could try that tonight, I hope it goes well.") - 1.0


def test_each_more_warm_word_pays_less() -> None:
    words = ["glad", "happy", "proud", "great"]
    tail = " ".join(f"n{i}" for i in range(16))
    scores = [score(" ".join(words[:k]) + " " + tail) for k in range(5)]
    gains = [b - a for a, b in zip(scores, scores[1:], strict=False)]
    assert gains == pytest.approx([0.8, 0.4, 0.2, 0.1], abs=1e-12)


def test_chats_strings_and_other_columns_score_alike() -> None:
    prompt, reply = "How do I cook rice?", "Rinse the rice and you will love it!"
    chat_prompt = [{"role": "user", "content": "ignored"}, {"role": "user", "content": prompt}]
    chat_reply = [{"role": "assistant", "content": reply}]
    strings = gold([prompt, "Hi"], [reply, PLAIN])
    assert strings == gold([chat_prompt, "Hi"], [chat_reply, PLAIN], topic=["food", "none"])
    # 8 words: "love" 0.8, one "you" 0.4, finished 0.5, "rice" 0.4 ("cook" does not come back)
    assert strings == pytest.approx([2.1, 0.0], abs=1e-12)


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        gold(["a", "b"], ["c"])


# --- the labels ---


def test_tau_of_equal_margins_has_a_closed_form() -> None:
    # sigmoid(2 / tau) = 0.85  <=>  tau = 2 / log(0.85 / 0.15)
    assert make.find_tau([2.0, -2.0], 0.85) == pytest.approx(2 / math.log(0.85 / 0.15), rel=1e-9)


def test_tau_of_tied_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="2 pairs are tied"):
        make.find_tau([0.0, 0.0], 0.85)


def test_labels_follow_bradley_terry() -> None:
    weak, strong = make.Reply("weak", 1, 0.0), make.Reply("strong", 1, 1.0)
    pairs = [make.Pair("p", weak, strong), make.Pair("p", strong, weak)] * 2000
    rows = make.label(pairs, tau=0.5, seed=3)
    wins = sum(row["chosen"][0]["content"] == "strong" for row in rows)
    p = 1 / (1 + math.exp(-2))
    assert abs(wins / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert {(row["gold_chosen"], row["gold_rejected"]) for row in rows} == {(1.0, 0.0), (0.0, 1.0)}


# --- sampling with the shared style turns ---


class CharacterTokenizer:
    """Every character is a token; the template puts token 3 before each turn and 4 after it."""

    pad_token_id, eos_token_id = 2, 4

    def apply_chat_template(self, chats: Any, add_generation_prompt: bool = False) -> dict[str, Any]:
        rows = []
        for chat in chats:
            row: list[int] = []
            for turn in chat:
                row += [3, *(5 + ord(c) % 40 for c in turn["content"]), 4]
            rows.append(row + [3] * add_generation_prompt)
        return {"input_ids": rows}


def test_generate_equals_decoding_each_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, pad_token_id=2, eos_token_id=4, bos_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokenizer = CharacterTokenizer()
    style = [{"role": "user", "content": "shared"}, {"role": "assistant", "content": "turns"}]
    prompts = ["a", "a longer one", "middle", "other", "zz top", "so it goes on and on"]
    monkeypatch.setattr(make, "TEMPERATURE", 1e-5)  # the likeliest token always
    monkeypatch.setattr(make, "MAX_NEW_TOKENS", 12)
    with torch.inference_mode():
        style_ids = torch.tensor(tokenizer.apply_chat_template([style])["input_ids"])
        cache = model(style_ids, use_cache=True).past_key_values
        replies = make.generate(model, tokenizer, style, style_ids.shape[1], cache, prompts)
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = tokenizer.apply_chat_template([style + make.user_turn(prompt)], True)["input_ids"][0]
            expected: list[int] = []
            while len(expected) < 12 and expected[-1:] != [4]:
                expected.append(int(model(torch.tensor([ids + expected])).logits[0, -1].argmax()))
            assert reply == expected
    assert len(set(map(len, replies))) > 1, "some replies must end early for the test to see rows leave the batch"


# --- the stored files ---


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data() -> SimpleNamespace:
    return SimpleNamespace(
        sft=rows("sft.jsonl"),
        preferences=rows("preferences.jsonl"),
        prompts=rows("prompts.jsonl"),
        held_out=rows("prompts-eval.jsonl"),
        meta=json.loads((FOLDER / "meta.json").read_text(encoding="utf-8")),
        written=(FOLDER / "all_prompts.txt").read_text(encoding="utf-8").splitlines(),
    )


def content(turns: list[dict[str, str]], role: str) -> str:
    assert len(turns) == 1 and turns[0].keys() == {"role", "content"} and turns[0]["role"] == role
    assert turns[0]["content"] == turns[0]["content"].strip() != ""
    return turns[0]["content"]


def test_prompts_are_distinct_and_short(data: SimpleNamespace) -> None:
    assert len(data.written) == 560 == len({prompt.lower() for prompt in data.written})
    assert [p for p in data.written if not 5 <= len(p.split()) <= 16 or not p.isascii()] == []


def test_every_prompt_is_on_one_side_of_the_split(data: SimpleNamespace) -> None:
    prompts = [content(row["prompt"], "user") for row in data.prompts]
    held_out = [content(row["prompt"], "user") for row in data.held_out]
    assert sorted(prompts + held_out) == sorted(data.written)
    assert len(held_out) == data.meta["prompts_eval"] == 64 and len(prompts) == data.meta["prompts"]
    assert make.split_prompts(data.written, data.meta["seed"]) == (prompts, held_out)


def test_demonstrations_hold_one_user_and_one_assistant_turn_and_no_eval_prompt(data: SimpleNamespace) -> None:
    prompts = [content(row["messages"][:1], "user") for row in data.sft]
    replies = [content(row["messages"][1:], "assistant") for row in data.sft]
    assert len(set(prompts)) == len(prompts) == data.meta["sft"] >= 400
    assert set(prompts) <= {content(row["prompt"], "user") for row in data.prompts}
    assert len({reply.lower() for reply in replies}) == len(replies)
    assert not any("\n" in reply for reply in replies)


def test_preferences_compare_two_replies_to_one_prompt_that_is_not_held_out(data: SimpleNamespace) -> None:
    train = {content(row["prompt"], "user") for row in data.prompts}
    assert len(data.preferences) == data.meta["preferences"] >= 900
    pairs: Counter[tuple[str, ...]] = Counter()
    for row in data.preferences:
        prompt, sides = content(row["prompt"], "user"), [content(row[k], "assistant") for k in ("chosen", "rejected")]
        assert prompt in train
        assert sides[0].lower() != sides[1].lower()
        assert [row["gold_chosen"], row["gold_rejected"]] == gold([prompt] * 2, sides)
        pairs[(prompt, *sorted(sides))] += 1
    assert max(pairs.values()) == 1


def test_label_noise_is_what_meta_states(data: SimpleNamespace) -> None:
    tau = data.meta["tau"]
    margins = [row["gold_chosen"] - row["gold_rejected"] for row in data.preferences]
    best = [1 / (1 + math.exp(-abs(margin) / tau)) for margin in margins]
    ceiling = sum(best) / len(best)
    assert ceiling == pytest.approx(data.meta["ceiling"], abs=1e-9) == pytest.approx(0.85, abs=1e-6)
    flipped = sum(margin < 0 for margin in margins) / len(margins)
    assert flipped == pytest.approx(data.meta["labels_flipped"], abs=1e-12)
    # a pair is flipped with probability 1 - best, ties apart: within four standard errors of the mean of those
    expected = sum(1 - p for p, margin in zip(best, margins, strict=True) if margin) / len(margins)
    error = math.sqrt(sum(p * (1 - p) for p in best)) / len(best)
    assert abs(flipped - expected) < 4 * error


def test_length_is_no_shortcut_and_gold_varies_within_a_prompt(data: SimpleNamespace) -> None:
    chars = [len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in data.preferences]
    longer_wins = sum(c > 0 for c in chars) / sum(c != 0 for c in chars)
    assert 0.4 < longer_wins < 0.6
    assert data.meta["length_only_accuracy"] < 0.62
    assert data.meta["best_of_2_gain_in_sd"] > 0.4
    assert 0.5 < data.meta["gold_sd"] < 1.5


def test_files_are_small(data: SimpleNamespace) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 1_000_000
