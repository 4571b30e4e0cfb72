"""Properties of Medusa: the heads and their loss, the three rules of acceptance, and that a tree
changes the speed of a text, never the text."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import medusa
from medusa import GREEDY, IGNORED, MedusaConfig, MedusaHeads, Sampling, accept, check_compatible
from medusa import cross_entropy, exponential_noise, generate, gumbel_scores, logits_to_probs
from medusa import medusa_generate, medusa_loss, targets_ahead, typical_threshold
from strategies import AFTER_EOS, KINDS, SEQUENTIAL, CheatingHeads, chi_square, close, decodings
from strategies import distribution, follow, greedy_text, markov_gpt, next_logits, properties
from strategies import random_gpt, random_heads, refused, rng, text_distribution, text_of, trees
from strategies import unit
from tree import cartesian_tree, tree_from_paths

CHAIN = tree_from_paths([[0], [0, 0], [0, 0, 0], [0, 0, 1]])  # and a last node that is off it


# ---- decoding ----
def decode(case, sampling=GREEDY, generator=None, text=()) -> list[list[int]]:
    """What each step emitted. case: a model, heads, a tree, a prompt, a number of new tokens."""
    heads, prompt = case[1], case[3]
    if isinstance(heads, CheatingHeads):
        heads.text, heads.length = [*prompt, *text], len(prompt)
    return follow(medusa_generate(*case, sampling, generator), heads, case[0].config.eos_ids)


def same_text(ours: list[int], plain: list[int], model, hint="") -> None:
    n = min(len(ours), len(plain))
    assert not set(model.config.eos_ids) & set(ours[:-1]), AFTER_EOS
    if ours[:n] == plain[:n]:
        says = "the text is longer than max_new_tokens or the context: tokens count, not steps"
        assert len(ours) <= len(plain), says
        says = "the text ends too early: at max_new_tokens, EOS or the end of the context"
        assert len(ours) >= len(plain), says
    assert ours == plain, f"the text is not the one that plain decoding gives{hint}"


@settings(properties, max_examples=150)
@given(decodings())
def test_greedy_tree_decoding_equals_plain_decoding(case):
    """Token for token, to the same end: max_new_tokens, EOS, or the end of the context."""
    model, _, tree, prompt, n = case
    text = greedy_text(model, prompt, n)
    assert text_of(generate(model, prompt, n)) == text
    steps = decode(case, text=text)
    same_text(sum(steps, []), text, model)
    says = "a step emits a token, and at most the guesses of the deepest path and the next root"
    assert all(1 <= len(emitted) <= max(tree.depths) + 1 for emitted in steps), says


NOISE = "; if greedy text is right: a node has the noise of its depth, which advances with the text"
TOP_P = st.sampled_from((0.3, 0.8, 1.0))
samplings = st.builds(Sampling, st.floats(0.2, 3), st.integers(0, 4), TOP_P)


@settings(properties, max_examples=150)
@given(decodings(), samplings, st.integers(0, 2**31))
def test_lossless_tree_sampling_gives_the_text_of_plain_sampling(case, sampling, seed):
    model, _, _, prompt, n = case
    text, before = text_of(generate(model, prompt, n, sampling, rng(seed))), torch.get_rng_state()
    same_text(sum(decode(case, sampling, rng(seed), text), []), text, model, NOISE)
    assert torch.equal(torch.get_rng_state(), before), "the generator alone decides"


@settings(properties, max_examples=150)
@given(decodings(SEQUENTIAL), st.just(GREEDY) | samplings, st.integers(0, 2**31))
def test_sequential_heads_guess_after_each_node_and_leave_the_text_alone(case, sampling, seed):
    """Node by node, without a cache: what head k ranks so after the tokens from the root on."""
    model, heads, tree, prompt, n = case
    plain = text_of(generate(model, prompt, n, sampling, rng(seed)))
    same_text(sum(decode(case, sampling, rng(seed)), []), plain, model)
    lm_head, text = heads.truncated(model.lm_head), list(prompt)
    known = torch.arange(model.config.vocab_size) if heads.token_map is None else heads.token_map
    for step in medusa_generate(*case, sampling, rng(seed)):
        hidden = model(torch.tensor([text[:-1] or text]))[0, -1]
        for node, parent in enumerate(step.tree.parents[1:], start=1):
            k, path = tree.depths[node], tree.mask[parent]
            between = unit(model, step.tokens[path])[None]
            logits = heads.one_head(k, hidden[None], lm_head, between)[0]
            if sampling.temperature > 0:
                logits = logits / sampling.temperature - step.noise[parent][known].log()
            assert step.tokens[node] == known[logits.argsort(descending=True)[tree.ranks[node]]]
        text += step.emitted


@settings(properties, max_examples=60)
@given(decodings(), st.floats(0.2, 3), st.integers(0, 2**31))
def test_typical_decoding_ends_at_the_same_places(case, temperature, seed):
    model, _, _, prompt, n = case
    eos, before = set(model.config.eos_ids), torch.get_rng_state()
    steps = decode(case, Sampling(temperature, typical=True), rng(seed), prompt * 10)
    assert torch.equal(torch.get_rng_state(), before), "the generator alone decides"
    text, room = sum(steps, []), min(n, model.config.max_position_embeddings - len(prompt))
    assert all(steps) and not eos & set(text[:-1])
    assert len(text) == room or (len(text) < room and text[-1] in eos)


TINY = 1e-20, 1e-29, 1e-31, 1e-46, 5e-324
NEAR_ZERO = [Sampling(typical=True), Sampling(1e-46, typical=True), Sampling(2.0, top_k=1)]
NEAR_ZERO += [Sampling(t, 4, 0.9) for t in TINY] + [Sampling(0.7, top_p=p) for p in TINY]


@settings(properties, max_examples=100)
@given(decodings(), st.sampled_from(NEAR_ZERO))
def test_a_temperature_nucleus_or_top_k_that_leaves_one_token_gives_the_greedy_text(case, sampling):
    """In every dtype, however small: nothing may underflow into a division by zero."""
    model, _, _, prompt, n = case
    text = greedy_text(model, prompt, n)
    assert text_of(generate(model, prompt, n, sampling, rng(0))) == text
    same_text(sum(decode(case, sampling, rng(0), text), []), text, model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (9 * torch.randn(3, 6, generator=rng(n))).to(dtype)
        probs, noise = logits_to_probs(logits, sampling), exponential_noise(logits.float(), rng(0))
        assert torch.equal(probs, F.one_hot(logits.argmax(-1), 6).to(probs.dtype))
        assert not gumbel_scores(logits, sampling, noise).isnan().any()


RULES = [GREEDY, Sampling(0.8), Sampling(0.8, 3, 0.9), Sampling(0.8, typical=True)]
NO_LOGITS = [[math.nan] * 6, [0, 0, 0, 0, math.nan, 0], [math.inf, *"12345"], [-math.inf] * 6]


@pytest.mark.parametrize("sampling", RULES, ids=str)
@pytest.mark.parametrize("bad", NO_LOGITS, ids=str)
def test_logits_that_are_nan_or_infinite_end_the_text_with_the_step_and_the_dtype(bad, sampling):
    """After token 3 of the text 1 2 3 4 ...; that token 0 is masked does not matter."""
    model, bad = markov_gpt(99.0 * torch.eye(6).roll(1, 1)), torch.tensor([*map(float, bad)])
    heads, mask = MedusaHeads(MedusaConfig(6, 6, 3)).double(), torch.tensor([-math.inf] + 5 * [0])

    def spoil(_, states, logits):
        return (logits + mask).where(states[0].argmax(-1, True) != 3, bad.double())

    model.lm_head.register_forward_hook(spoil)
    says, asked = "step after {} tokens: .*float64; try bfloat16", ([0], 9, sampling, rng(0))
    refused(says.format("4"), list, generate(model, *asked))
    refused(says.format("[1-4]"), list, medusa_generate(model, heads, CHAIN, *asked))


@settings(properties, max_examples=30)
@given(decodings(), st.integers(1, 4), st.sampled_from((GREEDY, Sampling(1.0))))
def test_right_guesses_are_all_accepted(case, depth, sampling):
    """Heads that know the text emit depth + 1 tokens a step, whatever rank the tree asks for."""
    model, _, _, prompt, n = case
    text = text_of(generate(model, prompt, n, sampling, rng(0)))
    for rank in (0, 1):
        heads = CheatingHeads(model, depth, [], 0, lambda: rank)
        # With rank 1, a node off the path comes first: index is not depth.
        tree = tree_from_paths({(0,)} | {(rank,) * d for d in range(1, depth + 1)})
        steps = decode((model, heads, tree, prompt, n), sampling, rng(0), text)
        same_text(sum(steps, []), text, model, NOISE)
        expected = ([1] + [depth + 1] * len(steps))[: max(len(steps) - 1, 0)]
        says = "right guesses are not all accepted: a step emits depth + 1 tokens"
        assert [len(emitted) for emitted in steps[:-1]] == expected, says


def count_on(prompt, n=21, context=32, eos=None) -> list[list[int]]:
    """A base that continues 0 1 2 3 4 5 0 1 ..., and private heads that know how to count: the
    matrix of head k is the base's, k tokens on. What both models are fed is checked, too."""
    model, fed = markov_gpt(9.0 * torch.eye(6).roll(1, 1), context, eos), []
    heads = MedusaHeads(MedusaConfig(6, 6, 3, original_lm_head=False)).double()
    heads.lm_heads.data = torch.stack([model.lm_head.weight.detach().roll(k, 0) for k in (1, 2, 3)])

    def check_base(_, args, named):
        fed.append(args[0].numel())
        positions = named.get("positions") if len(args) < 2 else args[1]
        says = "a token was fed at a position that is none: the context has ended"
        assert positions is None or positions.max() < context, says

    def check_heads(_, args):
        says = "the heads ran at several nodes: the state of the node accepted last is enough"
        assert args[0].numel() == 6, says

    model.register_forward_pre_hook(check_base, with_kwargs=True)
    heads.register_forward_pre_hook(check_heads)
    steps = decode((model, heads, CHAIN, prompt, n))
    says = "the base model runs once a step, on the prompt, then on the nodes of the tree"
    assert len(fed) == len(steps) and fed[0] == len(prompt) and max(fed[1:], default=0) <= 5, says
    return steps


