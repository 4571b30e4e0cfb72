"""Laws of Medusa: the heads and their loss, the three rules of acceptance, and that a tree changes the speed of a text, never the text."""

import itertools
import json
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import medusa
from data.compiled import Compiled
from medusa import (
    MedusaConfig,
    MedusaHeads,
    Sampling,
    accept,
    check_compatible,
    generate,
    logits_to_probs,
    medusa_generate,
    medusa_loss,
    typical_threshold,
)
from strategies import (
    CheatingHeads,
    built_trees,
    chi_square,
    distribution,
    follow,
    greedy_text,
    markov_gpt,
    next_logits,
    properties,
    random_gpt,
    random_heads,
    rng,
    text_distribution,
    trees,
)
from tree import Tree, cartesian_tree, tree_from_paths

CHAIN = Tree((-1, 0, 1, 2), (-1, 0, 0, 0))


def flat(steps) -> list[int]:
    return [token for emitted in steps for token in emitted]


# ---- decoding ----


@st.composite
def decodings(draw):
    """A model, heads (None: cheating ones, which need the text first), a tree, a prompt, a length."""
    vocab_size = draw(st.integers(2, 6))
    context = draw(st.integers(2, 20))
    eos = draw(st.none() | st.integers(0, vocab_size - 1))
    model = random_gpt(draw(st.integers(0, 99)), vocab_size, context, draw(st.integers(1, 2)), eos)
    prompt = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=context - 1))
    num_heads = draw(st.integers(1, 4))
    heads = draw(st.sampled_from(("new", "random", "private", "truncated", "cheating", "wrong")))
    guessed = draw(st.integers(1, vocab_size - 1)) if heads == "truncated" else vocab_size
    if heads == "new":
        made = random_heads(model, num_heads, 0)
        for weight in made.parameters():
            weight.data.zero_()
    elif heads in ("random", "private", "truncated"):
        made = random_heads(
            model,
            num_heads,
            draw(st.integers(0, 99)),
            draw(st.integers(1, 2)),
            heads == "private",
            guessed,
        )
    else:
        ranks = draw(st.randoms(use_true_random=False))
        rank_of = (
            (lambda: vocab_size - 1)
            if heads == "wrong"
            else lambda: ranks.choice([0, 0, ranks.randrange(vocab_size)])
        )
        made = CheatingHeads(model, num_heads, [], len(prompt), rank_of)
    tree = draw(built_trees(max_depth=num_heads, n_ranks=guessed))
    return model, made, tree, prompt, draw(st.integers(0, 24))


def same_text(ours: list[int], plain: list[int], model) -> None:
    eos = model.config.eos_token_id
    assert eos is None or eos not in ours[:-1], (
        "tokens behind EOS were kept: the text ends right after it, even in the middle of an accepted path"
    )
    assert len(ours) <= len(plain) or ours[: len(plain)] != plain, (
        "the text goes on behind max_new_tokens or the end of the context: tokens count, not steps"
    )
    assert len(ours) >= len(plain) or ours != plain[: len(ours)], (
        "the text ends too early: at max_new_tokens, EOS or the end of the context, not before"
    )
    assert ours == plain, "the text is not the one that plain decoding gives"


def decode(model, heads, tree, prompt, n, text, *sampling) -> list[list[int]]:
    if isinstance(heads, CheatingHeads):
        heads.text, heads.length = [*prompt, *text], len(prompt)
    return follow(medusa_generate(model, heads, tree, prompt, n, *sampling), heads)


@settings(properties, max_examples=250)
@given(decodings())
def test_greedy_tree_decoding_equals_plain_decoding(case):
    """Token for token, to the same end: max_new_tokens, EOS included, or the last position of the context."""
    model, heads, tree, prompt, n = case
    text = greedy_text(model, prompt, n)
    assert flat(generate(model, prompt, n)) == text
    steps = decode(model, heads, tree, prompt, n, text)
    same_text(flat(steps), text, model)
    assert all(steps), "every step earns at least one token"
    assert all(len(emitted) <= max(tree.depths) + 1 for emitted in steps), (
        "a step earns at most the deepest path and the next root"
    )


@settings(properties, max_examples=150)
@given(
    decodings(),
    st.floats(0.2, 3),
    st.integers(0, 4),
    st.sampled_from((0.3, 0.8, 1.0)),
    st.integers(0, 2**31),
)
def test_lossless_tree_sampling_draws_the_text_that_plain_sampling_draws_from_the_same_seed(
    case, temperature, top_k, top_p, seed
):
    model, heads, tree, prompt, n = case
    sampling = Sampling(temperature, top_k, top_p)
    text = flat(generate(model, prompt, n, sampling, rng(seed)))
    same_text(flat(decode(model, heads, tree, prompt, n, text, sampling, rng(seed))), text, model)


@settings(properties, max_examples=60)
@given(decodings(), st.floats(0.2, 3), st.integers(0, 2**31))
def test_typical_decoding_ends_at_the_same_places_and_repeats_with_its_seed(
    case, temperature, seed
):
    model, heads, tree, prompt, n = case
    sampling = Sampling(temperature, typical=True)
    steps = decode(model, heads, tree, prompt, n, prompt * 10, sampling, rng(seed))
    text = flat(steps)
    room = min(n, model.config.max_position_embeddings - len(prompt))
    assert all(steps) and len(text) <= room
    eos = model.config.eos_token_id
    assert eos not in text[:-1]
    assert len(text) == room or text[-1] == eos
    if not isinstance(heads, CheatingHeads):
        assert decode(model, heads, tree, prompt, n, text, sampling, rng(seed)) == steps


@settings(properties, max_examples=40)
@given(decodings())
def test_typical_decoding_at_temperature_zero_is_greedy(case):
    model, heads, tree, prompt, n = case
    text = greedy_text(model, prompt, n)
    assert flat(decode(model, heads, tree, prompt, n, text, Sampling(typical=True))) == text


@settings(properties, max_examples=60)
@given(
    st.integers(0, 99),
    st.integers(1, 4),
    st.integers(0, 25),
    st.integers(2, 20),
    st.sampled_from((0.0, 1.0)),
    st.none() | st.integers(0, 5),
)
def test_right_guesses_are_all_accepted(seed, depth, n, context, temperature, eos):
    """Heads that know the text earn depth + 1 tokens a step on a chain, and on any rank that the tree holds."""
    model = random_gpt(seed, vocab_size=6, context=context, eos=eos)
    sampling = Sampling(temperature)
    text = flat(generate(model, [1], n, sampling, rng(seed)))
    for rank in (0, 3):
        heads = CheatingHeads(model, depth, [], 1, lambda: rank)
        tree = tree_from_paths([[rank] * d for d in range(1, depth + 1)])
        steps = decode(model, heads, tree, [1], n, text, sampling, rng(seed))
        same_text(flat(steps), text, model)
        lengths = [len(emitted) for emitted in steps[:-1]]
        assert lengths == ([1] + [depth + 1] * len(steps))[: max(len(steps) - 1, 0)], (
            "right guesses are not all accepted: a step earns depth + 1 tokens"
        )
        assert len(steps) == (1 + math.ceil((len(text) - 1) / (depth + 1)) if text else 0), (
            "too many steps for guesses that are all right"
        )


def test_new_heads_are_right_about_a_base_that_always_says_the_same():
    model = markov_gpt(torch.tensor([0.0, 1, 5, 2]).expand(4, 4))
    steps = list(
        medusa_generate(model, MedusaHeads(MedusaConfig(4, 4, 3)).double(), CHAIN, [1], 17)
    )
    assert flat(steps) == [2] * 17
    assert [len(emitted) for emitted in steps] == [1, 4, 4, 4, 4]


