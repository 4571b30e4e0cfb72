"""The page of `sample.py --trace FILE.html`, and tokens as text.

The page is data/trace.html, with the records that sample.py makes of each decoding step inside.
"""

import json
from pathlib import Path

from data.command import check_out
from data.tokenizer import AnyTokenizer
from model import check, write_atomically

TEMPLATE = Path(__file__).with_suffix(".html")


class TextStream:
    """The text after a prompt, token by token; a character comes with the last of its tokens."""

    def __init__(self, tokenizer: AnyTokenizer, prompt: list[int]):
        # Decoded with the token before: many tokenizers drop a space at the start of a text.
        self.tokenizer, self.before, self.pending = tokenizer, prompt[-1:], []

    def push(self, token: int) -> str:
        """The text that this token completes; "" if its bytes end within a character."""
        self.pending.append(token)
        text = self.rest()
        if text.endswith("\ufffd"):
            return ""
        self.before, self.pending = self.pending, []
        return text

    def rest(self) -> str:
        """The text of the tokens that are not complete yet."""
        start = len(self.tokenizer.decode(self.before))
        return self.tokenizer.decode(self.before + self.pending)[start:]


def token_name(tokenizer: AnyTokenizer, token: int, prompt: list[int]) -> str | list[str]:
    """A token's text; [its name in the vocabulary] if it has none: a byte, the end of the text."""
    text = TextStream(tokenizer, prompt).push(token)
    return text if text and "\ufffd" not in text else [tokenizer.piece(token)]


def text_content(records: list[dict], tokenizer: AnyTokenizer, prompt: list[int], eos_ids) -> dict:
    """The records of the steps, with the text that each step added, and the names of all tokens."""
    stream, steps = TextStream(tokenizer, prompt), []
    for record in records:
        text = [stream.push(token) for token in record["emitted"] if token not in eos_ids]
        steps.append(record | {"text": text})
    steps[-1]["text"].append(stream.rest())
    shown = {token for record in records for token in record["tokens"] + record["targets"]}
    names = {token: token_name(tokenizer, token, prompt) for token in sorted(shown)}
    return {"steps": steps, "names": names, "prompt_length": len(prompt)}


def check_page(path: Path) -> None:
    """Raises ValueError if the page cannot be written: before the work, not after it."""
    check(path.is_file() or not path.exists(), f"--trace {path}: is no file; name an HTML file")
    check_out(str(path.parent), "--trace")


def write_page(path: Path, content: dict) -> None:
    """Write the page with its data, in which no string can open or end an element of the page."""
    data = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = TEMPLATE.read_text("utf-8").replace("{{trace}}", data)
    write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8"))
