"""calibration.json: how often the heads were right, measured on held-out rows. Trees are built of it, and speed-ups promised.

Dimension key: B rows, T tokens, K heads, V vocabulary.
"""

import copy
from collections import Counter
from itertools import chain, takewhile
from pathlib import Path

import torch
from torch import Tensor

from data.shards import read_shards
from medusa import MedusaHeads, Sampling, exponential, gumbel_scores, logits_to_probs
from model import GPT, read_json
from tree import calibrated_tree, expected_tokens, prefix_counts, ranked_prefixes, replay

CALIBRATION_TEMPERATURES = (0.0, 0.7, 1.0)
CALIBRATION_NODES, CALIBRATION_PREFIXES = 16, 256


def held_out_rows(directory: Path, vocab_size: int, K: int) -> dict[str, tuple[Tensor, Tensor]]:
    """{temperature: tokens (R, T) and loss (R, T)}"""
    rows_of = {
        str(t): read_shards(directory, f"validation-{t}.safetensors", vocab_size)
        for t in CALIBRATION_TEMPERATURES
    }
    if not all(
        loss_mask.shape[1] > K + 1 and scored(loss_mask, K).any()
        for _, loss_mask in rows_of.values()
    ):
        raise ValueError(
            f"{directory}: no held-out row is long enough for {K} heads: distil with more --new-tokens"
        )
    return rows_of


def scored(loss_mask: Tensor, K: int) -> Tensor:
    """(B, T) bool -> (B, T-K-1) bool: positions t of which all tokens that are guessed, t+1 .. t+K+1, carry loss."""
    return loss_mask[:, 1:].unfold(1, K + 1, 1).all(-1)


