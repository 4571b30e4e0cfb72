"""Medusa: heads guess several tokens ahead, a tree of guesses is checked in one pass, the longest
path that the base model agrees with is kept.

From "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (Cai et al.,
2024), sections "Medusa heads", "Tree attention", "Typical acceptance", "Medusa-1" and
"Self-distillation". Lossless sampling is ours, not the paper's: see `SharedGumbelNoise`.

Dimension key
    B batch   T tokens   D model width   V vocabulary (v of it, if the heads' own is truncated)
    K heads   J residual layers of a head   N tree nodes   n any number of positions

Head k (counted from 1) at position t guesses token t+k+1; the base model itself predicts t+1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, check, check_sizes, config_of, read_json, read_tensors, read_weights
from model import write_json, write_safetensors
from tree import ROOT_ONLY, Tree


# ---- heads ----
IGNORED = -100  # in place of a target: no loss here. F.cross_entropy's own default


@dataclass(frozen=True)
class MedusaConfig:
    """The fields of a heads directory's config.json.

    original_lm_head: W2 of every head is the base's LM head; if not, each head trains a copy.
    truncated_vocab_size: the heads guess among so many tokens only; 0 turns into vocab_size.
    sequential: head k also sees tokens t+1 to t+k, those before its guess.
    """

    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    num_hidden_layers: int = 2
    original_lm_head: bool = True
    truncated_vocab_size: int = 0
    sequential: bool = False

    def __post_init__(self):
        V = self.vocab_size
        v = self.truncated_vocab_size or V
        object.__setattr__(self, "truncated_vocab_size", v)
        check_sizes(self, [f.name for f in fields(self) if f.type is int])
        for name in ("original_lm_head", "sequential"):
            value = getattr(self, name)
            check(type(value) is bool, f"{name} = {value!r}: must be true or false")
        least = 1 if self.original_lm_head else V  # private LM heads are as long as the vocabulary
        check(least <= v <= V, f"truncated_vocab_size = {v}: must be {least} to {V}")


class MedusaHeads(nn.Module):
    """head_probs_k = softmax(W2_k (h + SiLU(W1_k h + b1_k)))  (paper, "Medusa heads")

    with J such residual layers. W1 and b1 start at zero, so a new head is exactly the LM head. All
    K heads are stacked: one batched product serves them all. A shared LM head is an argument of
    `forward`, never a parameter of the heads: it learns only if the base does.

    Sequential heads ("Hydra", Ankner et al., 2024; not the paper's) see which tokens are between h
    and their guess. Inside the SiLU of its first layer, head k also adds R_kj e(token t+j) for j
    from 1 to k; e is the base's embedding, scaled to unit RMS. R starts at zero as well.
    """

    token_map: Tensor | None

    def __init__(self, config: MedusaConfig, lm_head: nn.Linear | None = None):
        """lm_head: where private LM heads start; without it they are zeros, to be loaded."""
        super().__init__()
        self.config = config
        K, J = config.num_heads, config.num_hidden_layers
        D, V, v = config.hidden_size, config.vocab_size, config.truncated_vocab_size
        self.weight = nn.Parameter(torch.zeros(J, K, D, D))  # W1, each (out, in)
        self.bias = nn.Parameter(torch.zeros(J, K, 1, D))  # b1
        self.token_weights = None  # R; that of head k is (D, k * D): R_k1 .. R_kk side by side
        if config.sequential:
            shapes = [(D, k * D) for k in range(1, K + 1)]
            self.token_weights = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self.lm_heads = None  # W2, if private
        if not config.original_lm_head:
            start = torch.zeros(V, D) if lm_head is None else lm_head.weight.detach()
            self.lm_heads = nn.Parameter(start.repeat(K, 1, 1))  # (K, V, D)
        # The tokens of a truncated vocabulary: the first v, until training chooses.
        self.register_buffer("token_map", torch.arange(v) if v < V else None)

    def forward(self, hidden, lm_head, between: Tensor | None = None) -> Tensor:
        """hidden (..., D) -> logits (K, ..., V); (K, ..., v) if lm_head is `truncated`.

        between: (..., K * D), the `embed` of tokens t+1 to t+K, if the heads are sequential.
        """
        K, D = self.config.num_heads, self.config.hidden_size
        biases = list(self.bias)  # J times (K, 1, D); the first may grow to (K, n, D)
        if self.token_weights is not None:
            assert between is not None, "sequential heads see the tokens between"
            seen = between.reshape(-1, between.shape[-1])  # (n, K * D): head k sees the first k * D
            terms = [F.linear(seen[:, : R.shape[1]], R) for R in self.token_weights]
            biases[0] = biases[0] + torch.stack(terms)
        x = hidden.reshape(1, -1, D).expand(K, -1, -1)  # (K, n, D)
        # Layer by layer, the same layer of all heads at once.
        for weight, bias in zip(self.weight, biases):
            x = x + F.silu(torch.baddbmm(bias, x, weight.mT))  # (K, n, D)
        # (K, n, V), by the shared LM head or by one for each head.
        logits = lm_head(x) if self.lm_heads is None else torch.bmm(x, self.lm_heads.mT)
        return logits.view(K, *hidden.shape[:-1], logits.shape[-1])

    def one_head(self, k: int, hidden: Tensor, lm_head, between: Tensor) -> Tensor:
        """What `forward` makes of sequential head k, without the others, for `propose`.

        hidden (n, D); between (n, k * D), the embeddings of tokens t+1 to t+k -> logits (n, V).
        """
        assert self.token_weights is not None, "only sequential heads run one by one"
        i, x = k - 1, hidden
        for j in range(self.config.num_hidden_layers):
            inner = F.linear(x, self.weight[j, i], self.bias[j, i, 0])  # (n, D)
            if j == 0:
                inner = inner + F.linear(between, self.token_weights[i])
            x = x + F.silu(inner)
        return lm_head(x) if self.lm_heads is None else F.linear(x, self.lm_heads[i])

    def embed(self, embed_tokens: nn.Embedding, tokens: Tensor | None = None) -> Tensor | None:
        """What `forward` takes as `between`: tokens (..., K) -> (..., K * D), each of unit RMS.

        Without tokens: the whole vocabulary, (V, D). None if the heads are not sequential.
        """
        if self.token_weights is None:
            return None
        # The base does not learn from it.
        x = embed_tokens.weight.detach() if tokens is None else embed_tokens(tokens).detach()
        x = F.rms_norm(at_least_float32(x), x.shape[-1:], eps=1e-12).to(self.weight.dtype)
        return x if tokens is None else x.flatten(-2)

    def truncated(self, lm_head: nn.Linear) -> Callable[[Tensor], Tensor]:
        """The LM head that `forward` takes: only the rows in token_map, if there is one."""
        if self.token_map is None:
            return lm_head
        return partial(F.linear, weight=lm_head.weight[self.token_map])  # (v, D)

    def index_of(self, tokens: Tensor) -> Tensor:
        """Token ids -> their index in the heads' logits; IGNORED (-100) where left out."""
        if self.token_map is None:
            return tokens
        token_map = self.token_map.to(tokens.device)
        index = torch.full((self.config.vocab_size,), IGNORED, device=tokens.device)
        index[token_map] = torch.arange(len(token_map), device=tokens.device)
        return index[tokens]

    def tensors(self, layer="blocks.{k}.layers.{j}", lm_head="lm_heads.{k}") -> dict[str, Tensor]:
        """Views of all weights, by names on disk: layer and lm_head say how these are spelled."""
        tensors = {} if self.token_map is None else {"token_map": self.token_map}
        for k in range(self.config.num_heads):
            for j in range(self.config.num_hidden_layers):
                name = layer.format(k=k, j=j)
                tensors[f"{name}.weight"] = self.weight.detach()[j, k]
                tensors[f"{name}.bias"] = self.bias.detach()[j, k, 0]
            if self.token_weights is not None:
                # R_k1 .. R_kk; on disk both numbers count from 0.
                for i, R in enumerate(self.token_weights[k].detach().chunk(k + 1, dim=1)):
                    tensors[f"blocks.{k}.embeddings.{i}.weight"] = R
            if self.lm_heads is not None:
                tensors[f"{lm_head.format(k=k)}.weight"] = self.lm_heads.detach()[k]
        return tensors

    def save_pretrained(self, directory) -> None:
        """Write a vLLM Medusa speculator directory. A shared LM head stays with the base."""
        directory = Path(directory)
        about = {"architectures": ["MedusaModel"], "model_type": "medusa", "medusa_fc_bias": True}
        tensors = {name: t.cpu().contiguous() for name, t in self.tensors().items()}
        write_safetensors(directory / "model.safetensors", tensors)
        write_json(directory / "config.json", about | asdict(self.config))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device=None, vocab_size=0) -> Self:
        """Open what `save_pretrained` wrote, or the file of `from_official`, or its directory.

        vocab_size: the base's, for `from_official` alone. ValueError names the file and the field.
        """
        path = Path(path)
        for file in (path, path / "medusa_lm_head.safetensors", path / "medusa_lm_head.pt"):
            if file.is_file():
                return cls.from_official(file, dtype, device, vocab_size)
        config, weights = path / "config.json", path / "model.safetensors"
        raw = read_json(config)
        check(raw.get("model_type") == "medusa", f"{config}: model_type: no Medusa heads")
        # Fields left out have vLLM's defaults (vllm/transformers_utils/configs/medusa.py and
        # vllm/model_executor/models/medusa.py). Biases in the file are read in any case.
        defaults = {"num_heads": 5, "num_hidden_layers": 1, "original_lm_head": False}
        raw = defaults | raw | {"truncated_vocab_size": raw.get("truncated_vocab_size") or 0}
        disk = {name.removeprefix("medusa_heads."): t for name, t in read_weights(path).items()}
        raw.setdefault("sequential", any(".embeddings." in name for name in disk))  # ours
        has_bias = raw.get("medusa_fc_bias") or any(name.endswith(".bias") for name in disk)
        heads = cls(config_of(MedusaConfig, raw, config))
        tensors = {n: t for n, t in heads.tensors().items() if has_bias or not n.endswith(".bias")}
        # A layer that config.json does not name would be left out silently.
        for name in disk:
            is_known = name in tensors or not name.startswith("blocks.0.")
            check(is_known, f"{weights}: tensor {name}: {config} names no such layer")
        fill(tensors, disk, weights)
        if heads.token_map is not None:
            valid = set(heads.token_map.tolist()) & set(range(heads.config.vocab_size))
            different = len(valid) == len(heads.token_map)
            check(different, f"{weights}: token_map: not different tokens of the vocabulary")
        return heads.to(device, dtype).eval()

    @classmethod
    def from_official(cls, path, dtype=torch.float32, device=None, vocab_size=0) -> Self:
        """Open medusa_lm_head.safetensors or .pt of the paper's own repository.

        There head k (from 0) is a list: J residual layers "{k}.{j}.linear.weight" and ".bias", then
        a private LM head "{k}.{J}.weight". If no head has one, all share the base's, of vocab_size
        tokens. Raises ValueError, naming file and tensor.
        """
        path = Path(path)
        disk = read_tensors(path)
        # The names tell how many heads there are, and how many layers each has.
        K = sum(name.endswith(".0.linear.weight") for name in disk)
        J = sum(name.startswith("0.") and name.endswith(".linear.weight") for name in disk)
        shared = all(".linear." in name for name in disk)
        weight = disk.get("0.0.linear.weight" if shared else f"0.{J}.weight")  # tells V and D
        if K == 0 or weight is None or weight.dim() != 2:
            raise ValueError(f"{path}: no 0.0.linear.weight and 0.{J}.weight: no official heads")
        V, D = (vocab_size, weight.shape[1]) if shared else weight.shape
        check(V > 0, f"{path} shares the base's LM head: give its vocab_size")
        # Of the heads, a published config.json may name only some (2 of 5).
        config = path.with_name("config.json")
        raw = read_json(config) if config.is_file() else {}
        named = raw.get("medusa_num_heads", K), raw.get("medusa_num_layers", J)
        says = f"medusa_num_heads, medusa_num_layers = {named}: {path.name} has {K, J}"
        check(named[0] in range(1, K + 1) and named[1] == J, f"{config}: {says}")
        heads = cls(MedusaConfig(D, V, K, J, original_lm_head=shared))
        fill(heads.tensors("{k}.{j}.linear", "{k}." + str(J)), disk, path)
        return heads.to(device, dtype).eval()


