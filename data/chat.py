"""Conversations to tokens, as a chat model was trained on them: by the checkpoint's Jinja template.

A dialogue is a list of turns {"role", "content"}. In training, what its assistant writes carries
loss: each answer, and the token that ends it.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import cache, lru_cache, partial
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from data.command import optional
from data.corpus import is_validation, read_text
from data.tokenizer import AnyTokenizer, JsonTokenizer, read_if_there, special_tokens
from model import check, naming_errors

# ShareGPT has {"from": "human", "value": ...} for {"role": "user", "content": ...}.
ROLES = {"human": "user", "gpt": "assistant"}
# Of a turn or a dialogue: what would change its rows, and is not read here.
UNREAD = "tools", "tool_calls", "reasoning_content", "thinking", "weight"
Turns = list[dict[str, str]]  # {"role", "content"} each
NOW = datetime.now()  # for a template that writes the date: the same in all rows of a run


# ---- the template ----
def read_template(directory) -> str:
    """chat_template.jinja, or else the one in tokenizer_config.json; of several, the default."""
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = read_if_there(directory, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ValueError(f"{directory} has no chat template: it is no chat model")
    return template


@lru_cache(maxsize=1)
def chat_template(directory) -> Callable[[Turns, bool], str]:
    """The text of turns as the template writes them; True: with the opening of an answer."""
    template, special = read_template(directory), special_tokens(directory)
    name = f"the chat template of {directory}"

    def raise_exception(message: str):
        raise ValueError(message)

    # Templates expect the settings, the filter and the functions that transformers gives them.
    environment = optional("jinja2.sandbox", name).ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": NOW.strftime}
    # There are no tools and no documents, which a template may ask for.
    environment.globals |= special | {"tools": None, "documents": None}
    compiled = cache(environment.from_string)
    # {% generation %} ... {% endgeneration %}, around what the assistant writes, is only a scope.
    template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})", r"\1with", template)

    def render(turns: Turns, opens: bool) -> str:
        try:
            text = compiled(template).render(messages=turns, add_generation_prompt=opens)
            return text.encode().decode()  # refuses half a character
        except Exception as error:  # a template may raise anything
            raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from None

    return render


def chat_prompt(directory, tokenizer: AnyTokenizer, turns: Turns) -> list[int]:
    """Turns, and the opening of an answer; special tokens in the text become their own ids."""
    check(isinstance(tokenizer, JsonTokenizer), f"{directory}: chat needs a tokenizer.json")
    return tokenizer.encode(chat_template(directory)(turns, True))


# ---- files of dialogues ----
def turns_of(item) -> Turns:
    """The turns of {"messages": [...]} or {"conversations": [...]}, or a user's turn, a string."""
    if isinstance(item, str):
        item = {"messages": [{"role": "user", "content": item}]}
    given = item.get("messages", item.get("conversations")) if isinstance(item, dict) else None
    if not isinstance(given, list) or given == []:
        raise ValueError("must be a string, or have turns, as messages or conversations")
    if item.get("system"):
        given = [{"role": "system", "content": item["system"]}, *given]
    turns = []
    for turn in given:
        check(isinstance(turn, dict), "a turn must have a role and its content")
        unread = [n for n in UNREAD if (item | turn).get(n) not in (None, "", [], {}, 1)]
        check(unread == [], f"{', '.join(unread)}: cannot be read, and would change the text")
        name, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(str(name), name)
        is_known = role in ("system", "user", "assistant")
        check(is_known, f"role {name!r}: must be system, user or assistant")
        check(isinstance(text, str), f"the content of {name} must be text")
        str(text).encode()  # refuses half a character
        turns.append({"role": role, "content": text})
    return turns


def read_dialogues(paths: list) -> dict[str, Turns]:
    """{file and line: turns} of files, of JSON Lines or one JSON list each."""
    found = {}
    for path in paths:
        text = read_text(path)
        is_list = text.lstrip().startswith("[")
        with naming_errors(path, " cannot be read as JSON"):
            items = json.loads(text) if is_list else text.split("\n")
        for number, item in enumerate(items, start=1):
            if is_list or item.strip():
                where = f"{path}, {'item' if is_list else 'line'} {number}"
                with naming_errors(where):
                    found[where] = turns_of(item if is_list else json.loads(item))
    return found


# ---- a dialogue's tokens, and which of them carry loss ----
def answers(render: Callable[[Turns, bool], str], turns: Turns, ends: re.Pattern):
    """Of each answer in turn: the text before it, with its opening, and that up to its end.

    Of a last turn without an answer the two are the same.
    """
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before, after = render(turns[:i], True), render(turns[: i + 1], False)
            check(after.startswith(before), "the chat template opens answers as it writes none")
            # An answer may itself hold the text of a token that ends it.
            n, stops = len(ends.findall(turn["content"])), list(ends.finditer(after, len(before)))
            advice = "generation_config.json must name the token that does as an eos_token_id"
            check(n < len(stops), f"no known token ends an answer of the chat template: {advice}")
            yield before, after[: stops[n].end()]
    if turns[-1]["role"] != "assistant":
        before = render(turns, True)
        yield before, before


