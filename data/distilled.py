"""Text that a base model writes itself, to train its heads on  (paper, "Self-distillation"). Dimension key: R rows, P and T tokens, V vocabulary."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.calibration import CALIBRATION_TEMPERATURES
from data.chat import turn_prompts
from data.command import Common, option
from data.corpus import cache_directory, documents, packed, seeded, windows
from data.machine import check_out, pick_device, pick_precision, rank_and_world_size
from data.shards import base_digest, digest_of, metadata_of, write_shard
from data.states import states_path, write_states
from data.tokenizer import SHIPPED_BASE, load_base
from medusa import Sampling, draw, exponential, logits_to_probs
from model import GPT, check_sizes

SHIPPED_ROWS = Path("data/distilled")
HELD_OUT_ROWS = 256  # at most, of each temperature


@dataclass(frozen=True)
class DistillConfig(Common):
    """Text of the base's own: windows of the corpus as prompts, continued by sampling. Only the continuation carries loss."""

    base: str = option(SHIPPED_BASE, "directory of the base model")
    out: str = option(
        "", "directory to write; default: in the cache, under a name that depends on all settings"
    )
    shards: int = option(
        12,
        "files to write, besides the held-out ones; one that exists is kept, so that a stopped run goes on where it was",
    )
    rows: int = option(
        256, f"rows in a shard, sampled together; a held-out one has no more than {HELD_OUT_ROWS}"
    )
    chat: bool = option(
        False,
        "the --text files hold a user's turn a line, as data/turns.py writes them: the base answers these, by its chat template",
    )
    prompt_tokens: int = option(32, "tokens of a prompt; with --chat, longer ones are left out")
    new_tokens: int = option(
        224, "tokens sampled behind each prompt, at most: a row ends with its document"
    )
    temperature: float = option(0.7, "sampling temperature")
    top_p: float = option(1.0, "nucleus")
    states: bool = option(
        False,
        "keep the base's last hidden states too, 2 bytes a number: --mode medusa1 reads them in place of running the base in each step, and so does the first stage of medusa2",
    )

    def __post_init__(self):
        check_sizes(self, ["rows", "prompt_tokens", "new_tokens"])
        if self.shards < 0:
            raise ValueError(f"--shards {self.shards}: must be 0 (held-out rows alone) or more")
        Sampling(
            self.temperature, top_p=self.top_p
        )  # refuses bad values before anything is sampled


