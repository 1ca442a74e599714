"""The page in a real browser: each room's main way, by mouse, by keyboard, on a phone, in both languages and themes."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from source_tree import REPO_ROOT
from web_workspaces import HOSTILE, end_runs, write_many, write_record, write_sample

from stocklora.web.scripts import SCRIPTS, form_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt install chromium")

ROOMS = ("forecasts", "train", "trust", "assistant", "data")
PHONE = {"width": 390, "height": 844}
SCRIPT_MS = 60_000  # what a script may take on a busy machine
# What the page waits for: answers, and timers that are not its looks at what runs.
COUNTED = """(() => { const { fetch, setTimeout, clearTimeout } = window; const due = new Set(); let asked = 0;
    window.fetch = async (...given) => { asked += 1; try { return await fetch(...given); } finally { asked -= 1; } };
    window.setTimeout = (action, ms, ...given) => {
        const timer = setTimeout(() => { due.delete(timer); action(...given); }, ms);
        if (!(ms >= 400)) due.add(timer);
        return timer; };
    window.clearTimeout = (timer) => { due.delete(timer); clearTimeout(timer); };
    window.isWaiting = () => asked > 0 || due.size > 0; })()"""
ENTERED = """async (room) => { if (location.hash === `#/${room}`) return;
    const entered = new Promise((resolve) => addEventListener("hashchange", resolve, {once: true}));
    location.hash = `#/${room}`; await entered; }"""
SETTLED = """async () => { for (let still = 0; still < 6; still += 1) {
    await new Promise(requestAnimationFrame); if (window.isWaiting()) still = -1; } }"""


@contextlib.contextmanager
def serving(workspace: Path, models: Path | None = None) -> Iterator[str]:
    """The address that web.py prints for ``workspace``."""
    options = ["--workspace", str(workspace), "--models", str(models or workspace / "none"), "--port", "0", "--no-open"]
    server = subprocess.Popen([sys.executable, str(REPO_ROOT / "web.py"), *options], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("page: "))
        yield line.split()[1]
    finally:
        server.terminate()
        server.wait(timeout=20)
        end_runs(workspace)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A workspace with prices, forecasts, a record, rows, and names that would be code; its address and folder."""
    root = tmp_path_factory.mktemp("furnished")
    prices = write_sample(root, "AAPL", "MSFT")
    write_record(root, prices, origins=30)
    text = (root / "prices" / "MSFT.csv").read_text().splitlines()[-80:]
    header, rows = "Date,Open,High,Low,Close,Volume", [line for line in text if line[0].isdigit()]
    named = "\n".join(f'"{HOSTILE}",{line}' for line in rows)
    (root / "prices" / "hostile.csv").write_text(f"Ticker,{header}\n{named}\n")
    (root / "rows.jsonl").write_text(
        json.dumps({"instruction": HOSTILE, "output": f"<script>document.title='hacked'</script>{HOSTILE}"}) + "\n\n{\n"
    )
    forecast = "Ticker,Origin,Date,Day,Last_Close,Predicted_Close,P05,P10,P25,P50,P75,P90,P95\n"
    for ticker, frame in prices.items():
        last, close = frame.index[-1], float(frame["Close"].iloc[-1])
        for day in (1, 2, 3):
            forecast += f"{ticker},{last:%Y-%m-%d},2013-03-{3 + day:02},{day},{close},{close}," + ",".join(
                f"{close * (1 + 0.01 * day**0.5 * z):.4f}" for z in (-1.6, -1.3, -0.7, 0, 0.7, 1.3, 1.6)
            ) + "\n"  # fmt: skip
    (root / "predictions.csv").write_text(forecast)
    folder = root / "runs" / "20260101-000000-train-abcdef"
    folder.mkdir(parents=True)
    command = {"script": "train", "values": {"save_path": HOSTILE}, "argv": ["python", "train.py", HOSTILE],
               "folder": str(root), "environment": {}, "started": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    (folder / "command.json").write_text(json.dumps(command))
    (folder / "log").write_text(f"{HOSTILE}\n<script>document.title='hacked'</script>\n")
    (folder / "exit.json").write_text(json.dumps({"code": 2, "ended": 1767225605.0}))
    with serving(root) as address:
        yield address, root


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a context of its own; a fault of the page's scripts fails the test."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def opened(address: str, room: str = "", **options: object) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-US", **options})
        contexts.append(context)
        context.add_init_script(COUNTED)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(f"{address}#/{room}" if room else address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def enter(page: Page, room: str) -> None:
    """Go to a room as its link does, and wait until its requests are answered and what came is drawn."""
    page.evaluate(ENTERED, room)
    page.locator("main :is(h1, .title)").first.wait_for()
    page.locator("main .muted.pad").wait_for(state="detached")
    page.evaluate(SETTLED)


def test_from_nothing_to_a_forecast_and_a_price_one_drags(open_page: Callable[..., Page], tmp_path: Path) -> None:
    with serving(tmp_path) as address:
        page = open_page(address)
        page.get_by_text("No prices yet").wait_for()
        assert "token" not in page.url
        page.get_by_role("button", name="Use the bundled AAPL prices").click()
        page.locator(".vrow .range svg").wait_for(timeout=SCRIPT_MS)
        # By keyboard alone: into the list, and the first line opened.
        page.locator(".vlist").focus()
        page.keyboard.press("Enter")
        page.locator(".ticker-head h1", has_text="AAPL").wait_for()
        handle = page.get_by_role("slider")
        handle.wait_for()
        page.locator(".answers tbody tr").first.wait_for()
        assert page.locator(".side section").first.locator("tbody tr").count() == 3
        assert page.get_by_text("Why this wide").count() == 1
        assert page.locator(".factors li").count() > 2

        def asked() -> float:
            return float(page.locator("#asked").input_value())

        before, box = asked(), handle.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 9)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 109, steps=5)
        page.mouse.up()
        dragged = asked()
        assert dragged < 0.995 * before
        handle.focus()
        page.keyboard.press("ArrowDown")
        assert asked() == pytest.approx(dragged * 0.999, abs=0.006)
        page.locator("#asked").fill("1000000")
        assert page.locator(".answers tr.sum td").nth(1).inner_text() == "0%"
    command = json.loads(next((tmp_path / "runs").glob("*-framework-*/command.json")).read_text())
    assert command["argv"][1:] == [str(REPO_ROOT / "framework.py"), *command["argv"][2:]]


