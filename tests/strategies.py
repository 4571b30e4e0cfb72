"""What the tests use: small trees, GPTs in float64, heads of every quality, and oracles.

The oracles are written from definitions, without the code under test.
"""

import json
import math
import os
import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st

import train
from data.corpus import is_validation
from data.tokenizer import Tokenizer, train_tokenizer
from medusa import MedusaConfig, MedusaHeads
from model import GPT, ModelConfig
from train import BaseConfig, DistillConfig, Medusa1Config, Medusa2Config
from tree import Tree, calibrated_tree, cartesian_tree, tree_from_paths

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
properties = settings(deadline=None, derandomize=True, suppress_health_check=SLOW)


# Rotary scalings, as config.json names them.
ROPES = [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}]
for factor, low, high, context in ((8.0, 1.0, 4.0, 16), (2.0, 0.5, 9.0, 8)):
    rope = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    ROPES.append({"rope_type": "llama3", "original_max_position_embeddings": context} | rope)


@contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def refused(says: str, call, *given, **named) -> str:
    """call(...) raises ValueError, and its message, which is returned, matches `says`."""
    with pytest.raises(ValueError, match=says) as error:
        call(*given, **named)
    return str(error.value)


def call(main, *argv) -> None:
    """main() of a script, with these arguments of its command line."""
    with patch.object(sys, "argv", ["script.py", *map(str, argv)]):
        main()


def close(found, expected, says="") -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{says}\n{m}")


@st.composite
def trees(draw, max_nodes=10, max_depth=9, n_ranks=4):
    """Any parent list, with distinct ranks among siblings."""
    parents, ranks, depths, free = [-1], [-1], [0], [set(range(n_ranks))]
    for node in range(1, draw(st.integers(1, max_nodes))):
        may_grow = [i for i in range(node) if depths[i] < max_depth and free[i]]
        if not may_grow:
            break
        parent = draw(st.sampled_from(may_grow))
        rank = draw(st.sampled_from(sorted(free[parent])))
        free[parent].remove(rank)
        parents.append(parent)
        ranks.append(rank)
        depths.append(depths[parent] + 1)
        free.append(set(range(n_ranks)))
    return Tree(tuple(parents), tuple(ranks))


def rank_data(max_depth: int, n_ranks: int, max_rows=12):
    """Calibration data: the ranks of the true tokens, one row a position, all rows equally long."""
    rank = st.integers(0, n_ranks - 1)
    depth = st.integers(1, max_depth)
    return depth.flatmap(lambda k: st.lists(st.tuples(*[rank] * k), min_size=1, max_size=max_rows))


def built_trees(max_depth: int, n_ranks: int):
    """Trees from every builder, and from bare parent lists."""
    any_tree = trees(max_nodes=9, max_depth=max_depth, n_ranks=n_ranks)
    grown = any_tree.filter(lambda tree: len(tree) > 1)
    widths = st.lists(st.integers(1, min(n_ranks, 3)), min_size=1, max_size=max_depth)
    paths = grown.flatmap(lambda tree: st.permutations(tree.paths[1:]))
    calibrated = st.builds(calibrated_tree, rank_data(max_depth, n_ranks), st.integers(2, 9))
    return any_tree | paths.map(tree_from_paths) | widths.map(cartesian_tree) | calibrated


class SmallGPT(GPT):
    """A failing case shows how the model is made, in place of its modules."""

    made_by = ""

    def __repr__(self) -> str:
        return self.made_by


def tiny_gpt(V: int, D: int, mlp: int, layers: int, heads: int, context: int, eos) -> SmallGPT:
    more = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": eos}
    return SmallGPT(ModelConfig(V, D, mlp, layers, heads, 1, context, **more)).double().eval()


@torch.no_grad()
def with_random_weights(model: GPT, seed: int) -> GPT:
    """They are so large that every formula shows, and that a text depends on all of its past."""
    generator = rng(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        scale = 1.0 if "embed" in name else 0.7
        weight.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)
    return model


def random_gpt(seed: int, vocab_size=5, context=16, layers=1, eos=None) -> GPT:
    """In float64."""
    model = tiny_gpt(vocab_size, 8, 12, layers, 2, context, eos)
    model.made_by = f"random_gpt({seed}, {vocab_size}, {context}, {layers}, {eos})"
    return with_random_weights(model, seed)


