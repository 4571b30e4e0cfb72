"""Training: a base model, text that it writes itself, and Medusa heads for it.

    python train.py --mode base      a small Llama from nothing: tokenizer, then next-token cross-entropy
    python train.py --mode distill   continuations of seed prompts, sampled from the base model  (paper, "Self-distillation")
    python train.py --mode medusa1   heads on the frozen base  (paper, "Medusa-1"), then the tree is calibrated
    python train.py --mode medusa2   heads alone, then heads and base together  (paper, "Medusa-2")

Without other flags the heads are for the shipped base in data/base, and learn from text distilled from it. Every mode has its own
flags: `python train.py --mode MODE --help`. A run that was stopped goes on with `--resume`; on several GPUs a run is started with
`torchrun --nproc-per-node N train.py ...`. In data/: distilled.py, text that the base writes; rows.py, what a step trains on; lora.py, what of
a base learns, and its teacher; calibration.py, the tree; checkpoint.py, --resume.

Dimension key: B rows, T tokens, D model width, V vocabulary, K heads.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.calibration import calibrate, held_out_rows, report
from data.checkpoint import finish, prepare, resume, save_checkpoint
from data.command import Common, OneLineParser, add_options, option, run
from data.corpus import documents, packed, seeded, windows
from data.distilled import DistillConfig, distill, distilled_rows, regenerate
from data.lora import merge_adapters, trained_base
from data.machine import (
    autocast,
    check_kind,
    is_main_process,
    print0,
    rank_and_world_size,
    sum_over_processes,
)
from data.perplexity import bits_per_byte, perplexity
from data.rows import rows_to_train
from data.shards import base_digest, digest_of
from data.tokenizer import SHIPPED_BASE, copy_tokenizer, disk_dtype, load_base, train_tokenizer
from medusa import (
    DECAY,
    ROOT_ONLY,
    MedusaConfig,
    MedusaHeads,
    Sampling,
    check_compatible,
    cross_entropy_ahead,
    distillation_loss,
    medusa_loss,
)
from model import GPT, ModelConfig, check_sizes, write_atomically, write_json


@dataclass(frozen=True)
class TrainConfig(Common):
    out: str = option("out", "directory to write")
    steps: int = option(1200, "optimiser steps")
    batch: int = option(2, "rows in a batch, over all processes")
    accumulate: int = option(
        1, "parts into which a process splits its rows, one after the other, to save memory"
    )
    context: int = option(256, "tokens in a row")
    lr: float = option(
        7e-3, "learning rate: raised linearly in the warm-up, and lowered to 0 along a cosine"
    )
    warmup: int = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.0, "AdamW weight decay, of matrices only")
    clip: float = option(1.0, "largest norm of the gradient, of heads and of base apart")
    save_every: int = option(200, "steps between checkpoints")
    resume: bool = option(False, "go on from the checkpoint in --out")
    plot: bool = option(
        False, "draw losses, accuracies and rates of the run (needs bench/requirements.txt)"
    )

    def __post_init__(self):
        check_sizes(self, ["steps", "batch", "accumulate", "context", "warmup", "save_every"])
        if not 0 < self.lr < math.inf or not self.clip > 0 or not 0 <= self.weight_decay < math.inf:
            raise ValueError("--lr and --clip must be above 0, --weight-decay 0 or more")


@dataclass(frozen=True)
class BaseConfig(TrainConfig):
    """A Llama from nothing. Its validation text is never trained on, and the tokenizer learns from the training side alone."""

    out: str = option("out/base", "directory to write")
    mtp_weight: float = option(
        1.0,
        "weight, at the end, of the loss of Medusa heads trained along and then dropped: hidden states learn to look ahead",
    )
    vocab_size: int = option(ModelConfig.vocab_size, "pieces of the tokenizer")
    hidden_size: int = option(ModelConfig.hidden_size, "model width")
    intermediate_size: int = option(ModelConfig.intermediate_size, "width inside the MLP")
    num_hidden_layers: int = option(ModelConfig.num_hidden_layers, "blocks")
    num_attention_heads: int = option(ModelConfig.num_attention_heads, "attention heads")
    num_key_value_heads: int = option(ModelConfig.num_key_value_heads, "key/value heads")
    steps: int = option(3600, "optimiser steps")
    context: int = option(1024, "tokens in a row, and the longest context of the model")
    lr: float = option(
        2e-3, "learning rate: raised linearly in the warm-up, and lowered to 0 along a cosine"
    )
    warmup: int = option(150, "steps of linear warm-up")
    weight_decay: float = option(0.1, "AdamW weight decay, of matrices only")

    def __post_init__(self):
        super().__post_init__()
        if not self.mtp_weight >= 0:
            raise ValueError(f"--mtp-weight {self.mtp_weight}: must be 0 or more")


@dataclass(frozen=True)
class Medusa1Config(TrainConfig):
    """L = sum_k decay^k CE(head_probs_k at t, token t+k+1) on the frozen base."""

    base: str = option(SHIPPED_BASE, "directory of the base model")
    out: str = option("out/heads", "directory to write")
    data: str = option(
        "distilled",
        "text to train on: distilled from the base, or the corpus itself",
        choices=("distilled", "corpus"),
    )
    distilled: str = option(
        "",
        "a directory that --mode distill wrote; default: the shipped one for the shipped base, else one made now and cached",
    )
    num_heads: int = option(MedusaConfig.num_heads, "K, heads to train")
    num_hidden_layers: int = option(MedusaConfig.num_hidden_layers, "residual layers of a head")
    truncated_vocab_size: int = option(
        MedusaConfig.truncated_vocab_size,
        "tokens that heads with a shared LM head guess among, the most frequent of the text; 0: all",
    )
    original_lm_head: bool = option(
        MedusaConfig.original_lm_head,
        "share the base's LM head; --no-original-lm-head gives each head its own",
    )
    decay: float = option(DECAY, "weight of head k's loss is decay^k")

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, ["num_heads", "num_hidden_layers"])
        if self.context < 2:
            raise ValueError(f"--context {self.context}: a token needs another to guess")
        if (
            not 0 < self.decay < math.inf
            or self.truncated_vocab_size < 0
            or self.truncated_vocab_size
            and not self.original_lm_head
        ):
            raise ValueError(
                "--decay must be above 0, --truncated-vocab-size 0 or more, and 0 beside --no-original-lm-head"
            )
        if (
            Path(self.base).resolve()
            == (Path(self.out) / ("base" if isinstance(self, Medusa2Config) else "")).resolve()
        ):
            raise ValueError(
                f"--out {self.out} would overwrite its own --base: name another directory"
            )
        if self.data == "distilled" and self.context != TrainConfig.context:
            raise ValueError(
                "--context belongs to --data corpus: distilled rows are as long as they were written"
            )


@dataclass(frozen=True)
class Medusa2Config(Medusa1Config):
    """L = L_base + lambda_0 L_medusa, after a stage in which the heads learn alone. Writes OUT/base and OUT/heads."""

    out: str = option("out/medusa2", "directory to write")
    heads: str = option("", "directory of trained heads to start from; default: new ones")
    heads_steps: int = option(800, "steps of the first stage, heads alone; 0: none")
    steps: int = option(1600, "steps of the second stage, heads and base together")
    lr: float = option(
        2e-3,
        "learning rate of the heads: raised linearly in the warm-up of each stage, and lowered to 0 along a cosine",
    )
    lr_ratio: float = option(4.0, "how many times lower the base's learning rate is")
    lambda_0: float = option(0.2, "weight of the heads' loss beside the base's")
    ramp: bool = option(False, "raise lambda_0 along a sine from 0")
    base_loss: str = option(
        "auto",
        "kl: to the base as it was; ce: the text's own tokens; auto: kl on distilled text, else ce",
        choices=("auto", "kl", "ce"),
    )
    lora: bool = option(
        False,
        "train adapters of the base's linear layers in place of the weights; they are merged in the end",
    )
    checkpoint_activations: bool = option(
        False, "recompute the blocks' activations in the backward pass, to save memory"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.heads_steps < 0 or not self.lr_ratio > 0 or not self.lambda_0 >= 0:
            raise ValueError("--heads-steps and --lambda-0 must be 0 or more, --lr-ratio above 0")
        new = ("num_heads", "num_hidden_layers", "original_lm_head", "truncated_vocab_size")
        if self.heads and any(getattr(self, name) != getattr(MedusaConfig, name) for name in new):
            raise ValueError(
                "--num-heads, --num-hidden-layers, --original-lm-head and --truncated-vocab-size are of new heads: leave them out beside --heads"
            )


MODES: dict[str, type[Common]] = {
    "base": BaseConfig,
    "distill": DistillConfig,
    "medusa1": Medusa1Config,
    "medusa2": Medusa2Config,
}


# ---- optimisation, the same in every mode ----


def learning_rate(step: int, lr: float, warmup: int, steps: int) -> float:
    """Linear warm-up, times a cosine from 1 at the first step to 0 behind the last.

    >>> [round(learning_rate(step, 1.0, warmup=2, steps=4), 2) for step in range(4)]
    [0.5, 0.85, 0.5, 0.15]
    """
    return lr * min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def sine_ramp(step: int, steps: int) -> float:
    """sin(pi/2 * step / steps), from 0 at the first step to nearly 1 at the last: a factor of the weight of the heads' loss  (paper, "Medusa-2")"""
    return math.sin(math.pi / 2 * step / steps)


