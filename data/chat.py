"""Chat turns to tokens, as a chat model was trained on them: by the checkpoint's Jinja template."""

import json
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from data.command import optional
from data.corpus import is_validation
from data.tokenizer import AnyTokenizer, JsonTokenizer, special_tokens
from model import check, read_json


def read_template(directory) -> str:
    """chat_template.jinja, or else the one in tokenizer_config.json; of several, the default."""
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    path = Path(directory) / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ValueError(f"{directory} has no chat template: it is no chat model")
    return template


@lru_cache(maxsize=1)
def compiled(template: str, sandbox):
    """The template as jinja2's sandbox runs it; compiled once for all turns of a file."""

    def raise_exception(message: str):
        raise ValueError(message)

    # Templates expect the settings, the filter and the functions that transformers gives them.
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def chat_text(directory, turns: list[dict[str, str]]) -> str:
    """The text of turns {"role", "content"}, and of the opening of the model's answer."""
    template, special = read_template(directory), special_tokens(directory)
    sandbox = optional("jinja2.sandbox", f"the chat template of {directory}")
    try:
        prepared = compiled(template, sandbox)
        return prepared.render(messages=turns, add_generation_prompt=True, **special)
    except Exception as error:  # a template may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the chat template of {directory} fails: {reason}") from None


def chat_prompt(directory, tokenizer: AnyTokenizer, turns: list[dict[str, str]]) -> list[int]:
    """The tokens of chat_text; special tokens in it become their own ids."""
    text = chat_text(directory, turns)
    check(isinstance(tokenizer, JsonTokenizer), f"{directory}: chat needs a tokenizer.json")
    return tokenizer.encode(text)


def read_turns(path: str) -> list[str]:
    """A file of user turns, one JSON string a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        turns = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as one JSON string a line: {error}") from None
    if not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"{path}: must hold one JSON string a line")
    return turns


def turn_prompts(paths: list[str], directory, tokenizer, most: int) -> dict[str, list[list[int]]]:
    """The prompts of at most `most` tokens of each side, split by a hash of the turn."""
    check(paths != [], "--chat needs --text: a file of turns; python -m data.turns writes one")
    sides = {"validation": [], "train": []}
    for path in paths:
        for turn in read_turns(path):
            prompt = chat_prompt(directory, tokenizer, [{"role": "user", "content": turn}])
            if len(prompt) <= most:
                sides["validation" if is_validation(turn) else "train"].append(prompt)
    advice = f"give more turns, or a larger --prompt-tokens than {most}"
    for side, prompts in sides.items():
        check(prompts != [], f"the {side} side of the turns is empty: {advice}")
    return sides