def token_runs(directory, tokenizer, turns: Turns, eos_ids) -> list[list[tuple[list, list]]]:
    """Tokens of a dialogue as pairs: what is given, the answer ([] if there is none); in runs.

    A template may rewrite earlier turns: Qwen3 drops what the assistant thought. From there on is
    another run, in which the first pair's given is all that is before the next answer.
    """
    check(isinstance(tokenizer, JsonTokenizer), f"{directory}: chat needs a tokenizer.json")
    check(len(eos_ids) > 0, f"{directory}: eos_token_id is missing, so that no answer ends")
    ends = re.compile("|".join(re.escape(tokenizer.piece(id)) for id in eos_ids))
    runs, text, last = [[]], "", ""
    for before, after in answers(chat_template(directory), turns, ends):
        if not before.startswith(text):
            runs, text, last = [*runs, []], "", ""
        given, answer = before[len(text) :], after[len(before) :]
        ids = continued(tokenizer, last, given)
        last = given or last
        runs[-1].append((ids, continued(tokenizer, last, answer)))
        text, last = after, answer or last
    return runs


def continued(tokenizer: JsonTokenizer, before: str, text: str) -> list[int]:
    """The tokens of a text that follows another: some tokenizers put a space before a first word.

    If the two share a token, the text follows a line end instead, or a letter.
    """
    for start in (before, "\n", "a"):
        first, both = tokenizer.encode(start), tokenizer.encode(start + text)
        if both[: len(first)] == first:
            return both[len(first) :]
    return tokenizer.encode(text)


def dialogue_rows(dialogues, directory, tokenizer, eos_ids, length) -> tuple[Tensor, Tensor, int]:
    """{file and line: turns} -> tokens (R, length), loss_mask (R, length) bool: True in answers.

    A row ends with the last answer that fits, and is padded with 0. Third is the number of
    dialogues without a row: not even the first answer fits, or there is none.
    """
    rows, masks, dropped = [], [], 0
    for where, turns in dialogues.items():
        n_rows = len(rows)
        with naming_errors(where):
            runs = token_runs(directory, tokenizer, turns, eos_ids)
        for run in runs:
            ids, mask = [], []
            for given, answer in run:
                if answer == [] or len(ids) + len(given) + len(answer) > length:
                    break
                ids += given + answer
                mask += [False] * len(given) + [True] * len(answer)
            if ids:
                padding = length - len(ids)
                rows.append(ids + [0] * padding)
                masks.append(mask + [False] * padding)
        dropped += 1 if len(rows) == n_rows else 0
    return torch.tensor(rows), torch.tensor(masks), dropped


# ---- the two sides of the split ----
def split_dialogues(paths: list[str]) -> dict[str, dict[str, Turns]]:
    """The dialogues of each side: a hash of what is asked first decides."""
    check(paths != [], "--text: must name files of dialogues; python -m data.turns writes one")
    sides = {"validation": {}, "train": {}}
    for where, turns in read_dialogues(paths).items():
        first = takewhile(lambda turn: turn["role"] != "assistant", turns)
        name = "".join(turn["content"] for turn in first)
        sides["validation" if is_validation(name) else "train"][where] = turns
    # A small file may have none by chance.
    if sides["validation"] == {} and len(sides["train"]) > 1:
        sides["validation"] = dict([sides["train"].popitem()])
    for side, dialogues in sides.items():
        check(dialogues != {}, f"the {side} side of the dialogues is empty: give more of them")
    return sides


def given_turns(dialogues, directory, tokenizer, eos_ids, most: int) -> list[list[list[int]]]:
    """What a base is given that answers dialogues itself: tokens before answer 1, answer 2, ...

    Dialogues with more than `most` tokens before answer 1 are left out. If the template rewrites
    earlier turns, only answer 1 is asked for.
    """
    found = []
    for where, turns in dialogues.items():
        # The file's own answers do not count: "-" is in place of each between two user's turns.
        asked = []
        for turn in turns:
            if asked and (turn["role"], asked[-1]["role"]) == ("user", "user"):
                asked.append({"role": "assistant", "content": "-"})
            if turn["role"] != "assistant":
                asked.append(turn)
        with naming_errors(where):
            run = token_runs(directory, tokenizer, asked, eos_ids)[0] if asked else []
        given = [ids for ids, _ in run]
        if given and 0 < len(given[0]) <= most:
            found.append(given)
    advice = "a larger --prompt-tokens, or --context, half of which a prompt may have"
    check(found != [], f"no turn has at most {most} tokens: give others, or {advice}")
    return found