def calibration_path(heads) -> Path:
    """calibration.json in a directory of heads, or next to their file."""
    return (Path(heads).parent if Path(heads).is_file() else Path(heads)) / "calibration.json"


def fill(tensors: dict[str, Tensor], disk: dict[str, Tensor], path: Path) -> None:
    """Copy what was read into the tensors of the same name, shape and kind."""
    for name, tensor in tensors.items():
        check(name in disk, f"{path}: tensor {name} is missing")
        found, shape = disk[name], tuple(disk[name].shape)
        fits = shape == tensor.shape and found.is_floating_point() == tensor.is_floating_point()
        ours = f"{tuple(tensor.shape)} of {tensor.dtype}"
        check(fits, f"{path}: tensor {name} is {shape} of {found.dtype}, not {ours}")
        check(bool(found.isfinite().all()), f"{path}: tensor {name} has values that are not finite")
        tensor.copy_(found)


def check_compatible(model: GPT, heads: MedusaHeads, tree: Tree = ROOT_ONLY) -> None:
    """Raises ValueError if the heads are of another model, or the tree needs more guesses."""
    ours = heads.config.hidden_size, heads.config.vocab_size
    base = model.config.hidden_size, model.config.vocab_size
    check(ours == base, f"the heads' hidden_size and vocab_size are {ours}, the base's {base}")
    # Depth d needs head d; rank r needs r + 1 tokens to choose from.
    K, v = heads.config.num_heads, heads.config.truncated_vocab_size
    depth, rank = max(tree.depths), max(tree.ranks)
    check(depth <= K, f"the tree is {depth} deep, but there are {K} heads")
    check(rank < v, f"the tree has guess {rank}, but the heads have {v} tokens")


