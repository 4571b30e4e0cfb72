"""Properties of chat models' files: a tokenizer.json is read as the model needs it, loss is on what
the assistant writes alone, whatever the template, and dialogues come in every common form."""

import json
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings, strategies as st

import data.turns
from data.chat import chat_prompt, chat_template, dialogue_rows, given_turns
from data.chat import read_dialogues, split_dialogues, token_runs
from data.corpus import is_validation
from data.smollm2 import CONTROL, tokenizer_json
from data.tokenizer import JsonTokenizer, load_base
from data.turns import written_turns
from model import GPT, ModelConfig, read_json, write_json
from strategies import properties, refused, small_tokenizer
from train import DistillConfig, prompt_sources

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<turn|>", "[INST]"]


# ---- tokenizer.json ----
def json_tokenizer(directory: Path, change=lambda made, library: None, **files: dict) -> Path:
    """A tokenizer.json of bytes and special tokens; change: what else the library does to it."""
    library = pytest.importorskip("tokenizers")
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    kinds = [CONTROL] * len(SPECIAL) + [1] * len(alphabet)
    made = library.Tokenizer.from_str(json.dumps(tokenizer_json(SPECIAL + alphabet, kinds, [])))
    change(made, library)
    made.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        write_json(directory / f"{name}.json", content)
    return directory


@pytest.mark.parametrize("before, form", [
    ("", ""), ("<s>", "<s> $A </s>"), ("", "$A </s>"), ("<s></s>", "<s> </s> $A </s> <s>"),
])  # fmt: skip
def test_a_prompt_is_its_text_after_what_the_checkpoint_puts_there_once(before, form, tmp_path):
    def change(made, library):
        ends = {"special_tokens": [("<s>", 1), ("</s>", 2)]}
        parts = [library.processors.TemplateProcessing(form, **ends)] if form else []
        bytes_ = library.processors.ByteLevel(trim_offsets=False)
        made.post_processor = library.processors.Sequence([bytes_, *parts])
        made.enable_truncation(8)
        made.enable_padding(length=16)

    tok = JsonTokenizer(json_tokenizer(tmp_path, change))
    for text in ("hi", "", "x" * 100, " hi</s>", f"{before}hi", "</s>", "[INST]<s>"):
        assert tok.decode(tok.encode(text)) == text
        assert tok.decode(tok.opening(text)) == before + text.removeprefix(before)


@pytest.mark.parametrize("files, bos, eos", [
    ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, 1, 2),
    ({"special_tokens_map": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}}, 1, 2),
    ({"config": {"bos_token_id": 1, "eos_token_id": [4, 2]}}, 1, 4),
    ({"config": {"bos_token_id": None}, "generation_config": {"eos_token_id": 4}}, 4, 4),
    ({"tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"},
      "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"}}, 1, 2),
    ({"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": {}},
      "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"}}, 4, 4),
    ({"special_tokens_map": {"eos_token": "</s>"}, "config": {"eos_token_id": 5}}, 2, 2),
    ({"tokenizer_config": {"eos_token": "<other>"}, "config": {"eos_token_id": 2}}, 264, 264),
    ({"tokenizer_config": {"eos_token": ""}, "config": {"eos_token_id": 999}}, -1, -1),
])  # fmt: skip
def test_the_tokens_around_a_document_are_found_wherever_they_are_named(files, bos, eos, tmp_path):
    tok = JsonTokenizer(json_tokenizer(tmp_path, **files))
    assert (tok.bos, tok.eos) == (bos, eos) and tok.piece(-1) == "<-1>"


@pytest.mark.parametrize("added", [["<pad>"], ["<a>", "<b>"], ["hi"]])
def test_a_token_that_the_tokenizer_has_alone_is_never_fed(added, tmp_path):
    json_tokenizer(tmp_path, lambda made, _: made.add_special_tokens(added))
    n = len(SPECIAL) + 256
    GPT(ModelConfig(n, 8, 4, 1, 2, 1, 16)).save_pretrained(tmp_path)
    tok, _ = load_base(tmp_path)
    assert max(tok.opening("h <pa")) < n < tok.vocab_size
    for encode in (tok.encode, tok.opening):
        refused(f"holds {added[-1]}, a token that the model lacks", encode, f"h{added[-1]}")
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": added[0]})
    refused("no piece, known to the model, that begins or ends", load_base, tmp_path)


