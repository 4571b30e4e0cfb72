"""A Llama-style GPT: RMSNorm, rotary positions, grouped-query attention, SwiGLU, a KV cache.

Speculative decoding needs of it only `positions`, `mask`, and a cache that keeps chosen slots.

Dimension key
    B batch   T tokens fed now   S tokens in the cache   D model width   V vocabulary   L layers
    nh attention heads   nkv key/value heads   hs size of one attention head
"""

import json
import math
import os
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a Llama config.json that shape the computation; ValueError names a bad one."""

    vocab_size: int = 2048
    hidden_size: int = 160
    intermediate_size: int = 448
    num_hidden_layers: int = 10
    num_attention_heads: int = 5
    num_key_value_heads: int = 1
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    head_dim: int = None  # type: ignore  # None turns into hidden_size / num_attention_heads
    rope_scaling: dict | None = None
    model_type: str = "llama"  # or qwen2: q, k and v have biases; or qwen3: q and k have norms

    def __post_init__(self):
        if self.head_dim is None:
            check_sizes(self, ["hidden_size", "num_attention_heads"])
            D, nh = self.hidden_size, self.num_attention_heads
            check(D % nh == 0, f"hidden_size = {D}: no multiple of num_attention_heads = {nh}")
            object.__setattr__(self, "head_dim", D // nh)
        check_config(self)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        eos = self.eos_token_id
        ids = eos if isinstance(eos, list) else [eos]
        return tuple(token for token in ids if token is not None)


class KVCache:
    """Keys and values of the tokens so far: data (L, 2, B, nkv, capacity, hs), `length` in use."""

    def __init__(self, config, batch: int, capacity: int, dtype=torch.float32, device=None):
        L, nkv = config.num_hidden_layers, config.num_key_value_heads
        shape = (L, 2, batch, nkv, capacity, config.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity, self.length = capacity, 0

    def keep(self, start: int, rows: list[int]) -> None:
        """Of the slots written from `start` on, keep `rows` (ascending, relative to `start`)."""
        # Rows 0, 1, 2, ... are in place.
        if rows != list(range(len(rows))):
            index = torch.tensor(rows, device=self.data.device) + start
            self.data[..., start : start + len(rows), :] = self.data.index_select(4, index)
        self.length = start + len(rows)

    def keep_batch(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch, in this order: rows (kept,) long."""
        # Sequences that do not move are not copied.
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        self.data[:, :, moved] = self.data[:, :, rows[moved]]
        self.data = self.data[:, :, : len(rows)]  # (L, 2, kept, nkv, capacity, hs)


# Kinds of rope_scaling, and the numbers that each needs.
ROPE_SCALING = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rotary_table(config: ModelConfig, positions: int = 4096) -> Tensor:
    """cos and signed sin of the angles of the context's first positions: (positions, 2, 1, hs)."""
    # The angle by which one position turns pair i is theta^(-2i/hs).
    half = config.head_dim // 2
    inv_freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)  # (hs/2,)
    scaling = config.rope_scaling
    if scaling is not None:
        # Divided by `factor`, but "llama3" keeps short wavelengths as they are (smooth = 1).
        smooth = torch.zeros_like(inv_freq)
        if scaling["rope_type"] == "llama3":
            wavelengths = 2 * math.pi / inv_freq
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] / wavelengths
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = torch.lerp(inv_freq / scaling["factor"], inv_freq, smooth)
    # Attention rotates by x cos + (x, halves swapped) sin: the sign is in the table's sin.
    end = min(positions, config.max_position_embeddings)
    angle = torch.outer(torch.arange(end, dtype=torch.float64), inv_freq)  # (positions, hs/2)
    cos = torch.cat((angle.cos(), angle.cos()), dim=-1)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)
    return torch.stack((cos, sin), dim=1).unsqueeze(2).to(torch.get_default_dtype())


