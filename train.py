"""Training: a base model, text that it writes itself, and Medusa heads for it.

    python train.py --mode base      a small Llama from nothing
    python train.py --mode distill   text sampled from the base  (paper, "Self-distillation")
    python train.py --mode calibrate the best tree for heads that exist already
    python train.py --mode medusa1   heads on the frozen base  (paper, "Medusa-1")
    python train.py --mode medusa2   heads alone, then heads and base together  (paper, "Medusa-2")

Without other flags the heads are for the shipped base. --resume goes on with a stopped run;
`torchrun --nproc-per-node N train.py ...` uses N GPUs. To be read downwards: settings, batches,
losses, the loop, the modes, LoRA, self-distillation, calibration.

Dimension key: R rows of the data, B of a batch, T tokens, D model width, V vocabulary (v: that of
the heads), K heads, n any number of positions.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import chain, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.chat import dialogue_rows, given_turns, read_template, split_dialogues
from data.command import OneLineParser, check_out, option, parsed, pick_device, run
from data.corpus import documents, packed, seeded, shuffled, windows
from data.rows import base_digest, digest_of, metadata_of, read_shards, write_shard
from data.tokenizer import SHIPPED_BASE, copy_tokenizer, disk_dtype, load_base, train_tokenizer
from medusa import IGNORED, MedusaConfig, MedusaHeads, Sampling, calibration_path, check_compatible
from medusa import at_least_float32, check_sampled, exponential_noise, gumbel_scores, sample
from medusa import cross_entropy, distillation_loss, logits_to_probs, medusa_loss, targets_ahead
from model import GPT, ModelConfig, check, read_json, read_pickle, write_atomically, write_json
from tree import calibrated_tree, expected_tokens, prefix_counts
from tree import ranked_prefixes, read_counts, replay

SHIPPED_ROWS = "data/distilled"
SAVE_EVERY = 200  # steps between checkpoints
MAX_NORM = 1.0  # gradients are clipped to it, those of heads and base apart
TEMPERATURES = 0.0, 0.7, 1.0  # at which heads are calibrated
HELD_OUT_ROWS = 256  # of each temperature, at most
CALIBRATION_NODES = 16  # of the tree with which decoding is replayed: see `replay`
CALIBRATION_PREFIXES = 256  # the most frequent ones are written
PERPLEXITY_TOKENS = 1 << 15  # of a held-out text, at most
MAY_BE_0 = ("seed", "shards", "temperature", "truncated_vocab_size", "weight_decay")
MAY_BE_0 += ("mtp_weight", "lambda_0", "heads_steps")


# ---- settings: each field is a flag ----
@dataclass(frozen=True)
class Common:
    text: list[str] = option([], "UTF-8 files, or dialogues; default: Python's standard library")
    seed: int = option(0, "seed of all that is random")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option("auto", "of matmuls", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) in (int, float):
                least = "0 or more" if name in MAY_BE_0 else "above 0"
                most = math.inf if type(value) is float else 1 << 31
                in_range = 0 < value < most or (value == 0 and name in MAY_BE_0)
                check(in_range, f"--{name.replace('_', '-')} {value}: must be {least}")


@dataclass(frozen=True)
class TrainConfig(Common):
    out: str = option("out", "directory to write")
    steps: int = option(1200, "optimiser steps")
    batch: int = option(2, "rows in a batch, over all processes")
    context: int = option(256, "tokens in a row")
    lr: float = option(7e-3, "peak learning rate: linear warm-up, times a cosine to 0")
    warmup: int = option(100, "steps of warm-up")
    resume: bool = option(False, "go on from the checkpoint in --out")

    def __post_init__(self):
        super().__post_init__()
        check(self.context > 1, f"--context {self.context}: a token needs another to predict")
        stages = self.steps, getattr(self, "heads_steps", 0)
        fewest = min(steps for steps in stages if steps > 0)
        check(self.warmup <= fewest, f"--warmup {self.warmup}: must be at most the {fewest} steps")


@dataclass(frozen=True)
class BaseConfig(TrainConfig):
    """A Llama from nothing: its tokenizer, then next-token cross-entropy."""

    out: str = option("out/base", "directory to write")
    steps: int = option(3600, "optimiser steps")
    context: int = option(1024, "tokens in a row, and the model's longest context")
    lr: float = option(2e-3, "peak learning rate: linear warm-up, times a cosine to 0")
    warmup: int = option(150, "steps of warm-up")
    weight_decay: float = option(0.1, "AdamW weight decay, of matrices only")
    mtp_weight: float = option(1.0, "final weight of the loss of heads trained along, then dropped")
    vocab_size: int = option(ModelConfig.vocab_size, "pieces of the tokenizer")
    hidden_size: int = option(ModelConfig.hidden_size, "model width")
    intermediate_size: int = option(ModelConfig.intermediate_size, "width inside the MLP")
    num_hidden_layers: int = option(ModelConfig.num_hidden_layers, "blocks")
    num_attention_heads: int = option(ModelConfig.num_attention_heads, "attention heads")
    num_key_value_heads: int = option(ModelConfig.num_key_value_heads, "key/value heads")


@dataclass(frozen=True)
class DistillConfig(Common):
    """Text of the base's own: prompts continued by sampling. Only the continuation carries loss."""

    base: str = option(SHIPPED_BASE, "directory of the base model")
    out: str = option("out/rows", "directory to write; files that are there are kept")
    shards: int = option(12, "files of training rows; the held-out ones come with them")
    rows: int = option(256, "rows of a file, sampled together")
    chat: bool = option(False, "--text holds dialogues: answer their user, turn by turn")
    prompt_tokens: int = option(32, "tokens of a prompt; with --chat, longer ones are left out")
    new_tokens: int = option(224, "most tokens sampled after a prompt")
    temperature: float = option(0.7, "sampling temperature")
    top_p: float = option(1.0, "sample among the fewest tokens that hold so much probability")