def counting_gpt(**kwargs):
    """Says 0 1 2 3 4 5 0 1 ..."""
    return markov_gpt(9.0 * torch.eye(6).roll(1, 1), **kwargs)


def counting_heads(model, num_heads=3) -> MedusaHeads:
    """Private heads that know how to count: head k's matrix is the base's, k tokens on."""
    heads = MedusaHeads(MedusaConfig(6, 6, num_heads, original_lm_head=False)).double()
    heads.lm_heads.data = torch.stack(
        [model.lm_head.weight.detach().roll(k, 0) for k in range(1, num_heads + 1)]
    )
    return heads


def test_head_k_fills_depth_k_from_the_state_before_the_root():
    model = counting_gpt()
    steps = list(medusa_generate(model, counting_heads(model), CHAIN, [3], 21))
    assert flat(steps) == [(4 + i) % 6 for i in range(21)], "the text is not the base model's own"
    lengths = [len(emitted) for emitted in steps]
    assert lengths == [1, 4, 4, 4, 4, 4], (
        "head k does not fill depth k, or the heads do not see the state before the root"
    )


def test_eos_ends_the_text_in_the_middle_of_an_accepted_path():
    model = counting_gpt(eos=0)
    steps = list(medusa_generate(model, counting_heads(model), CHAIN, [3], 21))
    behind = "tokens behind EOS were kept, or steps made behind it: the text ends right after EOS, even in the middle of an accepted path"
    assert steps == [[4], [5, 0]], behind
    assert list(medusa_generate(model, counting_heads(model), CHAIN, [4], 21)) == [[5], [0]], behind
    assert list(medusa_generate(model, counting_heads(model), CHAIN, [5], 21)) == [[0]], behind


@pytest.mark.parametrize("prompt_length", range(1, 12))
def test_the_tree_shrinks_to_the_room_before_the_context_limit(prompt_length):
    model = counting_gpt(context=12)
    prompt = [i % 6 for i in range(prompt_length)]
    steps = list(medusa_generate(model, counting_heads(model), CHAIN, prompt, 99))
    assert flat(steps) == [i % 6 for i in range(prompt_length, 12)], (
        "the text does not run up to the last position of the context"
    )
    assert len(steps) == 1 + math.ceil((12 - prompt_length - 1) / 4), (
        "near the end of the context the tree shrinks to what still fits, and no further"
    )


@pytest.mark.parametrize("prompt_length", range(1, 8))
def test_nothing_is_read_or_written_beyond_the_context(prompt_length):
    """Every position that is fed exists, and no token is fed that could earn nothing."""
    model = random_gpt(3, vocab_size=6, context=8)
    seen = []
    forward = model.forward
    model.forward = lambda tokens, positions=None, *rest, **named: (
        seen.append(positions),
        forward(tokens, positions, *rest, **named),
    )[1]
    try:
        list(
            medusa_generate(
                model, random_heads(model, 3, 0), cartesian_tree((2, 2, 1)), [1] * prompt_length, 99
            )
        )
    finally:  # a position that does not exist ends the loop, too
        assert all(positions is None or positions.max() <= 6 for positions in seen), (
            "a token was fed at a position where it can earn nothing, or that is none"
        )


def test_token_zero_is_never_accepted_without_being_guessed():
    """Padding with token id 0 would pass wherever the base says 0."""
    model = markov_gpt(torch.tensor([9.0, 1, 2, 0]).expand(4, 4))
    heads = CheatingHeads(model, 3, [0] * 30, 1, lambda: 3)
    for tree in (CHAIN, cartesian_tree((3, 2)), tree_from_paths([[0], [1], [0, 0], [0, 0, 1]])):
        steps = list(medusa_generate(model, heads, tree, [1], 9))
        assert steps == [[0]] * 9, (
            "a token 0 was accepted that no head guessed: padding is no guess"
        )


