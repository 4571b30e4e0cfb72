"""Draw the README's figures from what was measured. Needs matplotlib.

    python bench/plot.py        decode.json and typical.json of bench/results -> speed, typical
    python bench/plot.py LOG    the log.jsonl of a training run -> training, next to it

Each figure is two files, NAME-light.svg and NAME-dark.svg.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot, rcParams
from matplotlib.transforms import Bbox

RESULTS = Path(__file__).with_name("results")
WIDTH = 4.5  # inches, 432 pixels: on a phone text is nine tenths as large


# ---- one style ----


def style(dark: bool) -> dict:
    """Settings of matplotlib. Colours are those of Okabe and Ito, with more contrast for text."""
    ink, faint, back = ("#e6edf3", "#3d444d", "#0d1117") if dark else ("#1f2328", "#c4cad1", "#fff")
    colours = ["#0072b2", "#c04f00", "#007d5c", "#a8538a", ink]
    if dark:
        colours = ["#56b4e9", "#f0a030", "#2fc198", "#e08fc0", ink]
    rc = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    rc |= {"axes.facecolor": back, "figure.facecolor": back, "savefig.facecolor": back}
    rc |= {"axes.edgecolor": faint, "grid.color": faint}
    rc |= {"axes.prop_cycle": pyplot.cycler(color=colours)}
    rc |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    rc |= {"axes.titleweight": "bold", "axes.titlesize": 10.5, "font.size": 10}
    rc |= {"lines.linewidth": 1.2, "lines.markersize": 5, "figure.constrained_layout.use": True}
    return rc | {"svg.hashsalt": "the same file every time"}


def save(draw: Callable, data, path: Path) -> None:
    for scheme in ("light", "dark"):
        with pyplot.rc_context(style(scheme == "dark")):
            figure = draw(data)
            file = f"{path}-{scheme}.svg"
            figure.savefig(file, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
        print(file)


# Places of a label around its point, the best first: offset in points, and the side that is fixed.
PLACES = [(7, 0, "left"), (6, -8, "left"), (0, -11, "center"), (-7, 0, "right")]
PLACES += [(-5, 8, "right"), (0, 11, "center"), (6, 8, "left"), (-6, -8, "right")]
PLACES += [(7, -13, "left"), (7, 13, "left"), (0, -16, "center"), (7, -26, "left"), (7, 26, "left")]


def covered(label, place: tuple, boxes: list[Bbox], lines: list[Bbox]) -> float:
    """Move the label to this place. How bad is what it covers there?"""
    *label.xyann, side = place
    label.set_ha(side)
    box, frame = label.get_window_extent().padded(1), label.axes.bbox
    outside = 0 if frame.x0 <= box.x0 and box.x1 <= frame.x1 else 1
    far = abs(label.xyann[1]) / 4
    return 20 * (outside + box.count_overlaps(boxes)) + box.count_overlaps(lines) + far


def add_labels(axes, labels: list[tuple]) -> None:
    """(text, x, y, colour) of each, where it covers no other, no point, and little of the lines."""
    boxes, lines = [text.get_window_extent() for text in axes.texts], []
    for line in axes.lines:
        if line.get_color() != rcParams["grid.color"]:
            along = axes.transData.transform(line.get_path().interpolated(20).vertices)
            lines += [Bbox([at - 1, at + 1]) for at in along]
    for _, x, y, _ in labels:
        at = axes.transData.transform((x, y))
        boxes.append(Bbox([at - 4, at + 4]))
    for text, x, y, colour in labels:
        more = {"textcoords": "offset points", "va": "center", "color": colour}
        label = axes.annotate(text, (x, y), (0, 0), **more)
        best = min(PLACES, key=lambda place: covered(label, place, boxes, lines))
        covered(label, best, boxes, lines)
        boxes.append(label.get_window_extent())


def labelled(figure, labels: dict):
    """The figure with {axes: labels}, which are placed when the axes have their size."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, of_axes in labels.items():
        add_labels(axes, of_axes)
    return figure


# ---- the figures ----

TREES = {f"calibrated-{n}": f"{n}" for n in (4, 8, 16, 32)} | {"calibrated-64": "64 nodes"}
LOOKUPS = {"transformers-lookup-3": "lookup 3", "transformers-lookup-10": "lookup 10"}
# A colour, and the labels of ways that a line joins. "cost-chosen" is one of TREES, timed again.
WAYS = [
    ("C4", {"plain": "plain"}),
    ("C4", {"chain": "chain"}),
    ("C4", {"cartesian": "Cartesian"}),
    ("C3", {"dynamic-cost-chosen": "", "dynamic-16": "dynamic"}),
    ("C2", {"product-16": "", "product-32": "product"}),
    ("C0", TREES),
    ("C1", {"transformers": "transformers"}),
    ("C1", LOOKUPS),
]
RULES = {"greedy": "Greedy", "lossless-0.7": "Temperature 0.7"}


