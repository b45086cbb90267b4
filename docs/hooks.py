"""MkDocs: the README is the home page; CONTRIBUTING and CHANGELOG are pages too. Their links are written for the
repository, so they are rewritten for the site. `::: rlhf_fast.NAME` is resolved to the file that defines NAME."""

import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import rlhf_fast

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    from_root = page.file.src_uri in PAGES.values()
    if from_root:
        markdown = markdown.replace("](docs/", "](")
    for source, target in PAGES.items():
        markdown = markdown.replace(f"]({source if from_root else '../' + source}", f"]({target}")
    return re.sub(r"^::: rlhf_fast\.(\w+)$", definition, markdown, flags=re.MULTILINE)


def definition(name: re.Match[str]) -> str:
    """mkdocstrings reads sources, where `rlhf_fast.ops.gae` is a file before it is a function. A result class is shown
    with its source, whose comments explain the fields."""
    found = getattr(rlhf_fast, name[1])
    directive = f"::: {found.__module__}.{found.__qualname__}"
    if not inspect.isclass(found):
        return directive
    return f"{directive}\n    options: {{ members: false }}\n\n```python\n{inspect.getsource(found)}```\n"