def markov_gpt(logits, context=32, eos=None) -> GPT:
    """A GPT whose logits after token i are row i of logits (V, V), whatever came before; V even.

    Its hidden state is one-hot.
    """
    logits = torch.as_tensor(logits, dtype=torch.float64)
    V = len(logits)
    model = tiny_gpt(V, V, 4, 1, 1, context, eos)
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.zero_()
        model.layers[0].mlp.down_proj.weight.zero_()
        model.embed_tokens.weight.copy_(torch.eye(V))
        model.norm.weight.fill_((1 / V + model.config.rms_norm_eps) ** 0.5)
        model.lm_head.weight.copy_(logits.T)
    return model


# The kinds of heads: private, truncated, sequential.
KINDS = [(False, 0, False), (True, 0, False), (False, 3, False), (True, 0, True), (False, 3, True)]


def random_heads(
    model: GPT, num_heads: int, seed: int, layers=1, private=False, truncated=0, sequential=False
):
    D, V = model.config.hidden_size, model.config.vocab_size
    config = MedusaConfig(D, V, num_heads, layers, not private, truncated, sequential)
    heads = MedusaHeads(config, model.lm_head).to(model.lm_head.weight.dtype)
    if heads.token_map is not None:
        heads.token_map.copy_(torch.randperm(V, generator=rng(seed))[:truncated])
    with torch.no_grad():
        for weight in heads.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng(seed), dtype=weight.dtype))
    return heads


class CheatingHeads:
    """Heads that know the text, and give its next tokens the rank that `rank_of()` returns.

    length: of the text so far, the prompt included.
    """

    token_map = None

    def __init__(self, model: GPT, num_heads: int, text: list[int], length: int, rank_of=lambda: 0):
        self.config = MedusaConfig(model.config.hidden_size, model.config.vocab_size, num_heads)
        self.text, self.length, self.rank_of = text, length, rank_of

    def truncated(self, lm_head):
        return lm_head

    def __call__(self, hidden, lm_head):
        assert hidden.dim() == 1, "heads run at one node alone, the one accepted last"
        V = self.config.vocab_size
        logits = torch.zeros(self.config.num_heads, V, dtype=hidden.dtype)
        # So far apart that no noise changes their order.
        falling = 60 * torch.arange(V, 0, -1, dtype=hidden.dtype)
        for k in range(self.config.num_heads):
            # The root is at length - 1, and head 1 guesses the token after it.
            at = self.length + k
            right = self.text[at] if at < len(self.text) else 0
            order = [token for token in range(V) if token != right]
            order.insert(self.rank_of(), right)
            logits[k, order] = falling
        return logits


def unit(model: GPT, tokens) -> torch.Tensor:
    """The embeddings of tokens (..., K) that sequential heads read: (..., K * D), of unit RMS."""
    x = model.embed_tokens(tokens).detach()
    return (x / x.square().mean(-1, keepdim=True).sqrt()).flatten(-2)


HINTS = {  # words of an error, and where it may come from
    "cache of": "the cache holds the text up to its end, then a tree; what comes after the end is "
    "cut off, tokens are counted and not steps",
    "must match": "the mask is (N, past + N), without the root in the past",
    "out of bounds": "positions are past + depth, near the end of the context the last one",
}


AFTER_EOS = "tokens after EOS were kept, or steps made after EOS: the text ends with it"


def follow(steps, heads, eos_ids=()) -> list[list[int]]:
    """What all steps of a decoding emitted; cheating heads are told how far the text has come."""
    taken = []
    try:
        for step in steps:
            sizes = {len(step.tree), len(step.tokens), len(step.logits)}
            assert len(sizes) == 1, "a Step has a token and logits for each node of its tree"
            parents = [step.tree.parents[node] for node in step.path[1:]]
            says = "a Step's path is the accepted nodes, from the root, node 0, downwards"
            assert step.path[:1] == [0] and parents == step.path[:-1], says
            taken.append(list(step.emitted))
            if isinstance(heads, CheatingHeads):
                heads.length += len(step.emitted)
    except (IndexError, RuntimeError, ValueError) as error:
        says = f"step {len(taken) + 1} breaks off, {type(error).__name__}: {error}"
        hints = [hint for word, hint in HINTS.items() if word in str(error)]
        hints = [AFTER_EOS] if set(sum(taken, [])) & set(eos_ids) else hints
        raise AssertionError("; ".join([says, *hints])) from error
    return taken