@torch.inference_mode()
def sample_rows(
    model: GPT,
    prompts: list[list[int]],
    length: int,
    sampling: Sampling,
    generator: torch.Generator,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue R prompts of any lengths to rows of at most `length` tokens: tokens (R, length), and True where a sampled token stands.

    Given states (R, length - 1, D), the base's last hidden states are written there, before each row's end.
    All rows grow together, by a token a step; where a longer prompt still has a token of its own, that one is fed. A row ends after EOS
    and leaves the batch; what stands behind its end is no text and carries no loss.
    """
    device = model.lm_head.weight.device
    tokens = torch.tensor(
        [prompt + [0] * (length - len(prompt)) for prompt in prompts], device=device
    )  # (R, length)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (R,)
    ends = torch.tensor(model.config.eos_ids, dtype=torch.long, device=device)
    cache = model.new_cache(length, batch=len(prompts))
    shortest = min(map(len, prompts))
    rows, new = (
        torch.arange(len(prompts), device=device),
        tokens[:, :shortest],
    )  # the rows still alive, and their tokens to feed
    for position in range(shortest, length):
        hidden = model(new, cache=cache)  # (alive, tokens fed, D)
        if states is not None:
            states[rows, position - hidden.shape[1] : position] = hidden.to(states)
        base_probs = logits_to_probs(model.lm_head(hidden[:, -1]), sampling)  # (alive, V)
        loss_mask[rows, position] = sampled = sizes[rows] <= position  # (alive,)
        tokens[rows, position] = torch.where(
            sampled, draw(base_probs, exponential(base_probs, generator)), tokens[rows, position]
        )
        new = tokens[rows, position, None]  # (alive, 1)
        alive = ~(sampled & torch.isin(new[:, 0], ends))  # (alive,)
        if not alive.all():
            n = int(alive.sum())
            kept = torch.arange(n, device=device)
            kept[~alive[:n]] = (
                n + alive[n:].nonzero()[:, 0]
            )  # the last ones move up into the gaps: the cache is large
            rows, new = rows[kept], new[kept]
            cache.keep_batch(kept)
        if len(rows) == 0:
            break
    return tokens, loss_mask


def regenerate(
    model: GPT, tokens: Tensor, loss_mask: Tensor, sampling: Sampling, seed: int
) -> tuple[Tensor, Tensor]:
    """The prompts of these rows, continued by this model: tokens (R, T) and loss (R, T)."""
    prompts = [
        row[: max(n, 1)].tolist() for row, n in zip(tokens, loss_mask.int().argmax(1))
    ]  # what stands before the first sampled token
    return sample_rows(
        model.eval(),
        prompts,
        tokens.shape[1],
        sampling,
        seeded(seed, device=model.lm_head.weight.device),
    )


def turns_of_shard(prompts: list[list[int]], i: int, rows: int, shards: int) -> list[list[int]]:
    """The prompts of shard i, each taken as often as the others, give or take one; near in length, so that they are continued from the start."""
    places = sorted(range(shards * rows), key=lambda place: len(prompts[place % len(prompts)]))
    return [prompts[place % len(prompts)] for place in places[i * rows : (i + 1) * rows]]


def distill(config: DistillConfig) -> Path:
    """Write config.shards shards of training rows and one of validation rows for each temperature, dealt out to the processes of the run;
    returns their directory when all are there."""
    if config.out:
        check_out(config.out)
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    tokenizer, model = load_base(config.base, dtype, device)
    if config.prompt_tokens + config.new_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"--prompt-tokens {config.prompt_tokens} + --new-tokens {config.new_tokens} are more than the context of {config.base}, "
            f"{model.config.max_position_embeddings}: use --mode distill with smaller ones, then --mode medusa1 with --distilled"
        )
    if config.chat:
        sides: dict[str, Any] = turn_prompts(
            config.text, config.base, tokenizer, config.prompt_tokens
        )
    else:
        sides = {
            name: packed(documents(name == "validation", config.text), tokenizer)
            for name in ("validation", "train")
        }
    settings = distill_digest(config, *sides.values())
    made = f"{base_digest(config.base)} {settings}"
    directory = Path(config.out) if config.out else cache_directory() / f"distilled-{settings}"
    shards = [
        ("validation", 0, t, directory / f"validation-{t}.safetensors")
        for t in CALIBRATION_TEMPERATURES
    ]
    shards += [
        ("train", i, config.temperature, directory / f"train-{i:05d}.safetensors")
        for i in range(config.shards)
    ]
    for *_, path in shards:  # all of them, so that no process begins beside what it may not touch
        if path.exists() and metadata_of(path).get("base") != made:
            raise ValueError(
                f"{path} was written by another base, from other text or with other settings: remove {directory}, or give another --out"
            )
    process, processes = rank_and_world_size()
    mine = list(enumerate(shards))[process::processes]
    for number, (side, i, temperature, path) in tqdm(
        mine, desc="distilling", unit="shard", disable=process > 0
    ):
        keeps = config.states and side == "train"
        if (
            not path.exists()
            or keeps
            and not metadata_of(states_path(path)).get("rows", "").startswith(made)
        ):
            rows = config.rows if side == "train" else min(config.rows, HELD_OUT_ROWS)
            if config.chat:
                prompts = turns_of_shard(
                    sides[side], i, rows, max(config.shards, 1) if side == "train" else 1
                )
            else:
                prompts = windows(
                    sides[side], rows, config.prompt_tokens, seeded(config.seed, i)
                ).tolist()
            sampling = Sampling(temperature, top_p=config.top_p if side == "train" else 1.0)
            length, generator = (
                config.prompt_tokens + config.new_tokens,
                seeded(config.seed, number, device=device),
            )
            states = (
                torch.zeros(
                    rows, length - 1, model.config.hidden_size, dtype=torch.float16, device=device
                )
                if keeps
                else None
            )
            tokens, loss_mask = sample_rows(model, prompts, length, sampling, generator, states)
            if states is not None:
                write_states(path, states, tokens, loss_mask, made)
            write_shard(path, tokens, loss_mask, model.config.vocab_size, made)
    if processes > 1:
        dist.barrier()
    return directory


def distill_digest(config: DistillConfig, *prompts: Tensor | list) -> str:
    """Names a set of shards by all that shapes it."""
    not_shaping = {"base", "out", "text", "device", "precision", "states"} | (
        set() if config.chat else {"shards"}
    )  # turns are dealt out over all shards
    settings = {name: value for name, value in asdict(config).items() if name not in not_shaping}
    return digest_of(settings, base_digest(config.base), *prompts)


def distilled_rows(config) -> Path:
    """The directory of the rows that a run of train.py trains and calibrates on; made first, if it has to be."""
    base = base_digest(config.base)
    if config.distilled:
        for path in Path(config.distilled).glob("*.safetensors"):
            if not metadata_of(path).get("base", base).startswith(base):
                raise ValueError(
                    f"--distilled: {path} was not written by the base in {config.base}: distil anew, or name that base"
                )
        return Path(config.distilled)
    if not config.text and metadata_of(SHIPPED_ROWS / "train-00000.safetensors").get(
        "base", ""
    ).startswith(base):
        return SHIPPED_ROWS
    shards = (
        DistillConfig.shards if config.data == "distilled" else 0
    )  # the held-out rows come along with any
    more = DistillConfig(
        base=config.base,
        text=config.text,
        seed=config.seed,
        device=config.device,
        precision=config.precision,
        shards=shards,
    )
    return distill(more)
