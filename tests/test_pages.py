"""The README and the pages of docs/: links lead somewhere, figures come from the committed results, code runs."""

import importlib.util
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import rlhf_fast.ops
from rlhf_fast.cli import COMMANDS
from rlhf_fast.config import STAGES

ROOT = Path(__file__).parent.parent
ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*ROOT_PAGES, *DOCS, ROOT / "csrc" / "README.md", ROOT / "kernels" / "README.md"]
README = ROOT_PAGES[0].read_text()
RESULTS = {path.stem: path for path in (ROOT / "bench" / "results").glob("*.json")}
BLOCK = re.compile(r"^<!-- (?:results|highlights) ([\w-]+) -->$", re.MULTILINE)

spec = importlib.util.spec_from_file_location("bench_results", ROOT / "bench" / "results.py")
assert spec is not None and spec.loader is not None
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs form them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, page: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith(("https://", "http://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(text if target == page else target.read_text())):
            broken.append(link)
    return broken


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page.read_text(), page) == []


def test_broken_links_are_found() -> None:
    text = "# A heading, here\n[](docs/nothing.md) [](#no-heading) [](#a-heading-here) [](docs/data.md#nowhere) `[](x)`"
    assert broken_links(text, ROOT / "README.md") == ["docs/nothing.md", "#no-heading", "docs/data.md#nowhere"]


@each_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    names = re.findall(r"`((?:rlhf_fast|csrc|kernels|tests|bench|docs|examples)/[\w./-]+)`", page.read_text())
    # bounded_reward is the operation that docs/adding-an-operation.md adds
    assert [name for name in names if not (ROOT / name).exists() and "bounded_reward" not in name] == []


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = re.findall(r"'([\w.-]+\.md)'", str(settings["nav"]))
    own = ["index.md", "contributing.md", "changelog.md"]
    assert sorted(listed) == sorted([*own, *(page.name for page in DOCS)])


# ---- figures -------------------------------------------------------------------------------------------------------


def test_every_block_has_its_results_and_every_results_file_a_block() -> None:
    shown = {name for page in PAGES for name in BLOCK.findall(page.read_text())}
    # whether a table of what `make gpu` wrote is shown is up to the page
    assert shown <= RESULTS.keys() and {name for name in RESULTS if not name.startswith("gpu-")} <= shown


@each_page
def test_every_block_is_what_its_results_give(page: Path) -> None:
    text = page.read_text()
    for name in set(BLOCK.findall(text)):
        assert results.renew(text, json.loads(RESULTS[name].read_text()), name) == text


def test_a_stale_block_is_found() -> None:
    text = "<!-- results tiny -->\n| stale |\n<!-- end -->\nafter"
    renewed = results.renew(text, json.loads(RESULTS["tiny"].read_text()), "tiny")
    assert "SFT validation loss" in renewed and "stale" not in renewed and renewed.endswith("<!-- end -->\nafter")


# ---- code and names ------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_readmes_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert len(capsys.readouterr().out.split()) == 2 and names["result"].loss.isfinite()  # type: ignore[attr-defined]


@each_page
def test_every_command_that_is_shown_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    known = {field.name for config in STAGES.values() for field in fields(config)}
    known |= {"config", "help", "adapter", "only", "threads", "json", "chart", "markdown", "stages", "version", "debug"}
    known |= {"follow", "output", "worst"}
    shell = "\n".join(re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    for line in shell.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"] and words[1:]:  # alone, it compiles the engine
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        if words[:1] == ["rlhf-fast"]:
            flags = {word[2:].partition(".")[2] or word[2:] for word in words if word.startswith("--")}
            assert words[1] in COMMANDS and flags <= known, line


def test_every_public_name_is_documented() -> None:
    functions = {name for name in rlhf_fast.ops.__all__ if name.islower()}
    operations = functions - {"backends", "build_info", "use_backend"}
    assert {name for name in operations if f"`{name}`" not in README} == set()
    page = (ROOT / "docs" / "operations.md").read_text()
    assert {name for name in operations if f"| `{name}` |" not in page} == set()
    listed = re.findall(r"^::: rlhf_fast\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(rlhf_fast.ops.__all__)


def test_every_folder_and_file_of_the_layout_exists() -> None:
    layout = (ROOT / "docs" / "design.md").read_text().split("## Layout")[1].split("```")[1]
    lines = re.findall(r"^( *)([\w./]+) ", layout + " ", re.MULTILINE)
    names = [f"rlhf_fast/{name}" if indent else name for indent, name in lines]
    assert len(names) > 15 and [name for name in names if not (ROOT / name).exists()] == []
