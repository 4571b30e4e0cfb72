"""The README's picture: plain and Medusa decoding of one prompt, each in its own measured time.

    python bench/animation.py            decoding.json, unless it is there already, and decoding.svg
    python bench/animation.py --still    trace.png: a screenshot of the page of sample.py --trace

The prompt is a typical one: of 50 held-out prompts, those whose text repeats most of its 4-grams
left out, the one whose tokens/step is nearest to the mean of all 50. Every step of a way takes the
median time of its steps. Remove decoding.json to measure again. --still needs chromium, its driver
(Debian: chromium-driver) and bench/requirements-browser.txt.
"""

import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.drawing import picture
from bench.figures import PROMPT_TOKENS, PROMPTS, distinct, machine
from bench.results import Bench, held_out_prompts, load
from data.command import check_out, option, optional, parsed, run
from data.tokenizer import SHIPPED_BASE
from data.trace import TextStream
from medusa import GREEDY, Step
from model import check, check_sizes, read_json, write_atomically, write_json
from sample import decode, read_calibration, timed_run
from tree import ROOT_ONLY, Tree, calibrated_tree

NODES, ROUNDS = 8, 20  # of the tree; of timing, in each both ways decode the prompt


@dataclass(frozen=True)
class AnimationConfig:
    out: str = option("bench/results", "directory of decoding.json, decoding.svg and trace.png")
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("data/heads", "directory of the heads and their calibration.json")
    prompt_tokens: int = option(PROMPT_TOKENS, "tokens of a prompt")
    new_tokens: int = option(88, "tokens decoded after it")
    still: bool = option(False, "write trace.png, and nothing else")

    def __post_init__(self):
        check_sizes(self, ["prompt_tokens"])
        check(self.new_tokens >= 8, f"--new-tokens {self.new_tokens}: must be at least 8")


# ---- what is measured ----
def typical(runs: list[list[Step]]) -> int:
    """Which decoding is nearest to the mean tokens/step of all; none that loops, if possible."""
    texts = [sum((step.emitted for step in steps), []) for steps in runs]
    counts = [(len(text) - 1, len(steps) - 1) for text, steps in zip(texts, runs)]
    mean = sum(tokens for tokens, _ in counts) / max(sum(steps for _, steps in counts), 1)
    strange = []
    for text, (tokens, steps) in zip(texts, counts):
        # A text may end with the prompt's own step.
        is_fit = steps > 0 and distinct([text]) >= 0.5
        strange.append(abs(tokens / steps - mean) if is_fit else math.inf)
    return strange.index(min(strange))


def measure(config: AnimationConfig) -> dict:
    """The prompt; for each way its tree, the time of its steps, and the text and path of each."""
    tokenizer, model, heads = load(Bench(base=config.base, heads=config.heads))
    tree = calibrated_tree(read_calibration(config.heads, 0.0)[0], NODES)
    trees, times = {"plain": ROOT_ONLY, "medusa": tree}, {"plain": [], "medusa": []}

    def steps_of(tree: Tree, prompt: list[int]):
        return decode(model, heads, tree, prompt, config.new_tokens, GREEDY, seed=0)

    prompts = held_out_prompts(tokenizer, PROMPTS, config.prompt_tokens)
    prompt = prompts[typical([list(steps_of(tree, prompt)) for prompt in prompts])]
    for _ in range(ROUNDS):  # plain, medusa, plain, medusa: a slow moment hits both
        for way, seconds in times.items():
            seconds += timed_run(steps_of(trees[way], prompt))[1]

    content: dict = {"command": " ".join(["python", *sys.argv]), "machine": machine()}
    content |= {"date": date.today().isoformat(), "prompt": tokenizer.decode(prompt)}
    for way, tree in trees.items():
        stream, steps = TextStream(tokenizer, prompt), []
        for step in steps_of(tree, prompt):
            text = [stream.push(token) for token in step.emitted]
            steps.append({"text": text, "path": step.path})
        steps[-1]["text"][-1] += stream.rest()
        content[way] = {"seconds": statistics.median(times[way]), "steps": steps}
        content[way] |= {"parents": tree.parents, "ranks": tree.ranks}
    texts = {"".join("".join(step["text"]) for step in content[way]["steps"]) for way in trees}
    check(len(texts) == 1, "rounding made the two texts differ: try another --new-tokens")
    return content


# ---- the trace page ----
def screenshot(out: Path) -> None:
    """out/trace.png: a step in the middle that accepted many guesses, its tree and its mask."""
    user, file = "bench/animation.py --still", "bench/requirements-browser.txt"
    webdriver = optional("selenium.webdriver", user, file)
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    missing = None in (chromium, chromedriver)
    check(not missing, f"{user} needs chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{switch}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "trace.html")
        command = [sys.executable, "sample.py", "--device", "cpu", "--tree", str(NODES)]
        command += ["--trace", str(page)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
        try:
            screen = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            still = {"name": "prefers-reduced-motion", "value": "reduce"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [still]})
            driver.get(page.as_uri())
            accepted = driver.execute_script("return steps.map(step => step.path.length)")
            middle = range(len(accepted) // 3, 2 * len(accepted) // 3 + 1)
            driver.get(f"{page.as_uri()}#{max(middle, key=accepted.__getitem__)}")
            driver.execute_script("title.scrollIntoView(); scrollBy(0, -32)")
            png = driver.get_screenshot_as_png()
        finally:
            driver.quit()
    write_atomically(out / "trace.png", lambda to: to.write_bytes(png))


def main() -> None:
    config = parsed(AnimationConfig, description=__doc__)
    check_out(config.out)
    out = Path(config.out)
    if config.still:
        screenshot(out)
        print(out / "trace.png")
        return
    measured = out / "decoding.json"
    if measured.exists():
        print(f"as {measured} has it; remove it to measure again")
    else:
        write_json(measured, measure(config))
    svg = picture(read_json(measured))
    write_atomically(out / "decoding.svg", lambda to: to.write_text(svg, encoding="utf-8"))
    print(out / "decoding.svg")


if __name__ == "__main__":
    run(main)
