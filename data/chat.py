"""Turns of a conversation as the text that a chat model was trained on: the checkpoint's own Jinja template, run in a sandbox."""

import json
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from data.corpus import is_validation
from data.packages import optional
from data.tokenizer import AnyTokenizer, JsonTokenizer, special_tokens
from model import read_json


def read_template(directory) -> str:
    """chat_template.jinja, or else the one in tokenizer_config.json, of several the default."""
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    path = Path(directory) / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        template = next(
            (
                entry.get("template")
                for entry in template
                if isinstance(entry, dict) and entry.get("name") == "default"
            ),
            None,
        )
    if not isinstance(template, str):
        raise ValueError(
            f"{directory} has no chat template, in chat_template.jinja or tokenizer_config.json: it is no chat model"
        )
    return template


def chat_prompt(directory, tokenizer: AnyTokenizer, turns: list[dict[str, str]]) -> list[int]:
    """The tokens of turns {"role", "content"}, and of the opening of the model's answer."""
    text = chat_text(directory, turns)
    if not isinstance(tokenizer, JsonTokenizer):
        raise ValueError(
            f"{directory} has no tokenizer.json: a tokenizer.model does not know which marks of the chat template are tokens"
        )
    return tokenizer.encode(text)


def chat_text(directory, turns: list[dict[str, str]]) -> str:
    """Raises ValueError for a template that is missing, broken or objects."""
    template = read_template(directory)
    modules = [
        optional(name, f"the chat template of {directory}") for name in ("jinja2", "jinja2.sandbox")
    ]
    try:
        return compiled(template, *modules).render(
            messages=turns, add_generation_prompt=True, **special_tokens(directory)
        )
    except Exception as error:  # whatever a template raises is its own fault
        raise ValueError(
            f"the chat template of {directory} fails: {type(error).__name__}: {error}"
        ) from None


@lru_cache(maxsize=1)  # a file of turns asks for one template again and again
def compiled(template: str, jinja2, sandbox):
    def objection(message: str):
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": objection,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(template)


def turn_prompts(
    paths: list[str], directory, tokenizer: AnyTokenizer, most: int
) -> dict[str, list[list[int]]]:
    """The prompts of both sides, of at most `most` tokens each: files of user turns, a JSON string a line, split by a hash of the turn."""
    if not paths:
        raise ValueError(
            "--chat needs --text: a file of user turns; python -m data.turns writes one"
        )
    sides = {"validation": [], "train": []}
    for path in paths:
        try:
            turns = [
                json.loads(line)
                for line in Path(path).read_text(encoding="utf-8").split("\n")
                if line.strip()
            ]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as one JSON string a line: {error}") from None
        if not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{path}: must hold one JSON string a line")
        for turn in turns:
            prompt = chat_prompt(directory, tokenizer, [{"role": "user", "content": turn}])
            if len(prompt) <= most:
                sides["validation" if is_validation(turn) else "train"].append(prompt)
    for side, prompts in sides.items():
        if not prompts:
            raise ValueError(
                f"the {side} side of the turns is empty: give more turns, or a larger --prompt-tokens than {most}"
            )
    return sides