CHUNK_LOGITS = (
    1 << 24
)  # at most so many logits of heads, base and teacher stand in memory at once; a chunk is one position at least


def targets_ahead(tokens: Tensor, mask: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What of tokens (B, T) is to be fed, given mask (B, T) bool, True where a token carries loss as a target; and the targets of each position.

    Returns the tokens to feed (B, t), up to the last target; which of these positions have a target at all (B, t) bool, n of them; and
    for each of the n a row of its own token and the K + 1 behind it, (n, K + 2), and which of these carry loss. Head k's is in column k + 1.
    """
    width = max(
        [2, *(mask.any(0).nonzero()[:, 0] + 1).tolist()]
    )  # behind the last target nothing is learnt
    tokens, mask = tokens[:, :width], mask[:, :width]
    ahead, loss_mask = (
        F.pad(rows, (0, K)).unfold(1, K + 2, 1) for rows in (tokens, mask)
    )  # (B, t, K + 2)
    used = loss_mask[..., 1:].any(-1)  # (B, t)
    used[0, 0] |= ~used.any()  # one at least, so that there is a gradient
    return tokens[:, :-1], used, ahead[used], loss_mask[used]


def backpropagate(
    model: GPT,
    heads: MedusaHeads,
    tokens: Tensor,
    mask: Tensor,
    counts: Tensor,
    weights: tuple[float, float],
    decay: float = DECAY,
    teacher=None,
) -> Tensor:
    """Add the gradient of weights[0] * L_base + weights[1] * L_medusa to the parameters.

    tokens (B, T), mask (B, T) bool, counts (K + 1,): the targets that carry loss in the whole batch, of which these rows are a part,
    for the base and each head. teacher is a pair, a function from tokens to hidden states and its LM head: L_base is the KL divergence
    to it, or cross-entropy without one. With weights[0] = 0 the base is frozen, and `model` may be anything that makes hidden states of
    tokens and has an lm_head (data/states.py).
    Returns (2K + 1,): the losses of base and heads, and the share of targets that each head's first guess met.

    K x V logits of all positions would fill the memory. So the hidden states are cut off from the base, the loss is taken
    chunk by chunk and backpropagated to them, and from there through the base once. Positions without a target are left out.
    """
    weight_base, weight_heads = weights
    K, V, truncated = (
        heads.config.num_heads,
        heads.config.vocab_size,
        heads.config.truncated_vocab_size,
    )
    tokens, used, ahead, loss_mask = targets_ahead(
        tokens, mask, K
    )  # (B, t) twice, (n, K + 2) twice
    targets = heads.places(
        ahead
    )  # what a truncated vocabulary leaves out is no target of the heads
    with torch.set_grad_enabled(weight_base > 0):
        hidden = model(tokens)[used]  # (n, D)
    cut = hidden.detach().requires_grad_(weight_base > 0)
    figures = torch.zeros(2 * K + 1, device=tokens.device)
    if teacher and weight_base > 0:
        with torch.no_grad():
            teacher_hidden, teacher_head = teacher[0](tokens)[used], teacher[1]  # (n, D)
    chunk = max(CHUNK_LOGITS // (K * truncated + 2 * V * (weight_base > 0)), 1)
    for start in range(0, len(cut), chunk):
        part = slice(start, start + chunk)
        loss = torch.zeros((), device=tokens.device)
        if weight_base > 0:
            logits = model.lm_head(cut[part])  # (chunk, V)
            if teacher:
                loss = distillation_loss(
                    logits,
                    teacher_head(teacher_hidden[part]).detach(),
                    loss_mask[part, 1],
                    counts[0],
                )
            else:
                loss = cross_entropy_ahead(
                    logits[:, None], ahead[part], loss_mask[part], 1, counts[0]
                )  # each position as a row of one
            figures[0] += loss.detach()
            loss = weight_base * loss
        if weight_heads > 0:
            guesses = heads(cut[part], heads.shortened(model.lm_head))  # (K, chunk, truncated V)
            wanted, known = targets[part], loss_mask[part] & (targets[part] >= 0)  # (chunk, K + 2)
            medusa, per_head = medusa_loss(guesses[:, :, None], wanted, known, decay, counts[1:])
            hits = ((guesses.argmax(-1).mT == wanted[:, 2:]) & known[:, 2:]).sum(0)  # (K,)
            figures[1:] += torch.cat((per_head.detach(), hits / counts[1:].clamp(min=1)))
            loss = loss + weight_heads * medusa
        if loss.requires_grad:
            loss.backward()
    if weight_base > 0:
        hidden.backward(cut.grad)
    return figures


def is_matrix(parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices, not for gains and biases; the biases of heads are (J, K, 1, D)."""
    return parameter.dim() > 1 and parameter.shape[-2] > 1


def adamw(
    config: TrainConfig, parts: dict[str, dict[str, nn.Parameter]], device: torch.device
) -> torch.optim.AdamW:
    """AdamW over two groups of each part: matrices, and gains and biases."""
    groups = [
        {
            "part": part,
            "params": [p for p in parameters.values() if matrix == is_matrix(p)],
            "weight_decay": config.weight_decay * matrix,
        }
        for part, parameters in parts.items()
        for matrix in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=device.type in ("cpu", "cuda"),
    )


def train_loop(
    config: TrainConfig,
    steps: int,
    rows_of_step: Callable[[int], tuple[Tensor, Tensor]],
    step_on_rows: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    parts: dict[str, dict[str, nn.Parameter]],
    rates: Callable[[int], dict[str, float]],
    K: int,
    device: torch.device,
    inputs: str,
) -> None:
    """AdamW on all parts, to the last step. What a step does depends on its number alone, so that a run can go on where it was stopped.

    steps         config.steps, and in Medusa-2 those of the first stage too
    rows_of_step  step -> tokens (B, T) and mask (B, T) of the whole batch
    step_on_rows  (step, tokens, mask, counts) of some of these rows -> the figures of `backpropagate`, which has added the gradients
    parts         name -> its parameters by name; each part is clipped by itself, and has the learning rate that `rates` gives
    K             heads
    inputs        names what the run depends on besides its settings
    """
    process, processes = rank_and_world_size()
    optimizer = adamw(config, parts, device)
    log = Path(config.out) / "log.jsonl"
    first = resume(config, parts, optimizer, inputs)
    lines = log.read_text().splitlines()[:first] if first and log.exists() else []
    bar = tqdm(
        range(first, steps),
        desc="training",
        unit="step",
        mininterval=1,
        initial=first,
        total=steps,
        disable=process > 0,
    )
    for step in bar:
        tokens, mask = rows_of_step(step)
        counts = torch.stack([mask[:, ahead:].sum() for ahead in range(1, K + 2)]).to(
            device
        )  # (K + 1,), of base and heads
        now = rates(step)
        for group in optimizer.param_groups:
            group["lr"] = now[group["part"]]
        pieces = list(
            zip(
                tokens.tensor_split(processes * config.accumulate),
                mask.tensor_split(processes * config.accumulate),
            )
        )
        mine = [
            step_on_rows(step, rows.to(device), loss_mask.to(device), counts)
            for rows, loss_mask in pieces[process::processes]
        ]
        figures = torch.stack(mine).sum(0)
        gradients = [
            p.grad
            for parameters in parts.values()
            for p in parameters.values()
            if p.grad is not None
        ]
        sum_over_processes([figures, *gradients])
        norms = {
            part: nn.utils.clip_grad_norm_(parameters.values(), config.clip).item()
            for part, parameters in parts.items()
        }
        figures = figures.tolist()
        if not math.isfinite(sum(figures) + sum(norms.values())):
            raise ValueError(
                f"the loss is {figures[: K + 1]} at step {step}, the gradient's norm {norms}: try a lower --lr or --precision float32; "
                f"{config.out} keeps the last checkpoint"
            )
        optimizer.step()
        optimizer.zero_grad()
        record = {
            "step": step,
            "base": figures[0],
            "heads": figures[1 : K + 1],
            "top1": figures[K + 1 :],
            "lr": now,
            "norm": norms,
        }  # losses of weight 0 are 0
        lines.append(json.dumps(record))
        bar.set_postfix(
            base=f"{figures[0]:.2f}", heads=" ".join(f"{value:.2f}" for value in figures[1 : K + 1])
        )
        if process == 0 and ((step + 1) % config.save_every == 0 or step + 1 == steps):
            write_atomically(
                log,
                lambda temporary: temporary.write_text("\n".join(lines) + "\n", encoding="utf-8"),
            )
            save_checkpoint(config, step + 1, parts, optimizer, inputs)


# ---- base ----


def train_base(config: BaseConfig) -> None:
    check_kind(config.out, heads=False)
    device, dtype = prepare(config)
    shape = {
        f.name: getattr(config, f.name) for f in fields(ModelConfig) if hasattr(config, f.name)
    }
    model_config = ModelConfig(**shape, max_position_embeddings=config.context)
    texts, held_out = documents(False, config.text), documents(True, config.text)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokens, held_out_tokens = packed(texts, tokenizer), packed(held_out, tokenizer)
    torch.manual_seed(seeded(config.seed).initial_seed())
    model = GPT(model_config).to(device)
    heads = MedusaHeads(MedusaConfig(config.hidden_size, config.vocab_size)).to(
        device
    )  # trained along, then dropped: --mtp-weight
    print0(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens of text, {dtype} on {device}"
    )

    def rows_of_step(step: int) -> tuple[Tensor, Tensor]:
        rows = windows(
            tokens, config.batch, config.context + 1, seeded(config.seed, step)
        )  # (B, T + 1)
        return rows, torch.ones_like(rows, dtype=torch.bool)

    def step_on_rows(step: int, rows: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
        with autocast(device, dtype):
            return backpropagate(
                model,
                heads,
                rows,
                mask,
                counts,
                (1.0, config.mtp_weight * sine_ramp(step, config.steps)),
            )

    def rates(step: int) -> dict[str, float]:
        return dict.fromkeys(
            ("base", "heads"), learning_rate(step, config.lr, config.warmup, config.steps)
        )

    parts = {"base": dict(model.named_parameters()), "heads": dict(heads.named_parameters())}
    train_loop(
        config,
        config.steps,
        rows_of_step,
        step_on_rows,
        parts,
        rates,
        heads.config.num_heads,
        device,
        digest_of(tokens),
    )
    if is_main_process():
        tokenizer.save(config.out)
        model.save_pretrained(config.out, torch.float16)
        bits = bits_per_byte(
            GPT.from_pretrained(config.out, device=device),
            held_out_tokens,
            sum(len(text.encode()) for text in held_out),
        )
        finish(config)
        size = sum(
            (Path(config.out) / name).stat().st_size
            for name in ("config.json", "model.safetensors", "tokenizer.model")
        )
        print0(f"{config.out}: {bits:.3f} bits per byte on held-out text, in {size:,} bytes")
        print0(f"next: python train.py --mode medusa1 --base {config.out}")


# ---- medusa1 and medusa2 ----


def heads_to_train(config: Medusa1Config, model: GPT, device: torch.device) -> MedusaHeads:
    if isinstance(config, Medusa2Config) and config.heads:
        heads = MedusaHeads.from_pretrained(config.heads, device=device)
        check_compatible(model, heads, ROOT_ONLY)
        return heads
    sizes = (
        config.num_heads,
        config.num_hidden_layers,
        config.original_lm_head,
        config.truncated_vocab_size,
    )
    return MedusaHeads(
        MedusaConfig(model.config.hidden_size, model.config.vocab_size, *sizes), model.lm_head
    ).to(device, torch.float32)


def schedule(config: Medusa1Config, step: int) -> tuple[tuple[float, float], dict[str, float]]:
    """The weights of the base's and the heads' losses, and the learning rates. Medusa-1, and Medusa-2's first stage: heads alone."""
    if not isinstance(config, Medusa2Config) or step < config.heads_steps:
        alone = config.heads_steps if isinstance(config, Medusa2Config) else config.steps
        return (0.0, 1.0), {
            "base": 0.0,
            "heads": learning_rate(step, config.lr, config.warmup, alone),
        }
    step -= config.heads_steps
    rate = learning_rate(step, config.lr, config.warmup, config.steps)
    return (1.0, config.lambda_0 * (sine_ramp(step, config.steps) if config.ramp else 1.0)), {
        "base": rate / config.lr_ratio,
        "heads": rate,
    }


def train_medusa(config: Medusa1Config) -> None:
    """Medusa-1, and with a Medusa2Config Medusa-2."""
    # what learns, and from what
    joint = isinstance(config, Medusa2Config)
    if not joint:
        check_kind(config.out, heads=True)
    device, dtype = prepare(config)
    tokenizer, model = load_base(
        config.base, torch.float32 if joint else dtype, device
    )  # a frozen base needs no more digits than it is used with
    model.requires_grad_(False)
    heads = heads_to_train(config, model, device)
    text = packed(documents(True, config.text), tokenizer)
    before = perplexity(model, text) if is_main_process() and joint else None
    shards = distilled_rows(config)
    rows_of_step, targets, frozen_base = rows_to_train(config, shards, tokenizer, model)
    if config.truncated_vocab_size and heads.token_map is not None:
        heads.token_map.copy_(
            targets.bincount(minlength=model.config.vocab_size)
            .topk(config.truncated_vocab_size)
            .indices
        )
    held_out = held_out_rows(shards, model.config.vocab_size, heads.config.num_heads)
    parts, teacher = {"heads": dict(heads.named_parameters())}, None
    if joint:
        parts["base"], teacher = trained_base(config, model)
    print0(
        f"{sum(p.numel() for part in parts.values() for p in part.values()):,} parameters to train, {heads.config.num_heads} heads, {dtype} on {device}"
    )

    def step_on_rows(step: int, tokens: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
        weights, _ = schedule(config, step)
        for p in parts.get("base", {}).values():  # which stands still in the first stage
            p.requires_grad_(weights[0] > 0)
        with autocast(device, dtype):
            return backpropagate(
                model if weights[0] > 0 else frozen_base,
                heads,
                tokens,
                mask,
                counts,
                weights,
                config.decay,
                teacher,
            )

    inputs = digest_of(base_digest(config.base), targets)
    steps = config.steps + (config.heads_steps if joint else 0)
    train_loop(
        config,
        steps,
        rows_of_step,
        step_on_rows,
        parts,
        lambda step: schedule(config, step)[1],
        heads.config.num_heads,
        device,
        inputs,
    )
    if not is_main_process():
        return

    # what it leaves: base, heads, calibration
    base, out = config.base, config.out
    if joint:
        base, out = f"{config.out}/base", f"{config.out}/heads"
        merge_adapters(model)
        copy_tokenizer(config.base, base)
        model.save_pretrained(base, disk_dtype(config.base))
        model = load_base(base, device=device)[1]
        # the base has changed: it continues the held-out prompts anew
        held_out = {
            t: regenerate(model, *rows, Sampling(float(t)), config.seed)
            for t, rows in held_out.items()
        }
    print0(
        "the heads are trained; calibrating on held-out rows, and measuring the base's perplexity"
    )
    heads = heads.to(disk_dtype(base)).float().eval()  # as they will stand on disk
    calibration = calibrate(model, heads, held_out)
    heads.to(disk_dtype(base)).save_pretrained(out)
    write_json(Path(out) / "calibration.json", calibration)
    finish(config)
    after = perplexity(model, text)
    print0(
        f"perplexity of the base on held-out text: {after:.3f}, "
        + (f"frozen, in {dtype}" if before is None else f"{before:.3f} before training")
    )
    report(base, out, calibration)


def main() -> None:
    chooser = OneLineParser(add_help=False)
    chooser.add_argument("--mode", choices=MODES, default="medusa1")
    mode = chooser.parse_known_args()[0].mode  # which flags there are depends on it
    parser = OneLineParser(description=MODES[mode].__doc__)
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="medusa1",
        help="what to do; the flags below are those of this mode (default: medusa1)",
    )
    add_options(parser, MODES[mode])
    arguments = vars(parser.parse_args())
    config = MODES[arguments.pop("mode")](**arguments)
    if "LOCAL_RANK" in os.environ:  # one of several processes that torchrun started
        backend = (
            "nccl" if torch.cuda.is_available() and config.device in ("auto", "cuda") else "gloo"
        )
        dist.init_process_group(
            backend, timeout=timedelta(days=1)
        )  # the others wait while the first calibrates
    try:
        if isinstance(config, BaseConfig):
            train_base(config)
        elif isinstance(config, DistillConfig):
            out = (
                "" if config.base == SHIPPED_BASE else f" --out {Path(config.base) / 'heads'}"
            )  # where sample.py looks for them
            print0(
                f"next: python train.py --mode medusa1 --base {config.base} --distilled {distill(config)}{out}"
            )
        elif isinstance(config, Medusa1Config):
            train_medusa(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
