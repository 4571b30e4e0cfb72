"""Training: a base model, text that it writes itself, and Medusa heads for it.

    python train.py --mode base      a small Llama from nothing: tokenizer, then next-token cross-entropy
    python train.py --mode distill   continuations of seed prompts, sampled from the base model  (paper, "Self-distillation")
    python train.py --mode medusa1   heads on the frozen base  (paper, "Medusa-1"), then the tree is calibrated

Without other flags medusa1 trains heads for the shipped base in data/base, on text distilled from it. Every mode has its own
flags: `python train.py --mode MODE --help`. Dimension key: B rows, T tokens, D model width, V vocabulary, K heads.
"""
import argparse
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from data.corpus import cache_directory, documents, pack
from data.tokenizer import Tokenizer, train_tokenizer
from medusa import DECAY, MedusaConfig, MedusaHeads, Sampling, base_distribution, draw, exponential, favour, medusa_loss
from model import GPT, ModelConfig, check_sizes, read_safetensors, write_json, write_safetensors
from tree import calibrated_tree, expected_tokens, prefix_counts, ranked_prefixes, replay


SHIPPED_BASE, SHIPPED_ROWS = "data/base", Path("data/distilled")


def option(default, help: str, **more):
    """A field of a config dataclass that becomes a flag of the command line."""
    metadata = {"help": help} | more
    return field(default_factory=lambda: list(default), metadata=metadata) if isinstance(default, list) else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Common:
    text: list[str] = option([], "UTF-8 files to use in place of the Python standard library")
    seed: int = option(0, "seed of all that is random")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option("auto", "of matmuls: float32, or bfloat16 mixed in; auto is bfloat16 on cuda", choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class Fit(Common):
    steps: int = option(2400, "optimiser steps")
    batch: int = option(2, "rows in a batch")
    context: int = option(256, "tokens in a row")
    lr: float = option(7e-3, "learning rate: raised linearly in the warm-up, and lowered to 0 along a cosine")
    warmup: int = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.0, "AdamW weight decay, of matrices only")
    clip: float = option(1.0, "largest norm of the gradient")

    def __post_init__(self):
        check_sizes(self, ["steps", "batch", "context", "warmup"])
        if not self.lr > 0 or not self.clip > 0:
            raise ValueError("--lr and --clip must be above 0")


@dataclass(frozen=True)
class BaseConfig(Fit):
    """A Llama from nothing. Its validation text is never trained on, and the tokenizer learns from the training side alone."""

    out: str = option("out/base", "directory to write")
    look_ahead: float = option(1.0, "weight, at the end, of the loss of Medusa heads trained along and then dropped: hidden states learn to look ahead")
    vocab_size: int = option(ModelConfig.vocab_size, "pieces of the tokenizer")
    hidden_size: int = option(ModelConfig.hidden_size, "model width")
    intermediate_size: int = option(ModelConfig.intermediate_size, "width inside the MLP")
    num_hidden_layers: int = option(ModelConfig.num_hidden_layers, "blocks")
    num_attention_heads: int = option(ModelConfig.num_attention_heads, "attention heads")
    num_key_value_heads: int = option(ModelConfig.num_key_value_heads, "key/value heads")
    steps: int = option(3600, "optimiser steps")
    batch: int = option(2, "rows in a batch")
    context: int = option(1024, "tokens in a row, and the longest context of the model")
    lr: float = option(2e-3, "learning rate: raised linearly in the warm-up, and lowered to 0 along a cosine")
    warmup: int = option(150, "steps of linear warm-up")
    weight_decay: float = option(0.1, "AdamW weight decay, of matrices only")

    def __post_init__(self):
        super().__post_init__()
        if not self.look_ahead >= 0:
            raise ValueError(f"--look-ahead {self.look_ahead}: must be 0 or more")