def test_heads_run_at_one_node_alone_and_the_base_once_a_step():
    model = random_gpt(1, context=32)
    heads = random_heads(model, 2, 1)
    head_calls, base_calls = [], []
    heads.register_forward_pre_hook(lambda _, args: head_calls.append(args[0].numel() // 8))
    model.register_forward_pre_hook(lambda _, args: base_calls.append(args[0].shape))
    tree = cartesian_tree((2, 2))
    steps = list(medusa_generate(model, heads, tree, [1, 2], 25))
    assert set(head_calls) == {1}, (
        "the heads ran at several nodes: only the state of the node accepted last is needed"
    )
    assert len(head_calls) in (len(steps) - 1, len(steps) - 2), (
        "the heads run once a step"
    )  # the last step may be too short for guesses
    assert len(base_calls) == len(steps), "the base model runs once a step"
    assert base_calls[:2] == [(1, 2), (1, len(tree))], (
        "the base model is fed the prompt, then in each step the nodes of the tree and nothing else"
    )


@settings(properties, max_examples=60)
@given(
    st.integers(0, 99),
    trees(max_nodes=8),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.data(),
)
def test_a_tree_forward_equals_plain_forwards_and_keep_equals_feeding_one_by_one(
    seed, tree, prompt, data
):
    model = random_gpt(seed, context=24, layers=2)
    tokens = data.draw(st.lists(st.integers(0, 4), min_size=len(tree), max_size=len(tree)))
    winner = data.draw(st.integers(0, len(tree) - 1))
    paths = {0: [0]}
    for node in range(1, len(tree)):
        paths[node] = paths[tree.parents[node]] + [node]
    S = len(prompt)
    with torch.no_grad():
        cache = model.new_cache(S + len(tree) + 1)
        model(torch.tensor([prompt]), cache=cache)
        mask = torch.cat((torch.ones(len(tree), S, dtype=torch.bool), tree.mask), dim=1)
        logits = model.lm_head(
            model(torch.tensor([tokens]), S + torch.tensor(tree.depths), mask, cache)
        )[0]
        for node, path in paths.items():
            torch.testing.assert_close(
                logits[node],
                next_logits(model, prompt + [tokens[i] for i in path]),
                rtol=1e-9,
                atol=1e-9,
            )

        cache.keep(S, paths[winner])
        lost = "after keep the cache is not what feeding the kept tokens one by one would have left"
        plain = model.new_cache(S + len(tree) + 1)
        model(torch.tensor([prompt]), cache=plain)
        for node in paths[winner]:
            model(torch.tensor([[tokens[node]]]), cache=plain)
        length = S + len(paths[winner])
        assert cache.length == plain.length == length, (
            "after keep the length is not that of the past and the kept rows"
        )
        torch.testing.assert_close(
            cache.data[..., :length, :],
            plain.data[..., :length, :],
            rtol=1e-9,
            atol=1e-9,
            msg=lambda m: f"{lost}\n{m}",
        )
        more = torch.tensor([[3]])
        torch.testing.assert_close(
            model(more, cache=cache),
            model(more, cache=plain),
            rtol=1e-9,
            atol=1e-9,
            msg=lambda m: f"{lost}\n{m}",
        )


@pytest.mark.parametrize(
    "start",
    [
        generate,
        lambda model, *rest: medusa_generate(model, random_heads(model, 3, 0), CHAIN, *rest),
    ],
)
def test_calls_that_cannot_be_honoured_are_refused(start):
    model = random_gpt(0, context=8)
    for prompt, n, says in (
        ([], 3, "prompt is empty"),
        ([1] * 8, 3, "shorten"),
        ([1] * 9, 3, "shorten"),
        ([1], -1, "max_new_tokens -1"),
    ):
        try:
            list(start(model, prompt, n))
        except ValueError as error:
            assert says in str(error), (
                f"prompt {prompt}, {n} new tokens: the ValueError does not say {says!r}"
            )
        else:
            pytest.fail(
                f"prompt {prompt}, {n} new tokens: no ValueError, although nothing can be decoded"
            )
    assert list(start(model, [1], 0)) == [], "0 new tokens were asked for"


def test_check_fit_refuses_heads_of_another_model_and_trees_beyond_the_heads():
    model = random_gpt(0)  # D = 8, V = 5
    fits = MedusaConfig(8, 5, 3)
    check_compatible(model, MedusaHeads(fits), CHAIN)
    check_compatible(model, MedusaHeads(fits), tree_from_paths([[4]]))
    for config, tree, says in (
        (replace(fits, hidden_size=6), CHAIN, "hidden_size 6"),
        (replace(fits, vocab_size=6), CHAIN, "vocab_size 6"),
        (replace(fits, num_heads=2), CHAIN, "3 deep"),
        (fits, tree_from_paths([[5]]), "guess 5"),
    ):
        with pytest.raises(ValueError, match=says):
            check_compatible(model, MedusaHeads(config), tree)
        with pytest.raises(ValueError, match=says):
            next(medusa_generate(model, MedusaHeads(config).double(), tree, [1], 4))


# ---- sampling ----


@properties
@given(
    st.lists(
        st.integers(-300, 300).map(lambda hundredths: hundredths / 100)
        | st.sampled_from((0.0, 1.0)),
        min_size=2,
        max_size=6,
    ),
    st.floats(0.05, 4),
    st.integers(0, 7),
    st.sampled_from((0.1, 0.3, 0.55, 0.9, 0.99, 1.0)),
)
def test_base_distribution_equals_its_definition(logits, temperature, top_k, top_p):
    """Ties included: of equally likely tokens the lower comes first."""
    sampling = Sampling(temperature, top_k, top_p)
    rows = torch.tensor([logits, logits[::-1]], dtype=torch.float64)
    expected = torch.tensor(
        [distribution(row, temperature, top_k, top_p) for row in rows.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(logits_to_probs(rows, sampling), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 3, 0.9)], ids=["greedy", "drawn"])
def test_base_distribution_is_that_of_each_row_however_rows_are_stacked(sampling):
    logits = torch.randn(2, 3, 5, generator=rng(0), dtype=torch.float64)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(
            logits_to_probs(logits, sampling)[i, j], logits_to_probs(logits[i, j], sampling)
        )


def test_a_nucleus_of_1_leaves_out_nothing_however_unlikely():
    logits = torch.tensor([0.0, -60.0, -50.0], dtype=torch.float64)
    assert (
        torch.equal(logits_to_probs(logits, Sampling(1.0, top_p=1.0)), logits.softmax(-1))
        and logits.softmax(-1).min() > 0
    )


@pytest.mark.parametrize(
    "top_k, top_p, expected",
    [
        (0, 1.0, [0.5, 0.25, 0.25]),
        (1, 1.0, [1, 0, 0]),
        (2, 1.0, [2 / 3, 1 / 3, 0]),
        (3, 1.0, [0.5, 0.25, 0.25]),
        (9, 1.0, [0.5, 0.25, 0.25]),
        (0, 1e-9, [1, 0, 0]),
        (0, 0.5, [1, 0, 0]),
        (0, 0.51, [2 / 3, 1 / 3, 0]),
        (0, 0.75, [2 / 3, 1 / 3, 0]),
        (0, 0.76, [0.5, 0.25, 0.25]),
        (2, 0.6, [1, 0, 0]),
        (2, 0.7, [2 / 3, 1 / 3, 0]),  # top-p works on what top-k has left
    ],
)
def test_top_k_keeps_the_likeliest_then_top_p_the_fewest_that_hold_its_mass(top_k, top_p, expected):
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    torch.testing.assert_close(
        logits_to_probs(logits, Sampling(1.0, top_k, top_p)),
        torch.tensor(expected, dtype=torch.float64),
    )


def test_temperature_zero_is_the_limit_of_small_temperatures():
    logits = torch.randn(20, 7, generator=rng(0), dtype=torch.float64)
    greedy = logits_to_probs(logits, Sampling())
    assert torch.equal(greedy, F.one_hot(logits.argmax(-1), 7).double())
    torch.testing.assert_close(logits_to_probs(logits, Sampling(1e-6)), greedy)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": 1.5},
        {"epsilon": math.nan},
    ],
)
def test_bad_sampling_values_are_refused_by_name(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)


def all_outcomes(run) -> dict:
    """{result: probability} of run(draw), where draw takes, in turn, every combination of tokens that it can: no randomness, no noise."""
    found, scripts = defaultdict(float), [[]]
    while scripts:
        script = scripts.pop()
        weight, used = 1.0, 0

        def draw(base_probs, noise):
            nonlocal weight, used
            drawn = []
            for probs in base_probs.reshape(-1, base_probs.shape[-1]).tolist():
                if used == len(script):
                    first, *others = [token for token, prob in enumerate(probs) if prob > 0]
                    scripts.extend([*script, token] for token in others)
                    script.append(first)
                drawn.append(script[used])
                weight *= probs[script[used]]
                used += 1
            return torch.tensor(drawn).view(base_probs.shape[:-1])

        result = run(draw)
        found[result] += weight
    return found


def accept_redrawing(tree, tokens, logits, sampling, noise=None, generator=None):
    """The classic fault: each child is tried against a draw of its own, and the next root is drawn once more."""
    base_probs = logits_to_probs(logits, sampling)

    def draw(rows):
        return medusa.draw(rows, medusa.exponential(rows, generator)).tolist()

    tries = draw(base_probs[torch.tensor(tree.parents[1:], dtype=torch.long)])
    reached = [0]
    for node in range(1, len(tree)):
        if tree.parents[node] in reached and tokens[node] == tries[node - 1]:
            reached.append(node)
    last = max(reached, key=lambda node: tree.depths[node])
    path = [node for node in range(len(tree)) if tree.mask[last, node]]
    return path, tokens[path[1:]].tolist() + draw(base_probs[last : last + 1])


def distance(found: dict, expected: dict) -> float:
    """Total variation."""
    return (
        sum(
            abs(found.get(text, 0.0) - expected.get(text, 0.0))
            for text in found.keys() | expected.keys()
        )
        / 2
    )


ENUMERATED = [
    # vocabulary, tree, new tokens, context, EOS, sampling
    (2, [[0], [0, 0]], 4, 16, None, Sampling(1.0)),
    (2, [[0], [1], [1, 0]], 4, 16, 1, Sampling(0.7)),
    (2, [[1], [1, 0]], 9, 6, None, Sampling(1.5)),
    (3, [[0], [1]], 3, 16, None, Sampling(1.0)),
    (3, [[0], [0, 1]], 3, 16, 2, Sampling(1.3)),
    (4, [[0], [1], [0, 0]], 3, 16, None, Sampling(1.0, top_k=2)),
    (4, [[0], [0, 0]], 3, 16, 0, Sampling(2.0, top_p=0.7)),
]