def draw_speed(results: dict):
    """Speed-up is tokens/step over step cost: a line from the origin is of one speed-up."""
    figure, panels = pyplot.subplots(2, 1, figsize=(WIDTH, 7.2), sharex=True)
    labels = {axes: [] for axes in panels}
    for axes, (rule, title) in zip(panels, RULES.items()):
        ways = results[rule]["ways"]
        axes.set(xlim=(0.9, 3.1), ylim=(0.8, 3.1))
        axes.set(xticks=(1, 1.5, 2, 2.5, 3), yticks=(1, 1.5, 2, 2.5, 3))
        for speed_up in (0.5, 1, 1.5, 2, 2.5):
            x = min(2.85, 2.9 / speed_up)
            axes.plot((0, x), (0, speed_up * x), color=rcParams["grid.color"], linewidth=0.8)
            axes.text(x, speed_up * x, f"{speed_up:g}x", va="bottom")
        axes.fill_between((0, 4), (0, 4), color=rcParams["grid.color"], alpha=0.25, linewidth=0)
        axes.text(3.06, 1.65, "slower", ha="right")
        for colour, names in WAYS:
            points = [(ways[way]["step cost"], ways[way]["tokens/step"]) for way in names]
            axes.plot(*zip(*points), "o-", color=colour)
            new = [(name, *at, colour) for name, at in zip(names.values(), points)]
            labels[axes] = new + labels[axes]  # what is drawn last is labelled first
        tree, lookup = (max(ways[way]["ratio"] for way in names) for names in (TREES, LOOKUPS))
        axes.set_title(f"{title}: tree {tree:.2f}x, lookup {lookup:.2f}x")
        axes.set_ylabel("tokens/step")
    panels[-1].set_xlabel("step cost")
    return labelled(figure, labels)


EPSILONS = {"0.01": "ε = 0.01", "0.09": "0.09", "1.0": "1.0"}  # the default, and the ends


def draw_typical(results: dict):
    """Lossless acceptance is at distance 0; a curve is over epsilon."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 4))
    labels = []
    for colour, (section, result) in zip(("C0", "C1"), results.items()):
        names = {"lossless": f"lossless, {section.replace('-', ' ')}"} | EPSILONS
        points = result["points"]
        at = {name: (row["total variation"], row["tokens/step"]) for name, row in points.items()}
        labels += [(text, *at[name], colour) for name, text in names.items()]
        axes.plot(*at.pop("lossless"), "o", color=colour)
        axes.plot(*zip(*at.values()), "o-", color=colour)
    axes.set_title("Typical acceptance: more tokens a step,\nbut of another distribution")
    axes.set(xlabel="total variation from the base distribution", ylabel="tokens/step")
    axes.set(xlim=(-0.02, 0.6), xticks=(0, 0.2, 0.4, 0.6), yticks=(2, 2.5, 3, 3.5))
    return labelled(figure, {axes: labels})


def draw_training(records: list[dict]):
    """Loss and accuracy on training rows; a point is the mean over a thirtieth of the steps."""
    figure, panels = pyplot.subplots(2, 1, figsize=(WIDTH, 6), sharex=True)
    n, labels = max(1, len(records) // 30), {axes: [] for axes in panels}
    ends = range(n, len(records) + 1, n)
    for axes, name in zip(panels, ("heads", "top1")):
        of_heads = zip(*(record[name] for record in records))
        curves = {f"head {k}": values for k, values in enumerate(of_heads, start=1)}
        if name == "heads" and any(record["base"] for record in records):
            curves["base"] = [record["base"] for record in records]
        for text, values in curves.items():
            line = axes.plot(ends, [mean(values[end - n : end]) for end in ends])[0]
            labels[axes].append((text, *line.get_xydata()[-1], line.get_color()))
        axes.set(xlim=(0, 1.25 * ends[-1]), xticks=(0, ends[-1] // 2, ends[-1]))
        axes.locator_params(axis="y", nbins=5)
    panels[0].set(title="The further ahead, the higher the loss", ylabel="loss, nats")
    panels[1].set(title="... and the fewer first guesses are right", ylabel="top-1 accuracy")
    panels[1].set_xlabel("step")
    return labelled(figure, labels)


SOURCES = [("speed", "decode.json", draw_speed), ("typical", "typical.json", draw_typical)]


def draw_results(out: Path) -> None:
    for name, source, draw in SOURCES:
        save(draw, json.loads((RESULTS / source).read_text())["results"], out / name)


def draw_log(log: Path) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines() if line]
    if len(records) == 0:
        sys.exit(f"{log} has no steps yet")
    save(draw_training, records, log.with_name("training"))


if __name__ == "__main__":
    logs = [Path(argument) for argument in sys.argv[1:]]
    if len(logs) == 0:
        draw_results(RESULTS)
    elif len(logs) == 1 and logs[0].is_file():
        draw_log(logs[0])
    else:
        sys.exit("usage: python bench/plot.py [LOG], the log.jsonl of a training run")
