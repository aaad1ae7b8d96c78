"""The web page at `/`, in real headless Chromium against the real server.

Needs `apt-get install chromium-driver` (brings the Chromium that fits it) and
`pip install selenium`; nothing is downloaded while it runs.
"""

import json
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import pytest

from course import process

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "serving" / "page.html"
ENTER, ESCAPE = "\ue007", "\ue00c"  # WebDriver's codes for these keys
DEADLINE_S = 60
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--no-proxy-server --window-size=1280,900"
)
HOSTILE = '<img src=x onerror="window.harmed = 1"><script>harmed = 1</script>'


class Page:
    """The page in a browser; an element is named by its id."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url: str) -> None:
        for kind in ("performance", "browser"):
            self.log(kind)  # of the page before
        self.driver.get(url)
        self.until("$('slots').childElementCount > 0")

    def run(self, script: str):
        return self.driver.execute_script(script)

    def until(self, condition: str) -> None:
        """Waits until a JavaScript condition holds."""
        process.wait_until(
            lambda: self.run(f"return Boolean({condition})"), DEADLINE_S, condition
        )

    def text(self, name: str) -> str:
        return self.driver.find_element("id", name).text

    def click(self, name: str) -> None:
        self.driver.find_element("id", name).click()

    def fill(self, name: str, *keys: str) -> None:
        field = self.driver.find_element("id", name)
        field.clear()
        field.send_keys(*keys)

    def say(self, message: str) -> None:
        self.fill("message", message, ENTER)

    def finished(self) -> None:
        self.until("$('stop').hidden")

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.driver.find_elements("css selector", selector)]

    def errors(self) -> list[str]:
        """What a developer would see in red in the console."""
        return [e["message"] for e in self.log("browser") if e["level"] == "SEVERE"]

    def requested(self) -> list[str]:
        """The network addresses of all requests since the page was opened."""
        log = [json.loads(e["message"])["message"] for e in self.log("performance")]
        sent = [e["params"] for e in log if e["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent]
        return [url for url in urls if not url.startswith(("chrome:", "data:"))]

    def log(self, kind: str) -> list[dict]:
        """What the browser has written to this log since the last look."""
        return self.driver.get_log(kind)


def program(name: str) -> str:
    """Where a browser program is; the test is skipped where it is not."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install chromium-driver")
    return path


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install selenium"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    # A driver named by its path keeps selenium from looking for one to download.
    service = webdriver.ChromeService(program("chromedriver"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        with webdriver.Chrome(options, service) as driver:
            yield Page(driver)


@pytest.fixture
def page(browser, server) -> Page:
    browser.open(server.url)
    return browser


def active(url: str) -> int:
    """How many slots the server at this address has at work."""
    address = url.rstrip("/") + "/health/ready"
    with build_opener(ProxyHandler({})).open(address, timeout=10) as response:
        return json.load(response)["active"]


def test_source_is_small_self_contained_and_writes_no_markup():
    source = PAGE.read_text("utf-8")
    assert len(source.encode()) <= 30_000
    assert source.count("://") == source.count("http://www.w3.org/2000/svg") == 1
    for way_in in ("innerHTML", "outerHTML", "insertAdjacentHTML", "write(<", "eval("):
        assert way_in not in source


@pytest.mark.browser
def test_loads_without_error_from_its_own_origin_only(page, server):
    page.until("$('state').dataset.state === 'ready'")
    assert page.errors() == []
    hosts = {urlsplit(url).netloc for url in page.requested()}
    assert hosts == {urlsplit(server.url).netloc}


@pytest.mark.browser
def test_every_control_has_a_name(page):
    controls = page.driver.find_elements("css selector", "button, input, textarea")
    shown = [control for control in controls if control.is_displayed()]
    assert len(shown) >= 9
    assert all(control.accessible_name for control in shown)


@pytest.mark.browser
def test_fits_a_narrow_screen(page):
    narrow = {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        assert page.run("return document.documentElement.scrollWidth") <= 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_an_answer_streams_in_steps_and_shows_its_figures(page):
    page.run(
        "window.lengths = [];"
        "new MutationObserver(() => lengths.push("
        "  document.querySelector('.turn:last-child p').textContent.length))"
        ".observe($('talk'), {characterData: true, subtree: true})"
    )
    page.say("Tell me a story about a fox.")
    page.finished()
    lengths = page.run("return lengths")
    assert len(set(lengths)) >= 5
    assert lengths == sorted(lengths)
    assert float(page.text("rate")) > 0
    assert page.text("first").endswith(("ms", "s"))
    assert int(page.text("prompt")) > 0
    assert "tokens in" in page.texts(".turn:last-child .number")[0]
    assert page.errors() == []


@pytest.mark.browser
def test_the_conversation_is_kept_and_its_prefix_comes_from_the_cache(page):
    page.fill("max-tokens", "24")
    page.say("Name three animals that live in the forest.")
    page.finished()
    before = int(page.text("prompt"))
    page.say("Name one more.")
    page.finished()
    assert int(page.text("prompt")) > before
    assert 0 < int(page.text("cached")) < int(page.text("prompt"))
    assert page.texts(".turn h3") == ["You", "Model"] * 2


@pytest.mark.browser
@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_frees_the_slot(page, server, way):
    page.fill("max-tokens", "1500")
    page.say("Write a very long story about a voyage around the world.")
    page.until("document.querySelector('.live p')?.textContent")
    assert active(server.url) == 1
    if way == "button":
        page.click("stop")
    else:
        page.fill("message", ESCAPE)
    process.wait_until(lambda: active(server.url) == 0, DEADLINE_S, "a free slot")
    page.finished()
    assert page.texts(".turn:last-child .number") == ["stopped"]
    page.until("$('busy').textContent.startsWith('0 of ')")


@pytest.mark.browser
def test_eight_answers_are_written_side_by_side(page):
    page.click("eight")
    page.until("document.querySelectorAll('.card.done').length === 8")
    assert all(page.texts(".card p"))
    spans = page.run("return cards.map((card) => [card.meter.first, card.meter.last])")
    # At some moment all eight had begun and none had ended.
    assert max(first for first, _ in spans) < min(last for _, last in spans)
    page.until("!$('eight').disabled")
    assert float(page.text("eight-rate").split()[0]) > 0
    assert page.errors() == []


@pytest.mark.browser
def test_markup_in_a_message_or_an_answer_stays_text(page):
    page.fill("max-tokens", "48")
    page.fill("temperature", "0")
    page.say(f"Repeat this: {HOSTILE}")
    page.finished()
    # Whatever the model made of it: the same through the two ways an answer is shown.
    page.run(
        f"addTurn('Model', '').node.appendData({HOSTILE!r});"
        f"cards[0].write({HOSTILE!r}, 1); showFault(new Refusal({HOSTILE!r}))"
    )
    assert page.texts(".turn p")[0] == f"Repeat this: {HOSTILE}"
    assert page.texts(".turn:last-child p")[0] == HOSTILE
    assert page.texts(".card p")[0] == HOSTILE
    assert page.text("fault") == HOSTILE
    assert page.run("return document.querySelectorAll('img, script').length") == 1
    assert page.run("return window.harmed") is None


@pytest.fixture
def locked():
    """A server that asks for a key and allows one request a minute: (url, key)."""
    key, port = secrets.token_urlsafe(32), process.free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, str(ROOT / "model_api.py"), "--serve", "--port", str(port)]
    env = {"API_KEYS": key, "REQUESTS_PER_MINUTE": "1"}
    ready = f"{url}/health/ready"
    with process.child(argv, env=env, ready=ready, deadline_s=DEADLINE_S):
        yield url, key


@pytest.mark.browser
def test_a_wrong_key_and_a_spent_limit_show_the_servers_message(browser, locked):
    url, key = locked
    browser.open(url)
    browser.fill("key", "wrong")
    browser.say("Hello")
    browser.until("!$('fault').hidden")
    assert "key" in browser.text("fault").lower()
    assert browser.run("return document.activeElement.id") == "key"
    assert browser.run("return $('message').value") == "Hello"  # to be sent again

    browser.fill("key", key)
    browser.say("Hello")
    browser.finished()
    assert browser.run("return $('fault').hidden")
    browser.say("Hello again")
    browser.until("!$('fault').hidden")
    assert "Try again in " in browser.text("fault")
    assert browser.run("return localStorage.length") == 0
