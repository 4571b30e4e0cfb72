"""The candidate tree: which combinations of the heads' guesses are checked together, and how many of them pay.

Medusa paper, "Tree attention" (what a node sees) and "Optimized tree construction" (which nodes to keep).

Node 0 is the root, a token already drawn from the base model. A node at depth d holds one of the top guesses of head d; its
`rank` says which (0 is its first). Dimension key: N nodes, the root included; K heads.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Ranks = tuple[int, ...]  # the ranks from the root down to a node; () is the root


@dataclass(frozen=True)
class Tree:
    """parents[i] < i is node i's parent and ranks[i] its rank among its head's guesses; the root has -1 for both."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self):
        if len(self.parents) != len(self.ranks) or not self.parents:
            raise ValueError(
                f"a tree needs as many parents as ranks, and at least the root: got {len(self.parents)} and {len(self.ranks)}"
            )
        if self.parents[0] != -1 or self.ranks[0] != -1:
            raise ValueError(
                f"node 0 must be the root, with parent -1 and rank -1: got {self.parents[0]} and {self.ranks[0]}"
            )
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node}: its parent {parent} must come before it")
        for node, rank in enumerate(self.ranks[1:], start=1):
            if rank < 0:
                raise ValueError(f"path {list(self.paths[node])}: negative rank")
        if len(set(zip(self.parents, self.ranks))) < len(
            self
        ):  # a path stands twice where siblings have the same rank
            twice = next(path for path, count in Counter(self.paths).items() if count > 1)
            raise ValueError(f"path {list(twice)} stands twice in the tree")

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """depths[i]: steps from the root to node i; also the head that guesses it, and its position behind the root's."""
        return tuple(len(path) for path in self.paths)

    @cached_property
    def paths(self) -> tuple[Ranks, ...]:
        """paths[i]: the ranks from the root to node i."""
        paths: list[Ranks] = [()]
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

    def cut(self, depth: int) -> "Tree":
        """The nodes of at most this depth, in the same order."""
        kept = [node for node in range(len(self)) if self.depths[node] <= depth]
        index = {-1: -1} | {node: i for i, node in enumerate(kept)}
        return Tree(
            tuple(index[self.parents[node]] for node in kept),
            tuple(self.ranks[node] for node in kept),
        )

    def render(self) -> str:
        """A drawing in text, one node a line: its index, and its rank among the guesses of the head at its depth."""
        children = {node: [] for node in range(len(self))}
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        lines = ["0 root"]

        def draw(node: int, indent: str) -> None:
            for child in children[node]:
                last = child == children[node][-1]
                lines.append(
                    f"{indent}{'`-' if last else '|-'} {child} head {self.depths[child]}, guess {self.ranks[child]}"
                )
                draw(child, indent + ("   " if last else "|  "))

        draw(0, "")
        return "\n".join(lines)


def tree_from_paths(paths: Iterable[Sequence[int]]) -> Tree:
    """The tree of these rank paths, such as [[0], [1], [0, 0]]; the root is implied. Any order; the nodes stand by depth, then ranks.

    Raises ValueError, naming the path, for a missing prefix, a duplicate, a negative rank or an empty path, and for no paths at all
    (`Tree((-1,), (-1,))` is the root alone).

    >>> tree_from_paths([[0], [1], [0, 0]]).parents
    (-1, 0, 0, 1)
    """
    paths = [tuple(path) for path in paths]
    if not paths:
        raise ValueError("no paths: a tree needs at least one node below the root")
    index: dict[Ranks, int] = {(): 0}
    parents, ranks = [-1], [-1]
    for path in sorted(paths, key=lambda path: (len(path), path)):
        if not path:
            raise ValueError("path []: the root is implied and must not be listed")
        if path[:-1] not in index:
            raise ValueError(f"path {list(path)}: its prefix {list(path[:-1])} is missing")
        index[path] = len(parents)
        parents.append(index[path[:-1]])
        ranks.append(path[-1])
    return Tree(tuple(parents), tuple(ranks))


def cartesian_tree(widths: Sequence[int]) -> Tree:
    """Every combination of the top widths[d-1] guesses of head d: sum_d prod_{i<=d} widths[i-1] nodes, and the root.

    >>> cartesian_tree([2, 1]).paths
    ((), (0,), (1,), (0, 0), (1, 0))
    """
    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"widths {list(widths)}: at least one, and each at least 1")
    level, paths = [()], []
    for width in widths:
        level = [path + (rank,) for path in level for rank in range(width)]
        paths += level
    return tree_from_paths(paths)


def prefix_counts(rank_paths: Iterable[Sequence[int]]) -> Counter:
    """How often each rank prefix occurs: the counts from which acceptance is estimated. () counts all positions."""
    counts = Counter()
    for ranks in rank_paths:
        ranks = tuple(ranks)
        counts.update(ranks[:depth] for depth in range(len(ranks) + 1))
    return counts


