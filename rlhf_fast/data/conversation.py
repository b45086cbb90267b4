"""Encodes a prompt and its response with the chat template (answers.py), or as plain text."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.answers import Encoded, TurnWriter
from rlhf_fast.data.chat import template_text
from rlhf_fast.data.formats import Example
from rlhf_fast.data.turns import Text, format_transcript
from rlhf_fast.errors import UserError

EOS_ADDED = "the chat template writes no token after an assistant's turn: {!r} is added, and sampling stops there"
REWRITTEN = (
    "conversations in the training form of the chat template, which writes their turns in more ways than one: each "
    "answer follows what sampling would start from, and is written as when it is the last turn"
)
CHAT = "chat turns, written by the chat template"
AS_TEXT = "turns written as plain text, since the tokenizer has no chat template"
PLAIN = "plain text"
PLAIN_BESIDE_TEMPLATE = "plain text, and the chat template is not used; give messages to use it"


class ConversationEncoder:
    """Encodes prompts and responses with one tokenizer; ``source`` names the data set in errors.

    ``special_tokens_in_data``: text of a special token in the data becomes that token; else it is ordinary text.
    ``prompt`` and ``response`` raise Wrong for a row that the template refuses or cannot write.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: str, *, special_tokens_in_data: bool = False
    ) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.eos = str(tokenizer.eos_token)
        self._special_tokens_in_data = special_tokens_in_data
        self._writers: dict[str | None, TurnWriter] = {}
        self._default = self._writer(None)

    def _writer(self, tools: object) -> TurnWriter:
        """The writer for a row's template; a tokenizer may have another template for rows with tools."""
        text = template_text(self.tokenizer, tools)
        if text not in self._writers:
            self._writers[text] = TurnWriter(self.tokenizer, text, special_tokens_in_data=self._special_tokens_in_data)
        return self._writers[text]

    def form(self, example: Example) -> str:
        """How the prompt is written, in words."""
        if isinstance(example.prompt, str):
            return PLAIN if self.tokenizer.chat_template is None else PLAIN_BESIDE_TEMPLATE
        return CHAT if self.tokenizer.chat_template is not None else AS_TEXT

    def facts(self, forms: Iterable[str]) -> list[str]:
        """Notes for the user on the chat template, if some prompts were written with it."""
        end = self._default.end
        return [EOS_ADDED.format(end.name)] if CHAT in forms and end.added else []

    def special_text(self, example: Example) -> str | None:
        """The first special token in the text of the row (except EOS at the end of a string)."""
        responses = [self._without_eos(text) if isinstance(text, str) else text for text in example.responses]
        texts = self._writer(example.template.get("tools")).texts
        return texts.first([example.prompt, *responses, example.template])

    def prompt(self, example: Example) -> list[int]:
        """The prompt's tokens, including the generation prompt."""
        prompt = self._plain(example, example.prompt, answer_next=True)
        if isinstance(prompt, str):
            return self._default.texts.encode_prompt(self._default.texts.hide(prompt))
        return self._writer(example.template.get("tools")).prompt(prompt, example.template)

    def response(self, example: Example, response: Text) -> Encoded:
        """The tokens of prompt and response. Every assistant turn of the response is marked, none of the prompt."""
        prompt = self._plain(example, example.prompt, answer_next=True)
        if isinstance(prompt, str):
            text = self._plain(example, response, answer_next=False)
            assert isinstance(text, str), "formats.py lets no chat list answer a string"
            return self._strings(prompt, self._without_eos(text))
        assert isinstance(response, list), "formats.py lets no string answer a chat list"
        return self._writer(example.template.get("tools")).response(prompt, response, example.template)

    def _plain(self, example: Example, text: Text, *, answer_next: bool) -> Text:
        """Plain text for turns from a transcript or Alpaca's columns, if there is no chat template; else ``text``."""
        if isinstance(text, str) or self.tokenizer.chat_template is not None:
            return text
        if example.joined:
            return "".join(f"{turn['content']}\n\n" for turn in text) if answer_next else text[0]["content"]
        if not example.transcript:
            raise UserError(
                f"{self.source}, row {example.index}: a list of chat turns, but the tokenizer has no chat template; "
                "give one with --chat_template FILE, or use string columns"
            )
        if answer_next:
            return format_transcript(text, answer_next=True)
        # The prompt ends with "Assistant:", so the first answer comes without its mark.
        return " " + text[0]["content"] + format_transcript(text[1:])

    def _without_eos(self, response: str) -> str:
        """The response without EOS text at its end; the EOS token is appended later anyway."""
        return response.removesuffix(self.eos)

    def _strings(self, prompt: str, response: str) -> Encoded:
        texts = self._default.texts
        prompt_ids = texts.encode_prompt(texts.hide(prompt))
        response_ids = [*texts.encode(texts.hide(response)), int(self.tokenizer.eos_token_id)]
        mask = [0] * len(prompt_ids) + [1] * len(response_ids)
        return Encoded(prompt_ids + response_ids, mask, len(prompt_ids))