def test_a_file_dropped_and_a_broken_one(open_page: Callable[..., Page], furnished: tuple[str, Path]) -> None:
    address, root = furnished
    page = open_page(address)
    page.locator(".vrow").first.wait_for()
    dropped = """(text) => {
        const data = new DataTransfer();
        data.items.add(new File([text], "broken.csv"));
        for (const kind of ["dragenter", "drop"]) {
            document.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
        }
    }"""
    page.evaluate(dropped, "Date,Close\n2024-01-02,abc\n")
    page.locator(".problem", has_text="broken.csv").wait_for()
    page.wait_for_timeout(700)
    assert page.locator(".problem", has_text="broken.csv").is_visible()  # it stays
    assert not (root / "prices" / "broken.csv").exists()


def test_training_from_the_form_to_the_history(open_page: Callable[..., Page], furnished: tuple[str, Path]) -> None:
    address, root = furnished
    page = open_page(address, "train/train")
    epochs = page.get_by_label("--epochs", exact=True)
    page.locator("summary", has_text="training").click()
    epochs.fill("-3")
    page.locator(".problem", has_text="--epochs must be 0 or more").wait_for()
    assert page.get_by_role("button", name="Start", exact=True).is_disabled()
    epochs.fill("two")
    page.locator(".problem", has_text="a whole number").wait_for()
    epochs.fill("2")
    page.get_by_label("--data", exact=True).fill("prices/AAPL.csv")
    page.locator(".command", has_text="--epochs 2").wait_for()
    command = page.locator(".command pre").inner_text()
    assert command.endswith("train.py --data prices/AAPL.csv --epochs 2")
    # However slow its log comes, a run is over for the page no sooner than its last lines are there.
    page.route("**/log?*", lambda route: (time.sleep(0.4), route.continue_()))
    page.get_by_role("button", name="Start", exact=True).click()
    page.locator(".run-head .badge", has_text="done").wait_for(timeout=SCRIPT_MS)
    assert "model: model.pth" in page.locator(".log").inner_text()
    assert page.locator(".command pre").inner_text() == command
    assert (root / "model.pth").exists()
    page.goto(f"{address}#/train")
    boxes = page.locator(".history tbody input[type=checkbox]")
    boxes.nth(0).wait_for()
    boxes.nth(0).check()
    boxes.nth(1).check()
    page.locator(".compare tr.differs th", has_text="epochs").wait_for()


def test_the_record_and_its_verification(open_page: Callable[..., Page], furnished: tuple[str, Path]) -> None:
    page = open_page(furnished[0], "trust")
    page.locator("svg.shares").wait_for(timeout=SCRIPT_MS)
    assert page.locator(".record-body tbody tr").count() == 3
    page.get_by_role("button", name="Verify the chain").click()
    page.locator(".strip.done", has_text="verify --head proves").wait_for(timeout=SCRIPT_MS)


