"""The candidate tree: which combinations of the heads' guesses are checked in one pass.

Medusa paper, "Tree attention" (what a node sees) and "Optimized tree construction" (which nodes to
keep). Node 0 is the root, a token already sampled from the base model. A node at depth d holds one
of the top guesses of head d; its rank says which (0 is the head's first guess).

Dimension key: N nodes, the root included; K heads.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RankPath = tuple[int, ...]  # the ranks from the root down to a node; () is the root


@dataclass(frozen=True)
class Tree:
    """parents[i] < i is node i's parent, ranks[i] its rank among its head's guesses.

    The root has -1 for both. Footgun: -1 as an index reads the last node, so loops start at 1.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self):
        if len(self.parents) != len(self.ranks):
            raise ValueError(f"{len(self.parents)} parents, but {len(self.ranks)} ranks")
        if self.parents[:1] != (-1,) or self.ranks[:1] != (-1,):
            raise ValueError("node 0 is the root: its parent and its rank must be -1")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node}: its parent {parent} must come before it")
        # Siblings of equal rank would be the same path twice.
        siblings = Counter(zip(self.parents, self.ranks))
        for node in range(1, len(self)):
            if self.ranks[node] < 0 or siblings[self.parents[node], self.ranks[node]] > 1:
                raise ValueError(f"path {list(self.paths[node])}: twice, or of negative rank")

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """depths[i]: steps from the root to node i, and the number of the head that guesses it."""
        return tuple(len(path) for path in self.paths)

    @cached_property
    def paths(self) -> tuple[RankPath, ...]:
        """paths[i]: the ranks from the root to node i."""
        paths: list[RankPath] = [()]
        for parent, rank in zip(self.parents[1:], self.ranks[1:]):
            paths.append(paths[parent] + (rank,))
        return tuple(paths)

    @cached_property
    def mask(self) -> Tensor:
        """Which nodes may each node attend to?  (paper, "Tree attention")

        (N, N) bool: [i, j] is True iff j is i or an ancestor of i.

            0 -+- 1 --- 3      parents = (-1, 0, 0, 1)
               +- 2            row 3 sees {0, 1, 3}; the sibling branch stays invisible
        """
        mask = torch.eye(len(self), dtype=torch.bool, device="cpu")  # (N, N)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]  # inherit all that the parent sees
        return mask

    def render(self) -> str:
        """A drawing in text, one node a line: its index, and its rank among its head's guesses."""
        lines = ["0 root"]
        # In the order of their paths, a node is followed by all that is below it.
        for path, node in sorted(zip(self.paths, range(len(self))))[1:]:
            lines.append("|  " * (len(path) - 1) + f"|- {node} head {len(path)}, guess {path[-1]}")
        return "\n".join(lines)


ROOT_ONLY = Tree((-1,), (-1,))


# ---- three builders ----
def tree_from_paths(paths: Iterable[Sequence[int]]) -> Tree:
    """The tree of these rank paths, such as [[0], [1], [0, 0]]; the root is implied.

    Any order; nodes are numbered by depth, then ranks. ValueError names a path that cannot be.

    >>> tree_from_paths([[0], [1], [0, 0]]).parents
    (-1, 0, 0, 1)
    """
    index: dict[RankPath, int] = {(): 0}
    parents, ranks = [-1], [-1]
    # Sorted by depth, every path comes after its own prefix.
    for path in sorted(map(tuple, paths), key=lambda path: (len(path), path)):
        if not path:
            raise ValueError("path []: the root is implied and must not be listed")
        if path[:-1] not in index:
            raise ValueError(f"path {list(path)}: its prefix {list(path[:-1])} is missing")
        index[path] = len(parents)
        parents.append(index[path[:-1]])
        ranks.append(path[-1])
    if len(parents) == 1:
        raise ValueError("no paths: a tree needs at least one node below the root")
    return Tree(tuple(parents), tuple(ranks))


def cartesian_tree(widths: Sequence[int]) -> Tree:
    """Every combination of the top widths[d-1] guesses of head d  (paper, "Tree attention").

    >>> cartesian_tree([2, 1]).paths
    ((), (0,), (1,), (0, 0), (1, 0))
    """
    if len(widths) == 0 or min(widths) < 1:
        raise ValueError(f"widths {list(widths)}: at least one, and each at least 1")
    # level: the paths of the current depth. Each of them is continued by every rank of the next.
    level, paths = [()], []
    for width in widths:
        level = [path + (rank,) for path in level for rank in range(width)]
        paths += level
    return tree_from_paths(paths)


