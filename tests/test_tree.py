"""Laws of the candidate tree, against brute force."""

import math
import random
import re
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from strategies import built_trees, properties, rank_data, trees
from tree import (
    Tree,
    best_first_tree,
    calibrated_tree,
    cartesian_tree,
    choose_size,
    expected_tokens,
    prefix_counts,
    replay,
    tree_from_paths,
)


def climb(tree: Tree, node: int) -> list[int]:
    """The node and its ancestors, from the root down."""
    chain = [node]
    while tree.parents[chain[0]] != -1:
        chain.insert(0, tree.parents[chain[0]])
    return chain


def refused_in_words(call, says: str, what: str) -> None:
    """call() raises ValueError, and its message says this."""
    try:
        call()
    except ValueError as error:
        assert says in str(error), f"{what}: the ValueError does not say {says!r}"
    else:
        pytest.fail(f"{what}: no ValueError, although no tree can be made of them")


@properties
@given(trees())
def test_mask_equals_brute_force(tree):
    assert tree.mask.dtype == torch.bool and tree.mask.shape == (len(tree), len(tree)), (
        "the mask is one bool for each pair of nodes"
    )
    for node in range(len(tree)):
        seen, chain = tree.mask[node].nonzero().flatten().tolist(), climb(tree, node)
        assert node in seen, f"node {node} does not see itself"
        assert set(chain) <= set(seen), f"node {node} does not see all of its ancestors"
        assert seen == chain, f"node {node} sees nodes that are not its ancestors"


@properties
@given(trees())
def test_depths_equal_brute_force(tree):
    for node in range(len(tree)):
        assert tree.depths[node] == len(climb(tree, node)) - 1, (
            f"the depth of node {node} is not its number of steps from the root"
        )


@properties
@given(trees())
def test_paths_equal_brute_force(tree):
    for node in range(len(tree)):
        ranks = tuple(tree.ranks[ancestor] for ancestor in climb(tree, node)[1:])
        assert tree.paths[node] == ranks, (
            f"the path of node {node} is not the ranks from the root down to it, the root's left out"
        )


def test_the_mask_hides_the_sibling_branch():
    mask = Tree((-1, 0, 0, 1), (-1, 0, 1, 0)).mask.int().tolist()
    assert not mask[2][1] and not mask[3][2] and not mask[1][2], (
        "a node sees a sibling, or a sibling's branch"
    )
    assert not mask[0][1] and not mask[1][3], (
        "a node sees its own children: a guess must not see what is guessed behind it"
    )
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], (
        "each node sees its ancestors and itself"
    )


@pytest.mark.parametrize(
    "parents, ranks, says",
    [
        ((), (), "at least the root: got 0 and 0"),
        ((-1, 0), (-1,), "as many parents as ranks, .* got 2 and 1"),
        ((0, 7), (-1, 5), "node 0 .* got 0 and -1"),
        ((-1, 7), (0, 5), "node 0 .* got -1 and 0"),
        ((-1, 1), (-1, 0), "node 1"),
        ((-1, 2, 0), (-1, 0, 0), "node 1: its parent 2 "),
        ((-1, -1), (-1, 0), "node 1"),
        ((-1, 0, -2), (-1, 0, 0), "node 2"),
        ((-1, 0), (-1, -1), r"path \[-1\]"),
        ((-1, 0, 1), (-1, 0, -3), r"path \[0, -3\]"),
        ((-1, 0, 0), (-1, 2, 2), r"path \[2\]"),
        ((-1, 0, 1, 1), (-1, 0, 4, 4), r"path \[0, 4\]"),
    ],
)
def test_a_malformed_tree_is_refused_by_name(parents, ranks, says):
    with pytest.raises(ValueError, match=says):
        Tree(parents, ranks)


def test_a_tree_is_frozen_and_the_root_alone_is_one():
    tree = Tree((-1,), (-1,))
    assert (len(tree), tree.depths, tree.paths) == (1, (0,), ((),)), (
        "the root is at depth 0, and its path is empty"
    )
    with pytest.raises(AttributeError):
        tree.parents = (-1, 0)


