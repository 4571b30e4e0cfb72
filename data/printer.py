"""Decoded text on the terminal, as it comes."""

import os
import sys

from data.tokenizer import AnyTokenizer


class Printer:
    """Streams tokens as text: the root of a step plain, each guess that was accepted in a colour that tells its depth."""

    COLOURS = (32, 36, 34, 35, 33, 31)  # depth 1, 2, ...: green, cyan, blue, magenta, yellow, red

    def __init__(self, tokenizer: AnyTokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self.coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.before, self.pending = (
            prompt[-1:],
            [],
        )  # decoded as a whole: many tokenizers drop a space in front of the first token

    def text(self) -> str:
        return self.tokenizer.decode(self.before + self.pending)[
            len(self.tokenizer.decode(self.before)) :
        ]

    def step(self, emitted: list[int], ends: tuple[int, ...]) -> None:
        for depth, token in enumerate(emitted, start=1):
            if token in ends:  # EOS is no text
                continue
            self.pending.append(token)
            text = self.text()
            if text.endswith("\ufffd"):  # bytes of a character that is not complete yet
                continue
            self.before, self.pending = self.pending, []
            colour = self.COLOURS[(depth - 1) % len(self.COLOURS)]
            print(
                f"\033[{colour}m{text}\033[0m" if self.coloured and depth < len(emitted) else text,
                end="",
                flush=True,
            )

    def finish(self) -> None:
        print(self.text())
