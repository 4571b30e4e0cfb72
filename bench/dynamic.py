"""A new tree in every step, from the heads' own probabilities at this position ("best_first_tree" in tree.py). It stands here and not in
medusa.py for as long as no measurement says that it is faster than the best fixed tree.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from medusa import (
    ROOT_ONLY,
    MedusaHeads,
    Sampling,
    SharedGumbelNoise,
    TreeBuffers,
    accept,
    check_compatible,
    gumbel_scores,
    max_length,
    truncate_at_eos,
)
from model import GPT
from tree import best_first_tree


def log_probs_of(scores: Tensor, logits: Tensor) -> Tensor:
    """How likely each guess is to come: (K, V), of the scores of `gumbel_scores`.

    softmax(logits) is the chance to be the largest once Gumbel noise is added to each logit. So it is for a race, in which
    log(score) takes the logit's place: the base's logits are taken to differ from the heads' by such noise.
    """
    return (scores if scores is logits else scores.log()).log_softmax(-1)


def grow(
    heads: MedusaHeads,
    lm_head: nn.Linear,
    hidden: Tensor,
    n_nodes: int,
    past: int,
    room: int,
    sampling: Sampling,
    noise: SharedGumbelNoise,
):
    """The plan of a tree of n_nodes nodes, at most `room` deep, for a cache of `past` rows, and the guesses at its nodes below the root, (N-1,)."""
    if room == 0:
        return TreeBuffers(ROOT_ONLY, past, hidden), torch.empty(
            0, dtype=torch.long, device=hidden.device
        )
    logits = heads.widened(heads(hidden, heads.shortened(lm_head)))[:room]  # (K, V)
    scores = gumbel_scores(logits, sampling, noise.at(range(len(logits))))  # (K, V)
    plan = TreeBuffers(best_first_tree(log_probs_of(scores, logits), n_nodes), past, hidden)
    guesses = scores.topk(plan.n_guesses).indices.flatten()
    return plan, guesses[plan.index[1:] - 1]  # a plan's index counts the root


@torch.inference_mode()
def dynamic_generate(
    model: GPT,
    heads: MedusaHeads,
    n_nodes: int,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """`medusa_generate`, but for the tree: n_nodes nodes, chosen anew in every step."""
    check_compatible(model, heads, ROOT_ONLY)
    end = max_length(model, prompt, max_new_tokens)
    lm_head, ends = model.lm_head, model.config.eos_ids
    cache = model.new_cache(end + n_nodes)
    noise = SharedGumbelNoise(lm_head.weight, sampling, generator)
    length = len(prompt)
    tokens = torch.tensor(prompt, device=lm_head.weight.device)
    states = model(tokens[None], cache=cache)[0, -1:]  # (1, D)
    path, emitted = accept(
        ROOT_ONLY, tokens[-1:], lm_head(states), sampling, noise.at(ROOT_ONLY.depths)
    )
    while length < end:
        yield (emitted := truncate_at_eos(emitted, ends))
        length += len(emitted)
        noise.advance(len(emitted))
        if length == end or emitted[-1] in ends:
            return
        past = length - 1
        plan, guesses = grow(
            heads, lm_head, states[path[-1]], n_nodes, past, end - length - 1, sampling, noise
        )
        tokens = torch.cat((guesses.new_tensor(emitted[-1:]), guesses))  # (N,)
        states = model(tokens[None], plan.depths + past, plan.mask(past), cache)[0]  # (N, D)
        path, emitted = accept(
            plan.tree, tokens, lm_head(states), sampling, noise.at(plan.tree.depths)
        )
        cache.keep(past, path)