@pytest.mark.parametrize("case", ENUMERATED)
def test_lossless_sampling_is_exactly_the_base_distribution(case, monkeypatch):
    """Every combination of the nodes' draws, weighed by its probability, gives each text the probability that the base model gives it.

    The guesses are fixed here; that they may follow the noise of the draws changes nothing is the law that a tree yields plain
    decoding's text for every noise, and the chi-square test below.
    """
    vocab_size, paths, n, context, eos, sampling = case
    model = random_gpt(6, vocab_size, context, eos=eos)
    heads = random_heads(model, 2, 7)
    tree, prompt = tree_from_paths(paths), [1, 0]

    def run(draw, rule=accept):
        monkeypatch.setattr(medusa, "draw", draw)
        return tuple(flat(medusa_generate(model, heads, tree, prompt, n, sampling, rng(0), rule)))

    expected = text_distribution(model, prompt, n, sampling)
    assert len(expected) > 3
    assert distance(all_outcomes(run), expected) < 1e-9
    assert distance(all_outcomes(partial(run, rule=accept_redrawing)), expected) > 1e-3, (
        "a child tried twice must not go unseen"
    )


@pytest.mark.parametrize("faulty", [False, True])
def test_texts_sampled_through_a_tree_pass_a_chi_square_test_and_a_redraw_for_each_child_does_not(
    faulty,
):
    sampling, n = Sampling(1.4, top_k=4, top_p=0.95), 1500
    model = random_gpt(11, vocab_size=6)
    heads = random_heads(model, 2, 7)
    generator = rng(0)
    rule = partial(accept_redrawing, generator=generator) if faulty else accept
    counts, steps = defaultdict(int), 0
    for _ in range(n):
        emitted = list(
            medusa_generate(
                model, heads, cartesian_tree((2, 2)), [1, 2], 3, sampling, generator, rule
            )
        )
        steps += len(emitted)
        counts[tuple(flat(emitted))] += 1
    assert n < steps < 3 * n, "no guess is ever accepted, or all are"
    expected = text_distribution(model, [1, 2], 3, sampling)
    assert len(expected) > 20
    chance = chi_square(counts, expected, n)
    assert chance < 1e-9 if faulty else chance > 0.01, (
        "texts do not come with the base model's probabilities: one draw for each node, for all its children"
    )


def test_a_token_is_drawn_with_its_probability():
    base_probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    base_probs = base_probs.expand(50_000, 5)
    counts = medusa.draw(base_probs, medusa.exponential(base_probs, rng(0))).bincount(minlength=5)
    expected = {token: prob for token, prob in enumerate(base_probs[0].tolist()) if prob > 0}
    assert counts[1] == 0, "a token of probability 0 was drawn"
    chance = chi_square(
        {token: count for token, count in enumerate(counts.tolist()) if count}, expected, 50_000
    )
    assert chance > 0.01, (
        "tokens are not drawn with their probabilities: the smallest noise / probability comes first"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_edges_of_the_noise_draw_tokens_of_nonzero_probability(dtype):
    base_probs = torch.tensor(
        [[0, 0.5, 0, 0.5, 0], [0, 0, 0.1, 0.2, 0.7], [1e-30, 0.6, 0.4, 0, 0]], dtype=dtype
    )
    least, most = torch.finfo(dtype).tiny, 800.0
    for favoured in range(5):
        noise = torch.full((3, 5), most, dtype=dtype)
        noise[:, favoured] = least
        assert (base_probs.gather(1, medusa.draw(base_probs, noise)[:, None]) > 0).all(), (
            "a token of probability 0 was drawn"
        )
    assert medusa.exponential(torch.empty(10**6, dtype=dtype), rng(0)).min() >= least


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.0, typical=True)])
def test_only_the_generator_that_was_handed_in_is_drawn_from(sampling):
    model = random_gpt(2)
    heads = random_heads(model, 2, 3)
    before = torch.get_rng_state()
    list(medusa_generate(model, heads, cartesian_tree((2, 2)), [1], 9, sampling, rng(1)))
    list(generate(model, [1], 9, sampling, rng(1)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_heads_that_think_as_the_base_does_guess_every_draw(temperature):
    """Every token has the same distribution here, so new heads are perfect; without the noise they could only repeat the likeliest."""
    model = markov_gpt(torch.tensor([[0.3, 0.0, 0.2, -0.1]]).expand(4, 4), context=64)
    heads = MedusaHeads(MedusaConfig(4, 4, 3)).double()
    steps = list(medusa_generate(model, heads, CHAIN, [1], 41, Sampling(temperature), rng(0)))
    lengths = [len(step) for step in steps]
    assert lengths == [1] + [4] * 10, (
        "heads that think as the base does must guess its every draw: rank by their race with the same noise and temperature"
    )
    assert len(set(flat(steps))) > 1


@properties
@given(st.integers(0, 99), st.integers(0, 99))
def test_typical_and_greedy_acceptance_rank_guesses_by_likelihood_alone(seed, noise_seed):
    logits = torch.randn(3, 6, generator=rng(seed), dtype=torch.float64)
    noise = medusa.exponential(logits, rng(noise_seed))
    likelihood = (
        "greedy and typical acceptance ask for the likeliest guesses: the noise is not theirs"
    )
    assert torch.equal(medusa.gumbel_scores(logits, Sampling(0.7, typical=True), noise), logits), (
        likelihood
    )
    assert torch.equal(medusa.gumbel_scores(logits, Sampling(), None), logits), likelihood
    raced = medusa.gumbel_scores(logits, Sampling(0.7), noise)
    for k in range(3):
        times = [
            float(noise[k, token]) / prob for token, prob in enumerate(distribution(logits[k], 0.7))
        ]
        ranking = sorted(range(6), key=times.__getitem__)
        assert raced[k].argsort(descending=True).tolist() == ranking, (
            "a lossless guess is ranked by noise / probability at the temperature, least first"
        )


# ---- typical acceptance ----


def entropy(probs) -> float:
    return -sum(prob * math.log(prob) for prob in probs if prob > 0)


@properties
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=8),
    st.floats(0.001, 1),
    st.none() | st.floats(0.01, 2),
)
def test_typical_threshold_equals_the_formula(weights, epsilon, delta):
    assume(sum(weights) > 0.1)
    probs = [weight / sum(weights) for weight in weights]
    threshold = typical_threshold(torch.tensor([probs, probs], dtype=torch.float64), epsilon, delta)
    expected = min(
        epsilon, (math.sqrt(epsilon) if delta is None else delta) * math.exp(-entropy(probs))
    )
    formula = "the threshold is not min(epsilon, delta * exp(-H)), H in nats, delta sqrt(epsilon) unless given"
    torch.testing.assert_close(
        threshold, torch.full((2,), expected, dtype=torch.float64), msg=lambda m: f"{formula}\n{m}"
    )


def test_typical_defaults_are_those_of_the_paper():
    assert Sampling().epsilon == 0.09
    uniform = torch.full((100,), 0.01, dtype=torch.float64)
    swapped = (
        "epsilon is 0.09 and delta its root, 0.3, unless told otherwise: not the other way round"
    )
    assert typical_threshold(uniform).item() == pytest.approx(0.3 / 100), swapped
    assert typical_threshold(torch.tensor([1.0, 0.0])).item() == pytest.approx(0.09), swapped


@st.composite
def verifications(draw):
    """A tree with tokens at its nodes, no token twice among siblings, and base logits."""
    vocab_size = draw(st.integers(2, 6))
    tree = draw(trees(n_ranks=vocab_size))
    seed = draw(st.integers(0, 10**6))
    guesses = [
        torch.randperm(vocab_size, generator=rng(seed + depth)).tolist()
        for depth in range(max(tree.depths) + 1)
    ]
    tokens = torch.tensor([guesses[depth][rank] for depth, rank in zip(tree.depths, tree.ranks)])
    logits = draw(st.floats(0.1, 4)) * torch.randn(
        len(tree), vocab_size, generator=rng(seed), dtype=torch.float64
    )
    noise = medusa.exponential(logits.new_empty(max(tree.depths) + 1, vocab_size), rng(seed))
    return tree, tokens, logits, noise[list(tree.depths)]