@pytest.mark.parametrize("about", [
    {"eos_token": "<|im_end|>"}, {"added_tokens_decoder": {"4": {"content": "<|im_end|>"}}},
    {"eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": {}},
])  # fmt: skip
def test_a_special_token_that_another_file_names_is_one_token(about, tmp_path):
    """And ids may have gaps: the size of a vocabulary is one more than its largest."""
    path = json_tokenizer(tmp_path) / "tokenizer.json"
    content = read_json(path)
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] != 4]
    content["model"]["vocab"]["\u0120\u0120"] = 300
    write_json(path, content)
    assert len(JsonTokenizer(tmp_path).encode("a<|im_end|>")) == 11
    write_json(tmp_path / "tokenizer_config.json", about)
    tok = JsonTokenizer(tmp_path)
    assert tok.encode("a<|im_end|>") == [*tok.encode("a"), 4]
    assert (tok.own_size, tok.vocab_size, tok.piece(300)) == (301, 301, "\u0120\u0120")


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
def test_a_tokenizer_that_cannot_encode_is_refused(kind, tmp_path):
    path = json_tokenizer(tmp_path) / "tokenizer.json"
    lacking = {"type": kind, "vocab": {"b": 0}, "unk_token": "[UNK]"}
    lacking |= {"merges": []} if kind == "BPE" else {}
    write_json(path, read_json(path) | {"model": lacking})
    refused("tokenizer.json cannot be read as a tokenizer: .*UNK", JsonTokenizer, tmp_path)


# ---- which tokens carry loss ----
class Letters(JsonTokenizer):
    """Tokens are the pieces and all characters; `start`, a token or none, begins a text."""

    def __init__(self, pieces: list[str], start: list[int]):
        self.pieces, self.start = pieces, start

    def encode(self, text: str) -> list[int]:
        found = re.findall("|".join(map(re.escape, self.pieces)) + "|(?s:.)", text)
        ids = [self.pieces.index(p) if p in self.pieces else 100 + ord(p) for p in found]
        return ids if ids == [] or ids[0] < 50 else self.start + ids

    def decode(self, ids) -> str:
        return "".join("" if id == 50 else self.piece(id) for id in ids)

    def piece(self, id: int) -> str:
        return self.pieces[id] if id < 50 else chr(id - 100)


@cache
def tokenizer(kind: str) -> JsonTokenizer:
    if kind == "byte level":
        return JsonTokenizer(json_tokenizer(Path(mkdtemp())))
    merged = [] if kind == "starts" else ["\n\n", " hi"]
    return Letters([*SPECIAL, *merged], [] if kind == "merges" else [50])


# What opens a dialogue; a turn of role {0} and content {1}, or {2} without spaces around it; the
# opening of an answer; the answer; what is after it; whether turns must alternate.
STYLES = {
    "ChatML": ("", "<|im_start|>{0}\n{1}<|im_end|>\n", "<|im_start|>assistant\n", "{1}<|im_end|>",
               "\n", 0),
    "Llama 3": ("", "<h>{0}</h>\n\n{2}<|eot|>", "<h>assistant</h>\n\n", "{2}<|eot|>", "</s>", 0),
    "Mistral": ("<s>", "[INST] {1} [/INST]", "", " {1}</s>", "", 1),
    "Gemma": ("<s>", "<|turn>{0}\n{2}<turn|>\n", "<|turn>model\n", "{2}<turn|>", "\n", 1),
    "Zephyr": ("", "<|{0}|>\n{1}</s>\n", "<|assistant|>\n", "{1}</s>", "\n", 0),
}  # fmt: skip
ENDS = [SPECIAL.index(end) for end in ("</s>", "<|eot|>", "<turn|>", "<|im_end|>")]
LOOP, ANSWERING = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
STRICT = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"


