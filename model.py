"""A Llama-style GPT, as small as it goes: RMSNorm, rotary positions, grouped-query attention, SwiGLU, a KV cache.

It knows nothing of speculative decoding. What a tree of guesses needs is only that `positions` and `mask` are arguments of
`forward`, and that the cache can keep chosen rows of what was written last ("Tree attention" in the Medusa paper needs no more).
The model ends with `GPT`; behind it stand fast products for a CPU, the layout on disk, checks and files.

Dimension key
    B  batch               T   tokens fed now        S   tokens in the cache
    D  model width         V   vocabulary            L   layers
    nh attention heads     nkv key/value heads       hs  size of one attention head
"""

import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

torch.backends.cuda.enable_cudnn_sdp(
    False
)  # cuDNN's attention plans anew for every length that the text has, and takes tens of milliseconds


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a Llama config.json that shape the computation, under the names they have there."""

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
    head_dim: int | None = None  # hidden_size / num_attention_heads unless given
    rope_scaling: dict | None = None
    model_type: str = "llama"  # or qwen2: queries, keys and values have biases

    def __post_init__(self):
        check_config(self)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return (
            tuple(self.eos_token_id)
            if isinstance(self.eos_token_id, list)
            else ()
            if self.eos_token_id is None
            else (self.eos_token_id,)
        )


# rope_scaling["rope_type"]: the numbers that it needs
ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class KVCache:
    """Keys and values of the tokens seen so far, in one tensor allocated once: (L, 2, B, nkv, capacity, hs).

    Rows [0, length) are valid. `GPT.forward` writes its T rows behind them and moves `length`.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype=torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (
            config.num_hidden_layers,
            2,
            batch,
            config.num_key_value_heads,
            capacity,
            config.head_size,
        )
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [
            tuple(layer) for layer in self.data
        ]  # per layer (keys, values), each a view (B, nkv, capacity, hs)
        self.capacity, self.length = capacity, 0

    def keep(self, start: int, rows: list[int]) -> None:
        """Of the rows written from `start` on, keep `rows` (ascending, relative to `start`) and forget the others."""
        if rows != list(range(len(rows))):  # else they lie in place already
            index = torch.tensor(rows, device=self.data.device) + start
            self.data[..., start : start + len(rows), :] = self.data.index_select(4, index)
        self.length = start + len(rows)

    def keep_batch(self, rows: Tensor) -> None:
        """Keep these batch entries alone, in this order; rows (kept,) long. What stands in its place already is not copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        self.data[:, :, moved] = self.data[:, :, rows[moved]]
        self.data = self.data[:, :, : len(rows)]  # (L, 2, kept, nkv, capacity, hs)
        self.layers = [tuple(layer) for layer in self.data]


def inv_freq(config: ModelConfig) -> Tensor:
    """theta^(-2i/hs), the angle by which a position turns pair i: (hs/2,) in float64.

    Rope scaling slows pairs down, to 1/factor. "linear": all of them. "llama3": those that turn fewer than low_freq_factor times
    within the original context; those that turn more than high_freq_factor times keep their speed, and in between it blends.
    """
    half = config.head_size // 2
    speed = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)  # (hs/2,)
    if (scaling := config.rope_scaling) is None:
        return speed
    kept = torch.zeros(())
    if scaling["rope_type"] == "llama3":
        turns = speed * scaling["original_max_position_embeddings"] / (2 * math.pi)  # (hs/2,)
        kept = (turns - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
    kept = kept.clamp(0, 1)
    return speed * (kept + (1 - kept) / scaling["factor"])


def rotary_table(config: ModelConfig) -> Tensor:
    """cos and signed sin of every position's angles: (max_position_embeddings, 2, 1, hs).

    Dimension i of a head turns together with dimension i + hs/2, by position * its speed. The sign that the first half
    needs stands in the table, so that rotating is x * cos + roll(x, hs/2) * sin.  (RoFormer, in the layout of Llama)
    """
    angle = torch.outer(
        torch.arange(config.max_position_embeddings, dtype=torch.float64), inv_freq(config)
    )  # (positions, hs/2)
    cos = torch.cat((angle.cos(), angle.cos()), dim=-1)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)
    return (
        torch.stack((cos, sin), dim=1).unsqueeze(2).to(torch.get_default_dtype())
    )  # (positions, 2, 1, hs)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(hs)) v, with q, k, v from one fused matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.nh, self.nkv, self.hs = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_size,
        )
        self.qkv_proj = Linear(
            config.hidden_size,
            (self.nh + 2 * self.nkv) * self.hs,
            bias=config.model_type == "qwen2",
        )
        self.o_proj = Linear(self.nh * self.hs, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        start: int | Tensor,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); cos and sin ([B,] T, 1, hs); cache: this layer's keys and values, of which `start` rows are valid."""
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, self.nh + 2 * self.nkv, self.hs)  # (B, T, nh + 2 nkv, hs)
        qk, v = qkv.split(
            (self.nh + self.nkv, self.nkv), dim=2
        )  # (B, T, nh + nkv, hs), (B, T, nkv, hs)
        qk = torch.addcmul(
            qk * cos, qk.roll(self.hs // 2, dims=-1), sin
        )  # queries and keys turned at once
        q, k = qk.transpose(1, 2).split(
            (self.nh, self.nkv), dim=1
        )  # (B, nh, T, hs), (B, nkv, T, hs)
        v = v.transpose(1, 2)  # (B, nkv, T, hs)
        if cache is not None:
            keys, values = cache
            if isinstance(
                start, Tensor
            ):  # compiled (data/compiled.py): the T rows to write; the mask hides those not written yet
                k, v = (
                    keys.index_copy_(2, start, k),
                    values.index_copy_(2, start, v),
                )  # (B, nkv, capacity, hs)
            else:
                keys[:, :, start : start + T] = k
                values[:, :, start : start + T] = v
                k, v = keys[:, :, : start + T], values[:, :, : start + T]  # (B, nkv, S + T, hs)
        group = self.nh // self.nkv
        if (
            T == 1
            and mask is None
            or group > 1
            and q.is_cuda
            and mask is not None
            and mask.dim() == 2
        ):
            # a group's queries as rows of one product: its keys and values are read once, and CUDA has a kernel for it
            rows = (
                mask if mask is None else mask.expand(T, -1).repeat(group, 1)
            )  # (group * T, S + T)
            y = F.scaled_dot_product_attention(
                q.reshape(B, self.nkv, -1, self.hs), k, v, rows
            ).reshape(q.shape)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, enable_gqa=group > 1
            )  # (B, nh, T, hs)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(SiLU(gate(x)) * up(x)), gate and up from one fused matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # each (B, T, intermediate_size)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        start: int | Tensor,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """tokens (B, T) -> hidden states after the final norm (B, T, D); `lm_head` makes logits (..., V) of them."""

    rotary: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self.apply(self._init_weights)
        for block in blocks:  # the residual stream sums 2L branches: each starts smaller by sqrt(2L), so that the sum does not grow with L (GPT-2)
            for branch in (block.self_attn.o_proj, block.mlp.down_proj):
                nn.init.normal_(branch.weight, std=0.02 / (2 * config.num_hidden_layers) ** 0.5)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        weight = self.embed_tokens.weight
        return KVCache(self.config, batch, capacity, weight.dtype, weight.device)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """tokens (B, T) long -> hidden (B, T, D).

        positions  (T,) or (B, T) long; default S, S+1, ... behind what the cache holds.
        mask       (T, S+T), or anything that broadcasts to (B, nh, T, S+T): boolean, True where a token may look, or a float that is
                   added to the scores. Default: causal.
        cache      read, written and advanced by T.
        Raises ValueError if the cache, or, without `positions`, the context, has no room for T more.
        """
        T = tokens.shape[1]
        start = cache.length if cache is not None else 0
        if cache is not None and start + T > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} tokens; {start} + {T} do not fit")
        if positions is None and start + T > len(self.rotary):
            raise ValueError(f"the context is {len(self.rotary)} tokens; {start} + {T} do not fit")
        cos_sin = (
            self.rotary[start : start + T] if positions is None else self.rotary[positions]
        )  # ([B,] T, 2, 1, hs)
        if mask is None and start > 0 and T > 1:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(
                start
            )  # (T, S+T)
        hidden = self.trunk(tokens, cos_sin, mask, cache and cache.layers, start)
        if cache is not None:
            cache.length = start + T
        return hidden

    def trunk(
        self,
        tokens: Tensor,
        cos_sin: Tensor,
        mask: Tensor | None,
        layers: list | None,
        start: int | Tensor,
    ) -> Tensor:
        """The part of `forward` that can be compiled. cos_sin ([B,] T, 2, 1, hs): the positions' rows of `rotary`; layers: those of the cache; start:
        its length, or, compiled, the rows to write (T,)."""
        cos, sin = cos_sin.unbind(-3)  # each ([B,] T, 1, hs)
        x = self.embed_tokens(tokens)  # (B, T, D)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, mask, layers and layers[i], start)
        return self.norm(x)

    def pack(self) -> "GPT":
        """For decoding on a CPU: a second copy of each large matrix, with which a tree's rows are up to twice as fast. The weights must not change afterwards."""
        for module in self.modules():
            if isinstance(module, Linear) and packable(module.weight):
                module.packed = torch.ops.mkldnn._reorder_linear_weight(
                    module.weight.detach(), 8
                )  # made for 8 rows, it serves any number
        return self

    def save_pretrained(self, directory, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors in the Hugging Face layout, each atomically."""
        directory = Path(directory)
        state = {
            name: t.detach().to(dtype or t.dtype).cpu().contiguous()
            for name, t in to_llama(self.state_dict(), self.config).items()
        }
        dtype_name = str(next(iter(state.values())).dtype).removeprefix("torch.")
        about = {
            "architectures": [ARCHITECTURES[self.config.model_type]],
            "head_dim": self.config.head_size,
            "dtype": dtype_name,
        }
        write_json(directory / "config.json", CONSTANTS | asdict(self.config) | about)
        write_safetensors(directory / "model.safetensors", state)

    @classmethod
    def from_pretrained(
        cls, directory, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "GPT":
        """Open a Hugging Face directory of the Llama family. Raises ValueError, naming file and field, for what this model cannot honour."""
        directory = Path(directory)
        config = read_config(directory / "config.json")
        state = from_llama(read_weights(directory), config, directory)
        with torch.device("meta"):  # no memory, and no weights drawn that are to be replaced
            model = cls(config)
        for name in state:
            state[name] = state[name].to(device, dtype, copy=True)
        model.load_state_dict(state, assign=True)
        model.rotary = rotary_table(config).to(device, dtype)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model.eval()


# ---- products on a CPU; on a first reading, Linear is nn.Linear ----

FEW = 16  # rows of x; with no more, (W x^T)^T is faster
LARGE = 1 << 18  # a matrix of so many numbers is worth a packed copy


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. A few rows go as (W x^T)^T on a CPU: the same product, but its weights are read in the order in which they lie."""
    rows = x.shape[:-1].numel()
    if rows > FEW or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    columns = (
        x.reshape(rows, -1) if rows > 1 else torch.cat((x.flatten(), x.flatten())).view(2, -1)
    )  # (rows, in); two columns are faster than one
    y = (
        (weight @ columns.mT).mT[:rows].contiguous().view(*x.shape[:-1], -1)
    )  # (..., out); attention is slow on what lies in columns
    return y if bias is None else y + bias


def packable(weight: Tensor) -> bool:
    """Is it large, and has oneDNN an order of its own for it on this machine?"""
    if (
        weight.numel() < LARGE
        or weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class Linear(nn.Linear):
    packed: Tensor | None = None  # the weights once more, in oneDNN's own order: see GPT.pack

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None or x.shape[:-1].numel() <= 2 or torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


# ---- the Llama layout on disk: the one place that knows that q, k, v and gate, up stand apart there ----

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
CONSTANTS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}


def _parts(config: ModelConfig):
    """Per layer and fused matrix: (fused name, names on disk, rows of each)."""
    q, kv = (
        heads * config.head_size
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    rows = {"self_attn.qkv_proj": (q, kv, kv), "mlp.gate_up_proj": (config.intermediate_size,) * 2}
    kinds = [(fused, "weight") for fused in FUSED] + [("self_attn.qkv_proj", "bias")] * (
        config.model_type == "qwen2"
    )
    for i in range(config.num_hidden_layers):
        for fused, kind in kinds:
            prefix = f"layers.{i}.{fused.split('.')[0]}."
            yield (
                f"layers.{i}.{fused}.{kind}",
                [f"model.{prefix}{part}.{kind}" for part in FUSED[fused]],
                rows[fused],
            )


def to_llama(state: dict, config: ModelConfig) -> dict:
    """Names and tensors in memory -> on disk."""
    state = dict(state)
    disk = {}
    for fused, names, rows in _parts(config):
        disk |= dict(zip(names, state.pop(fused).split(rows)))
    head = state.pop("lm_head.weight")
    if not config.tie_word_embeddings:
        disk["lm_head.weight"] = head
    return disk | {f"model.{name}": t for name, t in state.items()}


def from_llama(disk: dict, config: ModelConfig, where) -> dict:
    """Names and tensors on disk -> in memory; a missing, surplus or misshapen tensor is a ValueError with its name."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in to_llama(GPT(config).state_dict(), config).items()}
    # some files hold rotary tables, or a tied LM head once more
    disk = {
        name: t
        for name, t in disk.items()
        if name in shapes or not (name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight")
    }
    if odd := sorted(shapes.keys() ^ disk.keys()):
        raise ValueError(
            f"{where}: tensor {odd[0]} is {'missing' if odd[0] in shapes else 'not part of this model'}"
        )
    for name, shape in shapes.items():
        if disk[name].shape != shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {tuple(disk[name].shape)}, config.json asks for {tuple(shape)}"
            )
    state = {
        fused: torch.cat([disk.pop(name) for name in names]) for fused, names, _ in _parts(config)
    }
    state |= {name.removeprefix("model."): t for name, t in disk.items()}
    state.setdefault("lm_head.weight", state["embed_tokens.weight"])
    return state


def read_weights(directory: Path) -> dict[str, Tensor]:
    """model.safetensors, or else the shards that model.safetensors.index.json names."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists() or not index.exists():
        return read_safetensors(directory / "model.safetensors")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
    ):
        raise ValueError(f"{index}: weight_map must name a file of this directory for each tensor")
    return {
        name: t
        for shard in sorted(set(shards.values()))
        for name, t in read_safetensors(directory / shard).items()
    }


SUPPORTED = {  # field: all that it may say
    "model_type": ("llama", "mistral", "qwen2"), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "partial_rotary_factor": (1, None), "quantization_config": (None,),
}  # fmt: skip


def read_config(path: Path) -> ModelConfig:
    """config.json -> ModelConfig. A setting that changes the computation in a way not built here is refused by name."""
    raw = read_json(path)
    defaults: dict[str, Any] = {
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "head_dim": None,
        "model_type": "llama",
    }
    raw = defaults | {"num_key_value_heads": raw.get("num_attention_heads")} | raw
    raw |= read_rope(raw, path)
    for name, allowed in SUPPORTED.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path}: {name} = {raw[name]!r} is not supported here, only {allowed[0]!r}"
            )
    qwen = raw["model_type"] == "qwen2"
    raw = (
        {"bos_token_id": None, "eos_token_id": None} if qwen else {}
    ) | raw  # which Qwen2 files may leave out
    config: ModelConfig = config_of(
        ModelConfig, raw | {"model_type": "qwen2" if qwen else "llama"}, path
    )
    if (
        config.head_dim == config.hidden_size / config.num_attention_heads
    ):  # the default, spelled out
        config = replace(config, head_dim=None)
    # Qwen2 uses the window that it names only where use_sliding_window says so
    window = raw.get("sliding_window") if raw.get("use_sliding_window", not qwen) else None
    if window is None:
        return config
    if type(window) is not int or window < 1:
        raise ValueError(
            f"{path}: sliding_window = {window!r}: must be a whole number above 0, or null"
        )
    return replace(
        config, max_position_embeddings=min(window, config.max_position_embeddings)
    )  # a context in which the window hides nothing


