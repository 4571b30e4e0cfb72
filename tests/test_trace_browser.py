"""The page of --trace as a browser shows it: pytest -m browser tests/test_trace_browser.py

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver) and bench/requirements-browser.txt.
"""

import json
import shutil
import sys
import time
from contextlib import contextmanager

import pytest

import sample
from data.trace import page
from strategies import small_tokenizer
from test_trace import ODD, Outline, fake

pytestmark = pytest.mark.browser

SWITCHES = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync".split()
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
DESKTOP = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    try:
        from selenium import webdriver
    except ImportError:
        pytest.fail("selenium is missing: pip install -r bench/requirements-browser.txt")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.fail("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in [*SWITCHES, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument("--" + switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@contextmanager
def opened(browser, file, screen=DESKTOP, scheme="light", at=""):
    """The page on this screen; in the end it must have had nothing to complain about."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.get("about:blank")  # else a new #step alone would not load the page anew
    browser.get(f"file://{file}{at}")
    yield browser
    assert browser.get_log("browser") == []


def written(folder, *argv):
    file = folder / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--trace", str(file), *argv])
        sample.main()
    return file


@pytest.fixture(scope="module", params=["greedy", "64 nodes", "typical"])
def file(request, tmp_path_factory):
    """128 tokens of the shipped base and heads."""
    flags = {
        "greedy": ["--tree", "8"],
        "64 nodes": ["--tree", "64", "--temperature", "0.7"],
        "typical": ["--tree", "24", "--temperature", "1", "--accept", "typical"],
    }
    return written(
        tmp_path_factory.mktemp("page"), "--max-new-tokens", "128", *flags[request.param]
    )


def press(browser, *keys) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(browser).send_keys(*(getattr(Keys, key) for key in keys)).perform()


def step_of(browser) -> int:
    return int(browser.find_element("id", "timeline").get_attribute("aria-valuenow"))


NODES = "return [...document.querySelectorAll(arguments[0])].map(element => +element.dataset.node)"
LIT = "return [...document.querySelectorAll('#mask .cell.row[data-column]')].map(cell => +cell.dataset.column)"


def test_each_step_shows_the_accepted_path_of_its_record_the_text_and_the_rows_that_move(
    browser, file
):
    content = json.loads(Outline(file.read_text("utf-8")).data)
    text = content["prompt"]
    with opened(browser, file):
        press(browser, "HOME")
        for number, record in enumerate(content["steps"]):
            tree = content["trees"][record["tree"]]
            text += "".join(record["text"])
            assert step_of(browser) == number
            assert sorted(browser.execute_script(NODES, "#tree .node.accepted")) == record["path"]
            assert sorted(browser.execute_script(NODES, "#tree .node")) == list(
                range(len(record["tokens"]))
            )
            shown = browser.execute_script("return document.getElementById('text').textContent")
            assert shown == text
            assert browser.execute_script(NODES, "#cache .row-node") == [
                *range(len(record["tokens"])),
                *record["path"],
            ]
            assert browser.execute_script(LIT) == [
                node for node, mark in enumerate(tree["mask"][record["path"][-1]]) if mark == "1"
            ]
            press(browser, "ARROW_RIGHT")
        assert step_of(browser) == len(content["steps"]) - 1
        assert (
            browser.find_element("id", "rate").text
            == f"{(len_of(content) - 1) / (len(content['steps']) - 1):.2f}"
        )


def len_of(content) -> int:
    return sum(len(record["emitted"]) for record in content["steps"])


def test_the_keyboard_steps_plays_and_walks_the_tree(browser, file):
    content = json.loads(Outline(file.read_text("utf-8")).data)
    last = len(content["steps"]) - 1
    with opened(browser, file):
        assert step_of(browser) == 1
        for key, expected in (
            ("HOME", 0),
            ("ARROW_LEFT", 0),
            ("ARROW_RIGHT", 1),
            ("END", last),
            ("ARROW_RIGHT", last),
            ("ARROW_LEFT", last - 1),
        ):
            press(browser, key)
            assert step_of(browser) == expected
        press(browser, "HOME", "SPACE")
        time.sleep(2.2)
        press(browser, "SPACE")
        assert 1 <= (paused := step_of(browser)) <= 3
        time.sleep(1.2)
        assert step_of(browser) == paused
        browser.find_element(
            "id", "play"
        ).click()  # the button has the focus now: space must not press it as well
        press(browser, "SPACE")
        time.sleep(1.2)
        assert step_of(browser) == paused
        press(browser, "HOME", "ARROW_RIGHT")
        browser.execute_script("document.querySelector('.node[data-node=\"0\"]').focus()")
        for _ in range(3):
            press(browser, "ARROW_DOWN")
        pointed = browser.execute_script(NODES, ".node.pointed")
        assert pointed == browser.execute_script(NODES, "#tree .node")[3:4]
        press(browser, "ARROW_RIGHT")
        assert step_of(browser) == 2


def test_the_mouse_lights_up_row_and_column_and_moves_the_time(browser, file):
    from selenium.webdriver import ActionChains

    content = json.loads(Outline(file.read_text("utf-8")).data)
    mask = content["trees"][content["steps"][1]["tree"]]["mask"]
    with opened(browser, file):
        for node in (0, 1, 3, len(mask) - 1):
            element = browser.find_element("css selector", f".node[data-node='{node}']")
            browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            ActionChains(browser).move_to_element(element).perform()
            assert browser.execute_script(LIT) == [
                other for other in range(len(mask)) if mask[node][other] == "1"
            ]
            seen_by = browser.execute_script(
                "return [...document.querySelectorAll('#mask .cell.seen-by')].map(cell => +cell.dataset.row)"
            )
            assert seen_by == [
                other for other in range(len(mask)) if mask[other][node] == "1" and other != node
            ]
            assert browser.find_element("id", "detail").text.startswith(
                f"Node {node} " if node else "Root "
            )
        timeline = browser.find_element("id", "timeline")
        ActionChains(browser).move_to_element(timeline).click().perform()
        assert abs(step_of(browser) - (len(content["steps"]) - 1) / 2) <= 1


TIMES = """const done = arguments[0], look = () => {
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  paint ? done([performance.getEntriesByName("shown")[0].startTime, paint.startTime]) : setTimeout(look, 20);
}; look();"""


def test_the_page_is_small_and_soon_there(browser, file, capsys):
    with opened(browser, file):
        times = browser.execute_async_script(TIMES)
    with capsys.disabled():
        print(
            f"\n{file.stat().st_size / 1e6:.3f} MB, drawn after {times[0]:.0f} ms, painted after {times[1]:.0f} ms"
        )
    assert file.stat().st_size <= 1.5e6
    assert max(times) <= 1000


OVERFLOW = """return [...document.querySelectorAll("main *, footer *, header *")].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !element.closest("#text, .node");
}).map(element => element.outerHTML.slice(0, 90))"""


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, file, width):
    with opened(browser, file, PHONE | {"width": width}):
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OVERFLOW) == []


CONTRAST = """
const light = c => c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const colour = text => text.match(/[\\d.]+/g).map(Number);
const behind = element => { while (element) { const c = colour(getComputedStyle(element).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3); element = element.parentElement; } };
return [...document.querySelectorAll("main *, header *, footer *")].filter(e => !e.closest("svg") && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length).map(e => {
  const [a, b] = [light(colour(getComputedStyle(e).color).slice(0, 3)), light(behind(e))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 90)];
}).filter(([ratio]) => ratio < 4.5)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(browser, file, scheme):
    with opened(browser, file, scheme=scheme):
        assert browser.execute_script(CONTRAST) == []
        red = browser.execute_script(
            "return +getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
        )
        assert (red < 64) == (scheme == "dark")


