"""A new tree in every step, from the heads' own probabilities at this position.

Here and not in medusa.py: no measurement says that it is faster than the best fixed tree.
"""

import heapq
from collections.abc import Iterator

import torch
from torch import Tensor

from medusa import GREEDY, MedusaHeads, SharedGumbelNoise, Step, TreeBuffers, accept
from medusa import check_compatible, gumbel_scores, max_length, sample, truncate_at_eos
from model import GPT, check
from tree import ROOT_ONLY, RankPath, Tree, tree_from_paths


def best_first_tree(log_probs: Tensor, n_nodes: int) -> Tree:
    """The tree of n_nodes nodes, the root included, that holds the most probable paths.

    log_probs (K, V) of the heads at one position, which are taken to be right independently: the
    probability of a path is the product of its ranks'. It never grows from a node to its first
    child or next sibling, so the best node not yet taken is such a neighbour of one that was. Ties
    go to the shorter path, then to the lower ranks. The tree is smaller if fewer paths exist.
    """
    if n_nodes < 2:
        raise ValueError(f"n_nodes = {n_nodes}: must be at least 2")
    ranked = log_probs.topk(min(n_nodes - 1, log_probs.shape[-1])).values.tolist()
    # (cost, depth, path, cost of its parent), where cost is minus the log-probability
    heap: list[tuple[float, int, RankPath, float]] = [(-ranked[0][0], 1, (0,), 0.0)]
    paths = []
    while heap and len(paths) < n_nodes - 1:
        cost, depth, path, parent_cost = heapq.heappop(heap)
        paths.append(path)
        if depth < len(ranked):
            heapq.heappush(heap, (cost - ranked[depth][0], depth + 1, (*path, 0), cost))
        rank = path[-1] + 1
        if rank < len(ranked[0]):
            sibling, its_cost = (*path[:-1], rank), parent_cost - ranked[depth - 1][rank]
            heapq.heappush(heap, (its_cost, depth, sibling, parent_cost))
    return tree_from_paths(paths)


def grow(heads, lm_head, hidden: Tensor, n_nodes: int, sampling, noise):
    """The tree of a step, and the guesses that it takes its nodes from.

    A score is a head's logit, plus the shared Gumbel noise unless greedy. The base's logits are
    taken to differ from the head's by Gumbel noise, so that softmax(score) is the probability that
    the guess comes.
    """
    logits = heads(hidden, lm_head)  # (K, V), or (K, v) of a truncated vocabulary
    scores = gumbel_scores(logits, sampling, noise.at(range(len(logits))), heads.token_map)
    tree = best_first_tree(scores.log_softmax(-1), n_nodes)
    guesses = scores.topk(max(tree.ranks) + 1).indices.flatten()
    return tree, guesses if heads.token_map is None else heads.token_map[guesses]


@torch.inference_mode()
def dynamic_generate(
    model: GPT, heads: MedusaHeads, n_nodes: int, prompt, max_new_tokens: int, sampling=GREEDY,
    generator=None,
) -> Iterator[Step]:  # fmt: skip
    """`medusa_generate`, but for the tree: n_nodes nodes, chosen again in every step."""
    check(not heads.config.sequential, "sequential heads: their guesses depend on the tree")
    check_compatible(model, heads)
    length, end = len(prompt), max_length(model, prompt, max_new_tokens)
    if length == end:
        return
    lm_head, heads_lm_head = model.lm_head, heads.truncated(model.lm_head)
    cache, last = model.new_cache(end + n_nodes), model.config.max_position_embeddings - 1
    noise = SharedGumbelNoise(model, sampling, generator)
    tokens = torch.tensor(prompt, device=lm_head.weight.device)  # (T,)
    hidden = model(tokens[None], cache=cache)[0, -1]  # (D,)
    logits, noise_now = lm_head(hidden[None]), noise.at([0])  # (1, V)
    emitted = sample(logits, sampling, noise_now).tolist()
    step = Step(emitted, ROOT_ONLY, tokens[-1:], [0], hidden, logits, noise_now)
    while True:
        yield step
        length += len(emitted)
        noise.advance(len(emitted))
        if length == end or emitted[-1] in model.config.eos_ids:
            return
        past = length - 1
        tree, guesses = grow(heads, heads_lm_head, hidden, n_nodes, sampling, noise)
        buffers = TreeBuffers(tree, past, like=lm_head.weight)
        tokens = torch.cat((guesses.new_tensor(emitted[-1:]), guesses))[buffers.index]  # (N,)
        # Verify, accept, commit: as in `medusa_generate`.
        positions = (buffers.depths + past).clamp(max=last)
        states = model(tokens[None], positions, buffers.mask(past), cache)[0]  # (N, D)
        logits, noise_now = lm_head(states), noise.at(tree.depths)  # (N, V)
        path, emitted = accept(tree, tokens, logits, sampling, noise_now)
        emitted = truncate_at_eos(emitted[: end - length], model.config.eos_ids)
        cache.keep(past, path)
        step = Step(emitted, tree, tokens, path, hidden, logits, noise_now)
        hidden = states[path[-1]]