def test_head_k_fills_depth_k_from_the_state_before_the_root():
    steps = count_on([3])
    says = "the text is not the base model's own"
    assert sum(steps, []) == [(4 + i) % 6 for i in range(21)], says
    says = "head k does not fill depth k, or the heads do not see the state before the root"
    assert [len(emitted) for emitted in steps] == [1, 4, 4, 4, 4, 4], says


@pytest.mark.parametrize("prompt, steps", [(3, [[4], [5, 0]]), (4, [[5], [0]]), (5, [[0]])])
def test_eos_ends_the_text_in_the_middle_of_an_accepted_path(prompt, steps):
    for eos in (0, [2, 0]):
        assert count_on([prompt], eos=eos) == steps, AFTER_EOS


@pytest.mark.parametrize("prompt_length", range(1, 12))
def test_the_text_runs_up_to_the_context_limit_and_no_further(prompt_length):
    steps = count_on([i % 6 for i in range(prompt_length)], 99, context=12)
    says = "the text does not run up to the last position of the context"
    assert sum(steps, []) == [i % 6 for i in range(prompt_length, 12)], says
    says = "near the end of the context a step emits all that still fits, if all guesses are right"
    assert len(steps) == 1 + math.ceil((12 - prompt_length - 1) / 4), says


@settings(properties, max_examples=60)
@given(st.integers(0, 99), trees(max_nodes=8), st.integers(1, 6), st.integers(0, 7))
def test_a_tree_forward_and_keep_equal_feeding_tokens_one_by_one(seed, tree, S, last):
    model, N = random_gpt(seed, context=24, layers=2).requires_grad_(False), len(tree)
    prompt, tokens = torch.randint(5, (S + N,), generator=rng(seed)).split((S, N))
    paths = [[i for i in range(N) if tree.mask[node, i]] for node in range(N)]
    cache, plain = model.new_cache(S + N + 1), model.new_cache(S + N + 1)
    model(prompt[None], cache=cache)
    mask = torch.cat((torch.ones(N, S, dtype=torch.bool), tree.mask), dim=1)
    hidden = model(tokens[None], S + torch.tensor(tree.depths), mask, cache)[0]
    for node, path in enumerate(paths):
        close(model.lm_head(hidden[node]), next_logits(model, [*prompt, *tokens[path]]))

    path = paths[last % N]
    cache.keep(S, path)
    for token in [*prompt, *tokens[path]]:
        model(token.view(1, 1), cache=plain)
    says = "after keep the length is not that of the past and the kept rows"
    assert cache.length == plain.length == S + len(path), says
    says = "after keep the cache is not what feeding the kept tokens one by one would have left"
    close(cache.data[..., : cache.length, :], plain.data[..., : cache.length, :], says)
    more = torch.tensor([[3]])
    close(model(more, cache=cache), model(more, cache=plain), says)