NASTY = [
    "</script><script>pwned=1</script>",
    "<img src=x onerror=pwned=1>",
    "{{trace}}",
    "\u202eevil\u2066",
    *ODD,
]


def test_odd_tokens_are_shown_and_do_nothing(browser, tmp_path):
    steps, prompt = (
        [[token] for token in small_tokenizer().encode("x")]
        + [small_tokenizer().encode(text) for text in NASTY],
        "".join(NASTY),
    )
    about = {
        "prompt": prompt,
        "why": "<b>why</b>",
        "difference": "</script><b>",
        "costs": [0.002, 0.001],
    }
    file = tmp_path / "page.html"
    file.write_text(page(fake(steps, prompt).content() | about), "utf-8")
    with opened(browser, file):
        press(browser, "HOME")
        for number, tokens in enumerate(steps):
            assert step_of(browser) == number
            shown = browser.execute_script(
                "return [...document.querySelectorAll('#story .end .chip')].map(chip => chip.textContent)"
            )
            assert len(shown) == (len(tokens) if number else 2) and all(
                shown
            )  # of the prompt: its last token, and what follows
            assert not set("\0\n\u2028\u202e\u2066") & set("".join(shown))
            press(browser, "ARROW_RIGHT")
        text = browser.execute_script("return document.getElementById('text').textContent")
        assert text == (prompt + "x" + prompt).translate(
            {0: "\\x00", 0x2028: "\\u2028", 0x202E: "\\u202e", 0x2066: "\\u2066"}
        )
        assert browser.execute_script(
            "return window.pwned === undefined && !document.querySelector('img, #about b, #tree-why b')"
        )