@dataclass(frozen=True)
class DistillConfig(Common):
    """Text of the base's own: windows of the corpus as prompts, continued by sampling. Only the continuation carries loss."""

    base: str = option(SHIPPED_BASE, "directory of the base model")
    out: str = option("", "directory to write; default: in the cache, under a name that depends on all settings")
    shards: int = option(12, "files to write; one that exists is kept, so that a stopped run goes on where it was")
    rows: int = option(256, "rows in a shard, sampled together")
    prompt_tokens: int = option(32, "tokens of a prompt")
    new_tokens: int = option(224, "tokens sampled behind each prompt, at most: a row ends with its document")
    temperature: float = option(0.7, "sampling temperature")
    top_p: float = option(1.0, "nucleus")

    def __post_init__(self):
        check_sizes(self, ["shards", "rows", "prompt_tokens", "new_tokens"])
        Sampling(self.temperature, top_p=self.top_p)  # refuses bad values before anything is sampled


@dataclass(frozen=True)
class Medusa1Config(Fit):
    """L = sum_k decay^k CE(head_probs_k at t, token t+k+1) on the frozen base."""

    base: str = option(SHIPPED_BASE, "directory of the base model")
    out: str = option("out/heads", "directory to write")
    data: str = option("distilled", "text to train on: distilled from the base, or the corpus itself", choices=("distilled", "corpus"))
    distilled: str = option("", "a directory that --mode distill wrote; default: the shipped one for the shipped base, else one made now and cached")
    num_heads: int = option(MedusaConfig.num_heads, "K, heads to train")
    num_hidden_layers: int = option(MedusaConfig.num_hidden_layers, "residual layers of a head")
    original_lm_head: bool = option(MedusaConfig.original_lm_head, "share the base's LM head; --no-original-lm-head gives each head its own")
    decay: float = option(DECAY, "weight of head k's loss is decay^k")

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, ["num_heads", "num_hidden_layers"])
        if self.data == "distilled" and self.context != Fit.context:
            raise ValueError("--context belongs to --data corpus: distilled rows are as long as they were written")
        if self.data == "distilled" and self.distilled and self.text:
            raise ValueError("--text and --distilled contradict each other: leave one of them out")


MODES: dict[str, type[Common]] = {"base": BaseConfig, "distill": DistillConfig, "medusa1": Medusa1Config}


# ---- the command line, generated from the dataclasses ----


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    for f in fields(config):
        default = f.default if f.default is not MISSING else f.default_factory()
        flag, more = "--" + f.name.replace("_", "-"), {key: value for key, value in f.metadata.items() if key != "help"}
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            more["nargs"] = "+"
        else:
            more["type"] = type(default)
        text = f.metadata["help"] + ("" if default in ("", []) else f" (default: {default})")
        parser.add_argument(flag, default=default, help=text.replace("%", "%%"), **more)


def run(main: Callable[[], None]) -> None:
    """Call main; what the user can mend ends in one line and exit code 2."""
    try:
        main()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.Generator(torch.zeros(1, device=name).device).device  # some devices hold tensors but draw nothing
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matmuls in training."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def check_out(directory: str) -> None:
    """Raises ValueError if the directory cannot be written: before the work, not after it."""
    nearest = next(path for path in (Path(directory).absolute(), *Path(directory).absolute().parents) if path.exists())
    if not directory or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {directory or 'is empty'}: name a directory that can be written")