def test_a_chat_with_a_model_on_this_machine(
    open_page: Callable[..., Page], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    with serving(tmp_path, tiny_models["qwen3"].parent) as address:
        page = open_page(address, "assistant")
        base = page.get_by_label("--base_model", exact=True)
        base.fill(str(tiny_models["qwen3"]))
        page.get_by_role("button", name="Start the assistant").click()
        message = page.get_by_label("Message")
        message.wait_for(timeout=SCRIPT_MS)
        page.get_by_label("Longest answer").fill("5")
        message.fill(HOSTILE)
        message.press("Enter")
        page.locator(".said:not(.you) p", has_text=re.compile(r"[^…\s]")).wait_for(timeout=SCRIPT_MS)
        assert page.locator(".said.you p").inner_text() == HOSTILE
        assert page.title() != "hacked"
        page.get_by_role("button", name="Stop", exact=True).first.click()
        page.get_by_role("button", name="Start the assistant").wait_for(timeout=SCRIPT_MS)


def test_names_and_texts_that_would_be_code_are_shown_as_they_are(
    open_page: Callable[..., Page], furnished: tuple[str, Path]
) -> None:
    address, _ = furnished
    page = open_page(address)
    page.locator(".vrow a", has_text=HOSTILE).click()
    page.locator(".ticker-head h1", has_text=HOSTILE).wait_for()
    enter(page, "data/rows.jsonl")
    page.locator(".said p", has_text="<script>").wait_for()
    enter(page, "run/20260101-000000-train-abcdef")
    page.locator(".log", has_text="<script>").wait_for()
    for room in ("data", "train"):
        enter(page, room)
    page.locator(".history td", has_text=HOSTILE).first.wait_for()
    assert page.locator("img[src=x], main script").count() == 0
    assert "hacked" not in page.title()


def test_of_two_thousand_tickers_only_what_is_seen_is_drawn(open_page: Callable[..., Page], tmp_path: Path) -> None:
    tickers = write_many(tmp_path, 2000, rows=40)
    with serving(tmp_path) as address:
        page = open_page(address)
        page.get_by_text("2,000 tickers").wait_for(timeout=SCRIPT_MS)
        assert page.locator(".vrow").count() < 60
        page.locator(".vlist").focus()
        page.keyboard.press("End")
        page.locator(".vrow.active", has_text=tickers[-1]).wait_for()
        assert page.locator(".vrow").count() < 60
        page.get_by_label("Filter").fill("t1999")
        page.get_by_text("1 of 2,000 tickers").wait_for()


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_contrast_names_and_roles(open_page: Callable[..., Page], furnished: tuple[str, Path], theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    options = {"resultTypes": ["violations"]}
    page = open_page(furnished[0], color_scheme=theme)
    for room in (*ROOMS, "forecasts/AAPL", "run/20260101-000000-train-abcdef"):
        enter(page, room)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        found = Axe().run(page, options=options).response["violations"]
        assert not found, (room, [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in found])


def test_a_phone_s_width_holds_every_room(open_page: Callable[..., Page], furnished: tuple[str, Path]) -> None:
    page = open_page(furnished[0], viewport=PHONE, has_touch=True, is_mobile=True)
    for room in (*ROOMS, "forecasts/AAPL", "data/rows.jsonl"):
        enter(page, room)
        wide = page.evaluate("""() => [document.documentElement.scrollWidth, document.querySelector('main').scrollWidth,
            innerWidth]""")
        assert max(wide[:2]) <= wide[2], (room, wide)


def test_every_room_in_chinese_and_by_keyboard(open_page: Callable[..., Page], furnished: tuple[str, Path]) -> None:
    page = open_page(furnished[0], locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    texts = page.evaluate("""async () => { const s = await import("/static/js/strings.js");
        const both = {}; for (const code of ["en", "zh"]) { s.setLanguage(code);
            both[code] = s.KEYS.map((key) => s.t(key)); } s.setLanguage("zh"); return both; }""")
    assert all([*texts["en"], *texts["zh"]])
    places = [set(re.findall(r"\{\d\}", text)) for text in texts["en"]]
    assert places == [set(re.findall(r"\{\d\}", text)) for text in texts["zh"]]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for room, name in zip(ROOMS, ("预测", "训练", "可信度", "助手", "数据"), strict=True):
        link = page.locator(f"nav a[data-room={room}]")
        link.focus()
        page.keyboard.press("Enter")
        page.locator("main h1", has_text=name).wait_for()
        assert link.get_attribute("aria-current") == "page"
    page.get_by_role("button", name="Switch to English").click()
    page.locator("main h1", has_text="Data").wait_for()
    page.reload()
    page.locator("main h1", has_text="Data").wait_for()  # it is remembered


def test_a_page_of_an_earlier_server_says_so(open_page: Callable[..., Page], furnished: tuple[str, Path]) -> None:
    page = open_page(furnished[0])
    page.locator(".vrow").first.wait_for()
    page.context.clear_cookies()
    page.locator("nav a[data-room=trust]").click()
    page.locator(".banner", has_text="Open the address that web.py printed last").wait_for()


def test_every_section_of_a_form_has_a_name_in_chinese(
    open_page: Callable[..., Page], furnished: tuple[str, Path]
) -> None:
    page = open_page(furnished[0], locale="zh-CN")
    names = {section["name"] for script in SCRIPTS for section in form_of(script)["sections"]}
    known = page.evaluate("import('/static/js/strings.js').then((s) => s.KEYS)")
    assert {f"sec_{name}" for name in names} <= set(known)