def drawn(probs, noise) -> int:
    """The token that arrives first."""
    return min(
        (float(time) / prob, token)
        for token, (prob, time) in enumerate(zip(probs, noise))
        if prob > 0
    )[1]


def typical_by_hand(tree, tokens, logits, sampling, noise):
    """All paths one by one: the deepest whose every token passes, of equally deep ones the likeliest."""
    probs = [
        distribution(row, sampling.temperature, sampling.top_k, sampling.top_p)
        for row in logits.tolist()
    ]
    tokens = tokens.tolist()
    passing = []
    for node in range(len(tree)):
        path = [i for i in range(len(tree)) if tree.mask[node, i]]
        likelihood = 1.0
        for parent, child in zip(path, path[1:]):
            prob = probs[parent][tokens[child]]
            threshold = min(
                sampling.epsilon, math.sqrt(sampling.epsilon) * math.exp(-entropy(probs[parent]))
            )
            likelihood *= prob if prob > threshold else 0.0
        if likelihood > 0:
            passing.append((len(path), likelihood, path))
    path = max(passing)[2]
    return path, [tokens[node] for node in path[1:]] + [drawn(probs[path[-1]], noise[path[-1]])]


def accepted(path, best, emitted, tree, tokens) -> None:
    """The path is the best one, and the tokens are its guesses and one more."""
    assert path[:1] == [0] and all(
        tree.parents[node] == above for above, node in zip(path, path[1:])
    ), "the accepted nodes are no path from the root down"
    assert len(path) <= len(best), "a node was accepted that does not pass the rule at its parent"
    assert len(path) >= len(best), (
        "a deeper node was passed over although it and all above it pass the rule at their parents"
    )
    assert path == best, (
        "of the nodes that pass the rule not the right one won: the deepest, and of equally deep ones the likeliest path"
    )
    assert emitted[:-1] == tokens[path[1:]].tolist() and len(emitted) == len(path), (
        "a step earns the guesses on the path, then one draw of its last node"
    )


@settings(properties, max_examples=300)
@given(
    verifications(),
    st.floats(0.3, 2),
    st.floats(0.001, 0.9),
    st.integers(0, 4),
    st.sampled_from((0.6, 1.0)),
)
def test_typical_acceptance_agrees_with_the_formula(case, temperature, epsilon, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p, typical=True, epsilon=epsilon)
    tree, tokens, logits, noise = case
    path, emitted = accept(tree, tokens, logits, sampling, noise)
    best, earned = typical_by_hand(tree, tokens, logits, sampling, noise)
    accepted(path, best, emitted, tree, tokens)
    assert emitted[-1:] == earned[-1:], (
        "the next root is not drawn from the base distribution at the last accepted node, with that node's noise"
    )


@settings(properties, max_examples=100)
@given(verifications(), st.sampled_from((0.0, 0.5, 1.5)))
def test_greedy_and_lossless_acceptance_follow_the_draws_of_the_nodes(case, temperature):
    tree, tokens, logits, noise = case
    sampling = Sampling(temperature)
    probs = [distribution(row, temperature) for row in logits.tolist()]
    draws = [drawn(row, variates) for row, variates in zip(probs, noise)]
    path = [0]
    while node := [
        i for i in range(len(tree)) if tree.parents[i] == path[-1] and tokens[i] == draws[path[-1]]
    ]:
        path += node
    ours, emitted = accept(tree, tokens, logits, sampling, noise)
    accepted(ours, path, emitted, tree, tokens)
    assert emitted[-1] == draws[path[-1]], "the next root is not the draw of the last accepted node"


@properties
@given(verifications())
def test_typical_acceptance_takes_everything_of_nonzero_probability_as_epsilon_goes_to_zero(case):
    tree, tokens, logits, noise = case
    path, emitted = accept(tree, tokens, logits, Sampling(1.0, typical=True, epsilon=1e-300), noise)
    assert len(path) == max(tree.depths) + 1, (
        "a guess of nonzero probability was rejected although the threshold is next to 0"
    )
    impossible = logits.index_fill(1, tokens[1:2], -math.inf) if len(tree) > 1 else logits
    path, _ = accept(tree, tokens, impossible, Sampling(1.0, typical=True, epsilon=1e-300), noise)
    assert all(tokens[node] != tokens[1] for node in path[1:]), (
        "a guess of probability 0 was accepted"
    )


@properties
@given(verifications(), st.floats(0.001, 0.99), st.integers(0, 99))
def test_a_point_mass_accepts_only_its_token(case, epsilon, seed):
    tree, tokens, logits, noise = case
    favourites = torch.randint(logits.shape[1], (len(tree),), generator=rng(seed))
    logits = torch.full_like(logits, -math.inf).scatter(1, favourites[:, None], 0.0)
    path, emitted = accept(
        tree, tokens, logits, Sampling(1.0, typical=True, epsilon=epsilon), noise
    )
    assert emitted == favourites[path].tolist(), (
        "a node that is sure of its next token accepted another, or drew another"
    )
    more = any(
        tree.parents[node] == path[-1] and tokens[node] == favourites[path[-1]]
        for node in range(1, len(tree))
    )
    assert not more, "a child that holds the one token its parent is sure of was not accepted"


@pytest.mark.parametrize("likelier", [1, 2])
def test_of_equally_deep_paths_the_likeliest_wins(likelier):
    """The whole path counts: the last tokens alone would say the opposite."""
    tree = Tree((-1, 0, 0, 1, 2), (-1, 0, 1, 0, 0))
    tokens = torch.tensor([0, 0, 1, 2, 2])
    probs = torch.tensor(
        [[0.3, 0.3, 0.4], [0.2, 0.3, 0.5], [0.15, 0.25, 0.6], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]],
        dtype=torch.float64,
    )
    probs[0] = torch.tensor([0.5, 0.25, 0.25] if likelier == 1 else [0.25, 0.5, 0.25])
    if likelier == 2:
        probs[[1, 2]] = probs[[2, 1]]
    path, _ = accept(
        tree,
        tokens,
        probs.log(),
        Sampling(1.0, typical=True),
        torch.ones(5, 3, dtype=torch.float64),
    )
    assert path == [0, likelier, likelier + 2], (
        "of equally deep paths the one whose tokens together are likeliest wins"
    )


def test_the_next_root_of_typical_acceptance_is_drawn():
    """From the base distribution at the last node: not its argmax, and not the same for every seed."""
    tree = Tree((-1, 0), (-1, 0))
    tokens, logits = (
        torch.tensor([0, 1]),
        torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64).log(),
    )
    generator, counts = rng(0), defaultdict(int)
    for _ in range(2000):
        noise = medusa.exponential(logits, generator)
        path, emitted = accept(tree, tokens, logits, Sampling(1.0, typical=True), noise)
        assert path == [0, 1] and emitted[0] == 1, "a guess of probability 0.8 is accepted"
        counts[emitted[1]] += 1
    assert len(counts) > 1, (
        "the next root is always the same token: it is drawn, it is not the argmax"
    )
    assert chi_square(counts, {0: 0.2, 1: 0.5, 2: 0.3}, 2000) > 0.01, (
        "the next root is not drawn with the base model's probabilities at the last node"
    )


