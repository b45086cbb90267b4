"""The report in a real browser: Chromium, if it is installed (`apt install chromium`), driven by Playwright."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.monitor.report import write_page, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `apt install chromium`")
sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: `pip install -e .[dev]`")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: `pip install -e .[dev]`")

# What a plot lacks, by the id of its place: marks, a size, numbers.
FAULTY_PLOTS = """
Array.from(document.querySelectorAll(".plot")).filter((place) => {
  const svg = place.querySelector("svg");
  return !svg || !svg.querySelector("path, circle, rect") || svg.clientWidth < 200 || svg.outerHTML.includes("NaN");
}).map((place) => place.id)
"""
WIDER_THAN_THE_WINDOW = "document.scrollingElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, path: Path, faults: list[str], width: int, scheme: str) -> Any:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(5000)
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: request.url != path.as_uri() and faults.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_the_page_works_offline_and_for_everybody(
    browser: Any, tmp_path: Path, ppo: Callable[..., None], reward: Callable[..., None], width: int, scheme: str
) -> None:
    reward(tmp_path / "reward", steps=20)
    ppo(tmp_path / "ppo", steps=20)
    with open(tmp_path / "ppo" / "metrics.jsonl", "a") as file:
        file.write(2 * '{"step": 20, "eval/scores": 1.0, "eval/</script><script>alert(1)</script>\\u202e": 1.0}\n')
    faults: list[str] = []
    page = opened(browser, write_report(tmp_path), faults, width, scheme)
    assert page.evaluate(FAULTY_PLOTS) == [] and page.locator(".plot svg").count() == 22
    assert not page.evaluate(WIDER_THAN_THE_WINDOW)

    page.locator("select.evaluation").select_option("10")
    shown = page.locator("[data-step]:not([hidden])").evaluate_all("all => all.map((one) => one.dataset.step)")
    assert set(shown) == {"10"}
    page.locator(".by-a").check()
    page.locator("#ppo-seconds-per-step rect").first.hover()
    assert "rollout" in page.locator("#ppo-seconds-per-step [aria-label=tip]").text_content()
    page.locator("[data-chart=ppo-kl-coefficient] summary").click()
    numbers = page.locator("[data-chart=ppo-kl-coefficient] tbody tr")
    assert numbers.last.inner_text().split() == ["20", "0.08"] and numbers.count() == 21

    page.evaluate("for (const one of document.querySelectorAll('details:not(.numbers)')) one.open = true")
    found = axe_api.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    grave = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
    assert grave == [] and faults == []


def test_a_comparison_draws_every_chart(browser: Any, run_folder: Path, tmp_path: Path) -> None:
    faults: list[str] = []
    path = write_page([run_folder, run_folder, run_folder / "ppo"], tmp_path / "three.html")
    page = opened(browser, path, faults, 390, "light")
    assert page.evaluate(FAULTY_PLOTS) == [] and not page.evaluate(WIDER_THAN_THE_WINDOW) and faults == []
