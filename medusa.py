"""Medusa: heads that guess several tokens ahead, a tree of the guesses checked in one pass, the longest agreed path kept.

From "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (Cai et al., 2024): its sections "Medusa
heads", "Tree attention", "Typical acceptance", "Medusa-1" and "Self-distillation". A step of `medusa_generate` reads propose -> verify ->
accept -> commit.

Dimension key
    B batch   T tokens   D model width   V vocabulary   K heads   J residual layers of a head   N tree nodes
Head k (counted from 1) at position t guesses token t+k+1; token t+1 is the base model's own business.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    GPT,
    check_sizes,
    config_of,
    linear,
    read_json,
    read_pickle,
    read_safetensors,
    write_json,
    write_safetensors,
)
from tree import Tree


@dataclass(frozen=True)
class MedusaConfig:
    """K heads for one base model. original_lm_head: W2 is the base's LM head; otherwise each head has a copy of its own.

    truncated_vocab_size: the heads guess among so many tokens, whose rows of the shared LM head are all that they read; 0 becomes vocab_size.
    """

    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    num_hidden_layers: int = 2
    original_lm_head: bool = True
    truncated_vocab_size: int = 0

    def __post_init__(self):
        object.__setattr__(
            self, "truncated_vocab_size", self.truncated_vocab_size or self.vocab_size
        )
        check_sizes(
            self,
            ["hidden_size", "vocab_size", "num_heads", "num_hidden_layers", "truncated_vocab_size"],
        )
        if type(self.original_lm_head) is not bool:
            raise ValueError(f"original_lm_head = {self.original_lm_head!r}: must be true or false")
        if (
            self.truncated_vocab_size > self.vocab_size
            or self.truncated_vocab_size < self.vocab_size
            and not self.original_lm_head
        ):
            raise ValueError(
                f"truncated_vocab_size = {self.truncated_vocab_size}: at most vocab_size, {self.vocab_size}; and less only of a shared LM head"
            )


class MedusaHeads(nn.Module):
    """head_probs_k = softmax(W2_k (h + SiLU(W1_k h + b1_k)))  (paper, "Medusa heads"), with J such residual layers.

    W1 and b1 start at zero, so that a new head is exactly the base's LM head. The heads are stacked: one operation serves all K.
    A shared LM head is handed to `forward`; it is never a parameter of the heads, so that training them cannot move the base.
    """

    def __init__(self, config: MedusaConfig, lm_head: nn.Linear | None = None):
        """weight (J, K, D, D), each W1 as (out, in), and bias (J, K, 1, D): zero. lm_heads (K, V, D), each W2: a copy of lm_head's matrix, or,
        if none is given, zeros, to be filled from a file; None if the LM head is shared. Of a truncated vocabulary the buffer `tokens` holds
        the ids, the first ones of all until they are chosen."""
        super().__init__()
        self.config = config
        K, J, D = config.num_heads, config.num_hidden_layers, config.hidden_size
        self.weight = nn.Parameter(torch.zeros(J, K, D, D))  # W1
        self.bias = nn.Parameter(torch.zeros(J, K, 1, D))  # b1
        self.lm_heads = None
        if not config.original_lm_head:
            start = (
                torch.zeros(config.vocab_size, D) if lm_head is None else lm_head.weight.detach()
            )
            self.lm_heads = nn.Parameter(start.repeat(K, 1, 1))  # (K, V, D)
        if config.truncated_vocab_size < config.vocab_size:
            self.register_buffer("tokens", torch.arange(config.truncated_vocab_size))

    @property
    def token_map(self) -> Tensor | None:
        """The tokens of a truncated vocabulary (truncated_vocab_size,); None if all may be guessed."""
        return getattr(self, "tokens", None)

    def forward(self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
        """hidden (..., D) -> logits (K, ..., V), or (K, ..., truncated_vocab_size) in the order of token_map if lm_head is `shortened` to these."""
        K, D = self.config.num_heads, self.config.hidden_size
        x = hidden.reshape(1, -1, D).expand(K, -1, -1)  # (K, n, D), n positions in all
        for weight, bias in zip(self.weight, self.bias):
            x = x + F.silu(torch.baddbmm(bias, x, weight.mT))  # (K, n, D)
        logits = (
            lm_head(x) if self.lm_heads is None else torch.bmm(x, self.lm_heads.mT)
        )  # (K, n, V)
        return logits.view(K, *hidden.shape[:-1], -1)

    def shortened(self, lm_head: nn.Linear) -> Callable[[Tensor], Tensor]:
        """The LM head's rows of a truncated vocabulary, as a function of hidden states; lm_head itself if all tokens may be guessed."""
        return (
            lm_head
            if self.token_map is None
            else partial(linear, weight=lm_head.weight[self.token_map])
        )

    def widened(self, logits: Tensor) -> Tensor:
        """(..., truncated_vocab_size) -> (..., V): minus infinity for what is not guessed."""
        wide = (*logits.shape[:-1], self.config.vocab_size)
        return (
            logits
            if self.token_map is None
            else logits.new_full(wide, -math.inf).index_copy(-1, self.token_map, logits)
        )

    def places(self, tokens: Tensor) -> Tensor:
        """Where tokens stand in token_map; -1 for those that are left out."""
        if self.token_map is None:
            return tokens
        places = tokens.new_full((self.config.vocab_size,), -1)
        return places.index_copy(
            0, self.token_map, torch.arange(len(self.token_map), device=tokens.device)
        )[tokens]

    def parts(self) -> dict[str, Tensor]:
        """Views of the parameters under the names that they have on disk."""
        K, J = self.config.num_heads, self.config.num_hidden_layers
        parts = {
            f"blocks.{k}.layers.{j}.weight": self.weight.detach()[j, k]
            for k in range(K)
            for j in range(J)
        }
        parts |= {
            f"blocks.{k}.layers.{j}.bias": self.bias.detach()[j, k, 0]
            for k in range(K)
            for j in range(J)
        }
        parts |= {} if self.token_map is None else {"token_map": self.token_map}
        return (
            parts
            if self.lm_heads is None
            else parts | {f"lm_heads.{k}.weight": self.lm_heads.detach()[k] for k in range(K)}
        )

    def save_pretrained(self, directory) -> None:
        """Write a vLLM Medusa speculator directory: config.json and model.safetensors. A shared LM head stays with the base."""
        directory = Path(directory)
        constants = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "medusa_fc_bias": True,
        }
        write_safetensors(
            directory / "model.safetensors",
            {name: part.cpu().contiguous() for name, part in self.parts().items()},
        )
        write_json(directory / "config.json", constants | asdict(self.config))

    @classmethod
    def from_pretrained(
        cls, directory, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "MedusaHeads":
        """Open such a directory. Raises ValueError, naming file and field or tensor, when something is missing or does not fit."""
        path, weights = Path(directory) / "config.json", Path(directory) / "model.safetensors"
        raw = read_json(path)
        if raw.get("model_type") != "medusa":
            raise ValueError(
                f"{path}: model_type is {raw.get('model_type')!r}, not 'medusa': no Medusa heads"
            )
        raw["truncated_vocab_size"] = raw.get("truncated_vocab_size") or 0
        if raw.get("medusa_fc_bias", True) not in (True, None):
            raise ValueError(
                f"{path}: medusa_fc_bias = {raw['medusa_fc_bias']!r} is not supported here, only True"
            )
        heads = cls(config_of(MedusaConfig, raw, path))
        heads._fill(heads.parts(), read_safetensors(weights), weights)
        if heads.token_map is not None and len(
            {*heads.token_map.tolist()} & {*range(heads.config.vocab_size)}
        ) < len(heads.token_map):
            raise ValueError(f"{weights}: token_map must hold different tokens of the vocabulary")
        return heads.to(device=device, dtype=dtype).eval()

    @classmethod
    def from_official(
        cls, path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "MedusaHeads":
        """Open heads of the paper's own repository, medusa_lm_head.safetensors or .pt; raises ValueError, naming file and tensor, for a file that holds none.

        There head k (from 0) is a list of J residual layers, "{k}.{j}.linear.weight" and ".bias", and a private LM head, "{k}.{J}.weight".
        """
        path = Path(path)
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
        K = sum(name.endswith(".0.linear.weight") for name in state)
        J = sum(name.startswith("0.") and name.endswith(".linear.weight") for name in state)
        if K == 0 or (last := state.get(f"0.{J}.weight")) is None or last.dim() != 2:
            raise ValueError(
                f"{path}: no tensors named 0.0.linear.weight and 0.{J}.weight: no Medusa heads of the official layout"
            )
        heads = cls(MedusaConfig(last.shape[1], last.shape[0], K, J, original_lm_head=False))

        def official(
            name: str,
        ) -> str:  # blocks.{k}.layers.{j}.weight -> {k}.{j}.linear.weight, lm_heads.{k}.weight -> {k}.{J}.weight
            kind, k, *rest = name.split(".")
            return f"{k}.{J}.weight" if kind == "lm_heads" else f"{k}.{rest[1]}.linear.{rest[2]}"

        heads._fill({official(name): part for name, part in heads.parts().items()}, state, path)
        return heads.to(device=device, dtype=dtype).eval()

    @staticmethod
    def _fill(parts: dict[str, Tensor], disk: dict[str, Tensor], path: Path) -> None:
        for name, part in parts.items():
            if name not in disk:
                raise ValueError(f"{path}: tensor {name} is missing")
            if disk[name].shape != part.shape:
                raise ValueError(
                    f"{path}: tensor {name} has shape {tuple(disk[name].shape)}, not {tuple(part.shape)}"
                )
            if disk[name].is_floating_point() != part.is_floating_point():
                raise ValueError(
                    f"{path}: tensor {name} is of {disk[name].dtype}, not {part.dtype}"
                )
            part.copy_(disk[name])


def at_least_float32(x: Tensor) -> Tensor:
    """Probabilities and losses need more digits than half precision has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


DECAY = 0.8  # lambda_k = DECAY^k


def cross_entropy_ahead(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, ahead: int, count: Tensor | None = None
) -> Tensor:
    """Cross-entropy, in nats, of logits (B, n, V) at the first n positions against the tokens `ahead` positions later.

    The mean is over the targets that carry loss: there are `count` of them in the whole batch, if these rows are a part of it.
    Of targets without loss not even the logits are looked at.
    """
    n = max(min(logits.shape[1], tokens.shape[1] - ahead), 0)
    logits, targets = logits[:, :n], tokens[:, ahead : ahead + n]
    loss_mask = (
        torch.ones_like(targets, dtype=torch.bool) if mask is None else mask[:, ahead : ahead + n]
    )
    loss = F.cross_entropy(at_least_float32(logits[loss_mask]), targets[loss_mask], reduction="sum")
    return loss / (loss_mask.sum() if count is None else count).clamp(min=1)


def medusa_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    decay: float = DECAY,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L = sum_k decay^k * CE(head_probs_k at t, token t+k+1)  (paper, "Medusa-1")

    logits (K, B, n, V) of the heads at the first n positions of tokens (B, T); mask (B, T) bool: True where a token carries loss AS
    A TARGET. Each head's mean is over its own targets that carry loss, or counts (K,) of them; a head without any adds 0.
    Returns the loss and the K means it is made of, both in nats.
    """
    losses = torch.stack(
        [
            cross_entropy_ahead(
                of_head, tokens, mask, k + 1, None if counts is None else counts[k - 1]
            )
            for k, of_head in enumerate(logits, start=1)
        ]
    )  # (K,)
    weights = torch.tensor(
        [decay**k for k in range(1, len(losses) + 1)], dtype=losses.dtype, device=losses.device
    )
    return (weights * losses).sum(), losses


def distillation_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """KL(teacher || student), in nats: both are logits (..., V)  (paper, "Self-distillation")

    mask (...) bool: the positions that carry loss, all by default. The mean is over them, or over `count` if these are a part of the batch.
    """
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    student, teacher = (at_least_float32(logits).log_softmax(-1) for logits in (student, teacher))
    divergence = (teacher.exp() * (teacher - student)).sum(-1)  # (...)
    return divergence.sum() / (torch.tensor(divergence.numel()) if count is None else count).clamp(
        min=1
    )


# ---- acceptance ----


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the base model, and which guesses are accepted in place of a draw.

    temperature 0 is greedy. top_k keeps the k likeliest tokens, then top_p the fewest that hold that much probability; 0 and 1
    switch them off. typical: accept by typical acceptance (lossy) with this epsilon; otherwise acceptance is lossless.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical: bool = False
    epsilon: float = 0.09

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1 (off)")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon {self.epsilon}: must be above 0 and at most 1")


def scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """logits (..., V) / temperature, the largest at 0, so that no temperature above 0 makes it infinite."""
    logits = at_least_float32(logits)
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def logits_to_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from: logits (..., V) -> probabilities (..., V)."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = scale_logits(logits, sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        rest = logits.argsort(dim=-1, descending=True, stable=True)[..., sampling.top_k :]
        logits = logits.scatter(-1, rest, -math.inf)
    base_probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = base_probs.sort(dim=-1, descending=True, stable=True)
        rest = (
            ordered.cumsum(-1) - ordered >= sampling.top_p
        )  # enough probability stands before this token already
        base_probs = base_probs.masked_fill(
            rest.scatter(-1, order, rest), 0
        )  # back in the order of the vocabulary
        base_probs = base_probs / base_probs.sum(-1, keepdim=True)
    return base_probs


class SharedGumbelNoise:
    """The randomness of the positions to come: for each an exponential variate for every token, made in the order of the text.

    Plain decoding and a tree see the same noise at the same position, whichever node asks, and so draw the same text from one seed.
    The heads see it too: see `gumbel_scores`. `like` (V, D), the LM head's matrix, says V, the device and the dtype, float32 at least.
    """

    def __init__(self, like: Tensor, sampling: Sampling, generator: torch.Generator | None):
        self.like = at_least_float32(like[0, :0]).new_empty(like.shape[0])  # (V,)
        self.greedy, self.generator, self.ahead = sampling.temperature == 0, generator, []

    def at(self, depths: Sequence[int]) -> Tensor | None:
        """The noise at the positions `depths` ahead of the next token's, (N, V); None when nothing is drawn."""
        if self.greedy:
            return None
        while len(self.ahead) <= max(depths):
            self.ahead.append(exponential(self.like, self.generator))
        return torch.stack([self.ahead[depth] for depth in depths])

    def advance(self, n: int) -> None:
        """The text has grown by n tokens."""
        del self.ahead[:n]


def exponential(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Variates of the exponential distribution, none of them 0."""
    return (
        torch.empty_like(like)
        .exponential_(generator=generator)
        .clamp_(min=torch.finfo(like.dtype).tiny)
    )


def draw(probs: Tensor, noise: Tensor) -> Tensor:
    """probs (n, V), noise (n, V) exponential -> tokens (n,). A race: token i arrives after noise_i / probs_i, and is first with probability probs_i."""
    return (probs / noise).argmax(-1)


def typical_threshold(
    base_probs: Tensor, epsilon: float = Sampling.epsilon, delta: float | None = None
) -> Tensor:
    """min(epsilon, delta * exp(-H(base_probs))), H in nats, (..., V) -> (...); delta is sqrt(epsilon) unless given.  (paper, "Typical acceptance")

    >>> round(typical_threshold(torch.full((8,), 1 / 8)).item(), 4)  # 0.3 / 8: the flatter the distribution, the more passes
    0.0375
    """
    entropy = -torch.xlogy(base_probs, base_probs).sum(-1)
    return torch.clamp(
        (math.sqrt(epsilon) if delta is None else delta) * torch.exp(-entropy), max=epsilon
    )


def accept(
    tree: Tree, tokens: Tensor, logits: Tensor, sampling: Sampling, noise: Tensor | None = None
) -> tuple[list[int], list[int]]:
    """Walk from the root as far as the base model agrees.

    tokens (N,) at the nodes; logits (N, V) of the base model after each node; noise (N, V), needed for temperature > 0: equal at
    equal depths. A child is accepted if its parent is and it passes the rule at its parent; the deepest accepted node wins:
    - greedy and lossless: each node draws its next token; the child that holds its parent's draw passes. The draw of a node
      depends on its path and the noise of its position alone, so the text is the very text that plain decoding draws.
    - typical: base_probs(child) > typical_threshold at the parent. Of equally deep paths the likeliest wins.
    Returns the accepted nodes, from the root on, and the tokens they earn: the guesses on the path, then the draw of its last node.

    >>> says = torch.eye(4)[[1, 2]]  # token 1 after the root, token 2 after node 1
    >>> accept(Tree((-1, 0), (-1, 0)), torch.tensor([3, 1]), says, Sampling())
    ([0, 1], [1, 2])
    """
    if sampling.temperature > 0 or sampling.typical:
        base_probs = logits_to_probs(logits, sampling)  # (N, V)
    draws = logits.argmax(-1) if sampling.temperature == 0 else draw(base_probs, noise)  # (N,)  # pyright: ignore[reportArgumentType]
    guesses, drawn = torch.stack(
        (tokens, draws)
    ).tolist()  # without typical acceptance the one wait for the device in a step
    if sampling.typical:
        parents = torch.tensor(tree.parents, device=tokens.device)
        guess_probs = base_probs[parents, tokens]  # (N,)
        passes = (guess_probs > typical_threshold(base_probs, sampling.epsilon)[parents]).tolist()
        scores = guess_probs.log().tolist()
    else:
        passes = [guess == drawn[parent] for guess, parent in zip(guesses, tree.parents)]
        scores = [0.0] * len(tree)

    reached = {
        0: ([0], 0.0)
    }  # accepted node: its path, and the log-likelihood of that. What passes and scores say of the root is never looked at
    for node, parent in enumerate(tree.parents[1:], start=1):
        if passes[node] and parent in reached:
            reached[node] = [*reached[parent][0], node], reached[parent][1] + scores[node]
    path, _ = max(reached.values(), key=lambda found: (len(found[0]), found[1]))
    return path, [guesses[node] for node in path[1:]] + [drawn[path[-1]]]


# ---- decoding ----

ROOT_ONLY = Tree((-1,), (-1,))


def max_length(model: GPT, prompt: Sequence[int], max_new_tokens: int) -> int:
    """The length, prompt included, at which the text ends at the latest. Raises ValueError for a prompt that is empty or fills the context, and for
    max_new_tokens below 0."""
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: decoding needs at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens}: must be 0 or more")
    if len(prompt) >= model.config.max_position_embeddings:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, the context is {model.config.max_position_embeddings}: shorten the prompt"
        )
    return min(len(prompt) + max_new_tokens, model.config.max_position_embeddings)


def check_compatible(model: GPT, heads: MedusaHeads, tree: Tree) -> None:
    """Raises ValueError, in words, if the heads are of another model or the tree asks for more than they guess."""
    for name in ("hidden_size", "vocab_size"):
        ours, base = getattr(heads.config, name), getattr(model.config, name)
        if ours != base:
            raise ValueError(
                f"the heads have {name} {ours}, the base model {base}: they were trained for another model"
            )
    if max(tree.depths) > heads.config.num_heads:
        raise ValueError(
            f"the tree is {max(tree.depths)} deep, but there are {heads.config.num_heads} heads"
        )
    if max(tree.ranks) >= heads.config.truncated_vocab_size:
        raise ValueError(
            f"the tree asks for guess {max(tree.ranks)}, but the heads guess among {heads.config.truncated_vocab_size} tokens"
        )


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """Plain decoding with a KV cache: yields [token] a step, up to max_new_tokens, to EOS (included), or until the context is full."""
    end = max_length(model, prompt, max_new_tokens)
    cache = model.new_cache(end)
    tokens = torch.tensor(
        [prompt], device=model.lm_head.weight.device
    )  # (1, T): the prompt, then the last token
    noise, ends = SharedGumbelNoise(model.lm_head.weight, sampling, generator), model.config.eos_ids
    for _ in range(end - len(prompt)):
        logits = model.lm_head(model(tokens, cache=cache)[:, -1])  # (1, V)
        if sampling.temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)  # (1, 1)
        else:
            tokens = draw(logits_to_probs(logits, sampling), noise.at((0,)))[None]  # (1, 1)  # pyright: ignore[reportArgumentType]
            noise.advance(1)
        yield [emitted := int(tokens.item())]
        if emitted in ends:
            return


def truncate_at_eos(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens up to the first that ends the text, included.

    >>> truncate_at_eos([5, 2, 7], ends=(2,))
    [5, 2]
    """
    return tokens[: next((n for n, token in enumerate(tokens, start=1) if token in ends), None)]


class TreeBuffers:
    """What a tree needs in every step, laid out once for at most `capacity` rows before it, in the dtype and on the device of `like`.

    depths (N,); index (N,): where each node's token stands among the root, the n_guesses guesses of head 1, those of head 2, ...;
    bias (N, capacity + N), added to attention scores: 0 for the past, the node itself and its ancestors, minus infinity for other nodes.
    """

    def __init__(self, tree: Tree, capacity: int, like: Tensor):
        self.tree, self.capacity = tree, capacity
        self.depth = max(tree.depths)
        self.depths = torch.tensor(tree.depths, device=like.device)  # (N,)
        self.n_guesses = max(tree.ranks) + 1
        self.index = (
            (self.depths - 1) * self.n_guesses + torch.tensor(tree.ranks, device=like.device) + 1
        )  # into [root, guesses of head 1, 2, ...]
        self.index[0] = 0
        self.bias = torch.zeros(
            len(tree), capacity + len(tree), dtype=like.dtype, device=like.device
        )
        self.bias[:, capacity:].masked_fill_(~tree.mask.to(like.device), -math.inf)

    def mask(self, past: int) -> Tensor:
        """(N, past + N): the whole past, then the ancestors. A copy, since attention on CUDA asks for numbers that begin at an aligned address."""
        return self.bias[:, self.capacity - past :].clone(memory_format=torch.contiguous_format)


def gumbel_scores(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """Scores (K, V) by which the heads' guesses are ranked, of their logits and the noise at the positions that they guess.

    Greedy and typical acceptance ask for the likeliest tokens. A lossless draw is first in a race whose noise is known before: the
    tokens that are ahead in the heads' own race with the same noise are what the base model will draw, if the heads think alike.
    The base draws as it would without heads, whatever they guess, so the text is still exactly the base model's.
    """
    return (
        logits
        if noise is None or sampling.typical
        else scale_logits(logits, sampling.temperature).softmax(-1) / noise
    )


def propose(
    heads: MedusaHeads,
    guess_head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    root: int,
    plan: TreeBuffers,
    sampling: Sampling,
    noise: SharedGumbelNoise,
) -> Tensor:
    """The tokens at the nodes of the tree, (N,): the root, and below it the first guesses of the heads at `hidden` (D,)."""
    root_token = torch.tensor([root], device=hidden.device)
    if len(plan.tree) == 1:
        return root_token
    logits = heads.widened(heads(hidden, guess_head))  # (K, V)
    # a guess at depth k is what a node at depth k - 1 may draw: the noise of head k is that of depth k - 1
    guesses = (
        gumbel_scores(logits, sampling, noise.at(range(len(logits)))).topk(plan.n_guesses).indices
    )  # (K, guesses)
    return torch.cat((root_token, guesses.flatten()))[plan.index]


@torch.inference_mode()
def medusa_generate(
    model: GPT,
    heads: MedusaHeads,
    tree: Tree,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
    accept: Callable[
        ..., tuple[list[int], list[int]]
    ] = accept,  # or a stand-in, which sees each verdict and hands it on: data/trace.py
) -> Iterator[list[int]]:
    """Decoding with Medusa heads: yields what each step emitted, the first time the root that the prompt itself gives.

    Ends exactly as `generate` does, and unless sampling.typical yields the very tokens that `generate` does, given the same seed, but where two
    tokens are so close that rounding decides.
    """
    check_compatible(model, heads, tree)
    end = max_length(model, prompt, max_new_tokens)
    lm_head, guess_head, ends = model.lm_head, heads.shortened(model.lm_head), model.config.eos_ids
    cache = model.new_cache(end + len(tree))
    plan = TreeBuffers(tree, end, lm_head.weight)
    noise = SharedGumbelNoise(lm_head.weight, sampling, generator)
    length = len(prompt)  # of the text

    tokens = torch.tensor(prompt, device=lm_head.weight.device)
    states = model(tokens[None], cache=cache)[0, -1:]  # (1, D)
    path, emitted = accept(
        ROOT_ONLY, tokens[-1:], lm_head(states), sampling, noise.at(ROOT_ONLY.depths)
    )  # the prompt's last token is a tree of one
    while length < end:
        yield (emitted := truncate_at_eos(emitted, ends))
        length += len(emitted)
        noise.advance(len(emitted))
        if length == end or emitted[-1] in ends:
            return
        if plan.depth > end - length - 1:  # a node must leave room for the token it earns
            plan = TreeBuffers(tree.cut(end - length - 1), end, lm_head.weight)
        past = length - 1  # rows in the cache: all of the text but the root
        tokens = propose(
            heads, guess_head, states[path[-1]], emitted[-1], plan, sampling, noise
        )  # (N,)
        states = model(tokens[None], plan.depths + past, plan.mask(past), cache)[
            0
        ]  # verify: (N, D)
        path, emitted = accept(
            plan.tree, tokens, lm_head(states), sampling, noise.at(plan.tree.depths)
        )
        cache.keep(past, path)  # commit