@pytest.mark.parametrize("typical", [False, True])
def test_a_seed_repeats_its_text_and_another_draws_another(typical):
    model = random_gpt(4, vocab_size=6, context=32)
    heads = random_heads(model, 2, 1)
    texts = [
        flat(
            medusa_generate(
                model,
                heads,
                cartesian_tree((2, 2)),
                [1],
                24,
                Sampling(1.0, typical=typical),
                rng(seed),
            )
        )
        for seed in (0, 0, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 3


# ---- heads ----


SHAPE = "logits are (K, ..., V): heads first, then as the hidden states are, then the vocabulary"


def test_heads_have_the_shape_of_the_shipped_ones_unless_another_is_asked_for():
    shipped = MedusaHeads.from_pretrained(Path(__file__).parent.parent / "data/heads").config
    assert shipped == MedusaConfig(shipped.hidden_size, shipped.vocab_size)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("private", [False, True])
def test_new_heads_are_exactly_the_lm_head(private, layers):
    """In whole numbers, so that the order of a sum cannot matter."""
    lm_head = nn.Linear(6, 5, bias=False).double()
    lm_head.weight.data = torch.randint(-9, 9, (5, 6), generator=rng(0)).double()
    hidden = torch.randint(-9, 9, (2, 4, 6), generator=rng(1)).double()
    heads = MedusaHeads(MedusaConfig(6, 5, 3, layers, not private), lm_head).double()
    logits = heads(hidden, lm_head)
    assert logits.shape == (3, 2, 4, 5), SHAPE
    assert torch.equal(logits, lm_head(hidden).expand(3, 2, 4, 5)), (
        "a new head is not exactly the LM head: it is W2 (h + SiLU(W1 h + b1)), W1 and b1 zero at first"
    )
    assert torch.equal(heads(hidden[0, 0], lm_head), logits[:, 0, 0]), (
        "one hidden state alone gives other logits than among others"
    )


def heads_and_base(layers: int, private: bool) -> tuple[MedusaHeads, nn.Linear]:
    lm_head = nn.Linear(6, 5, bias=False)
    lm_head.weight.data = torch.randn(5, 6, generator=rng(9))
    heads = MedusaHeads(MedusaConfig(6, 5, 3, layers, not private), lm_head)
    generator = rng(8)
    for weight in heads.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    return heads, lm_head


BOTH = pytest.mark.parametrize("private", [False, True])
LAYERS = pytest.mark.parametrize("layers", [1, 2, 3])


@LAYERS
@BOTH
def test_heads_equal_the_formula_evaluated_head_by_head_from_the_file(layers, private, tmp_path):
    """softmax's argument W2 (h + SiLU(W1 h + b1)), each matrix as it stands on disk."""
    heads, lm_head = heads_and_base(layers, private)
    heads.save_pretrained(tmp_path)
    disk = {
        name: weight.double() for name, weight in load_file(tmp_path / "model.safetensors").items()
    }
    hidden = torch.randn(2, 4, 6, generator=rng(7), dtype=torch.float64)
    logits = heads.double()(hidden, lm_head.double())
    assert logits.shape == (3, 2, 4, 5), SHAPE
    for k in range(3):
        for b in range(2):
            for t in range(4):
                x = hidden[b, t]
                for j in range(layers):
                    z = (
                        disk[f"blocks.{k}.layers.{j}.weight"] @ x
                        + disk[f"blocks.{k}.layers.{j}.bias"]
                    )
                    x = x + z / (1 + torch.exp(-z))
                expected = (disk[f"lm_heads.{k}.weight"] if private else lm_head.weight) @ x
                wrong = f"head {k + 1} is not W2 (h + SiLU(W1 h + b1)), {layers} such layers one behind the other"
                torch.testing.assert_close(
                    logits[k, b, t],
                    expected,
                    rtol=1e-9,
                    atol=1e-9,
                    msg=lambda m, wrong=wrong: f"{wrong}\n{m}",
                )


@LAYERS
@BOTH
def test_no_parameter_is_shared_among_layers_or_heads(layers, private, tmp_path):
    heads, lm_head = heads_and_base(layers, private)
    owned = sum(weight.numel() for weight in heads.parameters())
    assert owned == 3 * (layers * (6 * 6 + 6) + private * 5 * 6), (
        "the heads own W1 and b1 of every layer, and W2 only where it is private; never the base's"
    )
    new = MedusaHeads(MedusaConfig(6, 5, 3, layers, not private), lm_head)
    held = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
        for weight in new.parameters()
    }
    assert sum(held.values()) >= 4 * owned, (
        "heads or layers share one block of memory: each must have its own"
    )
    hidden = torch.randn(6, generator=rng(7))
    logits = heads(hidden, lm_head)
    heads.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    for name in state:
        save_file(state | {name: state[name] + 1}, file)
        changed = (MedusaHeads.from_pretrained(tmp_path)(hidden, lm_head) != logits).any(-1)
        assert changed.nonzero().flatten().tolist() == [int(name.split(".")[1])], (
            f"{name} changes other heads than its own, or none"
        )


@BOTH
def test_training_heads_never_moves_the_lm_head(private):
    heads, lm_head = heads_and_base(1, private)
    own = {weight.untyped_storage().data_ptr() for weight in heads.parameters()}
    assert lm_head.weight.untyped_storage().data_ptr() not in own, (
        "the LM head of the base is a parameter of the heads: training them would move it"
    )
    before = lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0)
    heads(torch.ones(2, 4, 6), lm_head).square().sum().backward()
    optimizer.step()
    assert torch.equal(lm_head.weight, before), "training the heads moved the base's LM head"
    assert all(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in heads.parameters()
    ), "a parameter of the heads gets no gradient"


def test_private_heads_start_as_copies_of_their_own():
    lm_head = nn.Linear(6, 5, bias=False)
    heads = MedusaHeads(MedusaConfig(6, 5, 2, original_lm_head=False), lm_head)
    assert torch.equal(heads.lm_heads[0], lm_head.weight), (
        "a private head does not start as the LM head"
    )
    heads.lm_heads.data[0] += 1
    assert torch.equal(heads.lm_heads[1], lm_head.weight), (
        "private heads share one matrix: each needs a copy of its own"
    )
    assert heads.lm_heads.requires_grad, "private heads are trained"


def official_state(K: int, J: int) -> dict:
    shapes = {
        f"{k}.{j}.linear.{part}": (6, 6)[: 1 + (part == "weight")]
        for k in range(K)
        for j in range(J)
        for part in ("weight", "bias")
    }
    shapes |= {f"{k}.{J}.weight": (5, 6) for k in range(K)}
    return {
        name: torch.randn(shape, generator=rng(i)) for i, (name, shape) in enumerate(shapes.items())
    }


def write_official(state: dict, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


OFFICIAL_FILES = pytest.mark.parametrize(
    "name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"]
)


@OFFICIAL_FILES
@pytest.mark.parametrize("K, J", [(1, 1), (5, 1), (12, 2)])
def test_official_heads_give_the_logits_of_their_own_formula(K, J, name, tmp_path):
    """Residual blocks x + SiLU(linear(x)), then the head's own matrix; the LM head of the base has no part in it."""
    state = official_state(K, J)
    heads = MedusaHeads.from_official(write_official(state, tmp_path / name), torch.float64)
    x = torch.randn(6, generator=rng(99), dtype=torch.float64)
    logits = heads(x, None)
    assert heads.config == MedusaConfig(6, 5, K, J, original_lm_head=False)
    for k in range(K):
        y = x
        for j in range(J):
            y = y + F.silu(
                F.linear(
                    y,
                    state[f"{k}.{j}.linear.weight"].double(),
                    state[f"{k}.{j}.linear.bias"].double(),
                )
            )
        torch.testing.assert_close(logits[k], state[f"{k}.{J}.weight"].double() @ y)