REAL = "new", "random", "private", "truncated"  # kinds of heads that do not know the text
SEQUENTIAL = "sequential", "sequential and private", "sequential and truncated"


@st.composite
def decodings(draw, kinds=(*REAL, "cheating", "wrong"), room=1):
    """Model, heads, tree, prompt, number of new tokens; room: at least, for new tokens.

    With few tokens, guesses are right now and then.
    """
    V, seed, context = draw(st.integers(2, 6)), draw(st.integers(0, 99)), draw(st.integers(1, 19))
    context += room
    token = st.integers(0, V - 1)
    eos = draw(st.none() | token | st.lists(token, min_size=2, max_size=2))
    model = random_gpt(seed, V, context, draw(st.integers(1, 2)), eos)
    prompt = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=context - room))
    K, J = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    kind = draw(st.sampled_from(kinds))
    v = draw(st.integers(1, V - 1)) if "truncated" in kind else V
    if kind == "new":
        heads = MedusaHeads(MedusaConfig(8, V, K, J)).double()
    elif kind == "wrong":
        heads = CheatingHeads(model, K, [], 0, lambda: V - 1)
    elif kind == "cheating":
        ranks = draw(st.randoms(use_true_random=False))
        heads = CheatingHeads(model, K, [], 0, lambda: ranks.choice([0, 0, ranks.randrange(V)]))
    else:
        of_kind = J, "private" in kind, v, "sequential" in kind
        heads = random_heads(model, K, draw(st.integers(0, 99)), *of_kind)
    return model, heads, draw(built_trees(K, v)), prompt, draw(st.integers(0, 24))


def text_of(steps) -> list[int]:
    return [token for step in steps for token in step.emitted]


def next_logits(model: GPT, text) -> torch.Tensor:
    """The logits after the text, from one whole forward without a cache: (V,)."""
    with torch.no_grad():
        return model.lm_head(model(torch.tensor([list(text)])))[0, -1]


def greedy_text(model: GPT, prompt, max_new_tokens: int) -> list[int]:
    """The new tokens of greedy decoding, without cache, from its definition."""
    text = list(prompt)
    while len(text) < min(len(prompt) + max_new_tokens, model.config.max_position_embeddings):
        text.append(next_logits(model, text).argmax().item())
        if text[-1] in model.config.eos_ids:
            break
    return text[len(prompt) :]


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0) -> list[float]:
    """The distribution from its definition, token by token; of equal logits the lower first."""
    logits = [float(value) for value in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    order = order[:top_k] if top_k else order
    weights = {token: math.exp((logits[token] - logits[order[0]]) / temperature) for token in order}
    kept, mass = {}, 0.0
    for token in order:
        if mass >= top_p * sum(weights.values()):
            break
        kept[token] = weights[token]
        mass += weights[token]
    return [kept.get(token, 0.0) / mass for token in range(len(logits))]


def text_distribution(model: GPT, prompt, max_new_tokens: int, sampling) -> dict[tuple, float]:
    """The probability of every text of at most max_new_tokens new tokens, by the chain rule."""
    found, limits = {}, (sampling.temperature, sampling.top_k, sampling.top_p)
    longest = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))

    def extend(new: tuple[int, ...], prob: float) -> None:
        if len(new) == longest or set(model.config.eos_ids) & set(new[-1:]):
            found[new] = prob
            return
        logits = next_logits(model, [*prompt, *new])
        for token, p in enumerate(distribution(logits, *limits)):
            if p > 0:
                extend((*new, token), prob * p)

    extend((), 1.0)
    return found