def test_worked_example_of_the_cartesian_tree():
    tree = cartesian_tree((2, 3))
    assert len(tree) == 1 + 2 + 2 * 3, (
        "widths 2 and 3: the root, 2 guesses of head 1, and below each of them 3 of head 2"
    )
    assert tree.parents == (-1, 0, 0, 1, 1, 1, 2, 2, 2), (
        "nodes stand by depth, then by ranks, each with its parent's index"
    )
    assert tree.ranks == (-1, 0, 1, 0, 1, 2, 0, 1, 2), "the ranks below each parent count up from 0"


@properties
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_cartesian_tree_holds_every_combination_once(widths):
    tree = cartesian_tree(widths)
    assert all(rank < width for path in tree.paths for rank, width in zip(path, widths)), (
        "a rank at depth d is not below widths[d-1]"
    )
    assert len(tree) == 1 + sum(math.prod(widths[:depth]) for depth in range(1, len(widths) + 1)), (
        "not every combination, at every depth, is there"
    )
    assert len(set(tree.paths)) == len(tree), "a combination stands twice"


@pytest.mark.parametrize("widths", [(), (0,), (2, 0), (2, -1)])
def test_cartesian_tree_refuses_widths_below_one(widths):
    refused_in_words(lambda: cartesian_tree(widths), str(list(widths)), f"widths {widths}")


@properties
@given(built_trees(max_depth=3, n_ranks=4))
def test_every_builders_tree_is_closed_under_prefixes(tree):
    assert all(path[:-1] in tree.paths for path in tree.paths[1:])
    assert all(
        path[:-1] == tree.paths[parent] for path, parent in zip(tree.paths[1:], tree.parents[1:])
    )


@properties
@given(trees().filter(lambda tree: len(tree) > 1), st.randoms(use_true_random=False))
def test_tree_from_paths_takes_any_order_and_round_trips(tree, shuffler):
    paths = [list(path) for path in tree.paths[1:]]
    shuffler.shuffle(paths)
    built = tree_from_paths(paths)
    assert set(built.paths) == set(tree.paths), (
        "the tree does not hold the paths that it was made of, and the root"
    )
    assert built.paths == tuple(sorted(tree.paths, key=lambda path: (len(path), path))), (
        "nodes stand by depth, then by ranks"
    )
    assert tree_from_paths(built.paths[1:]) == built, "a tree is not what its own paths make"


@pytest.mark.parametrize(
    "paths, says",
    [
        ([], "no paths"),
        ([[]], "path []"),
        ([[0], []], "path []"),
        ([[0], [1, 0]], "path [1, 0]"),
        ([[0], [0, 0, 2]], "path [0, 0, 2]"),
        ([[0], [1], [0]], "path [0]"),
        ([[0], [0, 5], [0, 5]], "path [0, 5]"),
        ([[0], [-1]], "path [-1]"),
        ([[0], [0, -2]], "path [0, -2]"),
        ([[-1], [-1, 0]], "path [-1]"),
    ],
)
def test_tree_from_paths_names_the_path_it_refuses(paths, says):
    refused_in_words(lambda: tree_from_paths(paths), says, f"paths {paths}")


def test_a_missing_prefix_is_named_too():
    refused_in_words(
        lambda: tree_from_paths([[0], [0, 3, 1]]), "its prefix [0, 3] is missing", "path [0, 3, 1]"
    )


def every_tree(n_nodes: int, n_ranks: int, max_depth: int) -> set[frozenset]:
    """All prefix-closed sets of n_nodes paths, the root included."""
    found = {frozenset([()])}
    for _ in range(n_nodes - 1):
        found = {
            tree | {path + (rank,)}
            for tree in found
            for path in tree
            if len(path) < max_depth
            for rank in range(n_ranks)
            if path + (rank,) not in tree
        }
    return found