@pytest.mark.parametrize("way", [generate, medusa_generate])
def test_impossible_calls_are_refused(way):
    model = random_gpt(0, context=8)
    guessing = (random_heads(model, 3, 0), CHAIN) if way is medusa_generate else ()
    for length, n, says in ((0, 3, "has 0 tokens"), (8, 3, "1 to 7"), (1, -1, "max_new_tokens -1")):
        refused(says, lambda: list(way(model, *guessing, [1] * length, n)))
    assert list(way(model, *guessing, [1], 0)) == [], "0 new tokens were asked for"
    if way is medusa_generate:
        with pytest.raises(Exception) as error:
            list(way(model, random_heads(model, 2, 0), CHAIN, [1], 3))
        says = "first of all, check_compatible refuses what does not fit together"
        assert "the tree is 3 deep, but there are 2 heads" in str(error.value), says


def test_check_compatible_refuses_heads_of_another_model_and_trees_beyond_the_heads():
    model, fits = random_gpt(0), MedusaConfig(8, 5, 3)
    check_compatible(model, MedusaHeads(fits), tree_from_paths([[4], [4, 4], [4, 4, 4]]))
    for config, tree, says in (
        (replace(fits, hidden_size=6), CHAIN, r"hidden_size .* \(6, 5\)"),
        (MedusaConfig(8, 6, 3), CHAIN, r"vocab_size .* \(8, 6\)"),
        (replace(fits, truncated_vocab_size=3), cartesian_tree([4]), "guess 3"),
    ):
        refused(says, next, medusa_generate(model, MedusaHeads(config).double(), tree, [1], 4))
    private = {"original_lm_head": False, "truncated_vocab_size": 3}
    refused("truncated_vocab_size = 3: must be 5", replace, fits, **private)


# ---- sampling ----
LOGITS = st.sampled_from((-60.0, -3.0, 0.0, 0.01, 0.7, 2.5))
NUCLEI = st.sampled_from((0.1, 0.3, 0.55, 0.9, 0.99, 1.0))


@properties
@given(st.lists(LOGITS, min_size=2, max_size=6), st.floats(0.05, 4), st.integers(0, 7), NUCLEI)
def test_logits_to_probs_equals_its_definition(logits, temperature, top_k, top_p):
    """Ties included: of equally likely tokens the lower comes first. However rows are stacked."""
    rows = torch.tensor([[logits], [logits[::-1]]], dtype=torch.float64)
    for i, t in ((0, temperature), (1, temperature), (0, 0.0)):
        expected = distribution(rows[i, 0].tolist(), t, top_k, top_p)
        found = logits_to_probs(rows, Sampling(t, top_k, top_p))[i, 0]
        close(found, torch.tensor(expected, dtype=torch.float64))
        whole = t > 0.5 and top_k == 0 and top_p == 1
        assert not whole or found.min() > 0, "a nucleus of 1 leaves out nothing"


BAD = {"temperature": (-0.1, math.inf, math.nan), "top_k": (-1,), "top_p": (0.0, 1.1, math.nan)}
BAD |= {"epsilon": (0.0, -1.0, 1.5, math.nan)}


@pytest.mark.parametrize("name, value", [(name, value) for name in BAD for value in BAD[name]])
def test_bad_sampling_values_are_refused_by_name(name, value):
    refused(name, Sampling, **{name: value})