def template(style: str) -> str:
    words = "{{ m.role }}", "{{ m.content }}", "{{ m.content | trim }}"
    forms = [form.format(*words).replace("\n", "{{ '\\n' }}") for form in STYLES[style][:5]]
    first, other, opening, answer, rest = forms
    strict = STRICT + "{% endif %}" if STYLES[style][5] else ""
    answer = f"{opening}{{% generation %}}{answer}{{% endgeneration %}}{rest}"
    turn = f"{{% if m.role == 'assistant' %}}{answer}{{% else %}}{other}{{% endif %}}"
    return f"{first}{LOOP}{strict}{turn}{ANSWERING}{opening}{{% endif %}}"


def oracle(style: str, turns: list[dict]) -> list[tuple[str, bool]]:
    text, other, opening, answer, rest, _ = STYLES[style]
    pieces = []
    for turn in turns:
        words = turn["role"], turn["content"], turn["content"].strip()
        if turn["role"] == "assistant":
            pieces += [(text + opening, False), (answer.format(*words), True)]
            text = rest
        else:
            text += other.format(*words)
    return pieces + ([] if turns[-1]["role"] == "assistant" else [(text + opening, False)])


@cache
def chat_directory(text) -> Path:
    """Special tokens may be texts, objects or missing."""
    about = {"chat_template": text, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    directory = Path(mkdtemp())
    write_json(directory / "tokenizer_config.json", about)
    return directory


def turns_of(texts: list[str], system: list[str]) -> list[dict]:
    turns = [("system", text) for text in system]
    turns += [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [{"role": role, "content": text} for role, text in turns]


def dialogues(system=1):
    pieces = [*SPECIAL, "<|im_", "end|>", "\n", "\n\n", " ", "hi", "{{ x }}", "\u00e9"]
    text = st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=4).map("".join)
    texts = st.lists(text, min_size=1, max_size=5)
    return st.lists(st.builds(turns_of, texts, st.lists(text, max_size=system)), max_size=3)


@pytest.mark.parametrize("kind", ["starts", "merges", "starts and merges", "byte level"])
@settings(properties, max_examples=200)
@given(st.data(), st.sampled_from(list(STYLES)), st.integers(1, 120))
def test_loss_is_on_each_answer_and_its_end_and_on_nothing_else(kind, data, style, length):
    tok, directory, rows = tokenizer(kind), chat_directory(template(style)), []
    found = data.draw(dialogues(1 - STYLES[style][5]))
    for turns in found:
        texts, kinds = zip(*oracle(style, turns))
        # Only the first piece is the start of a text: 50, but for bytes.
        start = None if kind == "byte level" else 50
        ids = [[id for id in tok.encode(text) if id != start or text is texts[0]] for text in texts]
        pairs = token_runs(directory, tok, turns, ENDS)[-1]
        assert [part for pair in pairs for part in pair] == ids + [[]] * (len(ids) % 2)
        assert [tok.decode(part) for part in ids] == list(texts)
        most = max(n for n in range(0, len(ids) + 1, 2) if len(sum(ids[:n], [])) <= length)
        mask = [is_answer for part, is_answer in zip(ids[:most], kinds) for _ in part]
        padding = [0] * (length - len(mask))
        rows += [(sum(ids[:most], []) + padding, mask + padding)] if most else []
    of_lines = dict(enumerate(found))
    tokens, loss_mask, dropped = dialogue_rows(of_lines, directory, tok, ENDS, length)
    assert list(zip(tokens.tolist(), loss_mask.tolist())) == rows
    assert dropped == len(found) - len(rows)


THINKS = "{% set text = m.content if loop.last else m.content.split('/think>')[-1] %}"
THINKS = LOOP + THINKS + "{{ m.role + ':' + text + '</s>' }}" + ANSWERING + "assistant:{% endif %}"


def test_where_a_template_drops_what_was_thought_each_answer_is_a_row_of_its_own():
    turns = turns_of(["a?", "<think>x/think>A", "b?", "<think>y/think>B", "c?"], [])
    tok, directory = tokenizer("merges"), chat_directory(THINKS)
    given = "user:a?</s>assistant:A</s>user:b?</s>assistant:"
    last = f"{given}B</s>user:c?</s>assistant:"
    expected = [(tok.encode(given), tok.encode("<think>y/think>B</s>"))]
    assert token_runs(directory, tok, turns[:4], [2])[-1] == expected
    assert token_runs(directory, tok, turns, [2])[-1] == [(tok.encode(last), [])]
    tokens, mask, dropped = dialogue_rows({"line 1": turns}, directory, tok, [2], 80)
    answers = [tok.decode(row[where].tolist()) for row, where in zip(tokens, mask)]
    assert answers == ["<think>x/think>A</s>", "<think>y/think>B</s>"] and dropped == 0


def test_an_answer_right_after_another_is_no_start_of_a_text():
    text = LOOP + "{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "assistant")]
    tok = tokenizer("starts")
    (run,) = token_runs(chat_directory(text), tok, turns, [2])
    assert [tok.decode(ids) for pair in run for ids in pair] == ["u", "a</s>", "", "a</s>"]
    assert run[0][1] == run[1][1] == [100 + ord("a"), 2]


FORCED = LOOP + "{{ m.content }}</s>" + ANSWERING + "<think>{% endif %}"


@pytest.mark.parametrize("text, ends, says", [
    (template("Mistral"), ENDS, "a.jsonl, line 2: .*alternate"),
    (template("ChatML"), [2], "a.jsonl, line 2: no known token .*generation_config"),
    (template("ChatML"), [], "eos_token_id is missing"),
    (FORCED, [2], "a.jsonl, line 2: the chat template opens answers as it writes none"),
    ("{{ '\\ud83d' }}", [2], "a.jsonl, line 2: .*surrogates not allowed"),
])  # fmt: skip
def test_a_dialogue_that_cannot_be_written_is_refused_by_its_line(text, ends, says, tmp_path):
    turns = {"messages": turns_of(["a", "b"], ["system"])}
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(turns))
    found = read_dialogues([tmp_path / "a.jsonl"])
    refused(says, dialogue_rows, found, chat_directory(text), tokenizer("merges"), ends, 99)


