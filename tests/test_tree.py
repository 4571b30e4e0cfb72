"""Properties of the candidate tree, against brute force."""

import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from strategies import properties, rank_data, refused, trees
from tree import Tree, calibrated_tree, cartesian_tree, choose_size, expected_tokens
from tree import prefix_counts, read_counts, replay, tree_from_paths


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
    kind = tree.mask.dtype, tree.mask.shape
    assert kind == (torch.bool, (len(tree),) * 2), "the mask is one bool for each pair of nodes"
    for node in range(len(tree)):
        seen, chain = tree.mask[node].nonzero().flatten().tolist(), climb(tree, node)
        assert node in seen, f"node {node} does not see itself"
        assert set(chain) <= set(seen), f"node {node} does not see all of its ancestors"
        assert seen == chain, f"node {node} sees nodes that are not its ancestors"


@properties
@given(trees())
def test_depths_equal_brute_force(tree):
    for node in range(len(tree)):
        says = f"the depth of node {node} is not its number of steps from the root"
        assert tree.depths[node] == len(climb(tree, node)) - 1, says


@properties
@given(trees())
def test_paths_equal_brute_force(tree):
    for node in range(len(tree)):
        ranks = tuple(tree.ranks[ancestor] for ancestor in climb(tree, node)[1:])
        says = f"the path of node {node} is not the ranks from the root down, without the root's"
        assert tree.paths[node] == ranks, says


def test_the_mask_hides_the_sibling_branch():
    mask = Tree((-1, 0, 0, 1), (-1, 0, 1, 0)).mask.int().tolist()
    siblings, children = (mask[1][2], mask[2][1], mask[3][2]), (mask[0][1], mask[1][3])
    assert not any(siblings), "a node sees a sibling, or a sibling's branch"
    assert not any(children), "a node sees its own children: guesses that come after it"
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert mask == expected, "each node sees its ancestors and itself"


MALFORMED = [((), (), "node 0 is the root"), ((0, 7), (-1, 5), "node 0 is the root")]
MALFORMED += [((-1, 0), (-1,), "2 parents, but 1 ranks")]
MALFORMED += [((-1, 1), (-1, 0), "1: its parent 1 "), ((-1, 2, 0), (-1, 0, 0), "1: its parent 2 ")]
MALFORMED += [((-1, 0, -1), (-1, 0, 0), "2: its parent -1 "), ((-1, 0), (-1, -1), "path [-1]")]
MALFORMED += [((-1, 0, 1), (-1, 0, -3), "path [0, -3]")]
MALFORMED += [((-1, 0, 1, 1), (-1, 0, 4, 4), "path [0, 4]")]


@pytest.mark.parametrize("parents, ranks, says", MALFORMED)
def test_a_malformed_tree_is_refused_by_name(parents, ranks, says):
    refused_in_words(lambda: Tree(parents, ranks), says, f"parents {parents}, ranks {ranks}")


def test_a_tree_is_frozen_and_the_root_alone_is_one():
    tree = Tree((-1,), (-1,))
    found = len(tree), tree.depths, tree.paths
    assert found == (1, (0,), ((),)), "the root is at depth 0, and its path is empty"
    with pytest.raises(AttributeError):
        tree.parents = (-1, 0)


def test_render_draws_the_branches():
    drawn = Tree((-1, 0, 0, 1, 2, 3), (-1, 0, 2, 1, 0, 5)).render().splitlines()
    assert drawn[:2] == ["0 root", "|- 1 head 1, guess 0"]
    assert drawn[3:5] == ["|  |  |- 5 head 3, guess 5", "|- 2 head 1, guess 2"]


# ---- trees from paths and from widths ----
@properties
@given(trees().filter(lambda tree: len(tree) > 1), st.randoms(use_true_random=False))
def test_tree_from_paths_takes_any_order_and_round_trips(tree, shuffler):
    paths = [list(path) for path in tree.paths[1:]]
    shuffler.shuffle(paths)
    built = tree_from_paths(paths)
    ordered = tuple(sorted(tree.paths, key=lambda path: (len(path), path)))
    says = "the tree does not hold the paths that it was made of, and the root"
    assert set(built.paths) == set(tree.paths), says
    assert built.paths == ordered, "nodes are numbered by depth, then by ranks"
    assert tree_from_paths(built.paths[1:]) == built, "a tree is not what its own paths make"


