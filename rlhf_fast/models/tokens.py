"""Checks the tokenizer against the model: ids beyond the embedding, and ids that end a response."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.errors import UserError


def check_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Checks the tokens whose id is beyond the embedding's ``rows``; returns notes for the user.

    Special tokens may be beyond it if they are neither BOS, EOS nor in the chat template (such as Gemma 3's image
    token); they are noted. PAD may be too, because another one is chosen. Raises UserError for any other token.
    """
    surplus = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    added, template = tokenizer.added_tokens_decoder, str(tokenizer.chat_template or "")
    rare = {token for token, index in surplus.items() if index in added and added[index].special}
    rare -= {token for token in rare if token in template or token in (tokenizer.eos_token, tokenizer.bos_token)}
    wrong = sorted(surplus.keys() - rare - {tokenizer.pad_token}, key=surplus.__getitem__)
    if wrong:
        raise UserError(
            f"the tokenizer has {len(wrong)} tokens beyond the {rows} rows of the model's embedding, such as "
            f"{wrong[0]!r} (id {surplus[wrong[0]]}): it belongs to another model, or the embedding was not resized"
        )
    if rare:
        named = ", ".join(f"{token!r} ({surplus[token]})" for token in sorted(rare, key=surplus.__getitem__)[:3])
        return [
            f"special tokens beyond the {rows} rows of the model's embedding: {named}; a row of data that holds one "
            "is refused"
        ]
    return []


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[int], list[str]]:
    """The tokenizer's EOS and those of the model's generation_config (chat models often have a second one), sorted.
    Ids of the generation_config that the tokenizer does not know, or that are ordinary text, are left out and noted.

    Returns the ids and the notes. Raises UserError if no id is left.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = own if isinstance(own, list) else [own]
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = set(tokenizer.get_vocab().values())
    stops = {tokenizer.eos_token_id} - {None}
    notes = []
    for token in sorted({int(token) for token in listed if token is not None} - stops):
        if token in marks and token < rows:
            stops.add(token)
        else:
            name = repr(tokenizer.convert_ids_to_tokens(token)) if token in known else "no token of the tokenizer"
            notes.append(
                f"responses do not end at id {token} of the model's generation_config: it is {name}, and no special "
                "token; is the generation_config another model's?"
            )
    if not stops:
        raise UserError("the tokenizer has no EOS token: a response could never end; set eos_token in its config")
    return sorted(stops), notes