# ---- files of dialogues ----
# As in ShareGPT.
OTHER_NAMES = {"messages": "conversations", "content": "value", 'role": "user': 'from": "human'}
OTHER_NAMES |= {'role": "assistant': 'from": "gpt', 'role": "system': 'from": "system'}


@properties
@given(dialogues(), st.booleans(), st.booleans(), st.sampled_from(("\n", "\r\n\n", "[,]")))
def test_dialogues_are_the_same_in_every_form_of_a_file(tmp_path_factory, found, form, mark, ends):
    items = [json.dumps({"messages": turns}, ensure_ascii=mark) for turns in found]
    for old, new in OTHER_NAMES.items() if form else []:
        items = [item.replace(f'"{old}"', f'"{new}"') for item in items]
    items.append('"a\u2028b?"')
    text = f"[{', '.join(items)}]" if ends == "[,]" else ends.join(items)
    paths = [tmp_path_factory.mktemp("dialogues") / "any.name" for _ in range(2)]
    for path in paths:
        path.write_text(text, encoding="utf-8-sig" if mark else "utf-8")
    assert list(read_dialogues(paths).values()) == [*found, turns_of(["a\u2028b?"], [])] * 2


@pytest.mark.parametrize("content, says", [
    (None, "cannot be read"), (b"\xff\n", "cannot be read as UTF-8 text"), ("[1, ", "as JSON"),
    ("why?", ", line 1: Expecting value"), ("[" * 9999, "cannot be read as JSON"),
    ('"a"\n{"a": 1}\n', ", line 2: must be a string, or have turns"), ("[[]]", ", item 1: must"),
    ('"a"\n\n"half \\ud83d"', ", line 3: .*surrogates not allowed"), ("0", ", line 1: must be"),
    ('{"messages": ["a"]}', "line 1: a turn must have"), ('{"messages": {}}', "line 1: must be"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "role .*: must be system, user or"),
    ('{"conversations": [{"from": "gpt", "value": null}]}', "the content of gpt must be text"),
    ('{"messages": [{"role": "user", "content": "a", "weight": 0}]}', "line 1: weight: cannot"),
    ('{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}', "1: tool_calls"),
    ('{"messages": [{"content": "a"}], "tools": [1]}', "line 1: tools: cannot be read, and"),
    ('{"system": 3, "messages": [{"role": "user", "content": "a"}]}', "content of system must be"),
])  # fmt: skip
def test_a_file_that_holds_other_things_is_refused_by_its_line(content, says, tmp_path):
    path = tmp_path / "other.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "\n" not in refused(f"{re.escape(str(path))}.*{says}", read_dialogues, [path])


