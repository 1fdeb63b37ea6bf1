"""The prefix tree: what several prompts begin with is read once.

A node is a block of `BLOCK` ids behind those of its parents, with what they left in every layer's cache: their keys
and values, or the state after them. On a CPU prompts are read in pieces that end where blocks do, so a prompt that goes
on from a block gets the bits that it would have got without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import mlx.core as mx

BLOCK = 128  # ids: on a CPU a piece of a prompt, so that what follows is read in the pieces that it would be in without

Layers = list[list[mx.array]]  # of each layer its arrays


class Node:
    """A block of ids.

    Attributes:
        layers: of each layer keys and values `(1, kv_heads, BLOCK, head_dim)`, or the state after the block.
    """

    def __init__(self, parent: Node | None, name: Hashable, layers: Layers) -> None:
        self.layers = layers
        self.nbytes = sum(array.nbytes for arrays in layers for array in arrays)
        self.children: dict[Hashable, Node] = {}
        self.parent = parent
        self.name = name


class PrefixTree:
    """Blocks of texts, of at most `budget` bytes; the one that has not been used for longest goes first.

    Texts under different names share nothing: names tell models apart, and ways to rotate.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._roots: dict[Hashable, Node] = {}
        self._by_use: OrderedDict[Node, None] = OrderedDict()  # a node is used after its children

    def __len__(self) -> int:
        return len(self._by_use)

    def find(self, name: Hashable, ids: Sequence[int]) -> list[Node]:
        """Returns the blocks that `ids` begin with. Never all of `ids`: the last one's logits are not kept."""
        found: list[Node] = []
        node = self._roots.get(name)
        for start in range(0, len(ids) - BLOCK, BLOCK):
            node = None if node is None else node.children.get(tuple(ids[start : start + BLOCK]))
            if node is None:
                break
            found.append(node)
        self._use(found)
        return found

    def add(self, name: Hashable, ids: Sequence[int], cut: Callable[[int], Layers | None], nbytes: int) -> None:
        """Adds the whole blocks of `ids` that are not there yet.

        Args:
            cut: gives copies of what the block that begins at a position left in the caches; None if that is not
                known, and then the blocks behind it are not added either.
            nbytes: about what a block takes. A text larger than the budget is kept as far as it fits.
        """
        node = self._roots.setdefault(name, Node(None, name, []))
        path: list[Node] = []
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            if (len(path) + 1) * nbytes > self.budget:
                break
            block = tuple(ids[start : start + BLOCK])
            child = node.children.get(block)
            if child is None:
                layers = cut(start)
                if layers is None:
                    break
                mx.async_eval(layers)
                child = node.children[block] = Node(node, block, layers)
                self.nbytes += child.nbytes
            path.append(child)
            node = child
        self._use(path)
        self.shrink(self.budget)

    def shrink(self, nbytes: int) -> None:
        """Drops blocks until no more than `nbytes` are left."""
        while self.nbytes > nbytes:
            node, _ = self._by_use.popitem(last=False)
            assert node.parent is not None and not node.children
            del node.parent.children[node.name]
            self.nbytes -= node.nbytes

    def clear(self) -> None:
        """Drops everything."""
        self.shrink(0)

    def _use(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            self._by_use[node] = None
            self._by_use.move_to_end(node)