# ---- losses ----
def at_least_float32(x: Tensor) -> Tensor:
    """Probabilities and losses need more digits than half precision has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def targets_ahead(tokens: Tensor, mask: Tensor | None, K: int) -> Tensor:
    """What each position is asked for: tokens (B, T) -> (K+1, B, T).

    Row k is token t+k+1: row 0 the base model's target, row k that of head k. IGNORED beyond the
    end, and where mask (B, T) bool is False: it says which tokens carry loss AS A TARGET.

    >>> targets_ahead(torch.tensor([[5, 6, 7]]), None, K=1).tolist()
    [[[6, 7, -100]], [[7, -100, -100]]]
    """
    if mask is not None:
        tokens = tokens.masked_fill(~mask, IGNORED)
    # Row k is the text shifted by k+1. This is the one place that knows the offset.
    T = tokens.shape[1]
    padded = F.pad(tokens, (0, K + 1), value=IGNORED)
    return torch.stack([padded[:, k + 1 : k + 1 + T] for k in range(K + 1)])


def cross_entropy(logits: Tensor, targets: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in nats, of logits (..., V) against targets (...), IGNORED ones left out.

    count: the number of targets in the whole batch, if these positions are only a part of it.
    """
    logits, targets = at_least_float32(logits).flatten(0, -2), targets.flatten()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    count = (targets != IGNORED).sum() if count is None else count
    return total / count.clamp(min=1)


