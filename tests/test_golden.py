"""Worked examples, to be read first: one idea each, on four tokens, with the arithmetic.

The other tests state the same ideas as properties of every tree, text and model.
"""

import math

import pytest
import torch

from medusa import MedusaConfig, MedusaHeads, Sampling, accept, generate, logits_to_probs
from medusa import medusa_generate, medusa_loss, targets_ahead, typical_threshold
from model import KVCache, ModelConfig
from strategies import markov_gpt
from tree import Tree, calibrated_tree, cartesian_tree, expected_tokens, prefix_counts, replay

#     0 -+- 1 --- 3      two guesses of head 1; below the first of them, one of head 2
#        +- 2
TREE = Tree(parents=(-1, 0, 0, 1), ranks=(-1, 0, 1, 0))


def logs(*rows) -> torch.Tensor:
    """Logits of these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_a_node_sees_itself_and_its_ancestors():
    assert TREE.depths == (0, 1, 1, 2)
    assert TREE.paths == ((), (0,), (1,), (0, 0))
    assert TREE.mask.int().tolist() == [
        [1, 0, 0, 0],  # the root sees itself
        [1, 1, 0, 0],
        [1, 0, 1, 0],  # node 2 does not see node 1: they guess the same position
        [1, 1, 0, 1],  # node 3 continues node 1
    ]


def test_a_cartesian_tree_has_every_combination():
    tree = cartesian_tree([2, 2])  # 1 + 2 + 2 * 2 nodes
    assert tree.paths == ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))
    assert tree.parents == (-1, 0, 0, 1, 1, 2, 2)


def test_a_calibrated_tree_has_the_most_frequent_prefixes():
    ranks = [(0, 0), (0, 0), (0, 2), (1, 0)]  # of the true tokens, at four positions
    # (0,) came true 3 times, (0, 0) twice, (0, 2), (1,) and (1, 0) once.
    tree, counts = calibrated_tree(ranks, n_nodes=3), prefix_counts(ranks)
    assert tree.paths == ((), (0,), (0, 0))
    # Each step emits the next root; 3/4 also the guess (0,), and 2/4 also (0, 0).
    assert expected_tokens(tree, counts) == 1 + 3 / 4 + 2 / 4


def test_a_replay_tells_where_steps_would_start():
    ranks = [(0, 0), (5, 5), (0, 0), (1, 0), (0, 3), (2, 0)]
    # Position 0: guess 0 of head 1 is right, then guess 0 of head 2. 2 + 1 tokens: position 3.
    # Position 3: guess 1 of head 1 is right, and a leaf.             1 + 1 tokens: position 5.
    # Position 5: guess 2 of head 1 is not in the tree.                   1 token: the end.
    assert replay([ranks], TREE) == [(0, 0), (1, 0), (2, 0)]


def test_head_k_is_asked_for_the_token_k_plus_1_ahead():
    tokens, mask = torch.tensor([[3, 1, 2, 0]]), torch.tensor([[False, True, True, False]])
    assert targets_ahead(tokens, None, K=2).tolist() == [
        [[1, 2, 0, -100]],  # the base: token t+1. -100: there is no such token
        [[2, 0, -100, -100]],  # head 1: token t+2
        [[0, -100, -100, -100]],  # head 2: token t+3
    ]
    # The mask belongs to the target: 3 and 0 are left out of the loss, whoever guesses them.
    assert targets_ahead(tokens, mask, K=1).tolist() == [
        [[1, 2, -100, -100]],
        [[2, -100, -100, -100]],
    ]


def test_the_loss_of_head_k_weighs_a_power_of_four_fifths():
    # Two heads, three positions. Head 1 gives its two targets the probabilities 1/4 and 1/2, head 2
    # gives its only one 1/8.
    uniform, half, eighth = [0.25] * 4, [0.5, 0.5, 0, 0], [0.125, 0.875, 0, 0]
    logits = torch.stack((logs(uniform, half, uniform), logs(eighth, uniform, uniform)))
    targets, ln2 = torch.tensor([[3, 0, -100], [0, -100, -100]]), math.log(2)
    loss, (first, second) = medusa_loss(logits, targets)
    assert first.item() == pytest.approx((2 * ln2 + ln2) / 2)  # -ln 1/4 = 2 ln 2, -ln 1/2 = ln 2
    assert second.item() == pytest.approx(3 * ln2)  # -ln 1/8
    assert loss.item() == pytest.approx(0.8 * 1.5 * ln2 + 0.64 * 3 * ln2)


def test_a_new_head_is_the_lm_head_and_a_trained_one_adds_silu():
    lm_head = torch.nn.Linear(1, 2, bias=False)
    lm_head.weight.data = torch.tensor([[1.0], [3.0]])
    heads, hidden = MedusaHeads(MedusaConfig(1, 2, num_heads=1, num_hidden_layers=1)), torch.ones(1)
    assert heads(hidden, lm_head).tolist() == [[1, 3]]
    heads.weight.data[:] = 2.0  # h + SiLU(W1 h + b1) = 1 + SiLU(2), and SiLU(x) = x / (1 + e^-x)
    x = 1 + 2 / (1 + math.exp(-2))
    torch.testing.assert_close(heads(hidden, lm_head), torch.tensor([[x, 3 * x]]))


def test_greedy_acceptance_follows_the_base_models_argmax():
    tokens = torch.tensor([0, 2, 1, 3])  # at the nodes; the root is token 0
    logits = torch.eye(4)[[2, 3, 0, 1]]  # the base's argmax after nodes 0, 1, 2, 3
    # Node 1 holds 2, the argmax after the root, and node 3 holds 3, the argmax after node 1. Node 2
    # would need a 2, too. Last comes the base's own token after node 3, a 1.
    assert accept(TREE, tokens, logits) == ([0, 1, 3], [2, 3, 1])
    # With a 1 after node 1, node 3 is rejected, and this 1 is the next token.
    assert accept(TREE, tokens, torch.eye(4)[[2, 1, 0, 1]]) == ([0, 1], [2, 1])


def test_the_typical_threshold_falls_with_the_entropy():
    # epsilon = 0.09, delta = sqrt(0.09) = 0.3. Uniform over 8: H = ln 8, e^-H = 1/8.
    assert typical_threshold(torch.full((8,), 1 / 8)).item() == pytest.approx(0.3 / 8)
    # A sure token: H = 0, and 0.3 * 1 is above epsilon, which is the most.
    assert typical_threshold(torch.tensor([1.0, 0.0])).item() == pytest.approx(0.09)


def test_typical_acceptance_takes_guesses_that_are_plausible():
    tree, tokens = Tree((-1, 0, 1), (-1, 0, 0)), torch.tensor([0, 2, 3])
    # After the root, uniform over 4: threshold 0.3 / 4 = 0.075, and guess 2 has 0.25. After node 1
    # H = 0.2: 0.3 e^-0.2 = 0.25 is above epsilon, so that 0.09 is the threshold; guess 3 has 0.05.
    logits, sampling = logs([0.25] * 4, [0.95, 0, 0, 0.05], [0.25] * 4), Sampling(1.0, typical=True)
    assert accept(tree, tokens, logits, sampling, torch.ones_like(logits)) == ([0, 1], [2, 0])


@pytest.mark.parametrize("likely", [1, 2])
def test_of_equally_deep_paths_the_most_likely_wins(likely):
    """Typical acceptance by hand. Nodes 1 and 2 hold tokens 1 and 2; nodes 3 and 4 hold token 0."""
    tree, tokens = Tree((-1, 0, 0, 1, 2), (-1, 0, 1, 0, 0)), torch.tensor([0, 1, 2, 0, 0])
    # The threshold is at most epsilon = 0.09, so all four guesses pass: both paths reach depth 2.
    root, even, sure = [0.1, 0.2, 0.2, 0.2], [0.5, 0.2, 0.2, 0.1], [0.9, 0.1, 0, 0]
    root[likely] = 0.5
    after = [even, sure] if likely == 1 else [sure, even]
    logits, sampling = logs(root, *after, even, even), Sampling(1.0, typical=True)
    # 0.5 * 0.5 = 0.25 beats 0.2 * 0.9 = 0.18: the product counts, neither the last token alone, 0.5
    # against 0.9, nor the sum, 1.0 against 1.1. With equal noise the next token is the argmax.
    path, emitted = accept(tree, tokens, logits, sampling, torch.ones_like(logits))
    says = "of equally deep paths the most likely one wins: the product of its probabilities counts"
    assert (path, emitted) == ([0, likely, likely + 2], [likely, 0, 0]), says


def test_lossless_acceptance_samples_with_the_noise():
    tokens, probs = torch.tensor([0, 2, 1, 3]), [0.5, 0.25, 0.25, 0.0]
    # The noise of a position is the same at all of its nodes: of the rows here, 1 and 2 are equal.
    first, second, third = [1.0, 2.0, 0.1, 1.0], [0.1, 1.0, 1.0, 0.01], [1.0, 0.1, 1.0, 1.0]
    noise = torch.tensor([first, second, second, third], dtype=torch.float64)
    # After the root, probs / noise = 0.5, 0.125, 2.5, 0: token 2, which node 1 holds. After it
    # 5, 0.25, 0.25, 0: token 0. Node 3 holds 3, of probability 0: rejected.
    sampling = Sampling(temperature=1.0)
    assert accept(TREE, tokens, logs(*[probs] * 4), sampling, noise) == ([0, 1], [2, 0])


def test_temperature_top_k_and_top_p_make_the_distribution():
    logits = logs([0.4, 0.3, 0.2, 0.1])
    # Temperature 1/2 squares probabilities: 16, 9, 4, 1 of 30.
    squared = torch.tensor([[16, 9, 4, 1]], dtype=torch.float64) / 30
    torch.testing.assert_close(logits_to_probs(logits, Sampling(0.5)), squared)
    # The top 3 hold 0.9: 4/9, 3/9, 2/9. Of these the first two hold 7/9, more than top_p = 0.7.
    cut = torch.tensor([[4, 3, 0, 0]], dtype=torch.float64) / 7
    torch.testing.assert_close(logits_to_probs(logits, Sampling(1.0, top_k=3, top_p=0.7)), cut)


def test_keep_moves_the_accepted_rows_to_the_end_of_the_text():
    cache = KVCache(ModelConfig(4, 2, 2, 1, 1, 1), batch=1, capacity=6)
    cache.data[:] = torch.arange(6.0)[:, None]  # slot i holds the number i
    cache.length = 6  # a text of 2 tokens, then the 4 nodes of TREE
    cache.keep(2, [0, 1, 3])  # the path to node 3
    assert cache.length == 5 and cache.data[0, 0, 0, 0, :5, 0].tolist() == [0, 1, 2, 3, 5]


def test_a_whole_step_emits_the_tokens_of_plain_decoding():
    # After token i the base prefers i + 1, modulo 4, then i + 2. New heads are the LM head: from
    # the state that made the root, both of them guess what the base guessed there.
    base = markov_gpt([[0, 9, 2, 1], [1, 0, 9, 2], [2, 1, 0, 9], [9, 2, 1, 0]])
    heads = MedusaHeads(MedusaConfig(4, 4, num_heads=2)).double()
    prompt, step, *_ = medusa_generate(base, heads, TREE, [3], max_new_tokens=4)
    # The prompt, 3, gives the root, 0. The guesses after 3 are 0, of rank 0, and 1, of rank 1.
    assert (prompt.emitted, step.tokens.tolist()) == ([0], [0, 0, 1, 0])
    # After 0 the base prefers 1, which node 2 holds, and after 1 a 2: two tokens in one step.
    assert (step.path, step.emitted) == ([0, 2], [1, 2])
    plain = [step.emitted[0] for step in generate(base, [3], max_new_tokens=4)]
    tree = [step.emitted for step in medusa_generate(base, heads, TREE, [3], max_new_tokens=4)]
    assert plain == [0, 1, 2, 3] == sum(tree, [])
