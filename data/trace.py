"""The page of `sample.py --trace FILE.html`: a generation that can be looked at, step by step.

A Trace stands in for `accept` while `medusa_generate` decodes. It asks the real one, hands its verdict on and keeps what the verdict
was about; after the step that becomes a record: plain numbers, lists and strings. The page is data/trace.html, with the records in it.

Dimension key: N tree nodes, V vocabulary, K heads.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from data.tokenizer import AnyTokenizer
from medusa import (
    ROOT_ONLY,
    MedusaHeads,
    Sampling,
    accept,
    logits_to_probs,
    scale_logits,
    typical_threshold,
)
from model import write_atomically
from tree import Tree

TEMPLATE = Path(__file__).with_suffix(".html")
PAIR = Tree((-1, 0), (-1, 0))  # a node and one guess below it


def check_page(path: Path) -> None:
    """Raises ValueError if the page cannot be written: before the work, not after it."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError(
                f"--trace {path}: there is something there that is no file; name an HTML file"
            )
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ValueError(
            f"--trace {path}: cannot be written ({error.strerror}); name a file in a directory that can be written"
        ) from None


class Trace:
    """Looks on while `medusa_generate` decodes: hand it `trace.accept`, and call `trace.step` with all that it yields.

    ends: the tokens that end a text, which are no text themselves.
    """

    def __init__(
        self, tokenizer: AnyTokenizer, heads: MedusaHeads, prompt: list[int], ends: tuple[int, ...]
    ):
        self.tokenizer, self.ends = tokenizer, ends
        self.before = prompt[
            -1:
        ]  # decoded along: many tokenizers drop a space in front of the first token
        self.past = len(prompt) - 1  # rows in the cache before the step; the root is not among them
        self.trees, self.records, self.tokens = {}, [], []
        heads.register_forward_hook(self._listen)

    def _listen(self, heads: MedusaHeads, inputs: tuple, logits: Tensor) -> None:
        self.head_logits = heads.widened(logits)  # (K, V)

    def accept(
        self, tree: Tree, tokens: Tensor, logits: Tensor, sampling: Sampling, noise: Tensor | None
    ) -> tuple[list[int], list[int]]:
        """The verdict of `accept`. Nothing is computed here, so that the clock of a traced run stays right."""
        verdict = accept(tree, tokens, logits, sampling, noise)
        self.seen = tree, tokens, logits, sampling, noise, verdict[0]
        return verdict

    def step(self, emitted: list[int]) -> None:
        """Make a record of the verdict that was given last, and of what it emitted."""
        tree, tokens, logits, sampling, noise, path = self.seen

        def ask(part: Tree, nodes: list[int]) -> tuple[list[int], list[int]]:
            return accept(
                part,
                tokens[nodes],
                logits[nodes],
                sampling,
                None if noise is None else noise[nodes],
            )

        temperature = (
            sampling.temperature or 1.0
        )  # the distribution that greedy decoding takes the likeliest token of
        base_probs = logits_to_probs(logits, replace(sampling, temperature=temperature))  # (N, V)
        parents = list(tree.parents[1:])
        record = {
            "tree": self.trees.setdefault(tree, len(self.trees)),
            "tokens": tokens.tolist(),
            "head_probs": [None] + self._head_probs(tree, tokens, temperature),
            "base_probs": [None] + rounded(base_probs[parents, tokens[1:]]),
            "says": [ask(ROOT_ONLY, [node])[1][0] for node in range(len(tree))],
            "verdicts": verdicts(
                tree, path, lambda parent, node: ask(PAIR, [parent, node])[0] == [0, 1]
            ),
            "path": path,
            "emitted": emitted,
            "past": self.past,
        }
        if sampling.typical:
            record["thresholds"] = rounded(typical_threshold(base_probs, sampling.epsilon))
        self.records.append(record)
        self.tokens += emitted
        self.past += len(emitted)

    def _head_probs(self, tree: Tree, tokens: Tensor, temperature: float) -> list[float]:
        """What the head of its depth gives to the token at each node below the root."""
        if len(tree) == 1:
            return []
        head_probs = scale_logits(self.head_logits, temperature).softmax(-1)  # (K, V)
        return rounded(
            head_probs[[depth - 1 for depth in tree.depths[1:]], tokens[1:]]
        )  # head k is row k - 1

    def write(self, path: Path, **more) -> None:
        """Write the page. more: prompt, why (the tree is this one), difference (to plain text), costs (seconds a step: tree, plain)."""
        content = self.content() | more
        write_atomically(
            path, lambda temporary: temporary.write_text(page(content), encoding="utf-8")
        )

    def content(self) -> dict:
        sampling = self.seen[3]
        ended = self.tokens[-1] in self.ends
        texts = iter(
            split_text(self.tokenizer, self.before, self.tokens[:-1] if ended else self.tokens)
        )
        steps = [
            record | {"text": [next(texts, "") for _ in record["emitted"]]}
            for record in self.records
        ]
        shown = sorted(
            {token for record in self.records for token in record["tokens"] + record["says"]}
        )
        return {
            "rule": "typical"
            if sampling.typical
            else "lossless"
            if sampling.temperature
            else "greedy",
            "temperature": sampling.temperature,
            "names": {token: self._name(token) for token in shown},
            "trees": [
                {
                    "parents": tree.parents,
                    "ranks": tree.ranks,
                    "depths": tree.depths,
                    "mask": mask_rows(tree),
                }
                for tree in self.trees
            ],
            "steps": steps,
        }

    def _name(self, token: int) -> str | list[str]:
        """A token's text; [the vocabulary's name of it] if it has no text of its own: bytes of a longer character, the end of the text."""
        text = self.tokenizer.decode(self.before + [token])[
            len(self.tokenizer.decode(self.before)) :
        ]
        return [self.tokenizer.piece(token)] if not text or "\ufffd" in text else text


def verdicts(tree: Tree, path: list[int], passes: Callable[[int, int], bool]) -> list[str]:
    """What became of each node, the root first.

    accepted: on the path. passed: by the rule, but another path won, which is only possible under typical acceptance.
    rejected: the base goes on otherwise behind its parent. unseen: its parent was not reached.
    """
    found = ["accepted"]
    for node, parent in enumerate(tree.parents[1:], start=1):
        if found[parent] in ("rejected", "unseen"):
            found.append("unseen")
        else:
            found.append(
                "accepted" if node in path else "passed" if passes(parent, node) else "rejected"
            )
    return found


def split_text(tokenizer: AnyTokenizer, before: list[int], tokens: list[int]) -> list[str]:
    """The text behind `before`, in the parts that the tokens add; a character of several tokens comes with the last of them."""
    start = len(tokenizer.decode(before))
    whole = [tokenizer.decode(before + tokens[:n])[start:] for n in range(len(tokens) + 1)]
    ends = [0]
    for text in whole[1:-1]:
        ends.append(max(ends[-1], len(text.rstrip("\ufffd"))))
    return [whole[-1][a:b] for a, b in pairwise(ends + [len(whole[-1])])] if tokens else []


def mask_rows(tree: Tree) -> list[str]:
    """tree.mask, a row a string: "1" where the node may look."""
    return ["".join(map(str, row)) for row in tree.mask.int().tolist()]


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def page(content: dict) -> str:
    """The page with its data. Whatever could end a script element, or open one, stands in it as an escape."""
    data = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text("utf-8").replace("{{trace}}", data)