@OFFICIAL_FILES
@pytest.mark.parametrize("fault, says", [
    ({"1.0.linear.bias": None}, "1.0.linear.bias is missing"), ({"1.1.weight": None}, "1.1.weight is missing"),
    ({"0.0.linear.weight": None, "1.0.linear.weight": None}, "official layout"), ({"0.1.weight": torch.zeros(5)}, "official layout"),
    ({"0.0.linear.weight": None, "1.0.linear.weight": None, "0.0.weight": torch.zeros(5, 6)}, "official layout"),
    ({"1.0.linear.weight": torch.zeros(6, 7)}, "shape (6, 7), not (6, 6)"),
])  # fmt: skip
def test_official_heads_that_do_not_fit_are_refused_by_tensor(fault, says, name, tmp_path):
    state = {
        key: tensor for key, tensor in (official_state(2, 1) | fault).items() if tensor is not None
    }
    with pytest.raises(ValueError) as error:
        MedusaHeads.from_official(write_official(state, tmp_path / name))
    assert says in str(error.value) and name in str(error.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("content", ["code", "list", "numbers", "garbage", "missing"])
def test_a_pickle_that_is_no_table_of_tensors_is_refused_and_its_code_is_not_run(content, tmp_path):
    path, trace = tmp_path / "medusa_lm_head.pt", tmp_path / "trace"
    if content == "garbage":
        path.write_bytes(b"\x80\x04garbage")
    elif content != "missing":
        torch.save(
            {
                "code": {"0.0.linear.weight": Bomb(str(trace))},
                "list": [torch.zeros(1)],
                "numbers": {"a": 1},
            }[content],
            path,
        )
    with pytest.raises(ValueError, match="medusa_lm_head.pt"):
        MedusaHeads.from_official(path)
    assert not trace.exists()


# ---- the loss ----


def loss_by_hand(logits, tokens, mask, decay):
    means = []
    K, B, T, _ = logits.shape
    for k in range(1, K + 1):
        terms = [
            -F.log_softmax(logits[k - 1, b, t], -1)[tokens[b, t + k + 1]]
            for b in range(B)
            for t in range(T)
            if t + k + 1 < T and mask[b, t + k + 1]
        ]
        means.append(sum(terms) / len(terms) if terms else torch.zeros((), dtype=logits.dtype))
    return sum(decay**k * mean for k, mean in enumerate(means, start=1)), means


@st.composite
def batches(draw):
    K, B, T, V = (draw(st.integers(low, high)) for low, high in ((1, 4), (1, 3), (1, 7), (2, 5)))
    seed = draw(st.integers(0, 10**6))
    logits = torch.randn(K, B, T, V, generator=rng(seed), dtype=torch.float64)
    tokens = torch.randint(V, (B, T), generator=rng(seed))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).view(B, T)
    return logits, tokens, mask, draw(st.floats(0.1, 1))


@properties
@given(batches())
def test_medusa_loss_equals_the_sum_taken_one_target_at_a_time(batch):
    logits, tokens, mask, decay = batch
    for given_mask, used in ((mask, mask), (None, torch.ones_like(mask))):
        loss, means = medusa_loss(logits, tokens, given_mask, decay)
        expected, expected_means = loss_by_hand(logits, tokens, used, decay)
        wrong = "the mean of head k is not the cross-entropy at t against token t+k+1, over the targets that carry loss and only those"
        torch.testing.assert_close(
            means, torch.stack(expected_means), msg=lambda m, wrong=wrong: f"{wrong}\n{m}"
        )
        wrong = "the loss is not the sum over heads k = 1, 2, ... of decay^k times head k's mean"
        torch.testing.assert_close(
            loss,
            torch.as_tensor(expected, dtype=torch.float64),
            msg=lambda m, wrong=wrong: f"{wrong}\n{m}",
        )


def test_medusa_loss_decays_by_four_fifths_unless_told():
    logits, tokens = torch.randn(2, 1, 5, 4, generator=rng(0)), torch.tensor([[0, 1, 2, 3, 0]])
    loss, means = medusa_loss(logits, tokens)
    torch.testing.assert_close(
        loss, 0.8 * means[0] + 0.64 * means[1], msg=lambda m: f"head k weighs 0.8^k, k from 1\n{m}"
    )


@properties
@given(batches(), st.integers(0, 99))
def test_masked_targets_have_no_influence(batch, seed):
    logits, tokens, mask, decay = batch
    other = torch.where(
        mask, tokens, torch.randint(logits.shape[-1], tokens.shape, generator=rng(seed))
    )
    results = []
    for targets in (tokens, other):
        leaf = logits.clone().requires_grad_()
        loss, _ = medusa_loss(leaf, targets, mask, decay)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    wrong = "a target whose mask is False changes the loss or its gradient: the mask belongs to the target, not to the position that guesses it"
    torch.testing.assert_close(
        results[0], results[1], rtol=0, atol=0, msg=lambda m: f"{wrong}\n{m}"
    )
    K, B, T, _ = logits.shape
    for k in range(1, K + 1):
        for t in range(T):
            loss_mask = mask[:, t + k + 1] if t + k + 1 < T else torch.zeros(B, dtype=torch.bool)
            assert torch.equal(results[0][1][k - 1, :, t].abs().sum(-1) > 0, loss_mask), (
                f"head {k} at t learns exactly if token t+{k + 1} carries loss"
            )


