"""The replay page: what is in it, and what happens when Chromium clicks through it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdllm.load import BUNDLED
from jdllm.tokenizer import load_tokenizer
from jdllm.viz import replay, show
from jdllm.viz.pieces import Lexicon
from jdllm.viz.trace import Record, Run
from tests.conftest import find_chromium

MASK = 5
PROMPT = "</script><script>document.title='hit'</script> <b>&amp; \u202e\u4e16"
TEXT = "<i>1+2=3</i>\n\tso \U0001f600 it is\u202e & \u4e16."


@pytest.fixture(scope="module")
def run() -> Run:
    """A text that appears in an odd order, with an edit, a token masked again, and ends behind."""
    tokenizer = load_tokenizer(BUNDLED)
    assert tokenizer is not None
    prompt, text = (tokenizer(t)["input_ids"] for t in (PROMPT, TEXT))
    final = np.array([*prompt, *text, 2, 1, 1], np.int32)
    canvas, order = final.copy(), np.random.default_rng(0).permutation(len(text)) + len(prompt)
    canvas[len(prompt) :] = MASK
    canvases = [canvas]
    for k, columns in enumerate(np.array_split(order, 9)):
        canvas = canvases[-1].copy()
        canvas[columns] = final[columns]
        if k == 3:
            canvas[columns[0]] = text[0]  # edited below
            canvas[order[0]] = MASK  # masked again
        canvases.append(canvas)
    canvases.append(final)
    calls = len(canvases) - 1
    columns = np.tile(np.arange(len(prompt), len(final), dtype=np.int32), (calls, 1))
    columns[::3, ::2] = -1
    sure = np.random.default_rng(1).random(columns.shape, np.float32)
    candidates = np.stack(canvases[1:])[:, len(prompt) :]
    candidates = np.where(candidates == MASK, text[0], candidates).astype(np.int32)
    record = Record(np.stack(canvases), columns, candidates, sure, 2 * sure, len(prompt), MASK)
    about = {
        "prompt": PROMPT,
        "model": "bundled",
        "decode": {"threshold": 0.9, "steps": None},
        "environment": {"jdllm": "0.1.0"},
        "finish_reason": "stop",
    }
    return Run(record, Lexicon(tokenizer, MASK, (1, 2)), about)


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "run.html"
    replay.write(path, run)
    return path


def test_the_page_stands_alone(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"<(?:link|img|iframe|object)\b|@import|url\(|\bsrc=|https?:", text)
    assert text.count("<script") == text.count("</script>") == 2
    assert "<title>&lt;/script&gt;" in text


def test_the_page_holds_the_trace(page: Path, run: Run):
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    held = json.loads(data)
    assert held["header"]["prompt"] == PROMPT
    assert held["header"]["commit"] == run.record.commits.tolist()
    assert len(held["calls"]) == run.record.calls
    for line, sure in zip(held["calls"], run.record.confidence, strict=True):
        looked = run.record.columns[line["call"] - 1] >= 0
        assert line["confidence"] == pytest.approx(sure[looked], abs=0.6 * 10**-replay.DIGITS)


def test_slots_in_the_data_are_left_alone(run: Run):
    tricky = Run(run.record, run.pieces, {"prompt": "__DATA__ __TITLE__ \\1"})
    text = replay.page(tricky)
    assert text.count('"prompt": "__DATA__ __TITLE__ \\\\1"') == 1
    assert "<title>__DATA__ __TITLE__ \\1 · jdllm</title>" in text


# ---- in the browser

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1000,800",
)  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    found = find_chromium()
    if found is None:
        pytest.fail(
            "no chromium and chromedriver on the path: install both (on Debian "
            "`apt-get install chromium chromium-driver`), or leave out `-m browser`"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
    yield driver
    driver.quit()


def open_page(driver: Any, page: Path) -> None:
    driver.get(page.as_uri())
    assert driver.get_log("browser") == []


def element(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def canvas(driver: Any) -> str:
    return element(driver, "#completion").get_property("textContent")


def expected(run: Run, call: int) -> str:
    return "".join(cell.text for cell in show.cells(run.record, call, run.pieces))


@pytest.mark.browser
def test_slider_keys_and_play(driver: Any, page: Path, run: Run):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def where() -> str:
        return element(driver, "#where").text

    def press(*keys: str) -> None:
        ActionChains(driver).send_keys(*keys).perform()

    open_page(driver, page)
    calls = run.record.calls
    slider = element(driver, "#slider")
    assert where() == f"call 0 of {calls}"
    ActionChains(driver).move_to_element(slider).click().perform()
    assert where() == f"call {calls // 2} of {calls}"
    assert canvas(driver).expandtabs(4) == expected(run, calls // 2)
    press(Keys.ARROW_RIGHT)
    assert where() == f"call {calls // 2 + 1} of {calls}", "the slider has the focus"
    element(driver, "#next").click()
    press(Keys.ARROW_LEFT)
    assert where() == f"call {calls // 2 + 1} of {calls}", "a button has the focus"
    press(Keys.HOME)
    assert where() == f"call 0 of {calls}"
    element(driver, "#speed").send_keys("30")
    element(driver, "#play").click()
    assert element(driver, "#play").get_attribute("aria-label") == "Pause"
    WebDriverWait(driver, 20).until(lambda _: where() == f"call {calls} of {calls}")
    assert element(driver, "#play").get_attribute("aria-label") == "Play"
    assert canvas(driver).expandtabs(4) == expected(run, calls)
    assert driver.title.startswith("</script><script>")
    assert driver.get_log("browser") == []


@pytest.mark.browser
def test_every_call_reads_and_rates_as_in_python(driver: Any, page: Path, run: Run):
    open_page(driver, page)
    record = run.record
    for call in [*range(record.calls + 1), 2]:
        driver.execute_script("go(arguments[0])", call)
        assert canvas(driver).expandtabs(4) == expected(run, call), call
        state = driver.execute_script("return [state.tokens, state.writer, state.sure]")
        assert state[0] == record.tokens[call].tolist()
        writers = np.where(record.writers[call] < 0, 0, record.writers[call])
        masked = record.tokens[call] == MASK
        assert np.where(masked, 0, state[1]).tolist() == writers.tolist()
        sure = np.array([np.nan if x is None else x for x in state[2]])
        np.testing.assert_allclose(sure, record.sureness[call], atol=1e-4)


@pytest.mark.browser
def test_details_colours_and_themes(driver: Any, page: Path, run: Run):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def colour(selector: str) -> str:
        return element(driver, selector).value_of_css_property("background-color")

    open_page(driver, page)
    record = run.record
    driver.execute_script("go(arguments[0])", record.calls)
    column = int(np.flatnonzero(record.writers[-1] == 5)[0])
    cell = element(driver, f"[data-column='{column}']")
    ActionChains(driver).move_to_element(cell).perform()
    tip = element(driver, "#tip").text
    assert f"column {column}, " in tip and "by call 5" in tip
    for call, place in zip(*np.nonzero(record.columns == column), strict=True):
        values = record.confidence[call, place], record.entropy[call, place]
        confidence, entropy = (float(str(np.round(x, replay.DIGITS))) for x in values)
        assert f"{confidence:.3f} {entropy:.3f}" in tip
    cell.click()
    ActionChains(driver).move_to_element(element(driver, "#title")).perform()
    assert element(driver, "#tip").is_displayed(), "a click pins the details"
    ActionChains(driver).send_keys(Keys.ESCAPE).perform()
    assert not element(driver, "#tip").is_displayed()

    seen = set()
    for _ in range(3):
        seen.add(colour(f"[data-column='{column}']"))
        ActionChains(driver).send_keys("c").perform()
    assert len(seen) == 3, "by confidence, by commit step, none"
    light = colour("body")
    driver.execute_script("setTheme(2)")
    assert colour("body") != light
    element(driver, "#theme").click()
    assert colour("body") == light, "the headless system is light"

    driver.execute_script("go(1)")
    before = canvas(driver)
    element(driver, "#guesses").click()
    assert canvas(driver).count(show.SIGNS["mask"]) < before.count(show.SIGNS["mask"])
    assert driver.get_log("browser") == []
