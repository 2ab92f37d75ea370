"""The page: what is in it, and what happens when Chromium chats on it."""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Running

PUZZLE = "7 + 5 ="
SHOTS = Path(__file__).parents[2] / ".screenshots"


def test_the_page_stands_alone(served: Running):
    with urllib.request.urlopen(served.url) as reply:
        text, policy = reply.read().decode(), reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.findall(r"<(?:img|iframe|object)\b|@import|url\(|\bsrc=|https?:", text)
    assert "innerHTML" not in text and "insertAdjacent" not in text


@pytest.fixture
def browser() -> Iterator[Any]:
    from selenium import webdriver

    from tests.conftest import find_chromium

    if not (found := find_chromium()):
        pytest.fail("no chromium and chromedriver on the path: apt-get install both")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(found[1]))
    yield driver
    driver.quit()


@pytest.mark.browser
@pytest.mark.parametrize("size", [(390, 844), (1280, 800)])
def test_a_chat(browser: Any, served: Running, size: tuple[int, int], small: Any):
    """Text with markup stays text; the canvas is drawn; stop and a new chat work; it fits."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.set_window_size(*size)
    browser.get(served.url)
    wait = WebDriverWait(browser, 60)

    def one(css: str) -> Any:
        return browser.find_element(By.CSS_SELECTOR, css)

    def idle() -> Any:
        return wait.until(lambda _: one("#send").text == "Send")

    wait.until(lambda _: one("#model").text == "small")
    browser.execute_script(
        "window.drawn = 0; const old = draw; draw = (...x) => { drawn++; old(...x); };"
    )
    text = f"<b>{PUZZLE}</b>"
    one("#text").send_keys(text)
    one("#send").click()
    idle()
    (wanted,) = small.generate([[{"role": "user", "content": text}]])
    assert one(".user").text == text
    assert browser.execute_script("return document.querySelector('.reply').textContent") == (
        wanted.text
    )
    assert "model calls" in one(".note").text
    assert browser.execute_script("return drawn") >= 1
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= browser.execute_script("return innerWidth")
    if SHOTS.is_dir():
        browser.save_screenshot(str(SHOTS / f"chat-{size[0]}.png"))
    one("summary").click()
    one("#tokens").send_keys("9999")
    one("#text").send_keys("again\n")
    idle()
    assert "exceeds" in browser.find_elements(By.CSS_SELECTOR, ".note")[-1].text
    one("#fresh").click()
    assert not browser.find_elements(By.CSS_SELECTOR, ".user")
    severe = [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert all("400" in entry["message"] for entry in severe), severe