def test_texts_of_a_tree_pass_a_chi_square_test():
    """One sample for each child, in place of one a node, would not."""
    sampling, n, generator = Sampling(1.4, top_k=4, top_p=0.95), 1500, rng(0)
    model = random_gpt(11, vocab_size=6, eos=5)
    case = model, random_heads(model, 2, 7), cartesian_tree((2, 2)), [1, 2], 3
    texts = [decode(case, sampling, generator) for _ in range(n)]
    assert n < sum(map(len, texts)) < 3 * n, "no guess is ever accepted, or all are"
    counts = Counter(tuple(sum(steps, [])) for steps in texts)
    chance = chi_square(counts, text_distribution(model, [1, 2], 3, sampling), n)
    assert chance > 0.01, "texts do not have the base model's probabilities: one sample a node"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_noise_samples_no_token_of_probability_zero(dtype):
    rows = [[0, 0.5, 0, 0.5, 0], [0, 0, 0.1, 0.2, 0.7], [1e-30, 0.6, 0.4, 0, 0]]
    probs, least = torch.tensor(rows, dtype=dtype), torch.finfo(dtype).tiny
    for smallest in range(5):
        noise = torch.full((3, 5), 800.0, dtype=dtype).index_fill(1, torch.tensor(smallest), least)
        tokens = medusa.sample(probs.log(), Sampling(1.0), noise)
        assert (probs.gather(1, tokens[:, None]) > 0).all(), "a token of probability 0 was sampled"
    assert exponential_noise(torch.empty(10**6, dtype=dtype), rng(0)).min() >= least


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("truncated", [0, 3])
def test_heads_with_the_distribution_of_the_base_guess_every_token(temperature, truncated):
    """Every token has the same distribution here, so new heads are perfect; without the shared
    noise they could only repeat the most likely token."""
    model = markov_gpt(torch.tensor([[0.3, 0.0, 0.2, -999.0]]).expand(4, 4), context=64)
    heads = MedusaHeads(MedusaConfig(4, 4, 3, truncated_vocab_size=truncated)).double()
    for token_map in heads.buffers():
        token_map.copy_(torch.tensor([2, 0, 1]))
    steps = decode((model, heads, CHAIN, [1], 41), Sampling(temperature), rng(0))
    says = "perfect heads must guess every sample: rank by scores with the same noise, temperature"
    assert [len(emitted) for emitted in steps] == [1] + [4] * 10, says
    assert (len(set(sum(steps, []))) > 1) == (temperature > 0)


ranked = st.tuples(st.integers(0, 99), st.integers(0, 99))


def scores_to_rank(seed: int, noise_seed: int):
    """Logits of three heads and the noise of three positions, V = 6."""
    logits = torch.randn(3, 6, generator=rng(seed), dtype=torch.float64)
    return logits, exponential_noise(logits, rng(noise_seed))


@properties
@given(ranked)
def test_typical_and_greedy_acceptance_rank_guesses_by_likelihood_alone(seeds):
    logits, noise = scores_to_rank(*seeds)
    says = "greedy and typical acceptance ask for the most likely guesses, without noise"
    assert torch.equal(gumbel_scores(logits, GREEDY, None), logits), says
    assert torch.equal(gumbel_scores(logits, Sampling(0.7, typical=True), noise), logits), says


@properties
@given(ranked, st.floats(0.3, 3), st.none() | st.permutations(range(6)))
def test_a_lossless_guess_is_ranked_by_probability_over_noise(seeds, temperature, order):
    """Of all tokens, or of the four in a token_map."""
    logits, noise = scores_to_rank(*seeds)
    token_map = None if order is None else torch.tensor(order[:4])
    tokens = slice(None) if order is None else token_map
    logits = logits[:, tokens]
    probs = torch.tensor([distribution(row, temperature) for row in logits], dtype=torch.float64)
    found = gumbel_scores(logits, Sampling(temperature), noise, token_map)
    says = "a lossless guess is ranked by its probability / the same noise, at the temperature"
    assert torch.equal(found.argsort(), (probs / noise[:, tokens]).argsort()), says


# ---- acceptance ----
def entropy(probs) -> float:
    return -sum(prob * math.log(prob) for prob in probs if prob > 0)


weights = st.lists(st.floats(0, 1), min_size=2, max_size=8)


@properties
@given(weights, st.floats(0.001, 1), st.none() | st.floats(0.01, 2))
def test_typical_threshold_equals_the_formula(weights, epsilon, delta):
    assume(sum(weights) > 0.1)
    probs = [weight / sum(weights) for weight in weights]
    found = typical_threshold(torch.tensor([probs, probs], dtype=torch.float64), epsilon, delta)
    factor = math.sqrt(epsilon) if delta is None else delta
    expected = min(epsilon, factor * math.exp(-entropy(probs)))
    says = "the threshold is not min(epsilon, delta * exp(-H)), H in nats, delta sqrt(epsilon)"
    close(found, torch.full((2,), expected, dtype=torch.float64), says)


@st.composite
def verifications(draw):
    """A tree, tokens at its nodes, none twice among siblings, base logits, and noise by depth."""
    V, seed = draw(st.integers(2, 6)), draw(st.integers(0, 10**6))
    tree, scale = draw(trees(n_ranks=V)), draw(st.floats(0.1, 4))
    levels = range(max(tree.depths) + 1)
    guesses = [torch.randperm(V, generator=rng(seed + depth)) for depth in levels]
    tokens = torch.stack([guesses[depth][rank] for depth, rank in zip(tree.depths, tree.ranks)])
    logits = scale * torch.randn(len(tree), V, generator=rng(seed), dtype=torch.float64)
    noise = exponential_noise(logits.new_empty(len(levels), V), rng(seed))
    return tree, tokens, logits, noise[list(tree.depths)]