def chi_square(counts: dict, expected: dict, n: int) -> float:
    """The probability of counts at least as odd as these, if the texts follow `expected`.

    Texts that are expected less than 5 times are pooled.
    """
    if counts.keys() - expected.keys():
        return 0.0
    seen, due = Counter(), Counter()
    for text, prob in expected.items():
        cell = text if n * prob >= 5 else "rare"
        seen[cell] += counts.get(text, 0)
        due[cell] += n * prob
    statistic = sum((seen[cell] - due[cell]) ** 2 / due[cell] for cell in due)
    halves = torch.tensor([len(due) - 1, statistic]) / 2
    return torch.special.gammaincc(*halves).item()


# ---- training ----
def rate(step: int, lr: float, warmup: int, steps: int) -> float:
    """A ramp up to 1 over the warm-up, times half a turn of the cosine, from 1 to 0."""
    ramp = (step + 1) / warmup if step < warmup else 1.0
    return lr * ramp * 0.5 * (1 + math.cos(math.pi * step / steps))


# ---- a base of a few hundred weights, with its text, on disk ----
CPU = {"device": "cpu", "precision": "float32"}


def source(first: int, n: int) -> str:
    numbers = range(first, first + n)
    return "".join(f"def f{i}(x):\n    return x * {i * 7 % 13} + {i}\n" for i in numbers)


@cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer([source(0, 40)], 290)


def named(sides: list[bool], stem="") -> str:
    """A file name under which the pieces of a text fall on these sides, True for validation."""
    names = (f"{stem}{n}.txt" for n in count())
    return next(s for s in names if [is_validation(f"{s}:{i}") for i in range(len(sides))] == sides)


def write_text(folder: Path) -> list[str]:
    """Two files, one on each side of the split: training, then validation, in other words."""
    paths = [folder / named([side]) for side in (False, True)]
    paths[0].write_text(source(0, 40))
    other = source(40, 20).replace("def f", "def g").replace("x", "y").replace("*", "-")
    paths[1].write_text(other)
    return [str(path) for path in paths]


def write_base(folder: Path) -> Path:
    """A base with weights so large that its greedy text moves about."""
    tokenizer, generator = small_tokenizer(), rng(0)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    model = GPT(ModelConfig(tokenizer.vocab_size, 16, 16, 1, 2, 1, 40, **ids))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.4 * torch.randn(weight.shape, generator=generator))
    tokenizer.save(folder / "base")
    model.save_pretrained(folder / "base")
    return folder / "base"


class Code:
    """What a pickle that is opened carelessly runs."""

    def __reduce__(self):
        return os.mkdir, ("code-has-run",)


def contents(directory) -> dict[str, bytes]:
    """Every file below a directory, by its path there."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def base_config(tmp_path, text, name="new", **more) -> BaseConfig:
    sizes = {"vocab_size": 290, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "context": 16}
    run = {"text": text, "out": str(tmp_path / name), "steps": 4, "batch": 2, "warmup": 1}
    return BaseConfig(**sizes | run | CPU | more)


def distilling(base, text, **more) -> DistillConfig:
    sizes = {"shards": 3, "rows": 5, "prompt_tokens": 4, "new_tokens": 6}
    return DistillConfig(**{"base": str(base), "text": text} | sizes | CPU | more)


def training(base, text, out, config=Medusa1Config, **more) -> Medusa1Config | Medusa2Config:
    """A run of a few steps, on rows that are given, or on the corpus."""
    sizes = {"steps": 4, "batch": 3, "warmup": 1}
    sizes |= {"num_heads": 2} if config is Medusa1Config else {}
    sizes |= {"context": 9} if more.get("data") == "corpus" else {}
    return config(**{"base": str(base), "text": text, "out": str(out)} | sizes | CPU | more)


def run_of(what: str, base, text, rows, out) -> tuple:
    """The function and the config of a run of five steps; Medusa-2 has two stages of them."""
    if what == "distill":
        return train.distill, distilling(base, text, shards=5, out=str(out))
    if what == "base":
        return train.train_base, base_config(out.parent, text, out.name, steps=5)
    more = {"distilled": str(rows), "lr": 0.01}
    if what in ("medusa1", "states"):
        more |= {"data": "corpus"} if what == "medusa1" else {"keep_states": True}
        return train.train_medusa1, training(base, text, out, steps=5, **more)
    more |= {"heads_steps": 2, "steps": 3, "lora": what == "lora", "weight_decay": 0.1}
    return train.train_medusa2, training(base, text, out, Medusa2Config, **more)