def load_base(directory, dtype: torch.dtype = torch.float32, device="cpu") -> tuple[Tokenizer, GPT]:
    """A base directory's tokenizer and model; raises ValueError if they do not belong together."""
    tokenizer, model = Tokenizer.load(directory), GPT.from_pretrained(directory, dtype, device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{directory}: tokenizer.model has {tokenizer.vocab_size} pieces, the model {model.config.vocab_size}: not of one base")
    return tokenizer, model


# ---- optimisation, the same in every mode ----


def learning_rate(step: int, config: Fit) -> float:
    """Linear warm-up, times a cosine from 1 at the first step to 0 behind the last."""
    return config.lr * min(1, (step + 1) / config.warmup) * (1 + math.cos(math.pi * step / config.steps)) / 2


def sine_ramp(step: int, steps: int) -> float:
    """From 0 at the first step along a sine to nearly 1 at the last: the weight of the heads' loss beside the base's  (paper, "Medusa-2")"""
    return math.sin(math.pi / 2 * step / steps)


def fit(module: nn.Module, loss_of_step: Callable[[int], tuple[Tensor, dict]], config: Fit, device: torch.device, dtype: torch.dtype) -> None:
    """AdamW on the module's parameters. loss_of_step(step) -> the loss, and figures for the progress bar."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1 and p.shape[-2] > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1 or p.shape[-2] == 1], "weight_decay": 0.0},  # gains and biases
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))
    module.train()
    bar = tqdm(range(config.steps), desc="training", unit="step", mininterval=1)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, figures = loss_of_step(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        if not math.isfinite(loss.item() + norm.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}, its gradient's norm {norm.item()}: try a lower --lr or --precision float32")
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", **figures)
    module.eval()


def windows(tokens: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """n windows (n, length) at random places of a packed text (tokens,)."""
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than a row of {length}: give more text or a smaller --context")
    starts = torch.randint(len(tokens) - length + 1, (n, 1), generator=generator)  # (n, 1)
    return tokens[starts + torch.arange(length)].long()  # (n, length)


def packed(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    return torch.from_numpy(pack(texts, tokenizer).astype("int32"))


@torch.inference_mode()
def bits_per_byte(model: GPT, tokens: Tensor, n_bytes: int) -> float:
    """Compression of a packed text (tokens,): bits per byte of its UTF-8. Every token is scored once, with at least half a context before it."""
    device, context = model.lm_head.weight.device, model.config.max_position_embeddings
    nats, hop = 0.0, max(context // 2, 1)
    for start in range(0, len(tokens) - 1, hop):
        window = tokens[start : start + context + 1].long().to(device)
        fresh = 0 if start == 0 else context - hop  # what the window before has scored
        if len(window) - 1 <= fresh:
            break
        logits = model.lm_head(model(window[None, :-1])[0, fresh:])
        nats += F.cross_entropy(logits, window[1 + fresh :], reduction="sum").item()
    return nats / math.log(2) / n_bytes


# ---- base ----


def train_base(config: BaseConfig) -> None:
    check_out(config.out)
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    shape = {f.name: getattr(config, f.name) for f in fields(ModelConfig) if hasattr(config, f.name)}
    model_config = ModelConfig(**shape, max_position_embeddings=config.context)
    texts, held_out = documents(False, config.text), documents(True, config.text)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokens, held_out_tokens = packed(texts, tokenizer), packed(held_out, tokenizer)
    torch.manual_seed(config.seed)
    model = GPT(model_config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens of text, {dtype} on {device}")
    heads = MedusaHeads(MedusaConfig(config.hidden_size, config.vocab_size)).to(device)
    generator = torch.Generator().manual_seed(config.seed)

    def loss_of_step(step: int) -> tuple[Tensor, dict]:
        rows = windows(tokens, config.batch, config.context + 1, generator).to(device)  # (B, T+1)
        hidden = model(rows[:, :-1])  # (B, T, D)
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), rows[:, 1:].flatten())
        if config.look_ahead == 0:
            return loss, {}
        ahead, per_head = medusa_loss(heads(hidden, model.lm_head), rows)
        return loss + config.look_ahead * sine_ramp(step, config.steps) * ahead, {"next": f"{loss.item():.2f}", "heads": " ".join(f"{value:.2f}" for value in per_head.tolist())}

    fit(nn.ModuleList((model, heads)) if config.look_ahead else model, loss_of_step, config, device, dtype)
    tokenizer.save(config.out)
    model.save_pretrained(config.out, torch.float16)
    bits = bits_per_byte(GPT.from_pretrained(config.out, device=device), held_out_tokens, sum(len(text.encode()) for text in held_out))
    print(f"{config.out}: {bits:.3f} bits per byte on held-out text, in {directory_size(config.out):,} bytes")
    print(f"next: python train.py --mode medusa1 --base {config.out}")


def directory_size(directory) -> int:
    return sum(path.stat().st_size for path in Path(directory).iterdir())


# ---- distill ----


@torch.inference_mode()
def sample_rows(model: GPT, prompts: Tensor, n_new: int, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Continue all prompts (R, P) by up to n_new tokens: tokens (R, P + n_new), and True where a sampled token stands.

    A row ends after EOS and leaves the batch; what stands behind its end is no text and carries no loss.
    """
    R, P = prompts.shape
    tokens = torch.cat((prompts, torch.zeros(R, n_new, dtype=torch.long, device=prompts.device)), dim=1)  # (R, P + n_new)
    carries = torch.zeros_like(tokens, dtype=torch.bool)
    cache = model.new_cache(P + n_new, batch=R)
    rows, new = torch.arange(R, device=prompts.device), prompts  # the rows still alive, and their tokens to feed
    for position in range(P, P + n_new):
        base_probs = base_distribution(model.lm_head(model(new, cache=cache)[:, -1]), sampling)  # (alive, V)
        new = draw(base_probs, exponential(base_probs, generator))[:, None]  # (alive, 1)
        tokens[rows, position], carries[rows, position] = new[:, 0], True
        alive = new[:, 0] != (-1 if model.config.eos_token_id is None else model.config.eos_token_id)
        if not alive.all():
            rows, new = rows[alive], new[alive]
            cache.keep_batch(alive.nonzero()[:, 0])
        if len(rows) == 0:
            break
    return tokens, carries


def distill(config: DistillConfig) -> Path:
    """Write config.shards shards of training rows and one of validation rows; returns their directory."""
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    tokenizer, model = load_base(config.base, dtype, device)
    if config.prompt_tokens + config.new_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"--prompt-tokens {config.prompt_tokens} + --new-tokens {config.new_tokens} are more than the context of {config.base}, "
            f"{model.config.max_position_embeddings}: use --mode distill with smaller ones, then --mode medusa1 with --distilled"
        )
    texts = {name: documents(name == "validation", config.text) for name in ("validation", "train")}
    sides = {name: packed(side, tokenizer) for name, side in texts.items()}
    directory = Path(config.out) if config.out else cache_directory() / f"distilled-{distill_digest(config, *sides.values())}"
    shards = [("validation", 0, t) for t in CALIBRATION_TEMPERATURES] + [("train", i, config.temperature) for i in range(config.shards)]
    base = base_digest(config.base)
    for number, (side, i, temperature) in enumerate(tqdm(shards, desc="distilling", unit="shard")):
        path = directory / (f"train-{i:05d}.safetensors" if side == "train" else f"validation-{temperature}.safetensors")
        if path.exists() and base_of(path) != base:
            raise ValueError(f"{path} was not written by the base in {config.base}: remove {directory}, or give another --out")
        if not path.exists():
            generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + number)
            prompts = windows(sides[side], config.rows, config.prompt_tokens, torch.Generator().manual_seed(config.seed * 1_000_003 + i))
            sampling = Sampling(temperature, top_p=config.top_p)
            tokens, carries = sample_rows(model, prompts.to(device), config.new_tokens, sampling, generator)
            directory.mkdir(parents=True, exist_ok=True)
            narrow = torch.int16 if model.config.vocab_size <= 1 << 15 else torch.int32
            write_safetensors(path, {"tokens": tokens.to(narrow).cpu(), "loss": carries.cpu()}, {"base": base})
    return directory


