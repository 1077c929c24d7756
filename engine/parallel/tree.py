"""The sum of a step's gradients, in one order whatever the number of processes.

The micro-batches of a step are the leaves of a binary tree, numbered from the left: a node of size 2^k holds the sum of
the leaves from a multiple of its size on, its left half plus its right half, and a half without leaves counts for
nothing. Five leaves are ((0 + 1) + (2 + 3)) + 4. Every contiguous block of leaves consists of few whole nodes, which
the process that has computed it adds up alone, with a buffer for each level of the tree at most. Where a node's halves
lie in two processes, one of these sends its half to the other, which has the node then. The gradients travel in pieces,
and which of the two receives differs from piece to piece, so that none of the processes has to take in everything; in
the end each piece is told to all by the process that has its sum.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import rank, shares, warn_of_idle, world_size

PIECE_BITS = 4  # of a piece's number: there are up to 16
Node = tuple[int, int]  # the first leaf of a node, and its size
Gradients = dict[int, Tensor]  # by the weight's number; one that was not reached has none


class GradientTree:
    """Adds up the gradients of `weights` over the micro-batches of a step.

    A step is `begin`, which tells the micro-batches of this process, `add` after the backward pass of each, and
    `finish`: then the weights have the sums as their gradients. Where nothing is divided, `begin` may be left out.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self.weights = list(weights)
        self.everything = range(len(self.weights))
        n_pieces = min(2**PIECE_BITS, 1 << (world_size() - 1).bit_length(), max(1, len(self.weights)))
        self.pieces = shares([weight.nbytes for weight in self.weights], n_pieces)  # each as the weights in it
        self.has_begun = False  # a step that processes share
        self.reset()

    def reset(self) -> None:
        """Forget the micro-batches so far, and how they are shared."""
        self.shares: list[range] = []  # of each process; none where all is computed here
        self.first = self.next = 0
        self.nodes: dict[Node, Gradients] = {}

    def begin(self, n: int, sizes: Callable[[], Sequence[float]]) -> range:
        """Start a step of `n` micro-batches of these sizes; gives those that are computed here."""
        self.reset()
        if world_size() == 1:
            return range(n)
        if not self.has_begun:
            self.has_begun = True
            warn_of_idle(n, "micro-batches a step", "micro_batch_size or micro_batch_tokens")
        self.shares = shares(sizes(), world_size())
        self.starts = [share.start for share in self.shares if share]
        share = self.shares[rank()]
        self.first = self.next = share.start
        return share

    def add(self) -> None:
        """Take in the gradients of the next micro-batch, which are those of the weights now."""
        leaf = self.next
        self.next += 1
        # Those of an even leaf stay with the weights, where autograd adds the odd one's to them.
        if leaf % 2 == 0:
            return
        low, size = (leaf - 1, 2) if leaf > self.first else (leaf, 1)
        self.nodes[low, size] = self._take()

        # Two halves are added as soon as both are here.
        while low % (2 * size) != 0 and (low - size, size) in self.nodes:
            self._merge((low - size, size), (low, size), self.everything)
            low, size = low - size, 2 * size

    def finish(self) -> None:
        """Give the weights the sums over all micro-batches as their gradients, in every process."""
        if self.next % 2 == 1 and self.next > self.first:
            self.nodes[(self.next - 1, 1)] = self._take()
        self.n_leaves = self.shares[-1].stop if self.shares else self.next
        if self.n_leaves == 0 or not self.weights:
            return

        # Node by node, small ones first: in these all processes have something to do. Not added up yet are only those
        # at the ends of this process's share.
        self.root_size = 1
        while self.root_size < self.n_leaves:
            self.root_size *= 2
        mine = range(self.first, self.next)
        size = 2
        while mine and size <= self.root_size:
            for low in sorted({leaf // size * size for leaf in (mine[0], mine[-1])}):
                for number in range(len(self.pieces)):
                    self._join(low, size, number)
            size *= 2

        root = (0, self.root_size)
        for number, piece in enumerate(self.pieces):
            sums, holder = self._pop(root, piece), self._holder(root, number)
            if len(self.shares) > 1:
                message = self._message(sums, piece) if rank() == holder else self._empty_message(piece)
                dist.broadcast(message, src=holder)
                sums = sums or self._gradients(message, piece)
            for i, gradient in sums.items():
                self.weights[i].grad = gradient
        # From here on they are as those of a single micro-batch.
        self.reset()
        self.next = 1

    def _join(self, low: int, size: int, number: int) -> None:
        """Add up the halves of a node in the piece of this number, where one of the two is here."""
        node, left, right = (low, size), (low, size // 2), (low + size // 2, size // 2)
        if low + size <= self.n_leaves and self._process(low) == self._process(low + size - 1):
            return  # `add` has done it

        holder = self._holder(node, number)
        if right[0] < self.n_leaves:
            ours, theirs = self._holder(left, number), self._holder(right, number)
            if holder == theirs != ours:
                self._send(left, self.pieces[number], ours, holder)
            elif holder == ours != theirs:
                self._send(right, self.pieces[number], theirs, holder)
        if rank() == holder:
            self._merge(left, right, self.pieces[number])

    def _holder(self, node: Node, number: int) -> int:
        """The process that has the sum of a node in the piece of this number."""
        low, size = node
        last = min(low + size, self.n_leaves) - 1
        if self._process(low) == self._process(last):
            return self._process(low)

        left, right = (low, size // 2), (low + size // 2, size // 2)
        level = (self.root_size // size).bit_length() - 1  # from the root, which has 0
        goes_right = right[0] < self.n_leaves and number >> level % PIECE_BITS & 1
        return self._holder(right if goes_right else left, number)

    def _process(self, leaf: int) -> int:
        """The process that has computed a leaf."""
        return bisect_right(self.starts, leaf) - 1 if self.shares else rank()

    def _send(self, node: Node, piece: range, sender: int, receiver: int) -> None:
        """Take a piece of a node from one process to another."""
        if rank() == sender:
            dist.send(self._message(self._pop(node, piece), piece), dst=receiver)
        elif rank() == receiver:
            message = self._empty_message(piece)
            dist.recv(message, src=sender)
            self.nodes.setdefault(node, {}).update(self._gradients(message, piece))

    def _take(self) -> Gradients:
        """The weights' gradients, which they have no longer."""
        gradients = {i: weight.grad for i, weight in enumerate(self.weights) if weight.grad is not None}
        for i in gradients:
            self.weights[i].grad = None
        return gradients

    def _pop(self, node: Node, piece: range) -> Gradients:
        """A node's gradients in a piece, which it has no longer; none where no leaf has any."""
        gradients = self.nodes.get(node, {})
        return {i: gradients.pop(i) for i in piece if i in gradients}

    @torch.no_grad()
    def _merge(self, left: Node, right: Node, piece: range) -> None:
        """Make a piece of the node of two halves, in the memory of the left one; a right one without leaves is none."""
        sums, terms = self._pop(left, piece), self._pop(right, piece)
        both = [i for i in sums if i in terms]
        if both:
            torch._foreach_add_([sums[i] for i in both], [terms[i] for i in both])
        low, size = left
        self.nodes.setdefault((low, 2 * size), {}).update(terms | sums)

    def _message(self, gradients: Gradients, piece: range) -> Tensor:
        """A piece as bytes, its weights in their order, behind a byte for each that tells whether it has a gradient."""
        present = torch.tensor([i in gradients for i in piece], dtype=torch.uint8)
        parts = [present.to(self.weights[0].device)]
        for i in piece:
            gradient = gradients[i] if i in gradients else torch.zeros_like(self.weights[i])
            parts.append(gradient.contiguous().reshape(-1).view(torch.uint8))
        return torch.cat(parts)

    def _sizes(self, piece: range) -> list[int]:
        """Of the parts of a message, in bytes."""
        return [len(piece), *(self.weights[i].nbytes for i in piece)]

    def _empty_message(self, piece: range) -> Tensor:
        return torch.empty(sum(self._sizes(piece)), dtype=torch.uint8, device=self.weights[0].device)

    @torch.no_grad()
    def _gradients(self, message: Tensor, piece: range) -> Gradients:
        """The gradients of a message, each laid out in memory as autograd does it: sums over them depend on that."""
        present, *parts = message.split(self._sizes(piece))
        gradients = {}
        for i, is_there, part in zip(piece, present.tolist(), parts, strict=True):
            if is_there:
                gradient = torch.empty_like(self.weights[i])
                gradients[i] = gradient.copy_(part.clone().view(gradient.dtype).view(gradient.shape))
        return gradients