PATHS = [([], "no paths"), ([[0], []], "path []"), ([[0], [1, 0]], "path [1, 0]")]
PATHS += [([[0], [0, 3, 1]], "its prefix [0, 3] is missing"), ([[-1], [-1, 0]], "path [-1]")]
PATHS += [([[0], [0, 5], [0, 5]], "path [0, 5]"), ([[0], [0, -2]], "path [0, -2]")]


@pytest.mark.parametrize("paths, says", PATHS)
def test_tree_from_paths_names_the_path_it_refuses(paths, says):
    refused_in_words(lambda: tree_from_paths(paths), says, f"paths {paths}")


def test_worked_example_of_the_cartesian_tree():
    tree = cartesian_tree((2, 3))
    says = "widths 2 and 3: the root, 2 guesses of head 1, and below each of them 3 of head 2"
    assert len(tree) == 1 + 2 + 2 * 3, says
    says = "nodes are numbered by depth, then by ranks, each with its parent's index"
    assert tree.parents == (-1, 0, 0, 1, 1, 1, 2, 2, 2), says
    assert tree.ranks == (-1, 0, 1, 0, 1, 2, 0, 1, 2), "the ranks below each parent count up from 0"


@properties
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_cartesian_tree_holds_every_combination_once(widths):
    tree = cartesian_tree(widths)
    for path in tree.paths:
        inside = all(rank < width for rank, width in zip(path, widths))
        assert inside, "a rank at depth d is not below widths[d-1]"
    size = sum(math.prod(widths[:depth]) for depth in range(len(widths) + 1))
    assert len(tree) == size, "not every combination, at every depth, is there"
    assert len(set(tree.paths)) == len(tree), "a combination is there twice"


@pytest.mark.parametrize("widths", [(), (0,), (2, 0), (2, -1)])
def test_cartesian_tree_refuses_widths_below_one(widths):
    refused_in_words(lambda: cartesian_tree(widths), str(list(widths)), f"widths {widths}")


# ---- calibration ----
def every_tree(n_nodes: int, n_ranks: int, max_depth: int) -> set[frozenset]:
    """All prefix-closed sets of n_nodes paths, the root included."""
    found = {frozenset([()])}
    for _ in range(n_nodes - 1):
        smaller, found = found, set()
        for tree in smaller:
            inner = [path for path in tree if len(path) < max_depth]
            children = {path + (rank,) for path in inner for rank in range(n_ranks)}
            found |= {tree | {child} for child in children - tree}
    return found


CANDIDATES = {n: every_tree(n, 3, 3) for n in range(2, 6)}


def hits(paths, rows) -> int:
    """Accepted guesses: at each position the deepest path that the true ranks start with."""
    return sum(max(len(path) for path in paths if path == tuple(row[: len(path)])) for row in rows)


@settings(properties, max_examples=40)
@given(rank_data(max_depth=3, n_ranks=3), st.integers(2, 5))
def test_calibrated_tree_is_the_best_of_all_trees_of_its_size(rows, n_nodes):
    best = max(hits(paths, rows) for paths in CANDIDATES[n_nodes])
    says = "another tree of this size would have had more of its guesses accepted"
    assert hits(calibrated_tree(rows, n_nodes).paths, rows) == best, says


@properties
@given(rank_data(max_depth=3, n_ranks=3), st.integers(2, 12))
def test_calibrated_tree_takes_the_most_frequent_prefixes(rows, n_nodes):
    frequency = Counter(row[:depth] for row in rows for depth in range(1, len(row) + 1))
    order = sorted(frequency, key=lambda prefix: (-frequency[prefix], len(prefix), prefix))
    tree = calibrated_tree(rows, n_nodes)
    says = "n_nodes counts the root, and a tree holds prefixes that occurred and no others"
    assert len(tree) == min(n_nodes, len(frequency) + 1), says
    says = "not the most frequent prefixes, ties to the shorter, then to the lower ranks"
    assert set(tree.paths[1:]) == set(order[: n_nodes - 1]), says
    shuffled = random.Random(0).sample(rows, len(rows))
    assert calibrated_tree(shuffled, n_nodes) == tree, "the order of the positions changes the tree"