def hits(paths, rows) -> int:
    """Tokens accepted below the root, position by position: the deepest path that the true ranks start with."""
    return sum(max(len(path) for path in paths if path == tuple(row[: len(path)])) for row in rows)


CANDIDATES = {n: every_tree(n, 3, 3) for n in range(2, 6)}


@settings(properties, max_examples=40)
@given(rank_data(max_depth=3, n_ranks=3), st.integers(2, 5))
def test_calibrated_tree_is_the_best_of_all_trees_of_its_size(rows, n_nodes):
    tree = calibrated_tree(rows, n_nodes)
    best = max(hits(paths, rows) for paths in CANDIDATES[n_nodes])
    assert hits(tree.paths, rows) == best, (
        "another tree of this size would have had more of its guesses accepted"
    )
    assert expected_tokens(tree, prefix_counts(rows)) == pytest.approx(1 + best / len(rows)), (
        "the promise is not what this tree would have earned"
    )


@properties
@given(rank_data(max_depth=3, n_ranks=3), st.integers(2, 12))
def test_calibrated_tree_takes_the_most_frequent_prefixes_and_breaks_ties_to_the_shorter_then_lower(
    rows, n_nodes
):
    prefixes = {row[:depth] for row in rows for depth in range(1, len(row) + 1)}
    frequency = {prefix: sum(row[: len(prefix)] == prefix for row in rows) for prefix in prefixes}
    best = sorted(prefixes, key=lambda prefix: (-frequency[prefix], len(prefix), prefix))[
        : n_nodes - 1
    ]
    tree = calibrated_tree(rows, n_nodes)
    assert len(tree) == min(n_nodes, len(prefixes) + 1), (
        "n_nodes counts the root, and a tree holds prefixes that occurred and no others"
    )
    assert set(tree.paths[1:]) == set(best), (
        "not the most frequent prefixes, ties to the shorter, then to the lower ranks"
    )
    assert calibrated_tree(random.Random(0).sample(rows, len(rows)), n_nodes) == tree, (
        "the order of the positions is nothing"
    )


def test_calibrated_tree_breaks_ties_to_the_shorter_then_to_the_lower_ranks():
    assert calibrated_tree([(0, 0), (1, 1)], 3).paths == ((), (0,), (1,)), (
        "of equally frequent prefixes the shorter comes first"
    )
    assert calibrated_tree([(2, 0), (1, 0)], 2).paths == ((), (1,)), (
        "of equally frequent and long prefixes the one with the lower ranks comes first"
    )
    assert calibrated_tree([(1, 1), (0, 1), (0, 0), (1, 0)], 4).paths == ((), (0,), (1,), (0, 0)), (
        "ties go to the shorter, then to the lower ranks"
    )


def test_calibrated_tree_assumes_no_independence():
    """The marginals would prefer [0, 1] (0.6 * 0.6) to [1, 1] (0.4 * 0.6); jointly [1, 1] came twice as often."""
    rows = [(0, 1)] * 2 + [(0, 2)] * 2 + [(0, 3)] * 2 + [(1, 1)] * 4
    assert calibrated_tree(rows, 4).paths == ((), (0,), (1,), (1, 1)), (
        "heads are not independent: count whole prefixes, do not multiply marginals"
    )


def test_calibrated_tree_takes_counts_as_well_as_rows():
    rows = [(0, 0), (0, 1), (1, 0)]
    assert calibrated_tree(prefix_counts(rows), 4) == calibrated_tree(iter(rows), 4), (
        "rows and their prefix counts give different trees"
    )


@properties
@given(st.lists(rank_data(max_depth=3, n_ranks=3), max_size=3), trees(max_depth=3, n_ranks=3))
def test_a_replay_starts_a_step_behind_all_that_the_step_before_it_earned(texts, tree):
    expected = []
    for positions in texts:
        free = 0  # the first position that no step has passed yet
        for at, ranks in enumerate(positions):
            if at == free:
                expected.append(ranks)
                free += 1 + hits(tree.paths, [ranks])
    assert replay(texts, tree) == expected