class Attention(nn.Module):
    """softmax(q k^T / sqrt(hs) + mask) v."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.nh, self.nkv = config.num_attention_heads, config.num_key_value_heads
        self.hs, D, bias = config.head_dim, config.hidden_size, config.model_type == "qwen2"
        self.q_proj = nn.Linear(D, self.nh * self.hs, bias=bias)
        self.k_proj = nn.Linear(D, self.nkv * self.hs, bias=bias)
        self.v_proj = nn.Linear(D, self.nkv * self.hs, bias=bias)
        self.o_proj = nn.Linear(self.nh * self.hs, D, bias=False)
        self.has_norms = config.model_type == "qwen3"
        if self.has_norms:
            self.q_norm = nn.RMSNorm(self.hs, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.hs, config.rms_norm_eps)

    def forward(self, x: Tensor, cos, sin, mask, cache) -> Tensor:
        """x (B, T, D) -> (B, T, D); cos and sin ([B,] T, 1, hs); mask (T, S+T), or None if S = 0
        or T = 1; cache (2, B, nkv, S+T, hs): keys and values, the last T to be written; or None."""
        B, T, _ = x.shape
        nh, nkv, hs = self.nh, self.nkv, self.hs
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1).view(B, T, nh + nkv, hs)
        # Qwen3 normalises each head's query and key: the scores stay small.
        if self.has_norms:
            q, k = qk.split_with_sizes((nh, nkv), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        # Rotate queries and keys at once: dimensions i and i + hs/2 of a head turn together, so the
        # roll swaps the halves of a head.
        qk = torch.addcmul(qk * cos, qk.roll(hs // 2, dims=-1), sin).transpose(1, 2)
        q, k = qk.split_with_sizes((nh, nkv), dim=1)  # (B, nh, T, hs), (B, nkv, T, hs)
        v = self.v_proj(x).view(B, T, nkv, hs).transpose(1, 2)  # (B, nkv, T, hs)

        # Write the new keys and values into the cache, and attend to all that it holds.
        if cache is not None:
            cache[..., -T:, :] = torch.stack((k, v))
            k, v = cache.unbind()  # (B, nkv, S+T, hs)

        # The query heads that share a key/value head become one sequence of the batch: `expand`
        # gives each the same keys and copies nothing. If there is a single token, the group's
        # queries are instead rows of one head, so that its keys are read only once.
        heads, rows = (nh // nkv, T) if T > 1 else (1, nh // nkv)
        q = q.reshape(B * nkv, heads, rows, hs)  # its scores (B * nkv, heads, rows, S+T)
        k = k.reshape(B * nkv, 1, -1, hs).expand(-1, heads, -1, -1)  # (B * nkv, heads, S+T, hs)
        v = v.reshape(B * nkv, 1, -1, hs).expand(-1, heads, -1, -1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
        y = y.reshape(B, nh, T, hs).transpose(1, 2).reshape(B, T, nh * hs)
        return self.o_proj(y)  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(SiLU(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos, sin, mask, cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """tokens (B, T) -> hidden states (B, T, D); `lm_head` makes logits (..., V) of them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = nn.Buffer(rotary_table(config), persistent=False)
        # GPT-2's start: the residual stream sums 2L branches, so their ends start smaller.
        std, std_of_ends = 0.02, 0.02 / math.sqrt(2 * config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                is_end = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=std_of_ends if is_end else std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        # On CUDA, cuDNN's attention would plan again for every length of the cache.
        torch.backends.cuda.enable_cudnn_sdp(False)
        weight = self.embed_tokens.weight
        return KVCache(self.config, batch, capacity, weight.dtype, weight.device)

    def forward(self, tokens, positions=None, mask=None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) long -> hidden (B, T, D).

        positions  (T,) or (B, T) long, below the cache's capacity; default S, S+1, ...
        mask       (T, S+T): bool, True where a token may look, or a float to add to the scores.
        cache      read, written and advanced by T.
        ValueError if the cache, or, without `positions`, the context, has no room for T tokens.
        """
        T, context = tokens.shape[1], self.config.max_position_embeddings
        S, end = 0, (T if positions is None else context)
        if cache is not None:
            S, end = cache.length, cache.capacity
            check(S + T <= end, f"cache of {end}: {S} + {T} do not fit")
        if positions is None:
            check(S + T <= context, f"context of {context}: {S} + {T} do not fit")
            positions = torch.arange(S, S + T, device=tokens.device)
        # The rotary table of a long context grows to `end`: all positions are below it.
        if len(self.rotary) < min(end, context):
            self.rotary = rotary_table(self.config, end).to(self.rotary)
        # After a cached past, token i sees all of it, and the new tokens up to i.
        if mask is None and S > 0 and T > 1:
            mask = torch.ones(T, S + T, dtype=torch.bool, device=tokens.device).tril(S)

        # Embed, go through the blocks, each with its part of the cache, normalise.
        x = self.embed_tokens(tokens)  # (B, T, D)
        cos, sin = self.rotary[positions].unbind(-3)  # each ([B,] T, 1, hs)
        caches = [None] * len(self.layers)
        if cache is not None:
            cache.length = S + T
            caches = cache.data[..., : S + T, :].unbind()  # L times (2, B, nkv, S+T, hs)
        for block, block_cache in zip(self.layers, caches):
            x = block(x, cos, sin, mask, block_cache)
        return self.norm(x)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by their names in a Llama directory; a tied LM head is left out."""
        named = self.named_parameters()
        return {n if n == "lm_head.weight" else f"model.{n}": t.detach() for n, t in named}

    def load_tensors(self, disk: dict[str, Tensor], where) -> None:
        """Make the tensors of a Llama directory the weights; ValueError names one that is wrong."""
        ours, tied = self.tensors(), self.config.tie_word_embeddings
        # Some files also hold rotary tables, which say nothing new, or a tied LM head.
        disk = {n: t for n, t in disk.items() if not n.endswith("rotary_emb.inv_freq")}
        head = disk.pop("lm_head.weight", None) if tied else None
        for name in sorted(ours.keys() | disk.keys()):
            here = tuple(ours[name].shape) if name in ours else "missing"
            there = tuple(disk[name].shape) if name in disk else "missing"
            check(here == there, f"{where}: {name} is {there} in the file, {here} in the model")
        state = {name.removeprefix("model."): t for name, t in disk.items()}
        self.load_state_dict(state, strict=False, assign=True)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
            same = head is None or torch.equal(head, self.lm_head.weight)
            check(same, f"{where}: lm_head.weight differs: tie_word_embeddings must be false")

    def save_pretrained(self, directory, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors in the Hugging Face layout, each atomically."""
        state = {name: t.to("cpu", dtype).contiguous() for name, t in self.tensors().items()}
        raw = FIXED | asdict(self.config)
        raw["architectures"] = [f"{self.config.model_type.capitalize()}ForCausalLM"]
        raw["dtype"] = str(state["model.norm.weight"].dtype).removeprefix("torch.")
        write_json(Path(directory) / "config.json", raw)
        write_safetensors(Path(directory) / "model.safetensors", state)

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device=None) -> "GPT":
        """Open a directory of one of FAMILY's kinds. ValueError names file and field."""
        config = read_config(Path(directory) / "config.json")
        disk = read_weights(Path(directory))
        # On "meta" the weights, which are to be replaced, take no memory and no time.
        with torch.device("meta"):
            model = cls(config)
        for name, t in disk.items():
            is_wide = t.is_floating_point() and t.element_size() > 1
            check(is_wide, f"{directory}: {name} is {t.dtype}: must be dequantized first")
        # What was read is a mapped file, in which tensors are not aligned: they are copied.
        disk = {name: t.to(device, dtype, copy=True) for name, t in disk.items()}
        model.load_tensors(disk, directory)
        model.rotary = rotary_table(config).to(device, dtype)
        return model.eval()


# ---- the files of a Llama directory: no Medusa here, to be skipped at a first reading ----
def read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of the first of these files that exists; an index names several (shards)."""
    names = ["model.safetensors", "model.safetensors.index.json"]
    names += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    path = directory / next((name for name in names if (directory / name).exists()), names[0])
    if path.suffix != ".json":
        return read_tensors(path)
    weight_map = read_json(path).get("weight_map")
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    here = all(isinstance(shard, str) and Path(shard).name == shard for shard in shards)
    check(here, f"{path}: weight_map must name a file of this directory for each tensor")
    parts = {shard: read_tensors(directory / str(shard)) for shard in set(shards)}
    with naming_errors(path):
        return {name: parts[shard][name] for name, shard in weight_map.items()}


FAMILY = "llama", "mistral", "qwen2", "qwen3"
# Fields that must be absent, null or have these values, with which they are also written.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
ROPE_FIELDS = "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"


def read_config(path: Path) -> ModelConfig:
    """config.json -> ModelConfig; ValueError, naming file and field, for what is not supported."""
    raw = {"model_type": "llama", "tie_word_embeddings": False} | read_json(path)
    kind = raw["model_type"]
    raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    raw.setdefault("head_dim", 128 if kind == "qwen3" else None)
    if kind in ("qwen2", "qwen3"):
        # A Qwen config may leave these out.
        raw = {"bos_token_id": None, "eos_token_id": None} | raw
    with naming_errors(path):
        check(kind in FAMILY, f"model_type = {kind!r}: must be one of {', '.join(FAMILY)}")
        raw |= read_rope(raw) | {"model_type": "llama" if kind == "mistral" else kind}
        must_be = FIXED | {"partial_rotary_factor": 1, "quantization_config": None}
        for name, value in must_be.items():
            check(raw.get(name) in (None, value), f"{name} = {raw.get(name)!r}: unsupported")
        # Below, the context is cut to the window, which then hides nothing. Qwen may not use its.
        has_window = kind == "mistral" or (kind != "llama" and raw.get("use_sliding_window"))
        window = raw.get("sliding_window", 4096) if has_window else None
        fits = window is None or (type(window) is int and window > 0)
        check(fits, f"sliding_window = {window!r}: must be a whole number above 0, or null")
        layers = raw.get("layer_types") or []
        full = isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
        check(full or window is not None, f"layer_types = {str(layers)[:40]}: no sliding_window")
    config: ModelConfig = config_of(ModelConfig, raw, path)
    # Other tokens that end a text may be in generation_config.json alone.
    other = path.with_name("generation_config.json")
    more = read_json(other).get("eos_token_id") if other.exists() else None
    with naming_errors(other):
        ends = [*dict.fromkeys(config.eos_ids + replace(config, eos_token_id=more).eos_ids)]
    eos = ends if len(ends) > 1 else (ends or [None])[0]
    context = min(window or math.inf, config.max_position_embeddings)
    return replace(config, max_position_embeddings=context, eos_token_id=eos)


def read_rope(raw: dict) -> dict:
    """The rotary settings of a config, wherever they are; what is said twice must agree."""
    said = {name: raw[name] for name in ROPE_FIELDS if name in raw}
    for place in ("rope_scaling", "rope_parameters"):
        inner = raw.get(place) or {}
        check(isinstance(inner, dict), f"{place} = {inner!r}: must be an object")
        said |= {f"{place}.{key}": value for key, value in inner.items()}
    rope, names = {}, {}
    for name, value in said.items():
        # Older files call the kind `type`.
        key = "rope_type" if name.endswith(".type") else name.rpartition(".")[2]
        other, earlier = names.setdefault(key, name), rope.setdefault(key, value)
        check(value == earlier, f"{other} = {earlier!r}: but {name} = {value!r}; keep one")
    kind = rope.get("rope_type", "default")
    check(kind in list(ROPE_SCALING), f"{names.get('rope_type')} = {kind!r}: unsupported")
    known = ("rope_type", *ROPE_FIELDS, *ROPE_SCALING[kind])
    for key, name in names.items():
        check(key in known, f"{name} = {rope[key]!r}: unsupported with rope_type = {kind!r}")
    scaling = {"rope_type": kind} | {key: rope.get(key) for key in ROPE_SCALING[kind]}
    return {"rope_theta": 10000.0} | rope | {"rope_scaling": scaling if len(scaling) > 1 else None}


def config_of(kind, raw: dict, path: Path):
    """kind(...) of its fields in raw; ValueError, naming file and field, if missing or refused."""
    with naming_errors(path):
        return kind(**{f.name: raw[f.name] for f in fields(kind)})


# ---- checks ----
def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_sizes(config, names: list[str]) -> None:
    """Raises ValueError, naming the field, unless each is a whole number from 1 to 2^31 - 1."""
    for name in names:
        value = getattr(config, name)
        is_size = type(value) is int and 1 <= value < 1 << 31
        check(is_size, f"{name} = {value!r}: must be a whole number above 0, below 2^31")


def check_config(config: ModelConfig) -> None:
    # Every number is above 0, and the whole ones are sizes.
    check_sizes(config, [f.name for f in fields(config) if f.type is int])
    rope = config.rope_scaling or {}
    numbers = {"rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta}
    numbers |= {name: rope.get(name) for name in ROPE_SCALING.get(rope.get("rope_type", ""), ())}
    for name, value in numbers.items():
        is_number = type(value) in (int, float) and 0 < value < 1 << 63
        check(is_number, f"{name} = {value!r}: must be a number above 0, below 2^63")
    low, high = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", math.inf)
    check(low < high, f"high_freq_factor = {high}: must be above low_freq_factor = {low}")
    for name, ids in (("bos_token_id", [config.bos_token_id]), ("eos_token_id", config.eos_ids)):
        is_id = all(type(token) in (int, type(None)) for token in ids)
        check(is_id, f"{name} = {getattr(config, name)!r}: must be a token id, or null")
    # Heads come in groups, and rotate in pairs of dimensions.
    nh, nkv = config.num_attention_heads, config.num_key_value_heads
    check(config.head_dim % 2 == 0, f"head_dim = {config.head_dim}: must be even")
    check(nh % nkv == 0, f"num_attention_heads = {nh}: no multiple of num_key_value_heads = {nkv}")


# ---- files: read with a clear error, written atomically ----
@contextmanager
def naming_errors(path: Path | str, what: str = ""):
    """What goes wrong with this file is a ValueError that begins with its name."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}{what}: {error}") from None


def read_json(path: Path, kind: type = dict):
    """The content of a JSON file of this kind, dict or list; ValueError names the file."""
    with naming_errors(path, " cannot be read as JSON"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    what = "object" if kind is dict else "list"
    check(isinstance(content, kind), f"{path} holds no JSON {what}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    with naming_errors(path, " cannot be read as safetensors"):
        return load_file(path)


def read_pickle(path: Path):
    """The content of a torch.save file. Code in it is not run: that is a ValueError."""
    # torch warns of unusual pickles, and its errors advise to run their code: neither is shown.
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise ValueError(f"{path} cannot be read as tensors: missing, or damaged") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors, by name, of a safetensors file or of one that torch.save wrote."""
    disk = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    tensors = disk.values() if isinstance(disk, dict) else [None]
    kinds = {(t.is_cpu, t.is_nested, t.layout) if isinstance(t, Tensor) else () for t in tensors}
    plain = kinds <= {(True, False, torch.strided)} and set(map(type, disk)) <= {str}
    check(plain, f"{path} holds no tensors by name")
    return disk


def write_atomically(path: Path, write) -> None:
    """write(temporary path), then rename: a kill at any moment leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_safetensors(path: Path, state: dict[str, Tensor], metadata=None) -> None:
    content = save(state, metadata=metadata or {"format": "pt"})
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(content))
