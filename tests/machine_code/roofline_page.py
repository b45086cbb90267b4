"""The tables of docs/roofline.md, between ``<!-- NAME -->`` and ``<!-- end -->``."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "roofline.md"


def renew(name: str, text: str) -> None:
    """Writes what stands there."""
    begin, page = f"<!-- {name} -->", PAGE.read_text()
    before, _, after = page.partition(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n<!-- end -->{after.partition('<!-- end -->')[2]}")


def read(name: str) -> str:
    return PAGE.read_text().partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0].strip()


def rows(name: str) -> list[dict[str, str]]:
    """Each row of the table, by the heads of its columns."""
    lines = [line for line in read(name).splitlines() if line.startswith("|")]
    heads, _, *found = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(heads, cells, strict=True)) for cells in found]