def medusa_loss(logits: Tensor, targets: Tensor, decay=0.8, counts: Tensor | None = None):
    """L = sum_k decay^k * CE(head_probs_k at t, token t+k+1)  (paper, "Medusa-1")

    logits (K, ..., V); targets (K, ...), rows 1 to K of `targets_ahead`; counts (K,) as in
    `cross_entropy`. Returns the loss and the K means that it is made of, all in nats.
    """
    K = len(logits)
    counts = (targets != IGNORED).flatten(1).sum(1) if counts is None else counts  # (K,)
    losses = torch.stack([cross_entropy(*of_head) for of_head in zip(logits, targets, counts)])
    # Head k weighs decay^k: far tokens are harder to guess, and matter less.
    weights = decay ** torch.arange(1, K + 1, dtype=losses.dtype, device=losses.device)
    return (weights * losses).sum(), losses


def distillation_loss(student: Tensor, teacher: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student), in nats, of logits (..., V)  (paper, "Self-distillation")."""
    student = at_least_float32(student).log_softmax(-1)
    teacher = at_least_float32(teacher).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)  # (...)
    return divergence.mean() if count is None else divergence.sum() / count.clamp(min=1)


# ---- sampling ----
@dataclass(frozen=True)
class Sampling:
    """How the base model's next token is chosen, and which guesses are accepted.

    temperature 0 is greedy. top_k keeps the k most likely tokens (0: all), then top_p the fewest
    that hold so much probability (1: all). typical: the paper's lossy rule, with this epsilon.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical: bool = False
    epsilon: float = 0.09

    def __post_init__(self):
        finite = 0 <= self.temperature < math.inf
        check(finite, f"temperature {self.temperature}: must be 0 (greedy) or more")
        check(self.top_k >= 0, f"top_k {self.top_k}: must be 0 (off) or more")
        for name, value in (("top_p", self.top_p), ("epsilon", self.epsilon)):
            check(0 < value <= 1, f"{name} {value}: must be above 0 and at most 1")
        # top_k = 1 is greedy; so is a temperature or top_p so low that float32 would divide by 0.
        if self.top_k == 1 or min(self.temperature, self.top_p) < 1e-30:
            object.__setattr__(self, "temperature", 0.0)


