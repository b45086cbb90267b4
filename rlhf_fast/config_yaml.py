"""The mapping in a YAML file, read in bounded memory: a settings file is small, flat, and repeats nothing for ever."""

from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.errors import UserError, nearest
from rlhf_fast.text import one_line, shown

LARGEST_FILE = 1_000_000  # bytes
MOST_NODES, DEEPEST = 10_000, 50  # aliases counted as often as they are used


class SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader with three errors more: a key twice (PyYAML drops the first without a word), nesting beyond
    what Python's stack holds, and aliases that multiply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        mark, is_alias = event.start_mark, isinstance(event, yaml.AliasEvent)
        if self._depth == DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and node not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias inside what it stands for", mark)
        if node is None or is_alias:
            return node
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [item for pair in children for item in pair]
        self._sizes[node] = size = 1 + sum(self._sizes[child] for child in children)
        if size > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_NODES} values, aliases included", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {shown(key.value)} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[Any, Any]:
    """The mapping in a YAML file; {} for an empty file. Raises UserError that names file, line and column."""
    text = _read_text(path)
    try:
        document = yaml.load(text, SettingsLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = one_line(", ".join(part for part in (error.context, error.problem) if part), 200)
        raise UserError(f"{path}{where}: not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        character = f"the character {chr(error.character)!r} is not allowed"
        raise UserError(f"{path}, line {line}, column {column}: not valid YAML: {character}") from None
    except ValueError as error:  # PyYAML lets these out for a date such as 2026-13-01
        what = one_line(str(error), 200)
        raise UserError(f"{path}: not valid YAML: {what}; put text that looks like a date in quotes") from None
    except (AttributeError, LookupError) as error:  # and these for `!!timestamp x`, `!!bool x`, `!!int ""`
        raise UserError(f"{path}: not valid YAML: a value is not of the type that its !!tag names") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(f"{path}: must hold settings as `name: value` lines; got {shown(document)}")
    return document


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        folder = Path(path).parent
        try:
            neighbours = [item.name for item in folder.iterdir()]
        except OSError:  # no such folder, or not ours to look into: then there is nobody to suggest
            neighbours = []
        raise UserError(f"{path}: no such config file{nearest(Path(path).name, neighbours)}") from None
    except OSError as error:
        raise UserError(f"{path}: the config file cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: more than {LARGEST_FILE:,} bytes, so no settings file; name the YAML of settings")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from None