CALIBRATION_TEMPERATURES = (0.0, 0.7, 1.0)


def base_digest(directory) -> str:
    """Names a base by its configuration and weights."""
    return hashlib.sha256(b"".join((Path(directory) / name).read_bytes() for name in ("config.json", "model.safetensors"))).hexdigest()[:16]


def base_of(shard: Path) -> str | None:
    """The base_digest of the base that wrote these rows; None for a file that does not say."""
    try:
        with safe_open(shard, "pt") as file:
            return (file.metadata() or {}).get("base")
    except (OSError, SafetensorError):
        return None


def distill_digest(config: DistillConfig, *prompts: Tensor) -> str:
    """Names a set of shards by all that shapes it."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("base", "out", "shards", "text", "device", "precision")}
    digest = hashlib.sha256((repr(settings) + base_digest(config.base)).encode())
    for tokens in prompts:
        digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()[:16]


def read_shards(directory: Path, pattern: str, vocab_size: int) -> tuple[Tensor, Tensor]:
    """tokens (R, T) long and loss (R, T) bool of all shards whose name matches."""
    shards = [read_safetensors(path) for path in sorted(directory.glob(pattern))]
    if not shards:
        raise ValueError(f"{directory}: no {pattern} there; make it with python train.py --mode distill --out {directory}")
    for shard in shards:
        tokens, loss = shard.get("tokens", torch.empty(0)), shard.get("loss", torch.empty(0))
        fits = len(shard) == 2 and tokens.dim() == 2 and tokens.numel() and not tokens.is_floating_point() and 0 <= tokens.min() and tokens.max() < vocab_size
        if not fits or loss.dtype != torch.bool or loss.shape != tokens.shape or tokens.shape[1] != shards[0]["tokens"].shape[1]:
            raise ValueError(f"{directory}: {pattern} holds no rows of this base; make them with python train.py --mode distill")
    return torch.cat([shard["tokens"] for shard in shards]).long(), torch.cat([shard["loss"] for shard in shards])


# ---- medusa1 ----


def scored(carries: Tensor, K: int) -> Tensor:
    """(B, T) bool -> (B, T-K-1) bool: positions t of which all tokens that are guessed, t+1 .. t+K+1, carry loss."""
    return carries[:, 1:].unfold(1, K + 1, 1).all(-1)


def noise_of_draws(base_probs: Tensor, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise with which `draw` gives these tokens (n,), as likely as it is given that: (n, V).

    The first of a race arrives after a time of rate 1; whoever is still on the way then has as long to go as at the start.
    """
    first = exponential(base_probs[:, :1], generator)  # (n, 1)
    return base_probs * first + exponential(base_probs, generator).scatter(1, tokens[:, None], 0)