def test_what_changes_nothing_may_be_there_and_a_system_prompt_may_stand_apart(tmp_path):
    turn = {"from": "human", "value": "hi", "weight": 1, "tool_calls": [], "id": 3}
    item = {"system": "Be brief.", "conversations": [turn], "tools": None}
    (tmp_path / "a.json").write_text(json.dumps([item]))
    (turns,) = read_dialogues([tmp_path / "a.json"]).values()
    assert turns == turns_of(["hi"], ["Be brief."])


def test_a_base_is_asked_even_where_the_opening_of_an_answer_is_none_of_the_answer():
    tok, directory = tokenizer("merges"), chat_directory(FORCED)
    one, alone = turns_of(["a"], []), [{"role": "assistant", "content": "a"}]
    found = given_turns({"1": alone, "2": one}, directory, tok, [2], 99)
    assert [[tok.decode(ids) for ids in given] for given in found] == [["a</s><think>"]]
    blind = chat_directory(LOOP + "{{ '' if m.role == 'system' else m.content }}{% endfor %}")
    system = turns_of([], ["s"])
    assert len(given_turns({"1": system, "2": one}, blind, tok, [2], 99)) == 1


def test_a_turn_is_on_one_side_and_too_long_ones_are_left_out(tmp_path):
    turns = [f"what is {n} + {n}?" for n in range(60)] + ["a" * 99]
    path, tok, directory = tmp_path / "a.jsonl", tokenizer("merges"), chat_directory(THINKS)
    path.write_text("\n".join(map(json.dumps, turns)))
    for side, dialogues in split_dialogues([str(path)]).items():
        of_side = [turn for turn in turns[:-1] if is_validation(turn) == (side == "validation")]
        found = given_turns(dialogues, directory, tok, [2], 99)
        assert found == [[tok.encode(f"user:{turn}</s>assistant:")] for turn in of_side] != []
    asked = json.dumps({"messages": turns_of(["a", "A", "b", "B", "c"], ["system"])})
    path.write_text(asked)
    first, *later = given_turns(read_dialogues([path]), directory, tok, [2], 99)[0]
    assert tok.decode(first) == "system:system</s>user:a</s>assistant:"
    assert [tok.decode(ids) for ids in later] == [f"user:{c}</s>assistant:" for c in "bc"]
    refused("no turn has at most 5 tokens", given_turns, dialogues, directory, tok, [2], 5)
    path.write_text('"a?"\n"b?"\n"c?"')
    # Rows are the same dialogues', wherever their file is.
    digests = set()
    for other in (path, path.with_name("other.jsonl")):
        other.write_bytes(path.read_bytes())
        config = DistillConfig(base=str(directory), text=[str(other)], chat=True)
        digests.add(prompt_sources(config, tok, [2])[1])
    assert len(digests) == 1
    assert [len(split_dialogues([path])[side]) for side in ("train", "validation")] == [2, 1]
    path.write_text('"why?"')
    for paths, says in (([path], "the validation side of the dialogues"), ([], "must name files")):
        refused(says, split_dialogues, paths)


