"""The page of `d2moe report` in a real browser: what it shows, on which screens, by keyboard, on paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import chromium
from compression import TINY, d2moe_here

TABLES = """tables => tables.map(table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell =>
    cell.querySelector("data")?.value ?? cell.textContent)))"""
"""The numbers of tables with all their digits, which are beside what people see."""


@pytest.fixture(scope="module")
def report(
    compressed: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A page with every figure of a D2-MoE checkpoint, and what --json printed."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "a | <b>.txt").write_text(texts[1].read_text()[:2_000])
    done = d2moe_here(
        "report", compressed, folder / "report.html", "--source", TINY, "--text", folder / "a | <b>.txt",
        "--seq-len", 64, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "report.html", json.loads(done.stdout)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def open_page(browser: Any, report: tuple[Path, dict[str, Any]]) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end there must have been no message, no error and no request but for the page itself."""
    problems: list[str] = []
    contexts: list[Any] = []

    def opened(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(120_000)  # of a machine that has much else to do
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: problems.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
        # Pictures of many cells are in the page itself.
        tab.on("request", lambda request: None if request.url.startswith("data:") else problems.append(request.url))
        tab.goto(report[0].as_uri())
        assert problems.pop(0) == report[0].as_uri()
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def screen(width: int) -> dict[str, int]:
    return {"width": width, "height": 800}


def open_details(tab: Any) -> None:
    tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")


def test_every_figure_has_its_numbers_as_a_table_and_they_are_those_of_the_json(
    open_page: Callable[..., Any], report: tuple[Path, dict[str, Any]]
) -> None:
    tab = open_page()
    assert len(report[1]["figures"]) == 10
    for figure in report[1]["figures"]:
        section = tab.locator(f"#{figure['name']}-section")
        assert section.locator("h2").text_content() == figure["title"]
        assert section.locator(".reading").text_content() == figure["reading"]
        shown = section.locator("details table").evaluate_all(TABLES)
        expected = [[[read(value) for value in row] for row in table["rows"]] for table in figure["tables"]]
        assert shown == expected, figure["name"]
        assert section.locator("svg").count() == len(figure["panels"]) > 0


def read(value: Any) -> str:
    """As a table's cell has it."""
    return "–" if value is None else value if isinstance(value, str) else repr(value)


def test_every_picture_has_words(open_page: Callable[..., Any]) -> None:
    """A name and a description of its own, found by the browser's own accessibility tree; no id is there twice."""
    tab = open_page()
    for picture in tab.locator("svg").all():
        title, words = (picture.locator(f"> {tag}").first.text_content() for tag in ("title", "desc"))
        assert tab.get_by_role("img", name=f"{title} {words}", exact=True).count() == 1
        assert len(words) > 20
    twice = "[...document.querySelectorAll('[id]')].map(e => e.id).filter((id, n, all) => all.indexOf(id) !== n)"
    assert tab.evaluate(twice) == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_it_fits_and_is_accessible(open_page: Callable[..., Any], width: int, scheme: str) -> None:
    """With all tables open: nothing to scroll sideways, and axe-core finds no violation (contrast among them). Labels
    of pictures can be read on a phone too."""
    tab = open_page(viewport=screen(width), color_scheme=scheme)
    open_details(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    sizes = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
    assert min(size for size in tab.evaluate(sizes) if size) > 8
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
    passed = {rule["id"] for rule in found.response["passes"]}
    assert {"color-contrast", "svg-img-alt", "heading-order"} <= passed
    assert width > 360 or "scrollable-region-focusable" in passed


def test_pictures_take_the_colours_of_the_screen(open_page: Callable[..., Any]) -> None:
    """Text and lines of every picture stand out from the card at 4.5 to 1 and 3 to 1, light and dark."""
    contrast = """() => {
        const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const card = light(getComputedStyle(document.querySelector("section")).backgroundColor);
        const ratio = c => { const [a, b] = [light(c), card].sort((x, y) => x - y); return (b + 0.05) / (a + 0.05); };
        const named = name => { const e = document.createElement("i"); e.style.color = `var(--${name})`;
            document.body.append(e); const c = getComputedStyle(e).color; e.remove(); return ratio(c); };
        const texts = [...document.querySelectorAll("svg text")].filter(e => e.style.fill.startsWith("var("));
        return { lines: ["c1", "c2", "c3", "c4"].map(named), words: ["ink", "dim"].map(named),
            shown: texts.map(e => ratio(getComputedStyle(e).fill)) }; }"""
    for scheme in ("light", "dark"):
        found = open_page(color_scheme=scheme).evaluate(contrast)
        assert min(found["lines"]) > 3
        assert min(found["words"] + found["shown"]) > 4.5
        assert len(found["shown"]) > 200


def test_everything_is_reached_by_keyboard(open_page: Callable[..., Any]) -> None:
    """The skip link first, then the colours, links and every table of numbers, with a visible ring."""
    tab = open_page(color_scheme="light")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    tab = open_page(color_scheme="light")
    wanted = {"skip": 1, "theme": 1, "a": tab.locator("nav a").count(), "summary": tab.locator("summary").count()}
    reached: list[str] = []
    for _ in range(sum(wanted.values())):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.className || document.activeElement.name || "
                                    "document.activeElement.localName"))  # fmt: skip
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached
    assert {name: reached.count(name) for name in wanted} == wanted
    tab.locator("summary").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("details[open]").count() == 1
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('role')") == "region"


