"""Checks of the tokenizer on the stage's rows: PAD and EOS, the mask of trained tokens, special tokens in the text."""

from rlhf_fast.config import PPOConfig
from rlhf_fast.data import PairRow, PromptRow
from rlhf_fast.data.conversation import EOS_ADDED, PLAIN_BESIDE_TEMPLATE, REWRITTEN
from rlhf_fast.data.special import TextEncoder
from rlhf_fast.doctor.findings import Check, Finding, error, note, ok, share, warning
from rlhf_fast.doctor.subject import OpenStage, StageData
from rlhf_fast.text import shown


def pad_and_eos(data: StageData) -> Finding:
    tokenizer = data.tokenizer
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokens = f"PAD is {tokenizer.pad_token!r} (id {pad}), EOS is {tokenizer.eos_token!r} (id {eos})"
    why = "An EOS that is padding is masked and never learnt: responses would not end."
    if pad is None or pad == eos:
        return error(tokens, why, "Give the tokenizer a PAD token of its own (pad_token in tokenizer_config.json).")
    changed = [line for line in data.tokenizer_notes if "PAD is now" in line]
    if changed:
        return note(changed[0], why, "Nothing: the run changes PAD in the same way, and saves it with the adapters.")
    return ok(tokens)


def trained_tokens(data: StageData) -> Finding:
    """Shows on one row which tokens are trained on, or after which a response is sampled."""
    row = data.rows[0]
    if isinstance(row, PromptRow):
        end = data.tokenizer.decode(row.input_ids)
        text = f"row {row.index}: responses begin after {len(row.input_ids)} tokens, which end in {shown(end[-80:])}"
    else:
        ids, mask = ids_and_mask(row)
        first = mask.index(1)
        if first == 0:
            return error(
                f"row {row.index}: every token is trained on, the first one too: the row has no prompt",
                "Loss belongs on response tokens alone.",
                "Look at the columns of the data (docs: Data), or at the chat template.",
            )
        before, trained = data.tokenizer.decode(ids[:first]), data.tokenizer.decode(ids[first:])
        if len(trained) > 120:
            trained = f"{trained[:80]} ... {trained[-30:]}"
        text = (
            f"row {row.index}: {sum(mask)} of {len(ids)} tokens are trained on, {shown(trained)}, after what ends in "
            f"{shown(before[-80:])}"
        )
    forms = "; ".join(f"{form}: {count} rows" for form, count in data.report.forms.items())
    if PLAIN_BESIDE_TEMPLATE in data.report.forms:
        why = "A chat model that is trained on text without its template learns another format than the one it knows."
        return note(f"{text}. {forms}", why, "Give the prompts as chat turns (messages) if you want the template.")
    if REWRITTEN in data.report.notes:
        count, first_place = data.report.notes[REWRITTEN]
        why = "The template writes a turn in more ways than one; each answer is trained as sampling would meet it."
        return note(f"{text}. {count} rows are {REWRITTEN} (first: {first_place})", why, "Nothing, if that is meant.")
    if EOS_ADDED.format(data.tokenizer.eos_token) in data.report.facts:
        why = "Without a token at its end a response would never stop."
        return note(f"{text}. {'; '.join(data.report.facts)}", why, "Nothing, or a template that closes its turns.")
    return ok(f"{text}. {forms}")


def ids_and_mask(row: object) -> tuple[list[int], list[int]]:
    """The tokens of a row, of a pair its chosen side, and 1 for those that are trained on."""
    if isinstance(row, PairRow):
        response = row.chosen_response_length
        return row.chosen_ids, [0] * (len(row.chosen_ids) - response) + [1] * response
    return row.input_ids, row.response_mask  # type: ignore[attr-defined]


def special_tokens(data: StageData) -> Finding:
    """Whether text of the data spells special tokens, and what becomes of them."""
    encoder = TextEncoder(data.tokenizer)
    found = [(place, name) for place, row in enumerate(data.table, 1) if (name := encoder.first(row)) is not None]
    if not found:
        return ok(f"no text of the data spells a special token{data.scope}")
    place, name = found[0]
    where = f"{share(len(found), data.seen)} rows spell a special token{data.scope}; first: row {place}, {name!r}"
    if not data.config.special_tokens_in_data:
        ids = encoder.encode(encoder.hide(name))
        return note(
            f"{where}, which is encoded as {len(ids)} ordinary tokens",
            "Text of a user must not close a turn or open one for the assistant.",
            "Nothing, if it is text. If the data were rendered with a template before, give the turns instead.",
        )
    return warning(
        f"{where}, which becomes the token {data.tokenizer.convert_tokens_to_ids(name)}",
        "Whoever writes the text of a prompt can close the turn, and write one of the assistant or of the system.",
        "Leave --special_tokens_in_data unset, unless all of the data are your own.",
    )


def answer_end(opened: OpenStage) -> Finding:
    """Whether the answers that are trained on end in a token at which sampling stops."""
    stops = opened.base.stop_ids
    names = ", ".join(repr(opened.data.tokenizer.convert_ids_to_tokens(token)) for token in stops)
    why = "A model that is never shown the end of an answer does not learn to stop."
    if not stops:
        change = "Leave --ignore_eos unset: it is for benchmarks."
        return warning("no token ends a response: each has response_length tokens", why, change)
    if isinstance(opened.config, PPOConfig):
        return ok(f"sampling stops at {names}")
    rows = opened.data.rows
    ended = sum(ids_and_mask(row)[0][-1] in stops for row in rows)
    found = f"{share(ended, len(rows))} training answers end in a stop token ({names})"
    found += "; the others are cut" if ended < len(rows) else ""
    change = f"Raise --max_length ({opened.config.max_length}), or take shorter answers."
    if ended == 0:
        return error(found, why, change)
    return warning(found, why, change) if ended < 0.8 * len(rows) else ok(found)


CHECKS: list[Check] = [pad_and_eos, trained_tokens, special_tokens]