GREEDY = Sampling()


def logits_to_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits (..., V) -> the distribution (..., V) from which the next token is sampled."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    # Subtracting the maximum first keeps logits / temperature finite at any temperature.
    logits = at_least_float32(logits)
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return logits.softmax(-1)
    # The most likely first; of equal logits the lower token, as the sort is stable.
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k > 0:
        logits[..., sampling.top_k :] = -math.inf
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        # A token goes if those that are more likely hold top_p of the probability already.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return torch.empty_like(probs).scatter(-1, order, probs)  # back in vocabulary order


def exponential_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Exponential variates, none of them 0."""
    noise = torch.empty_like(like).exponential_(generator=generator)
    return noise.clamp_(min=torch.finfo(like.dtype).tiny)


class SharedGumbelNoise:
    """The randomness of the positions to come: one noise variate for every position and token.

    Ours, not the paper's. Plain decoding and every tree node at the same position read the same
    noise, so both sample the same text from one seed. The heads read it as well, to guess what the
    base model will sample: Gumbel coupling (Daliri, Musco, Suresh, 2024, arXiv:2408.07978). Kept as
    exponential variates e; -log(e) is Gumbel noise.
    """

    def __init__(self, model: GPT, sampling: Sampling, generator: torch.Generator | None):
        self.like = at_least_float32(model.lm_head.weight[:, 0])  # (V,); its values do not count
        self.sampling, self.generator, self.ahead = sampling, generator, []

    def at(self, depths: Sequence[int]) -> Tensor | None:
        """Row i: the noise for the token after depth depths[i], (N, V); None if greedy.

        Depth 0 is the last token of the text: the root, or the end of the prompt.
        """
        if self.sampling.temperature == 0:
            return None
        # Made in the order of the text, so that looking ahead changes no token.
        while len(self.ahead) <= max(depths):
            self.ahead.append(exponential_noise(self.like, self.generator))
        return torch.stack([self.ahead[depth] for depth in depths])

    def advance(self, n: int) -> None:
        """The text has grown by n tokens."""
        del self.ahead[:n]


def sample(logits: Tensor, sampling: Sampling, noise: Tensor | None = None) -> Tensor:
    """The base model's next token after each row: logits (N, V), noise (N, V) -> tokens (N,).

    Gumbel-max: argmax(log probs - log noise) is a sample of probs. As an exponential race,
    argmax(probs / noise), it takes no logarithm of 0. Greedy decoding needs no noise.
    -1, no token, where a logit is NaN or inf, or all are -inf: see `check_sampled`.
    """
    if sampling.temperature == 0:
        best, tokens = logits.max(-1)
    else:
        assert noise is not None, "temperature above 0 needs noise"
        best, tokens = (logits_to_probs(logits, sampling) / noise).max(-1)
    return tokens.where(best.isfinite(), -1)


def check_sampled(token: int, length: int, dtype: torch.dtype) -> None:
    """Raises ValueError if `sample` found no token after a text of this length."""
    says = f"the step after {length} tokens: its logits are NaN or infinite in {dtype}"
    check(token >= 0, f"{says}; try bfloat16 or float32")


def gumbel_scores(logits: Tensor, sampling: Sampling, noise: Tensor | None, token_map=None):
    """The scores that rank each head's guesses: logits (..., v), noise (..., V) -> (..., v).

    Greedy and typical acceptance ask for the most likely tokens. Lossless acceptance asks for what
    the base model will sample: the tokens that win with the same noise under the head's own
    distribution, top_k and top_p left out. A wrong guess costs speed only.
    """
    if noise is None or sampling.typical:
        return logits
    noise = noise if token_map is None else noise[..., token_map]
    # Logits plus Gumbel noise: the same order as probs / noise.
    return at_least_float32(logits) / sampling.temperature - noise.log()


# ---- acceptance ----
def typical_threshold(base_probs: Tensor, epsilon=Sampling.epsilon, delta=None) -> Tensor:
    """min(epsilon, delta * exp(-H(base_probs))), H in nats; (..., V) -> (...).

    Paper, "Typical acceptance"; delta is sqrt(epsilon) unless given. The flatter the distribution,
    the lower the threshold:

    >>> round(typical_threshold(torch.full((8,), 1 / 8)).item(), 4)  # 0.3 / 8
    0.0375
    """
    delta = math.sqrt(epsilon) if delta is None else delta
    entropy = -torch.xlogy(base_probs, base_probs).sum(-1)  # 0 log 0 = 0
    return torch.clamp(delta * torch.exp(-entropy), max=epsilon)


def accept(
    tree: Tree, tokens: Tensor, logits: Tensor, sampling=GREEDY, noise: Tensor | None = None
) -> tuple[list[int], list[int]]:
    """The longest path from the root that the base model agrees with, and the tokens it emits.

    tokens (N,) at the nodes; logits (N, V) of the base model after each node; noise (N, V), equal
    at equal depths, for temperature > 0. Returns the accepted nodes, the root first; and their
    guesses without the root's token, followed by the base model's own next token.
    """
    # 1. What the base model says after each node: one sample, shared by all its children. With one
    #    sample for each child, children would be accepted too often.
    targets = sample(logits, sampling, noise)  # (N,)
    # Both as lists, in one transfer from the device.
    guesses, targets = torch.stack((tokens, targets)).tolist()

    # 2. Does each node's guess pass at its parent? The root, node 0, is accepted already.
    parents = list(tree.parents[1:])  # of nodes 1, 2, ...
    if sampling.typical:
        base_probs = logits_to_probs(logits, sampling)  # (N, V)
        guess_probs = base_probs[parents, tokens[1:]]  # (N-1,)
        threshold = typical_threshold(base_probs, sampling.epsilon)[parents]  # (N-1,)
        passes = [True] + (guess_probs > threshold).tolist()
        scores = [0.0] + guess_probs.log().tolist()
    else:
        # Greedy and lossless: exact match with the parent's target token.
        passes = [True] + [guess == targets[p] for guess, p in zip(guesses[1:], parents)]
        scores = [0.0] * len(tree)

    # 3. Walk down from the root: a node is accepted if it passes and its parent is accepted.
    paths = {0: [0]}  # accepted node -> the nodes from the root to it
    for node, parent in enumerate(parents, start=1):
        if passes[node] and parent in paths:
            paths[node] = paths[parent] + [node]

    # 4. The longest path wins. If several are (in typical acceptance only), the most likely does.
    path = max(paths.values(), key=lambda nodes: (len(nodes), sum(scores[i] for i in nodes)))
    return path, [guesses[node] for node in path[1:]] + [targets[path[-1]]]


# ---- decoding ----
@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass of a decoding: what it emitted, and what it saw."""

    emitted: list[int]  # the new tokens of the text
    tree: Tree  # of N nodes; plain decoding and the prompt have the root alone
    tokens: Tensor  # (N,) at the nodes
    path: list[int]  # the accepted nodes, the root first
    hidden: Tensor  # (D,) what the heads guessed from; with the root alone, its own state
    logits: Tensor  # (N, V) of the base model after each node
    noise: Tensor | None  # (N, V), unless greedy