@torch.inference_mode()
def head_ranks(model: GPT, heads: MedusaHeads, tokens: Tensor, carries: Tensor, sampling: Sampling = Sampling()) -> list[Tensor]:
    """The rank (0 is the first guess) that each head gave to the token that came: for each row (n, K), at its positions that are `scored`.

    Of rows that were sampled the noise is gone: another is made with which these tokens would have been drawn.
    """
    K, n = heads.config.num_heads, tokens.shape[1] - heads.config.num_heads - 1
    ranks, generator = [], torch.Generator(tokens.device).manual_seed(0)
    for row, mask in zip(tokens, carries):
        hidden = model(row[None, :-1])[0]  # (T-1, D)
        if sampling.temperature > 0:
            noise = noise_of_draws(base_distribution(model.lm_head(hidden), sampling), row[1:], generator)  # (T-1, V), of tokens 1, 2, ...
        found = []
        for k, logits in enumerate(heads(hidden[:n], model.lm_head), start=1):  # (n, V); at t they guess token t+k+1
            scores = favour(logits, sampling, noise[k : k + n] if sampling.temperature > 0 else None)
            found.append((scores > scores.gather(1, row[k + 1 : k + 1 + n, None])).sum(-1))
        ranks.append(torch.stack(found, dim=1)[scored(mask[None], K)[0]].cpu())  # (n, K)
    return ranks


