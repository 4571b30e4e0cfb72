"""Two decodings of one prompt as an animated SVG: see bench/animation.py. No script, one file."""

from collections.abc import Iterable
from html import escape
from itertools import pairwise
from pathlib import Path

from tree import Tree

RACE, HOLD = 9.0, 3.5  # seconds in the picture: of plain decoding, and of the end
WIDTH, LEFT, CELL, LINE, HEADER = 540, 24, 10.2, 20, 70  # pixels; a CELL holds one character
COLUMNS = int((WIDTH - 2 * LEFT) / CELL)
WAYS = {
    "plain": ("Plain decoding", "each forward pass gives one token"),
    "medusa": ("Medusa", "each pass checks a tree of guesses"),
}
# Classes in drawing.css: the base's own token, and the guesses of heads 1 to 4.
KINDS = "own", "guess-1", "guess-2", "guess-3", "guess-4"


def label(x: float, y: float, text: str, kind: str = "", more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def heading(y: float, kind: str, text: str, more: str) -> str:
    return f'<text class="{kind}" x="{LEFT}" y="{y}">{text}<tspan dx="10">{more}</tspan></text>'


def timed(name: str, kind: str, begin: float, end: float, content: str) -> str:
    """Content that is seen from begin to end, shares of the loop; kind: on, to its end, or now."""
    stop = f"{end:.3%}{{visibility:hidden}}" if end < 1 else ""
    rule = f"@keyframes {name}{{0%{{visibility:hidden}}{begin:.3%}{{visibility:visible}}{stop}}}"
    group = f'<g class="{kind}" style="animation-name:{name}">{content}</g>'
    return f"<style>{rule}</style>{group}"


class Screen:
    """Text that grows token by token, wrapped as in a terminal."""

    def __init__(self, top: float):
        self.top, self.column = top, 0
        self.row: float = 0

    def add(self, text: str, kind: str) -> str:
        """A box with its characters for each line of the text; a line end is a third of one."""
        boxes = []
        for i, line in enumerate(text.split("\n")):
            if i > 0:
                boxes.append(self.box("", 1 / 3))
                self.row, self.column = self.row + 1, 0
            while line != "":
                if self.column == COLUMNS:
                    self.row, self.column = self.row + 1, 0
                part, line = line[: COLUMNS - self.column], line[COLUMNS - self.column :]
                boxes.append(self.box(part, len(part)))
                self.column += len(part)
        return f'<g class="{kind}">{"".join(boxes)}</g>'

    def box(self, text: str, cells: float) -> str:
        x, y = LEFT + self.column * CELL, self.top + self.row * LINE
        box = f'<rect x="{x:.1f}" y="{y}" width="{cells * CELL - 1:.1f}" height="{LINE - 1}"/>'
        # Fonts differ in width: each text is told its own. XML has no control characters.
        shown = "".join(c if c.isprintable() else "\ufffd" for c in text)
        length = f'textLength="{cells * CELL:.1f}" lengthAdjust="spacingAndGlyphs"'
        return box if text == "" else box + label(x, y + 14, shown, "", length)


def draw_nodes(tree: Tree, top: float, nodes: Iterable[int], kinds: Iterable[str]) -> str:
    """Some nodes, each with the edge above it; the root is on the left."""
    # A first child is in the row of its parent, the others are below it.
    spots, row, left = {}, 0, WIDTH - LEFT - 8 - 25 * max(tree.depths)
    for before, path in pairwise([(), *sorted(tree.paths)]):
        row += 0 if path[:-1] == before else 1
        spots[path] = left + 25 * len(path), top + 15 * row
    edges, circles = [], []
    for node, kind in zip(nodes, kinds):
        path = tree.paths[node]
        (x, y), (x0, y0) = spots[path], spots[path[:-1]]
        edges.append(f'<path d="M{x0} {y0}L{x} {y}"/>')
        circles.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="6.5"/>')
    return "".join(edges + circles)


def draw_way(name: str, way: dict, prompt: str, top: float, share: float) -> tuple[str, float]:
    """SVG of a decoding, and where it ends. share: of the loop, that a step takes."""
    tree = Tree(tuple(way["parents"]), tuple(way["ranks"]))
    leaves = set(range(len(tree))) - set(tree.parents)  # each ends a row of the tree
    screen = Screen(top + max(HEADER, 14 + 15 * len(leaves)))
    text, passing, tokens = [screen.add(prompt, "prompt")], [], 0
    last = len(way["steps"]) - 1
    for i, step in enumerate(way["steps"]):
        # A step's tokens appear at its end: the accepted guesses, then the base's own token.
        kinds = [KINDS[min(depth, 4)] for depth in range(1, len(step["path"]))]
        kinds += ["own"] * (len(step["text"]) - len(kinds))
        boxes = "".join(screen.add(*token) for token in zip(step["text"], kinds))
        text.append(timed(f"{name}{i}", "on", i * share, 1, boxes))
        # What it accepted, and the counts, are seen until the end of the next step.
        tokens += len(step["text"])
        count = f"{tokens} tokens · {i + 1} passes" if i > 0 else "1 token · 1 pass"
        count += f" · {1000 * last * way['seconds']:.0f} ms" if i == last else ""
        right = draw_nodes(tree, top + 18, step["path"], ["own", *kinds])
        shown = f'{label(LEFT, top + 55, count, "count")}<g class="right">{right}</g>'
        end, kind = (1, "now last") if i == last else ((i + 1) * share, "now")
        passing.append(timed(f"{name}-{i}", kind, i * share, end, shown))
    bottom = screen.top + (screen.row + 1) * LINE + 12
    size = f'width="{WIDTH - 16}" height="{bottom - top}"'
    parts = [
        f'<rect class="panel" x="8" y="{top}" {size} rx="8"/>',
        heading(top + 28, "title", *WAYS[name]),
        draw_nodes(tree, top + 18, range(len(tree)), ["own"] + ["wrong"] * len(tree)),
        *passing,
        f'<g class="code" id="{name}">{"".join(text)}</g>',
    ]
    return "\n".join(parts), bottom


def draw_legend(top: float) -> str:
    """What the colours mean, in two lines."""
    screen, rows = Screen(top), (top + 14, top + 14 + 1.2 * LINE)
    boxes = screen.add("  ", "own")
    screen.row, screen.column = 1.2, 0
    for depth in range(1, 5):
        boxes += screen.add(str(depth), KINDS[depth])
        screen.column += 1
    parts = [
        f'<g class="code">{boxes}</g>',
        label(LEFT + 2.8 * CELL, rows[0], "the model's own next token"),
        label(LEFT + 8 * CELL, rows[1], "right guess, so many tokens ahead"),
        f'<circle cx="{WIDTH - 165}" cy="{rows[0] - 5}" r="6.5"/>',
        label(WIDTH - 150, rows[0], "wrong guess"),
    ]
    return "".join(parts)


def picture(content: dict) -> str:
    """The SVG of what bench/animation.py measured."""
    plain, medusa = (content[way] for way in WAYS)
    passes, fewer = len(plain["steps"]), len(medusa["steps"])
    seconds, less = (passes - 1) * plain["seconds"], (fewer - 1) * medusa["seconds"]
    slow = max(1, round(RACE / seconds))
    loop = slow * max(seconds, less) + HOLD
    # Of the prompt only its last line is shown.
    prompt = content["prompt"]
    prompt = prompt[prompt.rstrip("\n").rfind("\n") + 1 :]
    about = f"One model, one prompt. Measured times, slowed down {slow} times."
    drawn, y = [label(LEFT, 28, about)], 42.0
    for name in WAYS:
        share = slow * content[name]["seconds"] / loop
        svg, bottom = draw_way(name, content[name], prompt, y, share)
        drawn.append(svg)
        y = bottom + 10
    drawn.append(draw_legend(y + 4))
    result = f"Same text, {seconds / less:.2f} times as fast"
    end = heading(y + 84, "result", result, f"{fewer} passes in place of {passes}")
    drawn.append(timed("result", "on", max(seconds, less) * slow / loop, 1, end))
    measured = f"{content['command']} on {content['machine']}; {content['date']}"
    return framed(y + 102, loop, f"{about} {result}. {measured}.", drawn)


def framed(height: float, loop: float, about: str, drawn: list[str]) -> str:
    """One file with its style, and without anything from elsewhere."""
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    size = f'width="{WIDTH}" height="{height:.0f}"'
    root = f'xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {height:.0f}"'
    says = f"<title>Plain decoding and Medusa decoding</title><desc>{escape(about)}</desc>"
    page = f'<rect class="page" {size} rx="10"/>'
    head = f'<svg {root} role="img" style="--loop:{loop:.2f}s">{says}\n<style>\n{style}</style>'
    return "\n".join([head, page, *drawn, "</svg>"]) + "\n"