def sampled(probs, noise) -> int:
    """The token that arrives first in an exponential race."""
    times = {token: float(e) / p for token, (p, e) in enumerate(zip(probs, noise)) if p > 0}
    return min(times, key=times.__getitem__)


def check_accepted(found, best: list[int], next_root: int, case, rule: str) -> None:
    """The path is the best one by the rule, and the tokens are its guesses and the next root."""
    (path, emitted), (tree, tokens, _, _) = found, case
    chained = all(tree.parents[node] == parent for parent, node in zip(path, path[1:]))
    assert path[:1] == [0] and chained, "the accepted nodes are no path from the root down"
    says = f"a node was accepted that does not pass at its parent: {rule}"
    assert len(path) <= len(best), says
    says = f"a deeper node was passed over although all on its path pass at their parents: {rule}"
    assert len(path) >= len(best), says
    says = f"the wrong node won: of the deepest that pass, it is the most likely; {rule}"
    assert path == best, says
    says = "a step emits the guesses on the path, then one sample of its last node"
    assert emitted[:-1] == tokens[path[1:]].tolist() and len(emitted) == len(path), says
    says = "the next root is not the sample of the last accepted node, with that node's noise"
    assert emitted[-1] == next_root, says


temperatures = st.sampled_from((0.0, 1.0)) | st.floats(0.3, 2)
limits = st.tuples(temperatures, st.integers(0, 4), st.sampled_from((0.6, 1.0)))  # and top_k, top_p
SLIPS = {
    "prob": "the guess's probability was taken after the guess itself, not after its parent",
    "threshold": "the threshold was the child's own, not its parent's",
    "orphan": "a node was accepted although its parent was not",
    "default": "epsilon was the default, not that of `sampling`",
}


def best_typical(tree, tokens, probs, epsilon, slip="") -> list[int]:
    """All paths one by one: the deepest that passes, of equally deep ones the most likely."""
    passing, epsilon = [], Sampling.epsilon if slip == "default" else epsilon
    for node in range(len(tree)):
        path, likelihood = [i for i in range(len(tree)) if tree.mask[node, i]], 1.0
        for parent, child in zip(path, path[1:]):
            prob = probs[child if slip == "prob" else parent][tokens[child]]
            spread = entropy(probs[child if slip == "threshold" else parent])
            passes = prob > min(epsilon, math.sqrt(epsilon) * math.exp(-spread))
            passes = passes or (slip == "orphan" and child != node)
            likelihood *= max(prob, 1e-300) if passes else 0.0
        if likelihood > 0:
            passing.append((len(path), likelihood, path))
    return max(passing)[2]


@settings(properties, max_examples=300)
@given(verifications(), limits, st.sampled_from((1e-300, 1.0)) | st.floats(0.001, 0.9))
def test_typical_acceptance_agrees_with_the_formula(case, chosen, epsilon):
    tree, tokens, logits, noise = case
    probs = [distribution(row, *chosen) for row in logits.tolist()]
    best = best_typical(tree, tokens, probs, epsilon)
    found = accept(tree, tokens, logits, Sampling(*chosen, typical=True, epsilon=epsilon), noise)
    rule = "its probability there must be above the threshold there"
    if found[0] != best:
        # Which common mistake gives the same?
        paths = {slip: best_typical(*case[:2], probs, epsilon, slip) for slip in SLIPS}
        rule = "; or ".join(SLIPS[slip] for slip in SLIPS if paths[slip] == found[0]) or rule
    check_accepted(found, best, sampled(probs[best[-1]], noise[best[-1]]), case, rule)


@settings(properties, max_examples=150)
@given(verifications(), limits)
def test_greedy_and_lossless_acceptance_follow_the_samples_of_the_nodes(case, chosen):
    tree, tokens, logits, noise = case
    rows = [distribution(row, *chosen) for row in logits.tolist()]
    targets, path = [sampled(*pair) for pair in zip(rows, noise)], [0]
    for node in range(1, len(tree)):
        if tree.parents[node] == path[-1] and tokens[node] == targets[path[-1]]:
            path.append(node)
    found = accept(tree, tokens, logits, Sampling(*chosen), noise)
    rule = "it must hold its parent's sample, one sample a node, for all of its children"
    check_accepted(found, path, targets[path[-1]], case, rule)


# ---- heads and their loss ----
SHAPES = pytest.mark.parametrize("private, layers", [(False, 1), (False, 3), (True, 1), (True, 3)])


@SHAPES
def test_new_heads_are_exactly_the_lm_head(private, layers):
    """In whole numbers, so that the order of a sum cannot matter."""
    lm_head = nn.Linear(6, 5, bias=False).double()
    lm_head.weight.data = torch.randint(-9, 9, (5, 6), generator=rng(0)).double()
    hidden = torch.randint(-9, 9, (2, 4, 6), generator=rng(1)).double()
    heads = MedusaHeads(MedusaConfig(6, 5, 3, layers, not private), lm_head).double()
    logits = heads(hidden, lm_head)
    says = "logits are (K, ..., V): heads, then as the hidden states are, then the vocabulary"
    assert logits.shape == (3, 2, 4, 5), says
    says = "a new head is not exactly the LM head: W2 (h + SiLU(W1 h + b1)), W1 and b1 zero"
    assert torch.equal(logits, lm_head(hidden).expand(3, 2, 4, 5)), says
    alone = heads(hidden[0, 0], lm_head)
    assert torch.equal(alone, logits[:, 0, 0]), "a state alone gives other logits than among others"