def test_a_replay_of_a_text_tells_what_decoding_earns():
    """Every other position misses: by all positions a step would earn 1.5 tokens, but a step that hits passes over a miss."""
    tree, positions = Tree((-1, 0), (-1, 0)), [(0,), (1,)] * 50
    assert expected_tokens(tree, prefix_counts(positions)) == 1.5
    assert expected_tokens(tree, prefix_counts(replay([positions], tree))) == 2.0
    assert replay([positions[1:]], tree) == [(1,)] + [(0,)] * 49


@pytest.mark.parametrize("rows, n_nodes", [([(0, 0)], 1), ([(0, 0)], 0), ([], 4), ([()], 4)])
def test_calibrated_tree_refuses_a_tree_without_guesses(rows, n_nodes):
    refused_in_words(
        lambda: calibrated_tree(rows, n_nodes),
        f"n_nodes = {n_nodes}",
        f"{n_nodes} nodes from rows {rows}",
    )


@properties
@given(rank_data(max_depth=3, n_ranks=3))
def test_prefix_counts_equal_brute_force(rows):
    counts = prefix_counts(rows)
    assert counts[()] == len(rows), "the empty prefix stands once for each position"
    assert counts == Counter(
        row[:depth] for depth in range(4) for row in rows if depth <= len(row)
    ), "each position counts once for each prefix of its ranks"


@properties
@given(rank_data(max_depth=3, n_ranks=4), trees(max_depth=3))
def test_expected_tokens_is_the_mean_of_what_each_position_would_have_emitted(rows, tree):
    promised, earned = (
        expected_tokens(tree, prefix_counts(rows)),
        1 + hits(tree.paths, rows) / len(rows),
    )
    assert promised == pytest.approx(earned), (
        "tokens per step: the next root, and each node's chance to be accepted"
    )


def every_path(K: int, V: int) -> list[tuple[int, ...]]:
    return [path for depth in range(1, K + 1) for path in product(range(V), repeat=depth)]


def worth(path, probs) -> Fraction:
    """The product of a path's probabilities, each row of probs in order from the likeliest."""
    return math.prod(sorted(row, reverse=True)[rank] for row, rank in zip(probs, path))


@st.composite
def head_probabilities(draw, max_heads=3, max_tokens=3):
    """K rows of V probabilities; few values, so that many are equal, and some 0. Powers of 2: logarithms in base 2 add up without rounding."""
    K, V = draw(st.integers(1, max_heads)), draw(st.integers(1, max_tokens))
    powers = st.sampled_from(
        [Fraction(0), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1)]
    )
    return draw(st.lists(st.lists(powers, min_size=V, max_size=V), min_size=K, max_size=K))


def logs(probs) -> torch.Tensor:
    return torch.tensor([[float(p) for p in row] for row in probs], dtype=torch.float64).log2()


@settings(properties, max_examples=30)
@given(head_probabilities(), st.integers(2, 5))
def test_a_best_first_tree_is_the_best_of_all_trees_of_its_size(probs, n_nodes):
    K, V = len(probs), len(probs[0])
    tree = best_first_tree(logs(probs), n_nodes)
    assert len(tree) == min(n_nodes, 1 + len(every_path(K, V)))
    assert all(path[:-1] in tree.paths for path in tree.paths[1:])
    best = max(
        sum(worth(path, probs) for path in paths if path) for paths in every_tree(len(tree), V, K)
    )
    assert sum(worth(path, probs) for path in tree.paths[1:]) == best


@properties
@given(head_probabilities(), st.integers(2, 12))
def test_a_best_first_tree_breaks_ties_to_the_shorter_then_to_the_lower_ranks(probs, n_nodes):
    order = sorted(
        every_path(len(probs), len(probs[0])),
        key=lambda path: (-worth(path, probs), len(path), path),
    )
    assert set(best_first_tree(logs(probs), n_nodes).paths[1:]) == set(order[: n_nodes - 1])