def calibrated_tree(rank_paths: Iterable[Sequence[int]] | Counter, n_nodes: int) -> Tree:
    """The tree of n_nodes nodes, the root included, on which the most guesses would be accepted.

    rank_paths: one (r_1 .. r_K) for each position, r_k the rank that head k gave to the token that
    came; or their `prefix_counts`. A node is accepted (exact match) when its path is a prefix of
    these ranks. A prefix is never rarer than its continuations, so the most frequent prefixes form
    a tree, and no other tree of this size covers more. (Ours: the paper multiplies each head's own
    accuracies, as if the heads were independent.) The tree is smaller if fewer prefixes occur.

    >>> calibrated_tree([(0, 0), (0, 0), (0, 2), (1, 0)], 3).paths
    ((), (0,), (0, 0))
    """
    counts = rank_paths if isinstance(rank_paths, Counter) else prefix_counts(rank_paths)
    if n_nodes < 2 or len(counts) < 2:
        raise ValueError(f"n_nodes = {n_nodes}, {len(counts)} prefixes: both must be at least 2")
    return tree_from_paths(ranked_prefixes(counts)[: n_nodes - 1])


# ---- calibration: how often each rank prefix came true, and which number of nodes is fastest ----
def prefix_counts(rank_paths: Iterable[Sequence[int]]) -> Counter:
    """How often each rank prefix occurs: the ranks (2, 0) count for (), (2,) and (2, 0)."""
    counts = Counter()
    for ranks in rank_paths:
        counts.update(tuple(ranks[:depth]) for depth in range(len(ranks) + 1))
    return counts


def ranked_prefixes(counts: Counter) -> list[RankPath]:
    """All prefixes but (), most frequent first; each comes before its continuations."""
    paths = [path for path in counts if path != ()]
    return sorted(paths, key=lambda path: (-counts[path], len(path), path))


def expected_tokens(tree: Tree, counts: Counter) -> float:
    """Expected tokens per step (acceleration rate): the nodes' chances, the root's being 1."""
    return sum(counts[path] for path in tree.paths) / counts[()]


def replay(texts: Iterable[Sequence[Sequence[int]]], tree: Tree) -> list[RankPath]:
    """The rank paths of the positions at which steps would start if these texts were decoded.

    texts: for each the ranks (r_1 .. r_K) of its positions, in order. Ours, not the paper's:
    most steps start right after a miss, where guesses are worse than on average, so counts over all
    positions would overestimate what decoding accepts.

    >>> replay([[(0, 0), (1, 0), (0, 1), (4, 4)]], cartesian_tree([1, 1]))
    [(0, 0), (4, 4)]
    """
    nodes, starts = set(tree.paths), []
    for positions in texts:
        position = 0
        while position < len(positions):
            ranks = tuple(positions[position])
            starts.append(ranks)
            # A step emits the guesses of the deepest node whose path came true, and the next root.
            accepted = max(depth for depth in range(len(ranks) + 1) if ranks[:depth] in nodes)
            position += accepted + 1
    return starts


def choose_size(expected: Callable[[int], float], cost: dict[int, float]) -> int:
    """The number of nodes N, of those in cost, that maximises expected(N) / cost(N).

    expected: N -> expected tokens per step of the best tree of N nodes; cost: {N: time of a step}.
    Times are noisy: of all sizes within 3 % of the best, the smallest.

    >>> choose_size({4: 1.6, 8: 2.4, 16: 2.5}.get, {4: 1.0, 8: 1.2, 16: 1.24})
    8
    """
    speeds = {n: expected(n) / cost[n] for n in cost}
    return min(n for n in speeds if speeds[n] >= 0.97 * max(speeds.values()))


def read_counts(entry: dict) -> Counter:
    """The prefix counts of an entry in calibration.json: {"steps": n, "prefixes": {"0 2": n}}."""
    # The empty prefix comes true at every step.
    written = {"": entry["steps"]} | entry["prefixes"]
    counts = Counter({tuple(map(int, path.split())): n for path, n in written.items()})
    # A prefix that is missing counts 0, so that its continuations are refused.
    if not all(type(n) is int and 0 < n <= counts[path[:-1]] for path, n in counts.items()):
        raise ValueError("counts must be whole numbers above 0, none above that of its own prefix")
    return counts