def ranked_prefixes(counts: Counter) -> list[Ranks]:
    """All prefixes but the root's, the most frequent first; ties to the shorter, then to the lower ranks, so that none stands before its own prefix."""
    return sorted(
        (path for path in counts if path), key=lambda path: (-counts[path], len(path), path)
    )


def calibrated_tree(rank_paths: Iterable[Sequence[int]] | Counter, n_nodes: int) -> Tree:
    """The tree of n_nodes nodes, the root included, on which the most tokens would have been accepted.

    rank_paths  one (r_1 .. r_K) a position: the rank that head k gave to the token that really came; or their `prefix_counts`.
    A node is accepted when its path is a prefix of the position's ranks, so its worth is the frequency of that prefix. Frequencies
    never grow along a path: the most frequent prefixes, ties to the shorter and then to the lower ranks, are closed under
    prefixes, and no other tree of this size has a larger sum. If fewer prefixes occur, the tree is that much smaller.

    >>> calibrated_tree([(0, 0), (0, 0), (0, 2), (1, 0)], 3).paths
    ((), (0,), (0, 0))
    """
    counts = rank_paths if isinstance(rank_paths, Counter) else prefix_counts(rank_paths)
    if n_nodes < 2 or len(counts) < 2:
        raise ValueError(
            f"n_nodes = {n_nodes}, {len(counts)} prefixes: a calibrated tree needs at least one node below the root"
        )
    return tree_from_paths(ranked_prefixes(counts)[: n_nodes - 1])


def best_first_tree(log_probs: Tensor, n_nodes: int) -> Tree:
    """The tree of n_nodes nodes, the root included, that is the best if each head is right with its own probability, whatever the others guess.

    log_probs  (K, V) of the heads at one position; a node's worth is the product of the probabilities along its path.
    It never grows from a node to its first child or to its next sibling, so the best node not yet taken is the first child or the next
    sibling of one that was. Ties go to the shorter path, then to the lower ranks. If fewer paths exist, the tree is that much smaller.
    """
    if n_nodes < 2:
        raise ValueError(
            f"n_nodes = {n_nodes}: a best-first tree needs at least one node below the root"
        )
    ranked = log_probs.topk(
        min(n_nodes - 1, log_probs.shape[-1])
    ).values.tolist()  # K x guesses, the likeliest first
    # (cost, depth, path, cost of its parent), where cost is minus the log-probability
    heap: list[tuple[float, int, Ranks, float]] = [(-ranked[0][0], 1, (0,), 0.0)]
    paths = []
    while heap and len(paths) < n_nodes - 1:
        cost, depth, path, parent_cost = heapq.heappop(heap)
        paths.append(path)
        if depth < len(ranked):
            heapq.heappush(heap, (cost - ranked[depth][0], depth + 1, (*path, 0), cost))
        if (rank := path[-1] + 1) < len(ranked[0]):
            heapq.heappush(
                heap,
                (parent_cost - ranked[depth - 1][rank], depth, (*path[:-1], rank), parent_cost),
            )
    return tree_from_paths(paths)


def expected_tokens(tree: Tree, counts: Counter) -> float:
    """Tokens per step that the calibration counts promise: the next root, plus each node's chance to be accepted."""
    return sum(counts[path] for path in tree.paths) / counts[()]


def replay(texts: Iterable[Sequence[Sequence[int]]], tree: Tree) -> list[Ranks]:
    """The rank paths at which steps would start, if these texts were decoded with this tree.

    texts  for each text the ranks (r_1 .. r_K) of its positions, in order
    A step goes on behind the guesses that it accepted and the root that it drew, so most steps start right behind a miss, where
    guesses are worse than on average: counts over all positions promise more than decoding keeps.

    >>> replay([[(0, 0), (1, 0), (0, 1), (4, 4)]], cartesian_tree([1, 1]))
    [(0, 0), (4, 4)]
    """
    nodes, starts = set(tree.paths), []
    for positions in texts:
        at = 0
        while at < len(positions):
            starts.append(start := tuple(positions[at]))
            at += 1 + max(depth for depth in range(len(start) + 1) if start[:depth] in nodes)
    return starts


def choose_size(
    expected: Callable[[int], float], cost: dict[int, float], sizes: Iterable[int] | None = None
) -> int:
    """The number of nodes N that maximises expected(N) / cost(N), tokens per unit of time.

    expected  N -> expected tokens per step of the best tree of N nodes
    cost      {N: time of a step over N nodes}, measured at a few N; in between it is interpolated
    sizes     the N to choose from, by default all from the smallest to the largest measured; of equals the smallest wins

    >>> choose_size(lambda n: n**0.5, {1: 1.0, 4: 1.2, 16: 4.0})
    4
    """
    if not cost or min(cost.values()) <= 0:
        raise ValueError("cost needs at least one measured size, and times above 0")
    sizes = range(min(cost), max(cost) + 1) if sizes is None else sizes
    measured, times = zip(*sorted(cost.items()))
    return max(sorted(sizes), key=lambda n: expected(n) / np.interp(n, measured, times))
