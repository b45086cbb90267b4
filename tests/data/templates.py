"""Chat templates for the tests; each treats assistant turns as one family of models does.

``FAMILIES``: name -> (template, special tokens, EOS, the text that stands for an answer "b1" in training after the
prompt, and the same for the last answer of a conversation of two).
"""

from typing import NamedTuple

TURN = "{%- for m in messages -%}"
DONE = "{%- endfor -%}"
LAST_QUESTION = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
SPLIT_THOUGHT = (
    "{%- set said = m.content -%}{%- set thought = m.reasoning_content or '' -%}"
    "{%- if '</think>' in said -%}{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
)


def ask(text: str) -> str:
    return "{%- if add_generation_prompt -%}{{- '" + text + "' -}}{%- endif -%}"


class Family(NamedTuple):
    template: str
    special: list[str]
    eos: str
    answer: str  # the trained text of an answer {}; the prompt ends before it
    thought: str  # the trained text of an answer {} with the thought r in <think> tags


CHATML = TURN + "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}" + DONE
IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
FAMILIES = {
    "chatml": Family(
        CHATML + ask("<|im_start|>assistant\n"),
        IM,
        "<|im_end|>",
        "{}<|im_end|>",
        "<think>\nr\n</think>\n\n{}<|im_end|>",
    ),
    # an empty think block in the answers after the last question, none in those before it
    "qwen3": Family(
        LAST_QUESTION
        + TURN
        + "{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}"
        + SPLIT_THOUGHT
        + "{%- if loop.index0 > ns.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' + said -}}"
        "{%- else -%}{{- said -}}{%- endif -%}{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\n' -}}"
        + DONE
        + ask("<|im_start|>assistant\n"),
        IM,
        "<|im_end|>",
        "<think>\n\n</think>\n\n{}<|im_end|>",
        "<think>\nr\n</think>\n\n{}<|im_end|>",
    ),
    # the same, and the generation prompt opens the think block
    "qwen3.5": Family(
        LAST_QUESTION
        + TURN
        + "{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}"
        + SPLIT_THOUGHT
        + "{%- if loop.index0 > ns.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' + said -}}"
        "{%- else -%}{{- said -}}{%- endif -%}{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\n' -}}"
        + DONE
        + ask("<|im_start|>assistant\n<think>\n"),
        IM,
        "<|im_end|>",
        "\n</think>\n\n{}<|im_end|>",
        "r\n</think>\n\n{}<|im_end|>",
    ),
    # the generation prompt opens a think block; thoughts are removed from every finished turn
    "r1-distill": Family(
        TURN
        + "{%- if m.role == 'assistant' -%}{{- '<A>' + m.content.split('</think>')[-1] + '<eos>' -}}"
        + "{%- elif m.role == 'user' -%}{{- '<U>' + m.content -}}{%- else -%}{{- m.content -}}{%- endif -%}"
        + DONE
        + ask("<A><think>\n"),
        ["<A>", "<U>", "<eos>"],
        "<eos>",
        "{}<eos>",
        "r\n</think>\n\n{}<eos>",
    ),
    # a turn ends where the next role's mark begins
    "glm": Family(
        "{{- '[gMASK]<sop>' -}}" + TURN + "{{- '<|' + m.role + '|>\n' + m.content -}}" + DONE + ask("<|assistant|>\n"),
        ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"],
        "<|endoftext|>",
        "{}<|endoftext|>",
        "<think>\nr\n</think>\n\n{}<|endoftext|>",
    ),
    # the last turn ends with a different token than earlier ones; channels before the text
    "gpt-oss": Family(
        TURN
        + "{{- '<|start|>' + m.role -}}{%- if m.role == 'assistant' -%}{{- '<|channel|>final' -}}{%- endif -%}"
        + "{{- '<|message|>' + m.content -}}{%- if m.role == 'assistant' and loop.last -%}{{- '<|return|>' -}}"
        + "{%- else -%}{{- '<|end|>' -}}{%- endif -%}"
        + DONE
        + ask("<|start|>assistant"),
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
        "<|return|>",
        "<|channel|>final<|message|>{}<|return|>",
        "<|channel|>final<|message|><think>\nr\n</think>\n\n{}<|return|>",
    ),
    # trims, alternates, says "model", refuses a system turn, and EOS is another token than the turn's end
    "gemma": Family(
        "{{- '<bos>' -}}" + TURN + "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{- raise_exception('roles must alternate') -}}{%- endif -%}"
        "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim"
        " + '<end_of_turn>\n' -}}" + DONE + ask("<start_of_turn>model\n"),
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        "{}<end_of_turn>",
        "<think>\nr\n</think>\n\n{}<end_of_turn>",
    ),
    # writes EOS after the last turn too, if there is no generation prompt
    "phi3": Family(
        TURN + "{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}" + DONE + "{%- if add_generation_prompt -%}"
        "{{- '<|assistant|>\n' -}}{%- else -%}{{- '<|endoftext|>' -}}{%- endif -%}",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"],
        "<|endoftext|>",
        "{}<|end|>",
        "<think>\nr\n</think>\n\n{}<|end|>",
    ),
    "llama3": Family(
        "{{- '<|begin_of_text|>' -}}" + TURN + "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
        " + m.content | trim + '<|eot_id|>' -}}" + DONE + ask("<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "<|end_of_text|>",
        "{}<|eot_id|>",
        "<think>\nr\n</think>\n\n{}<|eot_id|>",
    ),
    "mistral": Family(
        "{{- '<s>' -}}" + TURN + "{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}{%- else -%}"
        "{{- ' ' + m.content + '</s>' -}}{%- endif -%}" + DONE,
        ["<s>", "</s>"],
        "</s>",
        " {}</s>",
        " <think>\nr\n</think>\n\n{}</s>",
    ),
    "plain text": Family(
        TURN + "{{- '### ' + m.role + ':\n' + m.content + '\n\n' -}}" + DONE + ask("### assistant:\n"),
        ["<eos>"],
        "<eos>",
        "{}<eos>",
        "<think>\nr\n</think>\n\n{}<eos>",
    ),
}