def calibrate(model: GPT, heads: MedusaHeads, rows_of: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """The content of calibration.json: for each temperature each head's accuracy at all positions, and the counts of rank prefixes at those
    where steps start, as a `replay` with a tree of CALIBRATION_NODES finds them.
    """
    report = {}
    for temperature, (tokens, carries) in rows_of.items():
        device = model.lm_head.weight.device
        texts = head_ranks(model, heads, tokens.to(device), carries.to(device), Sampling(float(temperature)))
        ranks, texts = torch.cat(texts), [text.tolist() for text in texts]
        starts = replay(texts, calibrated_tree(ranks.tolist(), CALIBRATION_NODES))
        counts = prefix_counts(starts)
        report[temperature] = {
            "top1": [round((ranks[:, k] < 1).double().mean().item(), 4) for k in range(ranks.shape[1])],
            "top5": [round((ranks[:, k] < 5).double().mean().item(), 4) for k in range(ranks.shape[1])],
            "steps": len(starts),
            "prefixes": {" ".join(map(str, path)): counts[path] for path in ranked_prefixes(counts)[:CALIBRATION_PREFIXES]},
        }
    return report


CALIBRATION_NODES, CALIBRATION_PREFIXES = 16, 256


def distilled_rows(config: Medusa1Config) -> Path:
    """The directory of the rows to train and calibrate on; made first, if it has to be."""
    if config.distilled:
        return Path(config.distilled)
    if not config.text and base_of(SHIPPED_ROWS / "train-00000.safetensors") == base_digest(config.base):
        return SHIPPED_ROWS
    shards = DistillConfig.shards if config.data == "distilled" else 1  # the validation rows come along with any
    return distill(DistillConfig(base=config.base, text=config.text, seed=config.seed, device=config.device, precision=config.precision, shards=shards))


def train_medusa1(config: Medusa1Config) -> None:
    check_out(config.out)
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    tokenizer, model = load_base(config.base, device=device)
    model.requires_grad_(False)
    shards = distilled_rows(config)
    held_out = {str(t): read_shards(shards, f"validation-{t}.safetensors", model.config.vocab_size) for t in CALIBRATION_TEMPERATURES}
    if not all(carries.shape[1] > config.num_heads + 1 and scored(carries, config.num_heads).any() for _, carries in held_out.values()):
        raise ValueError(f"{shards}: no held-out row is long enough for {config.num_heads} heads: distil with more --new-tokens")
    generator = torch.Generator().manual_seed(config.seed)
    if config.data == "distilled":
        rows, loss_mask = read_shards(shards, "train-*.safetensors", model.config.vocab_size)
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(-(-config.steps * config.batch // len(rows)))])
    else:
        corpus = packed(documents(False, config.text), tokenizer)
    heads_config = MedusaConfig(model.config.hidden_size, model.config.vocab_size, config.num_heads, config.num_hidden_layers, config.original_lm_head)
    heads = MedusaHeads(heads_config, model.lm_head).to(device)
    print(f"{sum(p.numel() for p in heads.parameters()):,} parameters in {config.num_heads} heads, {dtype} on {device}")

    def loss_of_step(step: int) -> tuple[Tensor, dict]:
        if config.data == "distilled":
            chosen = order[step * config.batch : (step + 1) * config.batch]
            tokens, mask = rows[chosen].to(device), loss_mask[chosen].to(device)  # (B, T)
        else:
            tokens, mask = windows(corpus, config.batch, config.context, generator).to(device), None
        with torch.no_grad():
            hidden = model(tokens)  # (B, T, D)
        loss, per_head = medusa_loss(heads(hidden, model.lm_head), tokens, mask, config.decay)
        return loss, {"heads": " ".join(f"{value:.2f}" for value in per_head.tolist())}

    fit(heads, loss_of_step, config, device, dtype)
    heads.save_pretrained(config.out)
    calibration = calibrate(model, heads, held_out)
    write_json(Path(config.out) / "calibration.json", calibration)
    report(config, calibration)


def report(config: Medusa1Config, calibration: dict) -> None:
    """Print what training reached, on rows continued from held-out prompts."""
    for temperature, result in calibration.items():
        accuracy = "   ".join(f"head {k}: {a:.1%} / {b:.1%}" for k, (a, b) in enumerate(zip(result["top1"], result["top5"]), start=1))
        print(f"temperature {temperature}, top-1 / top-5 on held-out rows:   {accuracy}")
        counts = read_prefixes(result)
        sizes = {n: expected_tokens(calibrated_tree(counts, n), counts) for n in (4, 8, 16, 32)}
        print("   expected tokens/step: " + "   ".join(f"{tokens:.2f} with {n} nodes" for n, tokens in sizes.items()))
    print(f"next: python sample.py --base {config.base} --heads {config.out}")


def read_prefixes(result: dict) -> Counter:
    """The prefix counts of one temperature in calibration.json. Raises AttributeError, KeyError, TypeError or ValueError for what is none."""
    counts = Counter({tuple(map(int, path.split())): count for path, count in result["prefixes"].items()}) | Counter({(): result["steps"]})
    if not all(type(count) is int for count in counts.values()) or result["steps"] < 1:
        raise ValueError("counts must be whole numbers, and steps above 0")
    return counts


def main() -> None:
    chooser = OneLineParser(add_help=False)
    chooser.add_argument("--mode", choices=MODES, default="medusa1")
    mode = chooser.parse_known_args()[0].mode
    parser = OneLineParser(description=MODES[mode].__doc__)
    parser.add_argument("--mode", choices=MODES, default="medusa1", help="what to do; the flags below are those of this mode (default: medusa1)")
    add_options(parser, MODES[mode])
    arguments = vars(parser.parse_args())
    config = MODES[arguments.pop("mode")](**arguments)
    if mode == "base":
        train_base(config)
    elif mode == "distill":
        print(f"next: python train.py --mode medusa1 --base {config.base} --distilled {distill(config)}")
    else:
        train_medusa1(config)


if __name__ == "__main__":
    run(main)