def by_formula(disk, k: int, layers: int, x, lm_head, between=()) -> torch.Tensor:
    """W2 (h + SiLU(W1 h + b1)), each matrix as it is on disk; in the first layer also R e of each
    token between."""
    for j in range(layers):
        layer = f"blocks.{k}.layers.{j}"
        z = x @ disk[f"{layer}.weight"].T + disk[f"{layer}.bias"]
        for i, e in enumerate(between[: k + 1] if j == 0 else ()):
            z = z + e @ disk[f"blocks.{k}.embeddings.{i}.weight"].T
        x = x + z / (1 + torch.exp(-z))
    return x @ disk.get(f"lm_heads.{k}.weight", lm_head.weight).T


@SHAPES
def test_heads_equal_the_formula_evaluated_head_by_head_from_the_file(layers, private, tmp_path):
    lm_head = random_gpt(0).lm_head
    heads = random_heads(random_gpt(0), 3, 8, layers, private)
    heads.save_pretrained(tmp_path)
    disk = load_file(tmp_path / "model.safetensors")
    hidden = torch.randn(2, 4, 8, generator=rng(7), dtype=torch.float64)
    logits = heads(hidden, lm_head)
    for k in range(3):
        says = f"head {k + 1} is not W2 (h + SiLU(W1 h + b1)), {layers} such layers in a row"
        close(logits[k], by_formula(disk, k, layers, hidden, lm_head), says)


@SHAPES
def test_no_parameter_is_shared_among_layers_or_heads(layers, private):
    lm_head = nn.Linear(6, 5, bias=False)
    heads = MedusaHeads(MedusaConfig(6, 5, 3, layers, not private), lm_head)
    owned = sum(weight.numel() for weight in heads.parameters())
    says = "the heads own W1 and b1 of every layer, and W2 only where private; never the base's"
    assert owned == 3 * (layers * (6 * 6 + 6) + (5 * 6 if private else 0)), says
    blocks = [weight.untyped_storage() for weight in heads.parameters()]
    held = sum({block.data_ptr(): block.nbytes() for block in blocks}.values())
    assert held >= 4 * owned, "heads or layers share one block of memory: each must have its own"


@SHAPES
def test_sequential_heads_add_what_is_between_state_and_guess(private, layers, tmp_path):
    """R e of each token that they see, in the first layer; at first R is zero."""
    hidden = torch.randn(2, 4, 8, generator=rng(7), dtype=torch.float64)
    between = torch.randn(2, 4, 3, 8, generator=rng(9), dtype=torch.float64)
    seen, lm_head = between.flatten(-2), random_gpt(0).lm_head
    heads = random_heads(random_gpt(0), 3, 8, layers, private, sequential=True)
    logits = heads(hidden, lm_head, seen)
    heads.save_pretrained(tmp_path)
    # The file tells that they are sequential, even where config.json does not.
    change(tmp_path, {}, {"sequential": None})
    assert MedusaHeads.from_pretrained(tmp_path).config == heads.config
    disk = load_file(tmp_path / "model.safetensors")
    for k in range(3):
        close(logits[k], by_formula(disk, k, layers, hidden, lm_head, between.unbind(-2)))
        # A head alone needs no more tokens than it sees.
        few = between[:, :, : k + 1].flatten(-2).flatten(0, 1)
        one = heads.one_head(k + 1, hidden.flatten(0, 1), lm_head, few)
        close(one, logits[k].flatten(0, 1), f"head {k + 1} alone gives other logits than among all")
    new = MedusaHeads(heads.config, lm_head).double()
    close(new(hidden, lm_head, seen), lm_head(hidden).expand(3, 2, 4, 5))


@st.composite
def batches(draw):
    K, B, T, V = (draw(st.integers(low, high)) for low, high in ((1, 4), (1, 3), (1, 7), (2, 5)))
    seed = draw(st.integers(0, 10**6))
    logits = torch.randn(K, B, T, V, generator=rng(seed), dtype=torch.float64)
    tokens = torch.randint(V, (B, T), generator=rng(seed))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).view(B, T)
    return logits.requires_grad_(), tokens, draw(st.none() | st.just(mask)), draw(st.floats(0.1, 1))


@properties
@given(batches())
def test_targets_ahead_equal_brute_force(batch):
    logits, tokens, mask, _ = batch
    K, B, T, _ = logits.shape
    expected = torch.full((K + 1, B, T), IGNORED)
    for k in range(K + 1):
        for b in range(B):
            for t in range(T - k - 1):
                if mask is None or mask[b, t + k + 1]:
                    expected[k, b, t] = tokens[b, t + k + 1]
    says = "row k is not token t+k+1, IGNORED beyond the end and where that token's mask is False"
    assert torch.equal(targets_ahead(tokens, mask, K), expected), says