# ---- templates ----
# What transformers makes of those that ask for more than turns.
RENDERED = {
    "{% if tools is not none or documents is not none %}x{% endif %}{{ tools is defined }}": "True",
    "{% if not tools %}{{ tools }}{% endif %}{% for d in documents or [] %}x{% endfor %}": "None",
    "{% set x = 1 %}{% generation %}\n{% set x = 2 %}{{ x }}{% endgeneration %}\n {{ x }}": "2 1",
    LOOP + "{%- generation -%} {{ loop.index }} {% endgeneration %}{% endfor %}": "1 2 ",
    LOOP + "\n  {% if m['role'] == 'user' %}\n<u>{{ m.content }}{{ eos_token }}\n  {% else %}\n<a>"
    "{{ m['content'] | upper }}\n  {% endif %}\n{% endfor %}": "<u>a</s>\n<a><\u00c9>\n",
    "{{ messages[1] | tojson }}": '{"role": "assistant", "content": "<\u00e9>"}',
    "{{ ['\u00e9'] | tojson(ensure_ascii=true, indent=1) }}": '[\n "\\u00e9"\n]',
    LOOP + "{% if loop.first %}{% break %}{% endif %}{% endfor %}{{ pad_token }}": "",
    "{{ strftime_now('%%') }}{{ raise_exception is defined }}{{ bos_token }}": "%True<s>",
}  # fmt: skip
TURNS = turns_of(["a", "<\u00e9>"], [])


@pytest.mark.parametrize("text", RENDERED)
def test_templates_are_rendered_as_transformers_does(text):
    assert chat_template(chat_directory(text))(TURNS, True) == RENDERED[text]


def test_of_several_templates_the_default_is_taken_and_a_file_goes_before_them():
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "plain"}]
    directory = chat_directory.__wrapped__(templates)
    assert chat_template(directory)(TURNS, True) == "plain"
    (directory / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert chat_template.__wrapped__(directory)(TURNS, True) == "file </s>"  # not cached
    refused("tokenizer.json", chat_prompt, directory, small_tokenizer(), TURNS)


FAILING = [(none, "no chat template") for none in (None, [], [{"name": "other"}], {"a": 1})]
FAILING += [("{{ raise_exception('roles must alternate') }}", "roles must alternate")]
FAILING += [("{% for %}", "fails"), ("{{ 1 // 0 }}", "ZeroDivisionError")]
FAILING += [("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError")]
FAILING += [("{{ messages.append(1) }}", "SecurityError")]
FAILING += [("{{ cycler.__init__.__globals__.os.system('touch owned') }}", "fails")]
FAILING += [("{{ range(999999999) | list }}", "fails"), ("{{ 'a' * 10 ** 18 }}", "MemoryError")]


@pytest.mark.parametrize("text, says", FAILING, ids=str)
def test_a_bad_or_hostile_template_is_refused_and_runs_nothing(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = chat_directory.__wrapped__(text)
    assert str(directory) in refused(says, lambda: chat_template(directory)(TURNS, True))
    assert not list(tmp_path.iterdir())


@pytest.mark.peers
@pytest.mark.parametrize("text", [*RENDERED, *map(template, STYLES), THINKS])
def test_transformers_renders_the_same(text):
    from transformers.utils.chat_template_utils import render_jinja_template

    more = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    texts, _ = render_jinja_template([TURNS], chat_template=text, **more)
    assert [chat_template(chat_directory(text))(TURNS, True)] == texts


# ---- turns that a grammar writes ----
def test_turns_are_written_and_only_once():
    turns = written_turns(700, seed=0)
    assert len(set(turns)) == 700 and turns == written_turns(700, seed=0)
    assert turns != written_turns(700, seed=1)
    assert not re.search("[{}|]", "".join(turns)) and all(turn[0].isupper() for turn in turns)


def test_turns_are_written_for_all_tasks_alike_as_long_as_their_words_last(tmp_path, monkeypatch):
    tasks = {"few": ["few {x} {n}"], "many": ["many {y}", "many: {x} is one"]}
    words = {"x": ["a", "b", "c"], "y": ["{x} and {x}"]}
    grammar = {"tasks": tasks, "words": words, "numbers": {"n": [8, 10]}}
    monkeypatch.setattr(data.turns, "GRAMMAR", tmp_path / "turns.json")
    data.turns.GRAMMAR.write_text(json.dumps(grammar))
    turns = written_turns(18, seed=0)
    assert sorted(turns[::2]) == sorted(f"Few {x} {n}" for x in "abc" for n in (8, 9, 10))
    many = {f"Many {x} and {y}" for x in "abc" for y in "abc"}
    assert set(turns[1::2]) <= many | {f"Many: {x} is one" for x in "ABC"}
    refused("--written 19: the grammar has too few different turns", written_turns, 19, seed=0)