@pytest.mark.parametrize("length", [1, 2, 3])
def test_heads_without_targets_add_nothing(length):
    """Head k needs k + 2 tokens; with fewer, or with all masked, its mean is 0 and the gradient stays finite."""
    logits = torch.randn(3, 2, length, 4, generator=rng(0), requires_grad=True)
    tokens = torch.zeros(2, length, dtype=torch.long)
    for mask in (None, torch.zeros(2, length, dtype=torch.bool)):
        loss, means = medusa_loss(logits, tokens, mask)
        assert (means > 0).tolist() == [mask is None and k + 2 <= length for k in (1, 2, 3)], (
            "head k has a target only if k + 2 tokens are there; else it adds 0"
        )
        assert torch.isfinite(loss), "without targets the loss is not finite: a mean over nothing"
        assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all(), (
            "without targets the gradient is not finite: a mean over nothing"
        )


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5])
def test_head_k_learns_the_token_k_plus_1_ahead_and_nothing_else(offset):
    """Blocks of random tokens, each followed by its translation, so that a token tells the one `offset` ahead and no other.

    Of three heads, head offset - 1 learns it; at offsets 1 and 5 there is no such head and none may.
    """
    V, B, blocks = 6, 12, 8
    first = torch.randint(V, (B, blocks, offset), generator=rng(offset))
    tokens = torch.cat((first, (first * 5 + 2) % V), dim=2).flatten(1)  # (B, T)
    mask = torch.cat((torch.zeros_like(first), torch.ones_like(first)), dim=2).flatten(1).bool()
    hidden = 3.0 * F.one_hot(tokens, V).float()
    lm_head = nn.Linear(V, V, bias=False)
    nn.init.zeros_(lm_head.weight)
    heads = MedusaHeads(MedusaConfig(V, V, 3, original_lm_head=False), lm_head)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.2)
    for _ in range(25):
        loss, means = medusa_loss(heads(hidden, lm_head), tokens, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for k, mean in enumerate(means.tolist(), start=1):
        assert mean < 0.1 if k + 1 == offset else mean > 0.8 * math.log(V), (
            f"head {k} must learn the token {k + 1} ahead and no other; here {offset} is known"
        )


# ---- a truncated vocabulary ----


@properties
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_truncated_vocabulary_leaves_tokens_out_and_changes_nothing_else(truncated, K, seed):
    model = random_gpt(seed)
    heads, every = random_heads(model, K, seed, truncated=truncated), random_heads(model, K, seed)
    hidden = torch.randn(2, 3, 8, generator=rng(seed), dtype=torch.float64)
    short, whole = (
        heads(hidden, heads.shortened(model.lm_head)),
        every(hidden, every.shortened(model.lm_head)),
    )
    torch.testing.assert_close(short, whole[..., heads.token_map])
    torch.testing.assert_close(heads(hidden, model.lm_head), whole)
    wide, left_out = (
        heads.widened(short),
        [token for token in range(5) if token not in heads.token_map],
    )
    assert torch.equal(wide[..., heads.token_map], short) and torch.equal(
        every.widened(whole), whole
    )
    assert torch.equal(
        wide[..., left_out], torch.full((K, 2, 3, 5 - truncated), -math.inf, dtype=torch.float64)
    )
    places = heads.places(torch.arange(5))
    assert (places[left_out] == -1).all() and torch.equal(
        heads.token_map[places[heads.token_map]], heads.token_map
    )
    assert torch.equal(every.places(torch.arange(5)), torch.arange(5))


def test_a_truncated_vocabulary_stands_on_disk_as_vllm_has_it_and_comes_back(tmp_path):
    heads = random_heads(random_gpt(0), 2, 0, truncated=3)
    heads.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["truncated_vocab_size"] == 3
    assert torch.equal(load_file(tmp_path / "model.safetensors")["token_map"], heads.token_map)
    loaded = MedusaHeads.from_pretrained(tmp_path, torch.float64)
    assert loaded.config == heads.config and torch.equal(loaded.token_map, heads.token_map)
    with pytest.raises(ValueError, match="guess 3, but the heads guess among 3 tokens"):
        check_compatible(random_gpt(0), loaded, cartesian_tree([4]))


@pytest.mark.parametrize(
    "token_map", [[0, 1, 5], [-1, 0, 1], [0, 0, 1], [2.0, 1.0, 0.5], [0, 1], [[0, 1, 2]], None]
)
def test_a_token_map_that_is_none_is_refused_by_name(token_map, tmp_path):
    random_heads(random_gpt(0), 2, 0, truncated=3).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["token_map"]
    save_file(
        state | ({} if token_map is None else {"token_map": torch.tensor(token_map)}),
        tmp_path / "model.safetensors",
    )
    refuses(tmp_path, "model.safetensors", "token_map")


@pytest.mark.parametrize(
    "truncated, shared", [(6, True), (-1, True), (2.0, True), (True, True), (3, False)]
)
def test_a_truncated_vocabulary_that_cannot_be_is_refused(truncated, shared):
    with pytest.raises(ValueError, match="truncated_vocab_size"):
        MedusaConfig(8, 5, 2, 1, shared, truncated)


# ---- heads on disk ----


@LAYERS
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_heads_come_back_bit_for_bit(layers, private, dtype, tmp_path):
    heads = heads_and_base(layers, private)[0].to(dtype)
    heads.save_pretrained(tmp_path / "new" / "heads")
    loaded = MedusaHeads.from_pretrained(tmp_path / "new" / "heads", dtype=dtype)
    assert loaded.config == heads.config
    ours, theirs = heads.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and theirs[name].dtype == dtype for name in ours
    )
    assert not loaded.training


@LAYERS
@BOTH
def test_heads_on_disk_are_a_vllm_medusa_speculator(layers, private, tmp_path):
    heads_and_base(layers, private)[0].save_pretrained(tmp_path)
    names = {
        f"blocks.{k}.layers.{j}.{leaf}"
        for k in range(3)
        for j in range(layers)
        for leaf in ("weight", "bias")
    }
    names |= {f"lm_heads.{k}.weight" for k in range(3) if private}
    shapes = {
        name: tuple(weight.shape)
        for name, weight in load_file(tmp_path / "model.safetensors").items()
    }
    assert shapes == {
        name: (6,) if name.endswith("bias") else (5, 6) if "lm_heads" in name else (6, 6)
        for name in names
    }
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "num_heads": 3,
        "num_hidden_layers": layers,
        "hidden_size": 6,
        "vocab_size": 5,
        "truncated_vocab_size": 5,
        "medusa_fc_bias": True,
        "original_lm_head": not private,
    }
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.fixture
def saved(tmp_path):
    heads_and_base(2, True)[0].save_pretrained(tmp_path)
    return tmp_path


def refuses(directory, *says) -> None:
    with pytest.raises(ValueError) as error:
        MedusaHeads.from_pretrained(directory)
    assert all(word in str(error.value) for word in says), str(error.value)


@pytest.mark.parametrize("said", [{}, {"medusa_fc_bias": None}], ids=str)
def test_a_config_that_says_nothing_of_biases_means_that_there_are_some(saved, said):
    settings = json.loads((saved / "config.json").read_text())
    settings.pop("medusa_fc_bias")
    (saved / "config.json").write_text(json.dumps(settings | said))
    assert MedusaHeads.from_pretrained(saved).bias.shape == (2, 3, 1, 6)


@pytest.mark.parametrize(
    "name", ["blocks.0.layers.1.weight", "blocks.2.layers.0.bias", "lm_heads.1.weight"]
)
@pytest.mark.parametrize("shape", [None, (7, 7), (1,), (6,), (1, 6)])
def test_a_missing_or_misshapen_tensor_is_refused_by_name(saved, name, shape):
    """A tensor that could be broadcast is no better than one that could not."""
    file = saved / "model.safetensors"
    state = load_file(file)
    if state[name].shape == shape:
        shape = (1, 1, 6)
    del state[name]
    save_file(state | ({} if shape is None else {name: torch.ones(shape)}), file)
    refuses(saved, str(file), name)


@pytest.mark.parametrize(
    "field", ["hidden_size", "vocab_size", "num_heads", "num_hidden_layers", "original_lm_head"]
)
def test_a_missing_field_is_refused_by_name(saved, field):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    del config[field]
    file.write_text(json.dumps(config))
    refuses(saved, str(file), field)


@pytest.mark.parametrize("model_type", ["llama", None])
def test_another_model_type_is_refused(saved, model_type):
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": model_type}))
    refuses(saved, str(file), "model_type")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x04garbage \xff", b"[1, 2]"])
def test_a_missing_or_garbage_file_is_refused_by_name(saved, name, content):
    file = saved / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    refuses(saved, str(file))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_compiled_steps_decode_the_same_texts_and_are_compiled_once(temperature, compilations):
    """Also those of other prompts, and to the end of the context, where the tree is cut."""
    model, tree = random_gpt(5, vocab_size=5, context=40, layers=2), cartesian_tree([2, 2])
    heads, compiled = random_heads(model, 3, 6), Compiled(model, {1, len(tree)})
    for prompt in ([1, 2, 3], [4], [2, 0, 2, 1, 3, 3]):
        arguments = (prompt, 99, Sampling(temperature))
        plain = [list(generate(which, *arguments, rng(7))) for which in (model, compiled)]
        with_heads = [
            list(medusa_generate(which, heads, tree, *arguments, rng(7)))
            for which in (model, compiled)
        ]
        assert plain[0] == plain[1] and with_heads[0] == with_heads[1]
        assert flat(plain[0]) == flat(with_heads[0]) and len(flat(plain[0])) == 40 - len(prompt)
    assert compilations.frame_count == 2