@dataclass(frozen=True)
class MedusaTraining(TrainConfig):
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("", "heads to start from, of any kind; default: new ones")
    sequential: bool = option(False, "heads that see the tokens before their guess: Hydra")
    data: str = option("distilled", "what to train on", choices=("distilled", "corpus", "chat"))
    distilled: str = option("", "rows of --mode distill; default: shipped, or made in OUT/rows")

    def __post_init__(self):
        super().__post_init__()
        written = [Path(self.out).resolve(), Path(self.out, "base").resolve()]
        is_other = Path(self.base).resolve() not in written
        check(is_other, f"--out {self.out} would overwrite --base: name another directory")
        # Distilled rows have a length of their own.
        is_default = self.context == TrainConfig.context
        check(self.data != "distilled" or is_default, "--context: needs --data corpus or chat")
        # The shape of --heads is given, but Medusa heads may go on as sequential ones.
        shape = "num_heads", "num_hidden_layers", "original_lm_head", "truncated_vocab_size"
        own = [name for name in shape if getattr(self, name, 0) != getattr(type(self), name, 0)]
        check(self.heads == "" or own == [], f"--heads have their own {own}: leave these flags out")


@dataclass(frozen=True)
class Medusa1Config(MedusaTraining):
    """L = sum_k 0.8^k CE(head_probs_k at t, token t+k+1) on the frozen base."""

    out: str = option("out/heads", "directory to write")
    num_heads: int = option(MedusaConfig.num_heads, "K, heads to train")
    num_hidden_layers: int = option(MedusaConfig.num_hidden_layers, "residual layers of a head")
    original_lm_head: bool = option(True, "share the base's LM head; if not, each head has its own")
    truncated_vocab_size: int = option(0, "guess among the most frequent tokens alone; 0: all")
    keep_states: bool = option(False, "run the base once over all rows; keep its states on disk")


@dataclass(frozen=True)
class Medusa2Config(MedusaTraining):
    """L = L_base + lambda_0 L_medusa, after the heads alone. Writes OUT/base and OUT/heads."""

    out: str = option("out/medusa2", "directory to write")
    heads_steps: int = option(800, "steps of stage 1, the heads alone")
    steps: int = option(1600, "steps of stage 2, heads and base together")
    lr: float = option(2e-3, "peak learning rate of the heads, in each stage")
    lr_ratio: float = option(4.0, "how many times lower the base's learning rate is")
    lambda_0: float = option(0.2, "weight of the heads' loss")
    weight_decay: float = option(0.0, "AdamW weight decay, of matrices only")
    lora: bool = option(False, "train adapters of the base's matrices, merged in the end")


@dataclass(frozen=True)
class CalibrateConfig(Common):
    """Which tree is best for heads of any kind? Writes calibration.json to where they are."""

    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("", "their directory, or the official repository's file")
    distilled: str = option("", "rows of --mode distill; default: shipped, or made next to --heads")


# ---- one process, or several that torchrun started ----
def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products in training, and of a frozen base."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


# ---- batches ----
@dataclass(frozen=True)
class Batch:
    """What a step feeds and what it asks for: this process's part of the rows."""

    rows: Tensor  # (B,) their numbers in the training data
    tokens: Tensor  # (B, T)
    targets: Tensor  # (B, T, K+1): token t+1, the base's, then each head's; IGNORED: no loss
    counts: Tensor  # (K+1,) targets in the whole batch, over all processes