def test_colours_are_chosen_by_keyboard(open_page: Callable[..., Any]) -> None:
    """Device, light, dark: whatever the device prefers."""
    tab = open_page(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = tab.evaluate(background)
    tab.locator("#theme-auto").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#theme-light").is_checked()
    light = tab.evaluate(background)
    assert light != dark
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate(background) == dark


def test_on_paper_it_is_light_and_has_no_controls(open_page: Callable[..., Any], tmp_path: Path) -> None:
    tab = open_page(color_scheme="dark")
    tab.locator("#theme-dark").check()
    tab.locator("summary").first.click()
    tab.pdf(path=tmp_path / "page.pdf", format="A4")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") >= 3
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(31, 36, 48)"
    for hidden in (".theme", ".skip", "nav", "summary >> nth=1"):
        assert not tab.locator(hidden).is_visible()
    assert tab.locator("table").first.is_visible()
    assert not tab.locator("table").nth(1).is_visible()


def test_nothing_outside_of_the_page_is_named(report: tuple[Path, dict[str, Any]]) -> None:
    """No script, no address that could be fetched, and a policy that would forbid it; names are shown as they are."""
    html = report[0].read_text()
    assert "default-src 'none'" in html
    assert "<script" not in html
    addresses = {part.split('"')[0] for part in html.split('href="')[1:]} | {
        part.split('"')[0] for part in html.split('src="')[1:]
    }
    assert all(address.startswith(("#", "data:")) for address in addresses), addresses
    assert "url(http" not in html
    assert "a | &lt;b&gt;.txt" in html
    assert "<b>.txt" not in html


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ratio"), [("moe-svd", 0.2), ("mobe", 0.2)])
def test_pages_of_the_sister_methods(
    browser: Any, method: str, ratio: float, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Compressed for real: their own figures, no violation, nothing to scroll sideways."""
    few = ("--ratio", ratio, "--windows", 16, "--seq-len", 64, "--calibration", texts[0])
    assert d2moe_here("compress", TINY, tmp_path / "model", "--method", method, *few).returncode == 0
    done = d2moe_here("report", tmp_path / "model", tmp_path / "page.html", "--json")
    assert done.returncode == 0, done.stderr
    names = {figure["name"] for figure in json.loads(done.stdout)["figures"]}
    assert {"moe-svd": {"selection"}, "mobe": {"fit", "alphas"}}[method] <= names
    tab = browser.new_context(viewport=screen(360)).new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    open_details(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
    tab.context.close()