def max_length(model: GPT, prompt: Sequence[int], max_new_tokens: int) -> int:
    """The length, prompt included, at which the text ends at the latest; ValueError if no room."""
    context = model.config.max_position_embeddings
    check(max_new_tokens >= 0, f"max_new_tokens {max_new_tokens}: must be 0 or more")
    n = len(prompt)
    check(0 < n < context, f"the prompt has {n} tokens: must be 1 to {context - 1}")
    return min(n + max_new_tokens, context)


def truncate_at_eos(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """The tokens up to the first that ends the text, included."""
    ends = [n for n, token in enumerate(tokens, start=1) if token in eos_ids]
    return tokens[: min(ends, default=len(tokens))]


@torch.inference_mode()
def generate(
    model: GPT, prompt: Sequence[int], max_new_tokens: int, sampling=GREEDY, generator=None
) -> Iterator[Step]:
    """Plain (autoregressive) decoding with a KV cache, one token a step.

    Ends after max_new_tokens, after an EOS token, or when the context is full. sampling: Sampling;
    generator: torch.Generator, which alone decides what is sampled.
    """
    end = max_length(model, prompt, max_new_tokens)
    cache = model.new_cache(end)
    noise = SharedGumbelNoise(model, sampling, generator)
    # The prompt is fed at once, then each new token by itself: the cache holds the rest.
    tokens = torch.tensor(prompt, device=model.lm_head.weight.device)  # (T,), then (1,)
    for length in range(len(prompt), end):
        hidden = model(tokens[None], cache=cache)[0, -1:]  # (1, D)
        logits, noise_now = model.lm_head(hidden), noise.at([0])  # (1, V)
        root, tokens = tokens[-1:], sample(logits, sampling, noise_now)  # (1,)
        token = int(tokens.item())
        check_sampled(token, length, logits.dtype)
        noise.advance(1)
        yield Step([token], ROOT_ONLY, root, [0], hidden[0], logits, noise_now)
        if token in model.config.eos_ids:
            return


class TreeBuffers:
    """What a tree needs in every step, made once (the official code: medusa_buffers).

    max_past: most tokens in the cache before a step. depths (N,): position minus the root's.
    index (N,): where each node's token is in [root, guesses of head 1, guesses of head 2, ...].
    cartesian_tree([2, 1]), with n_guesses = 2 for each head:

        node 0 root   1 (0,)   2 (1,)   3 (0, 0)   4 (1, 0)        index = [0, 1, 2, 3, 3]
    """

    def __init__(self, tree: Tree, max_past: int, like: Tensor):
        # The first n_guesses of each head are laid out after the root, head by head.
        self.n_guesses = max(tree.ranks) + 1
        self.depths = torch.tensor(tree.depths, device=like.device)  # (N,)
        ranks = torch.tensor(tree.ranks, device=like.device)  # (N,)
        self.index = 1 + (self.depths - 1) * self.n_guesses + ranks  # (N,)
        self.index[0] = 0
        self.tree = tree
        # Added to attention scores: 0 where a node may look, minus infinity where not. Made for the
        # longest past; for a shorter one `mask` takes the last columns.
        seen = F.pad(tree.mask, (max_past, 0), value=True)  # (N, max_past + N)
        self.bias = torch.where(seen, 0.0, -math.inf).to(like)

    @cached_property
    def levels(self) -> list[tuple[Tensor, ...]]:
        """For sequential heads, which go down the tree: four tensors for each depth, 1 first.

        nodes (n,): those at this depth; paths (P, depth): the nodes from the root to each of their
        P parents; rows (n,): in which row of `paths` each node's parent is; ranks (n,).
        """
        tree, found = self.tree, []
        for depth in range(1, max(tree.depths) + 1):
            nodes = [node for node in range(len(tree)) if tree.depths[node] == depth]
            parents = sorted({tree.parents[node] for node in nodes})
            # Root first: ancestors have lower numbers.
            paths = [tree.mask[parent].nonzero()[:, 0].tolist() for parent in parents]
            rows = [parents.index(tree.parents[node]) for node in nodes]
            level = nodes, paths, rows, [tree.ranks[node] for node in nodes]
            found.append(tuple(torch.tensor(part, device=self.depths.device) for part in level))
        return found

    def mask(self, past: int) -> Tensor:
        """(N, past + N): the past, then the ancestors. A copy: CUDA needs an aligned address."""
        width = past + len(self.bias)
        return self.bias[:, -width:].clone(memory_format=torch.contiguous_format)


def propose(embeddings, heads, heads_lm_head, hidden: Tensor, root: int, buffers, noise):
    """The tokens at the nodes, (N,): the root, and the heads' best guesses after it.

    embeddings (V, D): `heads.embed` of the whole vocabulary; None unless they are sequential.
    hidden (D,): the state that predicted the root; buffers: TreeBuffers; noise: SharedGumbelNoise.
    """

    def best(logits: Tensor, depths: Sequence[int]) -> Tensor:
        """logits (n, v), after nodes of these depths, one each or one for all -> (n, n_guesses)."""
        scores = gumbel_scores(logits, noise.sampling, noise.at(depths), heads.token_map)
        guesses = scores.topk(buffers.n_guesses).indices
        return guesses if heads.token_map is None else heads.token_map[guesses]

    # Head k guesses the token at depth k. The base samples it with the noise after depth k-1.
    if not heads.config.sequential:
        logits = heads(hidden, heads_lm_head)  # (K, V), or (K, v) of a truncated vocabulary
        guesses = best(logits, range(len(logits)))  # (K, n_guesses)
        return torch.cat((guesses.new_tensor([root]), guesses.flatten()))[buffers.index]  # (N,)

    # Sequential heads go down the tree: head k guesses after each of the P nodes at depth k-1 that
    # have children, given the tokens from the root to it.
    tokens = torch.full_like(buffers.index, root)  # (N,), to be filled in
    for k, (nodes, paths, rows, ranks) in enumerate(buffers.levels, start=1):
        between = F.embedding(tokens[paths], embeddings).flatten(-2)  # (P, k * D)
        states = hidden.expand(len(paths), -1)  # (P, D)
        logits = heads.one_head(k, states, heads_lm_head, between)  # (P, v)
        tokens[nodes] = best(logits, [k - 1])[rows, ranks]
    return tokens


@torch.inference_mode()
def medusa_generate(
    model: GPT, heads, tree: Tree, prompt, max_new_tokens: int, sampling=GREEDY, generator=None
) -> Iterator[Step]:
    """Decoding with Medusa heads, several tokens a step; ends where `generate` ends.

    Unless typical, the text is that of `generate` with the same seed (rounding decides near-ties).
    """
    check_compatible(model, heads, tree)
    length, end = len(prompt), max_length(model, prompt, max_new_tokens)
    if length == end:
        return
    lm_head, heads_lm_head = model.lm_head, heads.truncated(model.lm_head)
    embeddings = heads.embed(model.embed_tokens) if heads.config.sequential else None  # (V, D)
    cache, eos_ids = model.new_cache(end + len(tree)), model.config.eos_ids  # text, then tree
    last_position = model.config.max_position_embeddings - 1
    buffers = TreeBuffers(tree, end, like=lm_head.weight)
    noise = SharedGumbelNoise(model, sampling, generator)

    # Prefill: the prompt gives the root, and the hidden state from which the heads guess on.
    tokens = torch.tensor(prompt, device=lm_head.weight.device)  # (T,)
    hidden = model(tokens[None], cache=cache)[0, -1]  # (D,)
    logits, noise_now = lm_head(hidden[None]), noise.at([0])  # (1, V)
    emitted = sample(logits, sampling, noise_now).tolist()
    step = Step(emitted, ROOT_ONLY, tokens[-1:], [0], hidden, logits, noise_now)
    while True:
        check_sampled(emitted[-1], length, logits.dtype)
        yield step  # the prompt's, then that of the last turn of this loop
        length, root = length + len(emitted), emitted[-1]
        noise.advance(len(emitted))
        if length == end or root in eos_ids:
            return
        past = length - 1  # rows in the cache: all of the text but the root

        # 1. Propose: the heads guess what follows the root; the tree arranges their guesses.
        tokens = propose(embeddings, heads, heads_lm_head, hidden, root, buffers, noise)  # (N,)

        # 2. Verify: one pass of the base model over all nodes, under tree attention. Nodes beyond
        #    the context take its last position: step 3 drops their tokens, as all after `end`.
        positions = (buffers.depths + past).clamp(max=last_position)  # (N,)
        states = model(tokens[None], positions, buffers.mask(past), cache)[0]  # (N, D)
        logits, noise_now = lm_head(states), noise.at(tree.depths)  # (N, V)

        # 3. Accept: the longest path the base model agrees with, and its own next token.
        path, emitted = accept(tree, tokens, logits, sampling, noise_now)
        emitted = truncate_at_eos(emitted[: end - length], eos_ids)

        # 4. Commit: keep the accepted path in the cache; the next step overwrites the rest.
        cache.keep(past, path)
        step = Step(emitted, tree, tokens, path, hidden, logits, noise_now)
        hidden = states[path[-1]]  # it predicted the next root