@properties
@given(batches())
def test_medusa_loss_equals_the_sum_taken_one_target_at_a_time(batch):
    logits, tokens, mask, decay = batch
    (K, B, T, _), logs, expected = logits.shape, logits.log_softmax(-1), []
    for k in range(1, K + 1):
        aims = [(b, t) for b in range(B) for t in range(T - k - 1)]
        aims = [(b, t) for b, t in aims if mask is None or mask[b, t + k + 1]]
        terms = [-logs[k - 1, b, t, tokens[b, t + k + 1]] for b, t in aims]
        expected.append(sum(terms, logits.new_zeros(())) / max(len(terms), 1))
    targets = targets_ahead(tokens, mask, K)[1:]
    loss, means = medusa_loss(logits, targets, decay)
    says = "the mean of head k is not the cross-entropy at t against token t+k+1, over the targets "
    close(means, torch.stack(expected), says + "with loss_mask and only those")
    says = "without a count cross_entropy is not the mean over its own targets"
    close(cross_entropy(logits[0], targets[0]), expected[0], says)
    says = "the loss is not the sum over heads k = 1, 2, ... of decay^k times head k's mean"
    close(loss, sum(decay**k * mean for k, mean in enumerate(expected, start=1)), says)
    says = "without targets the gradient is not finite: a mean over nothing"
    assert torch.autograd.grad(loss, logits, retain_graph=True)[0].isfinite().all(), says
    # The parts of a batch, each told how many targets the whole batch has, add up.
    counts = (targets != IGNORED).flatten(1).sum(1)
    parts = [medusa_loss(logits[:, :, t], targets[:, :, t], decay, counts) for t in range(T)]
    close(sum(part[0] for part in parts), loss, "counts are those of the whole batch")


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5])
def test_head_k_learns_the_token_k_plus_1_ahead_and_nothing_else(offset):
    """Blocks of random tokens, each followed by its translation: a token tells the one `offset`
    ahead and no other. Of three heads, head offset - 1 learns it, if there is such a head."""
    V, B, blocks = 6, 12, 8
    first = torch.randint(V, (B, blocks, offset), generator=rng(offset))
    tokens = torch.cat((first, (first * 5 + 2) % V), dim=2).flatten(1)  # (B, T)
    mask = torch.cat((torch.zeros_like(first), torch.ones_like(first)), dim=2).flatten(1).bool()
    hidden, lm_head = 3.0 * F.one_hot(tokens, V).float(), nn.Linear(V, V, bias=False)
    nn.init.zeros_(lm_head.weight)
    heads = MedusaHeads(MedusaConfig(V, V, 3, original_lm_head=False), lm_head)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.2)
    for _ in range(25):
        loss, means = medusa_loss(heads(hidden, lm_head), targets_ahead(tokens, mask, 3)[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for k, mean in enumerate(means.tolist(), start=1):
        says = f"head {k} must learn the token {k + 1} ahead and no other; here {offset} is known"
        assert (mean < 0.1) if k + 1 == offset else (mean > 0.8 * math.log(V)), says


# ---- heads on disk ----
FIELDS = "hidden_size", "vocab_size", "num_heads", "num_hidden_layers", "original_lm_head"
MAY_MISS = *FIELDS[2:], "truncated_vocab_size", "medusa_fc_bias", "sequential"


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("private, truncated, sequential", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_heads_come_back_bit_for_bit(layers, private, truncated, sequential, dtype, tmp_path):
    """From a directory of the form that vLLM opens as a speculator, unless they are sequential."""
    path = tmp_path / "new" / "heads"
    heads = random_heads(random_gpt(0), 2, 0, layers, private, truncated, sequential).to(dtype)
    heads.save_pretrained(path)
    expected = {"token_map": (truncated,)} if truncated else {}
    for k in range(2):
        for j in range(layers):
            expected[f"blocks.{k}.layers.{j}.weight"] = (8, 8)
            expected[f"blocks.{k}.layers.{j}.bias"] = (8,)
        if sequential:
            expected |= {f"blocks.{k}.embeddings.{j}.weight": (8, 8) for j in range(k + 1)}
        if private:
            expected[f"lm_heads.{k}.weight"] = (5, 8)
    disk = load_file(path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in disk.items()} == expected
    fields = {"architectures": ["MedusaModel"], "model_type": "medusa", "medusa_fc_bias": True}
    fields |= {"num_heads": 2, "num_hidden_layers": layers, "original_lm_head": not private}
    fields |= {"hidden_size": 8, "vocab_size": 5, "truncated_vocab_size": truncated or 5}
    fields |= {"sequential": sequential}
    assert json.loads((path / "config.json").read_text()) == fields
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
    # In an export for vLLM the file has the shared LM head as well.
    change(path, {} if private else {"lm_heads.0.weight": torch.ones(5, 8)})
    loaded = MedusaHeads.from_pretrained(path, dtype)
    assert loaded.config == heads.config and not loaded.training and loaded.bias.dtype == dtype
    torch.testing.assert_close(loaded.state_dict(), heads.state_dict(), rtol=0, atol=0)


@properties
@given(st.sets(st.sampled_from(MAY_MISS)), st.booleans(), st.sampled_from(("", "medusa_heads.")))
def test_what_a_vllm_directory_leaves_out_is_its_default(tmp_path_factory, missing, biases, prefix):
    """5 heads of 1 layer, private LM heads, the whole vocabulary, and no biases, that is, zeros."""
    path, model = tmp_path_factory.mktemp("vllm"), random_gpt(0).float()
    heads = random_heads(model, 5, 0, private=True)
    heads.bias.data.mul_(biases)
    heads.save_pretrained(path)
    tensors = {name: t for name, t in heads.tensors().items() if biases or "bias" not in name}
    renamed = dict.fromkeys(heads.tensors()) | {prefix + name: t for name, t in tensors.items()}
    change(path, renamed, {"medusa_fc_bias": biases} | dict.fromkeys(missing))
    loaded = MedusaHeads.from_pretrained(path)
    assert loaded.config == heads.config
    torch.testing.assert_close(loaded.state_dict(), heads.state_dict(), rtol=0, atol=0)


def change(directory, tensors=None, fields=None) -> None:
    """Put these into a directory of heads; None takes one out."""
    weights, config = directory / "model.safetensors", directory / "config.json"
    tensors = load_file(weights) | (tensors or {})
    fields = json.loads(config.read_text()) | (fields or {})
    save_file({name: t for name, t in tensors.items() if t is not None}, weights)
    config.write_text(json.dumps({name: v for name, v in fields.items() if v is not None}))


TENSORS = [None, torch.ones(7, 7), torch.ones(1), torch.ones(1, 8)]  # the last would broadcast
NAN = torch.full((8, 8), math.nan)
MAPS = [0, 1, 5], [-1, 0, 1], [0, 0, 1], [2.0, 1.0, 0.5], [0, 1], [[0, 1, 2]]
BROKEN = [("blocks.0.layers.1.weight", tensor) for tensor in TENSORS]
BROKEN += [("blocks.1.layers.0.bias", tensor) for tensor in (*TENSORS, NAN[0], 1 / torch.zeros(8))]
BROKEN += [("blocks.0.layers.0.weight", NAN), ("blocks.0.layers.2.weight", torch.ones(8, 8))]
BROKEN += [("token_map", None), *(("token_map", torch.tensor(tokens)) for tokens in MAPS)]
BROKEN += [("model_type", None), ("model_type", "llama"), ("vocab_size", None)]
BROKEN += [("truncated_vocab_size", 6), ("truncated_vocab_size", -1), ("truncated_vocab_size", 2.0)]
BROKEN += [("hidden_size", None), *((field, "2") for field in FIELDS)]


@pytest.mark.parametrize("name, value", BROKEN)
def test_a_missing_or_wrong_tensor_or_field_is_refused_by_file_and_name(name, value, tmp_path):
    random_heads(random_gpt(0).float(), 2, 0, layers=2, truncated=3).save_pretrained(tmp_path)
    is_tensor = name == "token_map" or "." in name
    change(tmp_path, **{"tensors" if is_tensor else "fields": {name: value}})
    file = "model.safetensors" if is_tensor else "config.json"
    refused(f"{file}.*{name}", MedusaHeads.from_pretrained, tmp_path)


OFFICIAL = pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])


def write_official(path, K: int, J: int, **changed) -> dict:
    state, generator = {}, rng(0)
    for k in range(K):
        for j in range(J):
            state[f"{k}.{j}.linear.weight"] = torch.randn(6, 6, generator=generator)
            state[f"{k}.{j}.linear.bias"] = torch.randn(6, generator=generator)
        state[f"{k}.{J}.weight"] = torch.randn(5, 6, generator=generator)
    state = {key: tensor for key, tensor in (state | changed).items() if tensor is not None}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return state


@OFFICIAL
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("K, J", [(1, 1), (12, 2)])
def test_official_heads_give_the_logits_of_their_own_formula(K, J, shared, name, tmp_path):
    """Residual blocks x + SiLU(linear(x)), then the head's own matrix; the base's if it has none.
    By file and by directory, whose config.json may name fewer heads."""
    none = {f"{k}.{J}.weight": None for k in range(K)} if shared else {}
    state, lm_head = write_official(tmp_path / name, K, J, **none), nn.Linear(6, 5, bias=False)
    says = {"medusa_num_heads": 1, "medusa_num_layers": J, "base_model_name_or_path": "lmsys/x"}
    (tmp_path / "config.json").write_text(json.dumps(says))
    for path in (tmp_path, tmp_path / name):
        heads = MedusaHeads.from_pretrained(path, vocab_size=5)
        assert heads.config == MedusaConfig(6, 5, K, J, original_lm_head=shared)
        assert medusa.calibration_path(path) == tmp_path / "calibration.json"
    x = torch.randn(6, generator=rng(99))
    for k, logits in enumerate(heads(x, lm_head)):
        y = x
        for j in range(J):
            layer = f"{k}.{j}.linear"
            y = y + F.silu(F.linear(y, state[f"{layer}.weight"], state[f"{layer}.bias"]))
        W2 = lm_head.weight if shared else state[f"{k}.{J}.weight"]
        torch.testing.assert_close(logits, W2 @ y)


FAULTS = [({name: None}, f"{name} is missing") for name in ("1.0.linear.bias", "1.1.weight")]
FAULTS += [({"0.0.linear.weight": None, "1.0.linear.weight": None}, "no official heads")]
FAULTS += [({"0.1.weight": wrong}, "no official heads") for wrong in (None, torch.zeros(5))]
FAULTS += [({"0.1.weight": None, "1.1.weight": None}, "give its vocab_size")]
FAULTS += [({f"medusa_num_{x}": n}, x) for x in ("heads", "layers") for n in (0, 3, "2", None)]
FAULTS += [({"1.0.linear.weight": torch.zeros(6, 7)}, "1.0.linear.weight is (6, 7)")]


@OFFICIAL
@pytest.mark.parametrize("fault, says", FAULTS)
def test_official_heads_that_do_not_fit_are_refused_by_tensor(fault, says, name, tmp_path):
    about = {field: value for field, value in fault.items() if "medusa" in field}
    (tmp_path / "config.json").write_text(json.dumps(about))
    write_official(tmp_path / name, 2, 1, **({} if about else fault))
    assert says in refused(name, MedusaHeads.from_official, tmp_path / name)