def noise_given_tokens(
    base_probs: Tensor, tokens: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Noise with which `draw` gives these tokens (n,), as likely as it is given that: (n, V).

    The first of a race arrives after a time of rate 1; whoever is still on the way then has as long to go as at the start.
    """
    first = exponential(base_probs[:, :1], generator)  # (n, 1)
    noise = base_probs * first + exponential(base_probs, generator).scatter(1, tokens[:, None], 0)
    return noise.clamp(min=torch.finfo(noise.dtype).tiny)


@torch.inference_mode()
def head_ranks(
    model: GPT,
    heads: MedusaHeads,
    tokens: Tensor,
    loss_mask: Tensor,
    sampling: Sampling = Sampling(),
) -> list[Tensor]:
    """The rank (0 is the first guess) that each head gave to the token that came: for each row (n, K), at its positions that are `scored`.

    What a truncated vocabulary leaves out has the rank V, which no guess has.
    Of rows that were sampled the noise is gone: another is made with which these tokens would have been drawn. The base may be in half
    precision, but logits are not: there many are equal.
    """
    K, ranks, generator = heads.config.num_heads, [], torch.Generator(tokens.device).manual_seed(0)
    lm_head = (
        model.lm_head
        if model.lm_head.weight.dtype == heads.weight.dtype
        else copy.deepcopy(model.lm_head).to(heads.weight.dtype)
    )
    for row, mask in zip(tokens, loss_mask):
        places = scored(mask[None], K)[0].nonzero()[:, 0]  # (n,)
        if len(places) == 0:
            ranks.append(torch.empty(0, K, dtype=torch.long))
            continue
        a, b = int(places[0]), int(places[-1]) + 1
        hidden = model(row[None, : b + K])[0, a:].to(
            heads.weight.dtype
        )  # (b-a+K, D), of positions a, a+1, ...
        if sampling.temperature > 0:
            noise = noise_given_tokens(
                logits_to_probs(lm_head(hidden), sampling), row[a + 1 : b + K + 1], generator
            )  # (b-a+K, V), of tokens a+1, a+2, ...
        found = []
        for k, logits in enumerate(
            heads(hidden[: b - a], heads.shortened(lm_head)), start=1
        ):  # at t they guess token t+k+1
            scores = gumbel_scores(
                heads.widened(logits),
                sampling,
                noise[k : k + b - a] if sampling.temperature > 0 else None,
            )  # (b-a, V)
            came = row[a + k + 1 : b + k + 1]  # (b-a,)
            rank = (scores > scores.gather(1, came[:, None])).sum(-1)
            found.append(rank.masked_fill(heads.places(came) < 0, heads.config.vocab_size))
        ranks.append(torch.stack(found, dim=1)[places - a].cpu())  # (n, K)
    return ranks


def paths_of(ranks: Tensor, guessed: int) -> list[tuple[int, ...]]:
    """ranks (n, K) -> the rank path of each position, up to what is not among the `guessed` tokens."""
    return [tuple(takewhile(lambda rank: rank < guessed, row)) for row in ranks.tolist()]


def calibrate(model: GPT, heads: MedusaHeads, rows_of: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """The content of calibration.json: for each temperature each head's accuracy at all positions, and the counts of rank prefixes at those
    where steps start, as a `replay` with a tree of CALIBRATION_NODES finds them.
    """
    report = {}
    for temperature, (tokens, loss_mask) in rows_of.items():
        device = model.lm_head.weight.device
        texts = head_ranks(
            model, heads, tokens.to(device), loss_mask.to(device), Sampling(float(temperature))
        )
        ranks, texts = (
            torch.cat(texts),
            [paths_of(text, heads.config.truncated_vocab_size) for text in texts],
        )
        starts = replay(texts, calibrated_tree(chain.from_iterable(texts), CALIBRATION_NODES))
        counts = prefix_counts(starts)
        report[temperature] = {
            "top1": [
                round((ranks[:, k] < 1).double().mean().item(), 4) for k in range(ranks.shape[1])
            ],
            "top5": [
                round((ranks[:, k] < 5).double().mean().item(), 4) for k in range(ranks.shape[1])
            ],
            "steps": len(starts),
            "prefixes": {
                " ".join(map(str, path)): counts[path]
                for path in ranked_prefixes(counts)[:CALIBRATION_PREFIXES]
            },
        }
    return report


def read_prefixes(result: dict) -> Counter:
    """The prefix counts of one temperature in calibration.json. Raises AttributeError, KeyError, TypeError or ValueError for what is none."""
    counts = Counter(
        {tuple(map(int, path.split())): count for path, count in result["prefixes"].items()}
    ) | Counter({(): result["steps"]})
    if not all(type(count) is int for count in counts.values()) or result["steps"] < 1:
        raise ValueError("counts must be whole numbers, and steps above 0")
    if not all(count <= counts.get(path[:-1], 0) for path, count in counts.items() if path):
        raise ValueError("a prefix cannot come more often than its own prefix")
    return counts


def read_calibration(directory, temperature: float) -> tuple[Counter, str]:
    """The prefix counts measured at the temperature nearest to this one, and that temperature."""
    path = Path(directory) / "calibration.json"
    content = read_json(path)
    try:
        nearest = min(content, key=lambda measured: abs(float(measured) - temperature))
        return read_prefixes(content[nearest]), nearest
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no calibration: {error!r}; train.py --mode medusa1 writes one"
        ) from None


def report(base: str, heads: str, calibration: dict) -> None:
    """Print what training reached, on rows continued from held-out prompts."""
    for temperature, result in calibration.items():
        accuracy = "   ".join(
            f"head {k}: {a:.1%} / {b:.1%}"
            for k, (a, b) in enumerate(zip(result["top1"], result["top5"]), start=1)
        )
        print(f"temperature {temperature}, top-1 / top-5 on held-out rows:   {accuracy}")
        counts = read_prefixes(result)
        sizes = {n: expected_tokens(calibrated_tree(counts, n), counts) for n in (4, 8, 16, 32)}
        print(
            "   expected tokens/step: "
            + "   ".join(f"{tokens:.2f} with {n} nodes" for n, tokens in sizes.items())
        )
    print(f"next: python sample.py --base {base} --heads {heads}")