def test_a_best_first_tree_without_guesses_is_refused():
    with pytest.raises(ValueError, match="n_nodes = 1"):
        best_first_tree(torch.zeros(2, 3), 1)


halves = st.integers(1, 6).map(lambda n: Fraction(n, 2))
costs = st.dictionaries(st.integers(1, 20), halves, min_size=1, max_size=5)


def straight_line(points: dict, x: int) -> Fraction:
    """Interpolation from its definition."""
    known = sorted(points)
    if x <= known[0]:
        return points[known[0]]
    for left, right in zip(known, known[1:]):
        if left <= x <= right:
            share = Fraction(x - left, right - left)
            return (1 - share) * points[left] + share * points[right]
    return points[known[-1]]


@properties
@given(
    costs,
    st.lists(st.integers(1, 4), min_size=21, max_size=21),
    st.none() | st.lists(st.integers(1, 20), min_size=1),
)
def test_choose_size_equals_brute_force_and_takes_the_smallest_of_equals(cost, gains, sizes):
    expected = [Fraction(gain) for gain in gains]  # few values, and costs with plateaus: many ties
    choice = choose_size(
        expected.__getitem__, {n: float(seconds) for n, seconds in cost.items()}, sizes
    )
    allowed = sorted(sizes) if sizes else list(range(min(cost), max(cost) + 1))
    values = {n: expected[n] / straight_line(cost, n) for n in allowed}
    assert choice in allowed and values[choice] >= max(values.values()) * (
        1 - 1e-12
    )  # interpolation rounds, what was measured does not
    assert all(
        values[n] < values[choice] for n in allowed if n < choice and {n, choice} <= cost.keys()
    )


def test_choose_size_grows_along_a_plateau_of_the_cost_and_stops_where_it_ends():
    cost = {1: 1.0, 16: 1.0, 32: 4.0}
    assert choose_size(lambda n: 1 + math.log(n), cost) == 16
    assert choose_size(lambda n: 1.0, cost) == 1
    assert choose_size(lambda n: 1 + math.log(n), cost, sizes=iter([32, 8, 4])) == 8


@pytest.mark.parametrize("cost", [{}, {1: 0.0}, {1: 1.0, 2: -1.0}])
def test_choose_size_refuses_costs_that_are_none(cost):
    with pytest.raises(ValueError, match="cost"):
        choose_size(lambda n: n, cost)


@properties
@given(trees(), st.integers(0, 6))
def test_cut_keeps_the_shallow_nodes_in_their_order(tree, depth):
    cut = tree.cut(depth)
    assert cut.paths == tuple(path for path in tree.paths if len(path) <= depth)
    assert max(cut.depths) == min(depth, max(tree.depths))


@properties
@given(trees())
def test_render_shows_each_node_once_below_its_parent(tree):
    lines = tree.render().splitlines()
    assert lines[0] == "0 root" and len(lines) == len(tree)
    above, parents = {0: 0}, {0: -1}  # above: depth -> the last node drawn at that depth
    for line in lines[1:]:
        indent, node, head, guess = re.fullmatch(
            r"([|` -]*)(\d+) head (\d+), guess (\d+)", line
        ).groups()
        node, depth = int(node), len(indent) // 3
        assert node not in parents
        assert int(head) == depth == tree.depths[node] and int(guess) == tree.ranks[node]
        parents[node], above[depth] = above[depth - 1], node
    assert parents == dict(enumerate(tree.parents))


def test_render_draws_the_branches():
    drawing = Tree((-1, 0, 0, 1, 2), (-1, 0, 2, 1, 0)).render()
    assert drawing.splitlines() == [
        "0 root",
        "|- 1 head 1, guess 0",
        "|  `- 3 head 2, guess 1",
        "`- 2 head 1, guess 2",
        "   `- 4 head 2, guess 0",
    ]