def config_of(kind, raw: dict, path: Path):
    """kind(...) of its fields in raw. Raises ValueError, naming file and field, for one that is missing or refused."""
    if missing := [f.name for f in fields(kind) if f.name not in raw]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    try:
        return kind(**{f.name: raw[f.name] for f in fields(kind)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_rope(raw: dict, path: Path) -> dict:
    """What a config says of rotary positions; newer transformers write all of it into rope_parameters."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: {name} = {rope!r}: must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *ROPE_SCALING):
        raise ValueError(
            f"{path}: {name}.rope_type = {kind!r} is not supported here, only default, {', '.join(ROPE_SCALING)}"
        )
    scaling = (
        None
        if kind == "default"
        else {"rope_type": kind} | {field: rope.get(field) for field in ROPE_SCALING[kind]}
    )
    return {"rope_scaling": scaling} | {
        field: rope[field] for field in ("rope_theta", "partial_rotary_factor") if field in rope
    }


# ---- checks ----


def check_config(config: ModelConfig) -> None:
    """Raises ValueError, naming the field, for values that no model can have."""
    check_sizes(
        config,
        [
            f.name
            for f in fields(config)
            if f.type is int or f.name == "head_dim" and config.head_dim is not None
        ],
    )
    scaling: dict = config.rope_scaling or {}
    numbers: dict[str, Any] = {
        name: getattr(config, name) for name in ("rms_norm_eps", "rope_theta")
    }
    numbers |= {
        name: scaling.get(name) for name in ROPE_SCALING.get(scaling.get("rope_type", ""), ())
    }
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} = {value!r}: must be a number above 0")
    if (
        scaling.get("rope_type") == "llama3"
        and scaling["low_freq_factor"] >= scaling["high_freq_factor"]
    ):
        raise ValueError(
            f"high_freq_factor = {scaling['high_freq_factor']}: must be above low_freq_factor = {scaling['low_freq_factor']}"
        )
    if type(config.bos_token_id) is not int and config.bos_token_id is not None:
        raise ValueError(f"bos_token_id = {config.bos_token_id!r}: must be one token id, or null")
    if not all(type(token) is int for token in config.eos_ids):
        raise ValueError(
            f"eos_token_id = {config.eos_token_id!r}: must be a token id, a list of them, or null"
        )
    if (
        config.head_size % 2
        or config.head_dim is None
        and config.hidden_size % config.num_attention_heads
    ):
        raise ValueError(
            f"hidden_size {config.hidden_size} does not split into {config.num_attention_heads} heads of even size: head_dim = {config.head_dim}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is no multiple of num_key_value_heads {config.num_key_value_heads}"
        )


def check_sizes(config, names: list[str]) -> None:
    """Raises ValueError, naming the field, unless each is a whole number from 1 to 2^31 - 1."""
    for name in names:
        if type(value := getattr(config, name)) is not int or not 1 <= value < 1 << 31:
            raise ValueError(f"{name} = {value!r}: must be a whole number above 0, and below 2^31")


# ---- files: read with a clear error, written atomically ----


def read_json(path: Path, kind: type = dict):
    """The content of a JSON file; raises ValueError, naming the file, unless it is of this kind, dict or list."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds no JSON {'object' if kind is dict else 'list'}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A torch.save file that holds tensors by name and nothing else: code in it is refused, not run."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles in an unusual dialect
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception:  # unpickling fails in many ways, and what torch says advises to run the code
        raise ValueError(
            f"{path} cannot be read as tensors: it is damaged, or holds something else"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} holds no tensors by name")
    return content


def write_atomically(path: Path, write) -> None:
    """write(temporary path), then rename: a reader, or a kill at any moment, sees the old file or the new one, never half. Makes the directory, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    write_atomically(
        Path(path),
        lambda temporary: temporary.write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        ),
    )


def write_safetensors(
    path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    write_atomically(
        Path(path),
        lambda temporary: temporary.write_bytes(save(state, metadata=metadata or {"format": "pt"})),
    )
