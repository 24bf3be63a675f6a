"""How a controller picks: uniformly from a set, by weight, the least of many, each in at most O(log of the number)."""

from __future__ import annotations

from bisect import bisect_left
from math import inf

Rank = tuple[float, float, int]
"""Key, less the excess of the queue over its target, class: the least is admitted."""

NOBODY: Rank = (inf, inf, -1)


class Pool:
    """A set of whole numbers, listed in an order that only draws depend on; adds and removes in O(1)."""

    __slots__ = ("_position", "items")

    def __init__(self) -> None:
        self.items: list[int] = []
        self._position: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: int) -> None:
        """Append an item that is not in it."""
        self._position[item] = len(self.items)
        self.items.append(item)

    def remove(self, item: int) -> None:
        """Take an item out; the last one moves into its place."""
        position = self._position.pop(item)
        last = self.items.pop()
        if last != item:
            self.items[position] = last
            self._position[last] = position

    def arrange(self, items: list[int]) -> None:
        """List the same items in another order."""
        self.items = list(items)
        self._position = {item: position for position, item in enumerate(items)}


class WeightTree:
    """Weights of which some are switched on, under a binary tree of their sums.

    A sum is computed from its two parts whenever one changes, so nothing drifts.
    """

    __slots__ = ("_sums", "_weights")

    def __init__(self, weights: list[float]) -> None:
        self._weights = weights
        self._sums = [0.0] * (2 << max(0, len(weights) - 1).bit_length())

    @property
    def total(self) -> float:
        """Sum of the weights switched on."""
        return self._sums[1]

    def switch(self, index: int, on: bool) -> None:
        """Switch a weight on or off, O(log)."""
        sums = self._sums
        node = len(sums) // 2 + index
        sums[node] = self._weights[index] if on else 0.0
        while node > 1:
            node >>= 1
            sums[node] = sums[2 * node] + sums[2 * node + 1]

    def find(self, u: float) -> int:
        """The index at which the running sum of the weights switched on first exceeds u in [0, total), O(log)."""
        sums = self._sums
        node = 1
        while node < len(sums) // 2:
            node *= 2
            if u >= sums[node] and sums[node + 1] > 0.0:  # rounding must not lead to a part that is empty
                u -= sums[node]
                node += 1
        return node - len(sums) // 2


class Tournament:
    """The best waiting class among those whose hold is below the slack: a winner tree with its leaves by hold.

    Those admitted are then the first leaves, whatever the slack, and neither a change of a class nor a question costs
    more than O(log I).
    """

    __slots__ = ("_holds", "_leaf", "_winners")

    def __init__(self, holds: list[float]) -> None:
        order = sorted(range(len(holds)), key=holds.__getitem__)
        size = 1 << max(0, len(holds) - 1).bit_length()
        self._holds = [holds[i] for i in order]
        self._leaf = [0] * len(holds)
        for leaf, i in enumerate(order):
            self._leaf[i] = size + leaf
        self._winners = [NOBODY] * (2 * size)

    def enter(self, i: int, rank: Rank) -> None:
        """Give class i a rank, `NOBODY` if it no longer waits."""
        winners = self._winners
        node = self._leaf[i]
        winners[node] = rank
        while node > 1:
            node >>= 1
            left, right = winners[2 * node], winners[2 * node + 1]
            best = left if left < right else right
            if winners[node] == best:
                return
            winners[node] = best

    def best(self, slack: float) -> int:
        """The class with the least rank among those with a hold below `slack`, -1 if none of them waits."""
        winners, size = self._winners, len(self._winners) // 2
        first = winners[1][2]
        if first < 0 or self._holds[self._leaf[first] - size] < slack:
            return first
        best = NOBODY
        left, right = size, size + bisect_left(self._holds, slack)
        while left < right:  # the first leaves as a union of subtrees; left stays the first node of its level
            if right & 1:
                right -= 1
                best = min(best, winners[right])
            left >>= 1
            right >>= 1
        return best[2]