def test_calibrated_tree_breaks_ties_to_the_shorter_then_to_the_lower_ranks():
    says = "of equally frequent prefixes the shorter comes first, then the one with lower ranks"
    assert calibrated_tree([(0, 0), (1, 1)], 3).paths == ((), (0,), (1,)), says
    assert calibrated_tree([(2, 0), (1, 0)], 2).paths == ((), (1,)), says
    rows = [(1, 1), (0, 1), (0, 0), (1, 0)]
    assert calibrated_tree(rows, 4).paths == ((), (0,), (1,), (0, 0)), says


def test_calibrated_tree_assumes_no_independence():
    """The marginals prefer [0, 1], 0.6 * 0.6, to [1, 1], 0.4 * 0.6; [1, 1] came twice as often."""
    rows = [(0, 1)] * 2 + [(0, 2)] * 2 + [(0, 3)] * 2 + [(1, 1)] * 4
    says = "heads are not independent: count whole prefixes, do not multiply marginals"
    assert calibrated_tree(rows, 4).paths == ((), (0,), (1,), (1, 1)), says


def test_calibrated_tree_takes_counts_as_well_as_rows():
    rows = [(0, 0), (0, 1), (1, 0)]
    ours = calibrated_tree(prefix_counts(rows), 4)
    assert ours == calibrated_tree(iter(rows), 4), "rows and their counts give different trees"


@pytest.mark.parametrize("rows, n_nodes", [([(0, 0)], 1), ([(0, 0)], 0), ([], 4), ([()], 4)])
def test_calibrated_tree_refuses_a_tree_without_guesses(rows, n_nodes):
    what, says = f"{n_nodes} nodes from rows {rows}", f"n_nodes = {n_nodes}"
    refused_in_words(lambda: calibrated_tree(rows, n_nodes), says, what)


@properties
@given(rank_data(max_depth=3, n_ranks=12))
def test_prefix_counts_equal_brute_force(rows):
    counts = prefix_counts(rows)
    assert counts[()] == len(rows), "the empty prefix counts once for each position"
    expected = Counter(row[:depth] for row in rows for depth in range(len(row) + 1))
    assert counts == expected, "each position counts once for each prefix of its ranks"
    prefixes = {" ".join(map(str, path)): n for path, n in counts.items() if path}
    assert read_counts({"steps": len(rows), "prefixes": prefixes}) == counts


@properties
@given(rank_data(max_depth=3, n_ranks=4), trees(max_depth=3))
def test_expected_tokens_is_the_mean_of_what_each_position_would_have_emitted(rows, tree):
    emitted = 1 + hits(tree.paths, rows) / len(rows)
    says = "tokens per step: the next root, and each node's chance to be accepted"
    assert expected_tokens(tree, prefix_counts(rows)) == pytest.approx(emitted), says


@properties
@given(st.lists(rank_data(max_depth=3, n_ranks=3), max_size=3), trees(max_depth=3, n_ranks=3))
def test_a_replay_starts_each_step_after_the_tokens_of_the_step_before(texts, tree):
    expected = []
    for positions in texts:
        free = 0  # the first position that no step has passed yet
        for at, ranks in enumerate(positions):
            if at == free:
                expected.append(ranks)
                free += 1 + hits(tree.paths, [ranks])
    assert replay(texts, tree) == expected


@pytest.mark.parametrize("steps", [0, 2.0, "2", True])
def test_counts_that_are_none_are_refused(steps):
    refused("whole numbers above 0", read_counts, {"steps": steps, "prefixes": {}})
    for prefixes in ({"0": 1, "0 1": 2}, {"0 1": 1}, {"0": 0}, {"0": -1}, {"0": 1.0}):
        refused("own prefix", read_counts, {"steps": 3, "prefixes": prefixes})


@properties
@given(st.dictionaries(st.integers(1, 20), st.tuples(st.integers(1, 3), st.integers(60, 66))))
def test_choose_size_takes_the_smallest_of_those_within_three_percent_of_the_best(measured):
    assume(measured)
    gains, costs = ({n: pair[i] for n, pair in measured.items()} for i in (0, 1))
    choice = choose_size(gains.__getitem__, costs)
    speeds = {n: Fraction(gains[n], costs[n]) for n in measured}
    near = [n for n in speeds if speeds[n] / max(speeds.values()) >= Fraction(97, 100)]
    assert choice == min(near)
