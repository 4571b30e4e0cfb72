"""The page of --trace as a browser shows it; needs chromium, its driver (Debian: chromium-driver)
and bench/requirements-browser.txt: pytest -m browser tests/test_trace_browser.py"""

import shutil
import time
from contextlib import contextmanager

import pytest

import sample
from data.trace import write_page
from strategies import call, small_tokenizer
from test_trace import ODD, data_of, fake
from tree import Tree

pytestmark = pytest.mark.browser

SWITCHES = "headless no-sandbox disable-gpu no-first-run disable-sync disable-component-update"
DESKTOP = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in [*SWITCHES.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument("--" + switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@contextmanager
def opened(browser, file, screen=DESKTOP, scheme="light"):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    browser.get(f"file://{file}")
    yield
    assert browser.get_log("browser") == []


FLAGS = ["--tree 8", "--tree 64 --temperature 0.7", "--tree 24 --temperature 1 --accept typical"]


@pytest.fixture(scope="module", params=FLAGS)
def file(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    call(sample.main, "--device", "cpu", "--trace", file, *request.param.split())
    return file


def press(browser, *keys) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(browser).send_keys(*(getattr(Keys, key) for key in keys)).perform()


def shown_step(browser) -> int:
    return int(browser.find_element("id", "timeline").get_attribute("aria-valuenow"))


def all_of(browser, selector, value):
    script = f"return [...document.querySelectorAll(arguments[0])].map(element => element.{value})"
    return browser.execute_script(script, selector)


def numbers(browser, selector, name="node") -> list[int]:
    return [int(number) for number in all_of(browser, selector, f"dataset.{name}")]


def results(record: dict, typical: bool) -> list[str]:
    """What became of each node, by the rule itself."""
    passed, found = {0}, ["accepted"]
    for node, parent in enumerate(record["tree"]["parents"][1:], start=1):
        passes = record["tokens"][node] == record["targets"][parent]
        if typical:
            passes = record["base_probs"][node] > record["thresholds"][parent]
        passed |= {node} if passes and parent in passed else set()
        result = "passed" if passes else "rejected"
        result = result if parent in passed else "not reached"
        found.append("accepted" if node in record["path"] else result)
    return found


LIT = "#mask .cell.row[data-column]"  # what the chosen node's row of the mask shows


def test_each_step_shows_its_path_the_text_the_mask_and_the_rows_that_move(browser, file):
    content = data_of(file)
    text = content["prompt"]
    with opened(browser, file):
        press(browser, "HOME")
        for number, record in enumerate(content["steps"]):
            assert len(numbers(browser, "#tree .node")) == len(record["tokens"])
            tree, path = Tree(*map(tuple, record["tree"].values())), record["path"]
            text += "".join(record["text"])
            assert shown_step(browser) == number
            expected = results(record, content["typical"])
            for result in ("accepted", "passed", "rejected", "not reached"):
                found = numbers(browser, "#tree .node." + result.replace(" ", "-"))
                assert sorted(found) == [i for i, r in enumerate(expected) if r == result]
            assert all_of(browser, "#text", "textContent") == [text]
            assert numbers(browser, "#cache .row-node") == [*range(len(tree)), *path]
            assert numbers(browser, LIT, "column") == tree.mask[path[-1]].nonzero()[:, 0].tolist()
            press(browser, "ARROW_RIGHT")
        tokens = sum(len(record["emitted"]) for record in content["steps"])
        rate = (tokens - 1) / number
        assert browser.find_element("id", "rate").text == f"{rate:.2f}"


def test_the_keyboard_steps_plays_and_walks_the_tree(browser, file):
    last = len(data_of(file)["steps"]) - 1
    with opened(browser, file):
        keys = "HOME ARROW_LEFT ARROW_RIGHT END ARROW_RIGHT ARROW_LEFT".split()
        for key, expected in zip(keys, (0, 0, 1, last, last, last - 1)):
            press(browser, key)
            assert shown_step(browser) == expected
        press(browser, "HOME", "SPACE")
        time.sleep(2.2)
        press(browser, "SPACE")
        paused = shown_step(browser)
        # A button with the focus: space must not press it as well.
        browser.find_element("id", "play").click()
        press(browser, "SPACE")
        time.sleep(1.2)
        assert 1 <= shown_step(browser) == paused <= 3
        press(browser, "HOME", "ARROW_RIGHT")
        browser.execute_script("document.querySelector('.node[data-node=\"0\"]').focus()")
        press(browser, *["ARROW_DOWN"] * 3)
        assert numbers(browser, ".node.pointed") == numbers(browser, "#tree .node")[3:4]


def test_the_mouse_lights_up_row_and_column_and_moves_the_time(browser, file):
    from selenium.webdriver import ActionChains

    steps = data_of(file)["steps"]
    mask = Tree(*map(tuple, steps[1]["tree"].values())).mask
    with opened(browser, file):
        for node in (0, 1, 3, len(mask) - 1):
            element = browser.find_element("css selector", f".node[data-node='{node}']")
            browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            ActionChains(browser).move_to_element(element).perform()
            assert numbers(browser, LIT, "column") == mask[node].nonzero()[:, 0].tolist()
            seen_by = numbers(browser, "#mask .seen-by", "row")
            assert [node, *seen_by] == mask[:, node].nonzero()[:, 0].tolist()
            begin = f"Node {node} " if node else "Root "
            assert browser.find_element("id", "detail").text.startswith(begin)
        ActionChains(browser).click(browser.find_element("id", "timeline")).perform()
        assert abs(shown_step(browser) - (len(steps) - 1) / 2) <= 1


OVERFLOW = """return [...document.querySelectorAll("main *, footer *, header *")].filter(e => {
  const { width, right } = e.getBoundingClientRect();
  return width && right > innerWidth + 1 && !e.closest("#text, .node");
}).map(e => e.outerHTML.slice(0, 90))"""
CONTRAST = """
const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
  const v = c[i] / 255;
  return sum + weight * (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
}, 0);
const colour = text => text.match(/[\\d.]+/g).map(Number);
const ground = element => {
  const c = colour(getComputedStyle(element).backgroundColor);
  return c.length < 4 || c[3] > 0 ? c : ground(element.parentElement);
};
const hasText = e => !e.closest("svg") && e.getClientRects().length
  && [...e.childNodes].some(node => node.nodeType === 3 && node.data.trim());
return [...document.querySelectorAll("main *, header *, footer *")].filter(hasText).map(e => {
  const pair = [light(colour(getComputedStyle(e).color)), light(ground(e))];
  return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), e.outerHTML.slice(0, 90)];
}).filter(([ratio]) => ratio < 4.5)"""
DRAWN = "return performance.getEntriesByName('shown')[0].startTime"
RED = "return +getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"


def test_on_every_screen_the_page_is_soon_there_fits_and_is_legible(browser, file):
    assert file.stat().st_size <= 1.5e6
    for width, scheme in zip((320, 360, 768, 1280), ("light", "dark", "light", "dark")):
        screen = {**DESKTOP, "width": width, "mobile": width < 600}
        with opened(browser, file, screen, scheme):
            assert browser.execute_script(DRAWN) <= 1000
            assert all_of(browser, "html", "scrollWidth")[0] <= width
            assert browser.execute_script(OVERFLOW) == browser.execute_script(CONTRAST) == []
            assert (browser.execute_script(RED) < 64) == (scheme == "dark")


NASTY = ["</script><script>pwned=1</script>", "<img src=x onerror=pwned=1>", "\u202eevil\u2066"]
ESCAPED = {0: "\\x00", 0x2028: "\\u2028", 0x202E: "\\u202e", 0x2066: "\\u2066"}


def test_odd_tokens_are_shown_and_do_nothing(browser, tmp_path):
    encode, prompt = small_tokenizer().encode, "".join(NASTY + ODD)
    steps = [[token] for token in encode("x")] + [encode(text) for text in NASTY + ODD]
    write_page(tmp_path / "page.html", fake(steps, prompt))
    with opened(browser, tmp_path / "page.html"):
        press(browser, "HOME")
        for number, tokens in enumerate(steps):
            shown = all_of(browser, "#story .end .chip", "textContent")
            assert len(shown) == (len(tokens) if number else 2) and all(shown)
            assert not set("\0\n\u2028\u202e\u2066") & set("".join(shown))
            press(browser, "ARROW_RIGHT")
        text = (prompt + "x" + prompt).translate(ESCAPED)
        assert all_of(browser, "#text", "textContent") == [text]
        assert not browser.execute_script("return window.pwned")
        assert all_of(browser, "img, #about b, #tree-why b", "tagName") == []