def make_batch(config: TrainConfig, data: tuple, heads: MedusaHeads, device, step: int) -> Batch:
    """The batch of a step. data: all rows, tokens (R, T+1), and their loss mask (R, T+1) bool."""
    # Every row once, in random order, before any comes again. The order depends on the step's
    # number alone, so that a resumed run sees the same batches. Each epoch's order is cached.
    R, numbers = len(data[0]), range(step * config.batch, (step + 1) * config.batch)
    rows = torch.stack([shuffled(R, config.seed, n // R)[n % R] for n in numbers])  # (B,)
    tokens, mask = data[0][rows].long(), data[1][rows]  # (B, T+1)

    # What follows the last target need not be fed; but at least one token is.
    last = max([1, *mask.any(0).nonzero()[:, 0].tolist()])
    tokens, mask = tokens[:, : last + 1], mask[:, : last + 1]

    # The heads' targets are indices into their vocabulary, IGNORED outside of it. Row 0 is the
    # base's: token ids.
    targets = targets_ahead(heads.index_of(tokens), mask, heads.config.num_heads)  # (K+1, B, T+1)
    targets[:1] = targets_ahead(tokens, mask, 0)  # (1, B, T+1)
    counts = (targets != IGNORED).flatten(1).sum(1)  # (K+1,) before rows are dealt to processes

    # To (B, T, K+1): a (B, T) mask then picks positions. The last token has no target.
    parts = rows, tokens[:, :-1], targets.permute(1, 2, 0)[:, :-1]
    rank, world_size = rank_and_world_size()
    rows, tokens, targets = (part.tensor_split(world_size)[rank].to(device) for part in parts)
    return Batch(rows, tokens, targets, counts.to(device))


# ---- losses: one function for each mode ----
CHUNK_LOGITS = 1 << 24  # so many logits are in memory at once


def in_chunks(loss_of: Callable, logits_per_position: int, *inputs: Tensor) -> list[Tensor]:
    """The sums of what loss_of(*inputs) returns, over chunks of the n positions.

    K x V logits of all positions would fill the memory. The backward pass computes those of a chunk
    again (torch.utils.checkpoint).
    """
    size = max(CHUNK_LOGITS // logits_per_position, 1)
    # A single chunk is not computed twice.
    if len(inputs[0]) <= size:
        return loss_of(*inputs)
    chunks = zip(*(t.split(size) for t in inputs))
    results = [checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks]
    return [torch.stack(parts).sum(0) for parts in zip(*results)]


def base_loss(lm_head: nn.Linear, hidden: Tensor, batch: Batch, teacher=None) -> Tensor:
    """Cross-entropy of the base; with a teacher KL(teacher || base)  (paper, "Self-distillation").

    hidden (B, T, D). teacher: a model with an lm_head; its states replace the targets.
    """
    targets, count = batch.targets[..., 0], batch.counts[0]  # (B, T), ()
    used = targets != IGNORED  # (B, T)
    if teacher is not None:
        # With LoRA the teacher is the model itself, its adapters off (`Adapter`, below).
        Adapter.on = False
        with torch.no_grad():
            targets = teacher(batch.tokens)  # (B, T, D)
        Adapter.on = True

    def loss_of(hidden, targets):  # (n, D), (n,) or (n, D)
        if teacher is None:
            return [cross_entropy(lm_head(hidden), targets, count)]
        return [distillation_loss(lm_head(hidden), teacher.lm_head(targets), count)]

    size = len(lm_head.weight) * (1 if teacher is None else 2)
    return in_chunks(loss_of, size, hidden[used], targets[used])[0]


def following(x: Tensor, n: int) -> Tensor:
    """What follows each position: x (B, T) -> x at t+1 to t+n, (B, T, n); 0 beyond the end.

    Sequential heads see n = K tokens. A head with a target never sees the 0: it guesses later.
    """
    return F.pad(x, (0, n))[:, 1:].unfold(1, n, 1)


def medusa1_loss(heads: MedusaHeads, model: GPT, hidden: Tensor, batch: Batch):
    """L = sum_k 0.8^k CE(head_probs_k at t, token t+k+1)  (paper, "Medusa-1"); hidden (B, T, D).

    Returns it, and metrics, in one tensor (1 + 2K,) that processes can sum: [loss of the base (here
    0), K losses of heads, K top-1 accuracies].
    """
    # Positions without any target of a head are left out.
    used = (batch.targets[..., 1:] != IGNORED).any(-1)  # (B, T): n positions
    K, v, counts = heads.config.num_heads, heads.config.truncated_vocab_size, batch.counts[1:]
    heads_lm_head = heads.truncated(model.lm_head)

    def loss_of(hidden, targets, seen):  # (n, D), (n, K), (n, K)
        between, targets = heads.embed(model.embed_tokens, seen), targets.mT
        logits = heads(hidden, heads_lm_head, between)  # (K, n, v)
        loss, losses = medusa_loss(logits, targets, counts=counts)
        # A head is correct if its target has the largest logit; amax is faster than argmax. An
        # IGNORED target is looked up as token 0, and left out.
        of_targets = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # (K, n)
        correct = ((of_targets == logits.amax(-1)) & (targets != IGNORED)).sum(-1)  # (K,)
        return [loss, losses.detach(), correct]

    inputs = hidden, batch.targets[..., 1:], following(batch.tokens, K)
    loss, losses, correct = in_chunks(loss_of, K * v, *(t[used] for t in inputs))
    return loss, torch.cat((losses.new_zeros(1), losses, correct / counts.clamp(min=1)))


def medusa2_loss(model: GPT, heads: MedusaHeads, batch: Batch, lambda_0: float, teacher=None):
    """L = L_base + lambda_0 L_medusa  (paper, "Medusa-2"), and the metrics of `medusa1_loss`."""
    hidden = model(batch.tokens)  # (B, T, D)
    loss_of_base = base_loss(model.lm_head, hidden, batch, teacher)
    loss, metrics = loss_of_base, loss_of_base.new_zeros(1 + 2 * heads.config.num_heads)
    # With lambda_0 = 0 the heads get no gradient at all, so that AdamW leaves them alone.
    if lambda_0 > 0:
        loss_of_heads, metrics = medusa1_loss(heads, model, hidden, batch)
        loss = loss_of_base + lambda_0 * loss_of_heads
    metrics[0] = loss_of_base.detach()
    return loss, metrics


# ---- the loop, the same in every mode ----
def learning_rate(step: int, lr: float, warmup: int, steps: int) -> float:
    """Linear warm-up, times a cosine from 1 at the first step to 0 after the last.

    >>> [round(learning_rate(step, 1.0, warmup=2, steps=4), 2) for step in range(4)]
    [0.5, 0.85, 0.5, 0.15]
    """
    return lr * min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


class Run:
    """What learns, its optimiser, and the steps that are done: all that a checkpoint holds."""

    def __init__(self, config: TrainConfig, device: torch.device, parts: dict, inputs: str):
        """parts: "heads", "base" -> parameters by name. inputs: a digest of base and text."""
        self.config, self.device, self.parts = config, device, parts
        self.step, self.log, self.path = 0, [], Path(config.out) / "checkpoint.pt"
        self.settings = asdict(config) | {"base and text": inputs}
        for name in ("out", "resume", "device"):
            del self.settings[name]
        weight_decay, groups = getattr(config, "weight_decay", 0.0), []
        for part, parameters in parts.items():
            print(f"{part}: {sum(p.numel() for p in parameters.values()):,} parameters to train")
            # Weight decay is for matrices, not for gains and biases: (J, K, 1, D) those of heads.
            matrices = [p for p in parameters.values() if p.dim() > 1 and p.shape[-2] > 1]
            others = [p for p in parameters.values() if not (p.dim() > 1 and p.shape[-2] > 1)]
            groups.append({"part": part, "params": matrices, "weight_decay": weight_decay})
            groups.append({"part": part, "params": others, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type != "mps")
        if config.resume:
            self.load()

    def save(self) -> None:
        state = {"settings": self.settings, "step": self.step, "log": self.log}
        state |= {"parts": self.parts, "optimizer": self.optimizer.state_dict()}
        log = "\n".join(self.log) + "\n"
        write_atomically(self.path.with_name("log.jsonl"), lambda to: to.write_text(log))
        write_atomically(self.path, lambda to: torch.save(state, to))

    def load(self) -> None:
        try:
            state = read_pickle(self.path)
            theirs, ours = state["settings"], self.settings
            other = [f"{name} {value}" for name, value in theirs.items() if ours.get(name) != value]
            check(not other, f"it was started with {', '.join(other)}")
            for part, parameters in self.parts.items():
                for name, p in parameters.items():
                    p.data.copy_(state["parts"][part][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.log = state["step"], state["log"]
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"--resume: {self.path} cannot be used: {error}") from None

    def finish(self) -> None:
        """Results are written: delete the checkpoint, and what a kill left half written."""
        for name in ("checkpoint.pt", "states.npy"):
            for path in (self.path.with_name(name), *self.path.parent.glob(f".{name}.*")):
                path.unlink(missing_ok=True)


def start(config: TrainConfig) -> torch.device:
    """Refuse before the work what would fail after it."""
    check_out(config.out)
    path, about = Path(config.out) / "checkpoint.pt", Path(config.out) / "config.json"
    if config.resume and not path.exists():
        advice = "if its run is finished, --heads starts from the heads that it wrote"
        raise ValueError(f"--resume: {path} does not exist: leave --resume out; {advice}")
    if path.exists() and not config.resume:
        raise ValueError(f"{path} is of a run that was stopped: use --resume, or delete it")
    writes_heads = isinstance(config, Medusa1Config)
    if about.exists() and (read_json(about).get("model_type") == "medusa") != writes_heads:
        raise ValueError(f"--out {config.out} holds another kind of model: name another directory")
    check(config.batch >= rank_and_world_size()[1], f"--batch {config.batch}: fewer than processes")
    return pick_device(config.device)


def train_loop(run: Run, steps: range, batch_of: Callable, loss_of: Callable, lr_factors: dict):
    """These steps, or those that are left; the learning rate rises and falls once.

    batch_of: step -> Batch. loss_of: Batch -> loss, metrics (1 + 2K,). lr_factors: part -> factor.
    """
    config, parts, is_main = run.config, run.parts, rank_and_world_size()[0] == 0
    dtype = pick_precision(config.precision, run.device)
    # A run that is resumed after this stage has no steps left in it.
    left = range(max(run.step, steps.start), steps.stop)
    bar = tqdm(left, "training", steps.stop, initial=run.step, disable=not is_main)
    for step in bar:
        rate = learning_rate(step - steps.start, config.lr, config.warmup, len(steps))
        rates = {part: rate * factor for part, factor in lr_factors.items()}
        for group in run.optimizer.param_groups:
            group["lr"] = rates[group["part"]]

        # 1. Loss and gradient of this process's rows; the sum over processes is the batch's.
        batch = batch_of(step)
        with torch.autocast(run.device.type, dtype, dtype != torch.float32):
            loss, metrics = loss_of(batch)
        loss.backward()
        if dist.is_initialized():
            grads = [p.grad for ps in parts.values() for p in ps.values()]
            for t in (metrics, *grads):
                if t is not None:  # a frozen parameter has no gradient
                    dist.all_reduce(t)

        # 2. Clip: heads and base each by themselves, since their gradients differ in size.
        norms = {part: clip_grad_norm_(ps.values(), MAX_NORM).item() for part, ps in parts.items()}
        metrics = metrics.tolist()  # 1 + 2K numbers
        if not math.isfinite(sum(metrics) + sum(norms.values())):
            advice = "try a lower --lr or --precision float32; the last checkpoint is kept"
            raise ValueError(f"step {step}: loss or gradient is not finite; {advice}")

        # 3. Update.
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step = step + 1

        # 4. Log, and save.
        K = len(metrics) // 2
        losses, top1 = metrics[1 : K + 1], metrics[K + 1 :]
        record = {"step": step, "base": metrics[0], "heads": losses, "top1": top1}
        run.log.append(json.dumps(record | {"lr": rates, "norm": norms}))
        shown = {"heads": " ".join(f"{value:.2f}" for value in losses)}
        if metrics[0] > 0:  # a frozen base has no loss
            shown["base"] = f"{metrics[0]:.2f}"
        bar.set_postfix(shown, refresh=False)
        if is_main and (run.step % SAVE_EVERY == 0 or run.step == steps.stop):
            run.save()


# ---- the modes that train ----
def train_base(config: BaseConfig) -> None:
    device = start(config)
    shape = {name: v for name, v in asdict(config).items() if hasattr(ModelConfig, name)}
    torch.manual_seed(config.seed)
    model = GPT(ModelConfig(**shape, max_position_embeddings=config.context)).to(device)
    texts = documents(False, config.text)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokens, held_out = packed(texts, tokenizer), packed(documents(True, config.text), tokenizer)

    # Ours, not the paper's: an auxiliary multi-token-prediction loss, by heads that are dropped in
    # the end. Its weight rises along a sine: the base learns its own task first.
    heads = MedusaHeads(MedusaConfig(config.hidden_size, config.vocab_size)).to(device)
    # The last token of a row is only a target.
    rows = text_rows(tokens, config.context + 1)
    batch_of = partial(make_batch, config, rows, heads, device)
    parts = {"base": dict(model.named_parameters()), "heads": dict(heads.named_parameters())}
    run = Run(config, device, parts, digest_of(tokens))

    def loss_of(batch: Batch):
        ramp = math.sin(math.pi / 2 * run.step / config.steps)
        return medusa2_loss(model, heads, batch, config.mtp_weight * ramp)

    train_loop(run, range(config.steps), batch_of, loss_of, {"base": 1.0, "heads": 1.0})
    if rank_and_world_size()[0] == 0:
        # Written in half precision, and measured as written.
        tokenizer.save(config.out)
        model.save_pretrained(config.out, torch.float16)
        run.finish()
        model = GPT.from_pretrained(config.out, device=device)
        print(f"perplexity on held-out text: {perplexity(model, held_out):.3f}")
        print(f"next: python train.py --mode medusa1 --base {config.out}")


def text_rows(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A text (n,) cut into rows (R, length), and their loss mask: every token is a target."""
    R = len(tokens) // length
    check(R > 0, f"the text has {len(tokens)} tokens, a row {length}: give more text")
    rows = tokens[: R * length].view(R, length)
    return rows, torch.ones_like(rows, dtype=torch.bool)


def training_data(config: MedusaTraining, tokenizer, model: GPT, K: int):
    """Rows (R, T) and their loss mask; `held_out_rows`; a held-out text (n,) for `perplexity`."""
    V, is_distilled = model.config.vocab_size, config.data == "distilled"
    if config.data == "chat":
        # Answers of a file's own, each dialogue on one side of the split.
        sides = split_dialogues(config.text)
        chat = config.base, tokenizer, model.config.eos_ids, config.context
        tokens, mask, dropped = dialogue_rows(sides["train"], *chat)
        print(f"{len(tokens)} rows; {dropped} dialogues without an answer that ends in --context")
        unseen, unseen_mask, _ = dialogue_rows(sides["validation"], *chat)
        says = f"has an answer that ends in --context {config.context}: give more, or a larger one"
        check(min(len(tokens), len(unseen)) > 0, f"of one side of the split no dialogue {says}")
        # A row ends with its last answer.
        ends = [int(mask.nonzero().max()) + 1 for mask in unseen_mask]
        data, text = (tokens, mask), torch.cat([row[:end] for row, end in zip(unseen, ends)])
    else:
        text = packed(documents(True, config.text), tokenizer)
    shards = DistillConfig.shards if is_distilled else 0
    directory = distilled_rows(config, f"{config.out}/rows", shards)
    if config.data == "corpus":
        data = text_rows(packed(documents(False, config.text), tokenizer), config.context)
    elif is_distilled:
        data = read_shards(directory, "train-*.safetensors", V)
    return data, held_out_rows(directory, V, K), text


def open_base_and_heads(config, precision: str, device: torch.device):
    """The tokenizer and the frozen model of --base; the heads of --heads, or new ones."""
    tokenizer, model = load_base(config.base, pick_precision(precision, device), device)
    model.requires_grad_(False)
    D, V = model.config.hidden_size, model.config.vocab_size
    if config.heads:
        heads = MedusaHeads.from_pretrained(config.heads, vocab_size=V)
        check_compatible(model, heads)
        if getattr(config, "sequential", False) and not heads.config.sequential:
            # What is new starts at zero: they guess as the heads that they start from.
            trained = heads.state_dict()
            heads = MedusaHeads(replace(heads.config, sequential=True))
            heads.load_state_dict(trained, strict=False)
    else:
        shape = {name: v for name, v in asdict(config).items() if hasattr(MedusaConfig, name)}
        heads = MedusaHeads(MedusaConfig(D, V, **shape), model.lm_head)
    return tokenizer, model, heads.to(device, torch.float32)


def train_medusa1(config: Medusa1Config) -> None:
    device = start(config)
    # A base that stays frozen needs no more digits than it computes with.
    tokenizer, model, heads = open_base_and_heads(config, config.precision, device)
    (tokens, mask), held_out, text = training_data(config, tokenizer, model, heads.config.num_heads)

    # A new truncated vocabulary holds the most frequent targets.
    if heads.token_map is not None and config.heads == "":
        counts = tokens[mask].bincount(minlength=heads.config.vocab_size)
        heads.token_map.copy_(counts.topk(len(heads.token_map)).indices)
    states = kept_states(config, model, tokens) if config.keep_states else None

    parts = {"heads": dict(heads.named_parameters())}
    run = Run(config, device, parts, digest_of(base_digest(config.base), tokens, mask))
    batch_of = partial(make_batch, config, (tokens, mask), heads, device)
    loss_of = partial(frozen_loss, model, heads, states)
    train_loop(run, range(config.steps), batch_of, loss_of, {"heads": 1.0})
    if rank_and_world_size()[0] == 0:
        write_heads(model, heads, held_out, config.out, config.base)
        run.finish()
        print(f"perplexity of the base on held-out text: {perplexity(model, text):.3f}, frozen")
        prompt = ' --chat "Why is the sky blue?"' if config.data == "chat" else ""
        print(f"next: python sample.py --base {config.base} --heads {config.out}{prompt}")


def frozen_loss(model: GPT, heads: MedusaHeads, states: Tensor | None, batch: Batch):
    """`medusa1_loss` on a frozen base, or on its states if they are kept: (R, T-1, D)."""
    if states is None:
        with torch.no_grad():
            hidden = model(batch.tokens)  # (B, T, D)
    else:
        hidden = states[batch.rows.cpu(), : batch.tokens.shape[1]].to(model.lm_head.weight)
    return medusa1_loss(heads, model, hidden, batch)


def kept_states(config: Medusa1Config, model: GPT, tokens: Tensor) -> Tensor:
    """The base's states of all rows (R, T): (R, T-1, D) float16, in a file that is made once."""
    path, shape = Path(config.out) / "states.npy", (*tokens[:, 1:].shape, model.config.hidden_size)

    @torch.no_grad()
    def write(temporary: Path) -> None:
        states = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        for row in tqdm(range(0, len(tokens), 16), "states of the base"):
            hidden = model(tokens[row : row + 16, :-1].to(model.lm_head.weight.device))
            states[row : row + 16] = hidden.half().cpu().numpy()
        states.flush()

    # The first process writes the file, the others wait for it.
    if rank_and_world_size()[0] == 0 and not (config.resume and path.exists()):
        write_atomically(path, write)
    if dist.is_initialized():
        dist.barrier()
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # read where it is used


def train_medusa2(config: Medusa2Config) -> None:
    device = start(config)
    tokenizer, model, heads = open_base_and_heads(config, "float32", device)
    data, held_out, text = training_data(config, tokenizer, model, heads.config.num_heads)
    before = perplexity(model, text)

    # The teacher is the base as it is now; with LoRA the same model without its adapters. For text
    # that the base did not write there is none: the text's own tokens are the targets.
    teacher = None
    if config.data == "distilled":
        teacher = model if config.lora else copy.deepcopy(model)
    # What of the base learns: adapters, or all of it.
    base = add_adapters(model, config.seed) if config.lora else dict(model.named_parameters())
    parts = {"heads": dict(heads.named_parameters()), "base": base}
    run = Run(config, device, parts, digest_of(base_digest(config.base), *data))
    batch_of = partial(make_batch, config, data, heads, device)

    # Stage 1: the heads alone, on the frozen base, as in Medusa-1.
    loss_of_heads = partial(frozen_loss, model, heads, None)
    stage_1 = range(config.heads_steps)
    train_loop(run, stage_1, batch_of, loss_of_heads, {"heads": 1.0, "base": 0.0})

    # Stage 2: heads and base together, the base at a lower rate.
    loss_of_both = partial(medusa2_loss, model, heads, lambda_0=config.lambda_0, teacher=teacher)
    for p in base.values():
        p.requires_grad_(True)
    stage_2 = range(config.heads_steps, config.heads_steps + config.steps)
    train_loop(run, stage_2, batch_of, loss_of_both, {"heads": 1.0, "base": 1 / config.lr_ratio})
    if rank_and_world_size()[0] == 0:
        base_out, heads_out = f"{config.out}/base", f"{config.out}/heads"
        merge_adapters(model)
        copy_tokenizer(config.base, base_out)
        model.save_pretrained(base_out, disk_dtype(config.base))
        model = GPT.from_pretrained(base_out, device=device)
        # The base has changed, so it writes the held-out rows again.
        for t, old in held_out.items():
            held_out[t] = regenerate(model, *old, Sampling(float(t)), config.seed)
        write_heads(model, heads, held_out, heads_out, base_out)
        run.finish()
        after = perplexity(model, text)
        print(f"perplexity of the base on held-out text: {after:.3f}, {before:.3f} before training")
        print(f"next: python sample.py --base {base_out} --heads {heads_out}")


# ---- low-rank adapters of a base  ("LoRA", Hu et al., 2021) ----
class Adapter(nn.Module):
    """W + alpha / r * up down, of rank r; up starts at zero, so that nothing changes at first."""

    RANK, ALPHA = 32, 16
    on = True  # all adapters at once: off, the base is what it was

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(self.RANK, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, self.RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.ALPHA / self.RANK * (self.up @ self.down) if self.on else weight


def add_adapters(model: GPT, seed: int) -> dict[str, nn.Parameter]:
    """Adapt every linear layer of the blocks. Returns what learns, by name: the adapters alone."""
    learning, generator = {}, seeded(seed)
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            adapter = Adapter(module.weight, generator)
            parametrize.register_parametrization(module, "weight", adapter)
            learning |= {f"{name}.down": adapter.down, f"{name}.up": adapter.up}
    return learning


def merge_adapters(model: GPT) -> None:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


# ---- self-distillation: text that the base writes itself  (paper, "Self-distillation") ----
@torch.inference_mode()
def sample_rows(model: GPT, prompts: list[list[int]], length: int, sampling: Sampling, generator):
    """Continue R prompts of any lengths by sampling, to rows of at most `length` tokens.

    Returns tokens (R, length) and the loss mask (R, length) bool, True where a token was sampled. A
    row ends after EOS; what follows is padding.
    """
    device = model.lm_head.weight.device
    # Padded with 0, which is no mark: `loss_mask` and `prompt_lengths` tell what is text.
    padded = [prompt + [0] * (length - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(padded, device=device)  # (R, length)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (R,)
    eos_ids = torch.tensor(model.config.eos_ids, dtype=torch.long, device=device)

    # All rows grow together, one token a step. rows: those in the batch; new: what is fed next.
    rows, shortest = torch.arange(len(prompts), device=device), min(map(len, prompts))
    cache, new = model.new_cache(length, batch=len(prompts)), tokens[:, :shortest]
    for position in range(shortest, length):
        logits = at_least_float32(model.lm_head(model(new, cache=cache)[:, -1]))  # (rows, V)
        sampled = sample(logits, sampling, exponential_noise(logits, generator))  # (rows,)
        check_sampled(int(sampled.min()), position, model.lm_head.weight.dtype)

        # Where a prompt is longer, its own token stays.
        after_prompt = prompt_lengths[rows] <= position  # (rows,)
        loss_mask[rows, position] = after_prompt
        tokens[rows, position] = torch.where(after_prompt, sampled, tokens[rows, position])
        new = tokens[rows, position, None]  # (rows, 1)

        # A row that ended leaves the batch. An alive row from beyond the first n takes its place:
        # few are copied. alive = [1, 0, 1, 0, 1]: n = 3, kept = [0, 4, 2].
        alive = ~(after_prompt & torch.isin(new[:, 0], eos_ids))  # (rows,)
        n = int(alive.sum())
        if n == 0:
            break
        if n < len(rows):
            kept = torch.arange(n, device=device)
            kept[~alive[:n]] = n + alive[n:].nonzero()[:, 0]
            rows, new = rows[kept], new[kept]
            cache.keep_batch(kept)
    return tokens, loss_mask


@torch.inference_mode()
def answer_turns(model: GPT, dialogues: list[list[list[int]]], length: int, sampling, generator):
    """Answer R dialogues, one turn after the other, each after the answers before: `sample_rows`.

    dialogues[r]: the tokens that are given before answer 1, between answers 1 and 2, and so on.
    """
    first = [turns[0] for turns in dialogues]
    tokens, loss_mask = sample_rows(model, first, length, sampling, generator)  # (R, length)
    going = range(len(dialogues))
    for n in range(1, max(map(len, dialogues))):
        # A dialogue goes on if its answer has ended, and there is room for its next turn.
        prompts = {}
        for r in going:
            end = int(loss_mask[r].nonzero().max()) + 1
            turns, ended = dialogues[r], int(tokens[r, end - 1]) in model.config.eos_ids
            if ended and n < len(turns) and end + len(turns[n]) < length:
                prompts[r] = tokens[r, :end].tolist() + turns[n]
        if not prompts:
            break
        going = list(prompts)
        answers = sample_rows(model, list(prompts.values()), length, sampling, generator)
        tokens[going] = answers[0]
        loss_mask[going] |= answers[1]
    return tokens, loss_mask


def regenerate(model: GPT, tokens: Tensor, loss_mask: Tensor, sampling: Sampling, seed: int):
    """The prompts of these rows (R, T), continued by this model: see `sample_rows`."""
    # argmax finds the first True: the first token that was sampled.
    lengths = loss_mask.int().argmax(1).clamp(min=1).tolist()
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths)]
    generator = seeded(seed, device=model.lm_head.weight.device)
    return sample_rows(model.eval(), prompts, tokens.shape[1], sampling, generator)


def prompt_sources(config: DistillConfig, tokenizer, eos_ids) -> tuple[dict, str]:
    """What prompts are made of, for each side of the split: user turns, or a text; its digest."""
    if config.chat:
        sides = split_dialogues(config.text)
        # Of the dialogues, and not of their tokens: a template may write the date.
        asked = {side: list(dialogues.values()) for side, dialogues in sides.items()}
        digest = digest_of(asked, read_template(config.base))
        chat = config.base, tokenizer, eos_ids, config.prompt_tokens
        return {side: given_turns(dialogues, *chat) for side, dialogues in sides.items()}, digest
    sides = {"train": packed(documents(False, config.text), tokenizer)}
    sides["validation"] = packed(documents(True, config.text), tokenizer)
    return sides, digest_of(*sides.values())


def distill(config: DistillConfig) -> Path:
    """Write files of training rows, and held-out rows for each of TEMPERATURES. Returns --out."""
    sampling = Sampling(config.temperature, top_p=config.top_p)  # refuses bad values
    check_out(config.out)
    device = pick_device(config.device)
    tokenizer, model = load_base(config.base, pick_precision(config.precision, device), device)
    length, context = config.prompt_tokens + config.new_tokens, model.config.max_position_embeddings
    says = f"--prompt-tokens + --new-tokens = {length}: over context {context}"
    check(length <= context, f"{says}; use --mode distill with less, and name it by --distilled")

    sides, source_digest = prompt_sources(config, tokenizer, model.config.eos_ids)
    # Each file: name, side of the split, part of it (which decides the prompts), rows, sampling.
    files = []
    for t in TEMPERATURES:
        # Dialogues may be few: each is sampled up to 32 times, but answered greedily only once.
        rows = min(config.rows, HELD_OUT_ROWS, len(sides["validation"]) * (32 if t > 0 else 1))
        files.append((f"validation-{t}", "validation", 0, rows, Sampling(t)))
    files += [(f"train-{n:05d}", "train", n, config.rows, sampling) for n in range(config.shards)]

    # A file is marked by digests of its base and of its settings: a stopped run goes on with its
    # own files only. More shards may be added.
    not_marked = "base", "out", "text", "device", "precision", "shards"
    settings = {name: value for name, value in asdict(config).items() if name not in not_marked}
    mark = f"{base_digest(config.base)} {digest_of(settings, source_digest)}"

    rank, world_size = rank_and_world_size()
    mine = list(enumerate(files))[rank::world_size]
    for number, (name, side, part, rows, sampling) in tqdm(mine, "distilling", disable=rank > 0):
        path, source = Path(config.out) / f"{name}.safetensors", sides[side]
        if path.exists():
            advice = "is of another base, text or settings: delete it, or name another directory"
            check(metadata_of(path).get("base") == mark, f"{path} {advice}")
            continue
        generator = seeded(config.seed, number, device=device)
        if config.chat:
            turns = [source[n % len(source)] for n in range(part * rows, (part + 1) * rows)]
        else:
            starts = windows(source, rows, config.prompt_tokens, seeded(config.seed, part))
            turns = [[start] for start in starts.tolist()]
        tokens, loss_mask = answer_turns(model, turns, length, sampling, generator)
        write_shard(path, tokens, loss_mask, model.config.vocab_size, mark)
    if world_size > 1:
        dist.barrier()
    return Path(config.out)


def distilled_rows(config, out: str, shards: int) -> Path:
    """The directory of the rows to train and calibrate on; made in `out` if there is none.

    shards: files of training rows to make; with 0, the held-out rows alone, for calibration.
    """
    # A mark begins with the digest of the base; a file without one counts as the base's own.
    base, directory = base_digest(config.base), Path(config.distilled or SHIPPED_ROWS)
    files = list(directory.glob("*.safetensors"))
    foreign = [f for f in files if not metadata_of(f).get("base", base).startswith(base)]
    if config.distilled and foreign:
        raise ValueError(f"--distilled: {foreign[0]} was not written by {config.base}")
    # The shipped rows are of the shipped base, and not of --text.
    if config.distilled or (files and not foreign and not config.text):
        return directory
    same = {f.name: getattr(config, f.name) for f in fields(Common)}
    if getattr(config, "data", "") == "chat":
        half = config.context // 2
        same |= {"chat": True, "prompt_tokens": half, "new_tokens": config.context - half}
    return distill(DistillConfig(base=config.base, out=out, shards=shards, **same))


# ---- calibration: how often the heads are right, on held-out rows ----
def held_out_rows(directory: Path, vocab_size: int, K: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The held-out rows: {temperature: (tokens (R, T), loss mask (R, T))}."""
    found = {}
    for t in TEMPERATURES:
        found[str(t)] = read_shards(directory, f"validation-{t}.safetensors", vocab_size)
        if not following(found[str(t)][1], K + 1).all(-1).any():
            raise ValueError(f"{directory}: rows too short for {K} heads; more --new-tokens")
    return found


def noise_given_tokens(probs: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Shared noise of tokens that were sampled before: probs (..., V), tokens (...) -> (..., V).

    That is exponential noise e, given that argmax(probs / e) is the token. As a race: i arrives at
    e_i / probs_i, exponential with rate probs_i. The first arrival is exponential with rate
    sum(probs) = 1, whoever it is. Then i waits on, again with rate probs_i (no memory), and this
    wait times probs_i is exponential with rate 1 again:

        e_token = probs_token * first        e_i = probs_i * first + another exponential
    """
    first = exponential_noise(probs[..., :1], generator)  # (..., 1)
    # -log of uniform noise is exponential: not as fine near 0, but five times faster on a CPU.
    after = torch.empty_like(probs).uniform_(generator=generator).log_().neg_()  # (..., V)
    noise = after.scatter_(-1, tokens[..., None], 0).add_(probs * first)
    return noise.clamp_(min=torch.finfo(probs.dtype).tiny)


@torch.inference_mode()
def head_ranks(model: GPT, heads: MedusaHeads, tokens: Tensor, loss_mask: Tensor, sampling):
    """For each row a tensor (n, K): the rank (0: first guess) that head k gave to token t+k+1.

    tokens (R, T), loss_mask (R, T) bool; n positions of a row are scored. A token that a truncated
    vocabulary leaves out has rank V. Ours: if rows were sampled, ranks are by `gumbel_scores`.
    """
    K, V, ranks = heads.config.num_heads, model.config.vocab_size, []
    # Half-precision logits tie often, so the LM head is copied in the heads' dtype.
    lm_head = copy.deepcopy(model.lm_head).to(heads.weight.dtype)
    heads_lm_head = heads.truncated(lm_head)
    generator = torch.Generator(tokens.device).manual_seed(0)
    # In memory at once: the logits of K heads, the base's probabilities, the noise.
    size = max(CHUNK_LOGITS // (tokens.shape[1] * V * (K + 2)), 1)
    for rows, mask in zip(tokens.split(size), loss_mask.split(size)):  # (B, T)
        hidden = model(rows).to(heads.weight.dtype)  # (B, T, D)
        scored = following(mask, K + 1).all(-1)  # (B, T): tokens t+1 to t+K+1 all carry loss
        row, t = scored.nonzero(as_tuple=True)  # (n,) each
        if sampling.temperature > 0:
            # noise[:, t] is what token t+1 was sampled with.
            base_probs = logits_to_probs(lm_head(hidden), sampling)  # (B, T, V)
            sampled = rows.roll(-1, dims=1)  # (B, T); a row's last is never scored
            noise = noise_given_tokens(base_probs, sampled, generator)  # (B, T, V)

        # With K = 2 and x0 x1 x2 x3 = tokens[t : t + 4]: the base sampled x1, with noise[t];
        # head 1 is asked for x2, sampled with noise[t + 1]; head 2 for x3, with noise[t + 2].
        of_heads = []
        between = heads.embed(model.embed_tokens, following(rows, K)[row, t])  # (n, K * D)
        logits_of = heads(hidden[row, t], heads_lm_head, between)  # (K, n, v)
        for k, logits in enumerate(logits_of, start=1):
            noise_k = noise[row, t + k] if sampling.temperature > 0 else None  # (n, V)
            scores = gumbel_scores(logits, sampling, noise_k, heads.token_map)  # (n, v)
            index = heads.index_of(rows[row, t + k + 1])  # (n,) of the actual token
            actual = scores.gather(1, index.clamp(min=0)[:, None])  # (n, 1)
            of_heads.append((scores > actual).sum(-1).masked_fill(index == IGNORED, V))
        ranks += torch.stack(of_heads, dim=1).cpu().split(scored.sum(1).tolist())
    return ranks


def rank_paths(ranks: Tensor, heads: MedusaHeads) -> list[tuple[int, ...]]:
    """ranks (n, K) -> the rank path of each position, up to what the heads cannot guess."""
    known = heads.config.truncated_vocab_size
    return [tuple(takewhile(lambda rank: rank < known, row)) for row in ranks.tolist()]


def calibrate(model: GPT, heads: MedusaHeads, rows_of: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """The content of calibration.json. For each temperature: each head's accuracy at all positions,
    and how often each rank prefix came true at the positions where steps start."""
    device, content = model.lm_head.weight.device, {}
    for temperature, (tokens, mask) in tqdm(rows_of.items(), "calibrating"):
        rows = tokens.to(device), mask.to(device)
        ranks = head_ranks(model, heads, *rows, Sampling(float(temperature)))
        texts = [rank_paths(text, heads) for text in ranks]
        tree = calibrated_tree(chain.from_iterable(texts), CALIBRATION_NODES)
        starts = replay(texts, tree)
        counts, found = prefix_counts(starts), {}
        for n in (1, 5):
            shares = (torch.cat(ranks) < n).double().mean(0)  # (K,)
            found[f"top{n}"] = shares.round(decimals=4).tolist()
        kept = ranked_prefixes(counts)[:CALIBRATION_PREFIXES]
        prefixes = {" ".join(map(str, path)): counts[path] for path in kept}
        content[temperature] = found | {"steps": len(starts), "prefixes": prefixes}
    return content


def write_calibration(model: GPT, heads: MedusaHeads, held_out: dict, path: Path) -> None:
    """Write calibration.json, and report accuracies and expected tokens/step."""
    calibration = calibrate(model, heads.float().eval(), held_out)
    write_json(path, calibration)
    for temperature, found in calibration.items():
        pairs = enumerate(zip(found["top1"], found["top5"]), start=1)
        accuracy = "   ".join(f"head {k}: {a:.1%} / {b:.1%}" for k, (a, b) in pairs)
        print(f"temperature {temperature}, top-1 / top-5 on held-out rows:   {accuracy}")
        counts = read_counts(found)
        trees = {n: calibrated_tree(counts, n) for n in (4, 8, 16, 32)}
        expected = [f"{expected_tokens(trees[n], counts):.2f} with {n} nodes" for n in trees]
        print(f"   expected tokens/step: {'   '.join(expected)}")


def write_heads(model: GPT, heads: MedusaHeads, held_out: dict, out: str, base: str) -> None:
    """Heads in the dtype of their base, and their calibration, measured as written."""
    heads.to(disk_dtype(base)).save_pretrained(out)  # `heads` are rounded now, too
    write_calibration(model, heads, held_out, calibration_path(out))


def calibrate_heads(config: CalibrateConfig) -> None:
    check(config.heads != "", "--heads: name the heads to calibrate")
    path = calibration_path(config.heads)
    check_out(str(path.parent))
    device = pick_device(config.device)
    _, model, heads = open_base_and_heads(config, config.precision, device)
    rows = distilled_rows(config, f"{path.parent}/rows", 0)
    held_out = held_out_rows(rows, model.config.vocab_size, heads.config.num_heads)
    write_calibration(model, heads, held_out, path)
    print(f"next: python sample.py --base {config.base} --heads {config.heads}")


@torch.inference_mode()
def perplexity(model: GPT, tokens: Tensor) -> float:
    """exp of the mean cross-entropy on the beginning of a text (n,).

    Every token but the first is scored once, with half a context before it wherever there is one.
    """
    tokens, context = tokens[:PERPLEXITY_TOKENS].long(), model.config.max_position_embeddings
    hop, nats = max(context // 2, 1), 0.0
    count = torch.tensor(len(tokens) - 1, device=model.lm_head.weight.device)

    def loss_of(hidden, targets):
        return [cross_entropy(model.lm_head(hidden), targets, count)]

    for start in range(0, len(tokens) - 1, hop):
        window = tokens[start : start + context + 1].to(count.device)
        # Of a later window, the first context - hop targets were scored with the window before.
        done = 0 if start == 0 else context - hop
        hidden = model(window[None, :-1])[0, done:]  # (n, D)
        nats += in_chunks(loss_of, model.config.vocab_size, hidden, window[1 + done :])[0].item()
    return math.exp(nats) if nats < 700 else math.inf  # more than a float can hold


def main() -> None:
    # Which flags there are depends on the mode.
    chooser = OneLineParser(add_help=False)
    chooser.add_argument("--mode", choices=MODES, default="medusa1", help="what to do")
    config_class, mode = MODES[chooser.parse_known_args()[0].mode]
    config = parsed(config_class, description=config_class.__doc__, parents=[chooser])

    # torchrun sets LOCAL_RANK. One process prints; while it calibrates, the others wait.
    if "LOCAL_RANK" in os.environ:
        on_gpu = torch.cuda.is_available() and config.device in ("auto", "cuda")
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    mode(config)
    if isinstance(config, DistillConfig):
        print(f"next: python train.py --mode medusa1 --base {config.base} --distilled {config.out}")
    if dist.is_initialized():
        # Gloo's threads may hold tensors, and abort a Python that is torn down (pytorch#179291).
        sys.stdout.flush()
        os._exit(0)


MODES: dict[str, tuple[type, Callable]] = {
    "base": (BaseConfig, train_base),
    "distill": (DistillConfig, distill),
    "calibrate": (CalibrateConfig, calibrate_heads),
    "medusa1": (Medusa1Config, train_medusa1),
    "medusa2": (Medusa2Config, train_medusa2),
}

if __name__ == "__main__":
    run(main)
