"""The sum of a step's gradients, in one order whatever the number of processes.

The micro-batches of a step are the leaves of a binary tree, numbered from the left: a node of size 2^k holds the sum of
the leaves from a multiple of its size on, its left half plus its right half, and a half without leaves counts for
nothing. Five leaves are ((0 + 1) + (2 + 3)) + 4. Every contiguous block of leaves consists of few whole nodes, which
the process that has computed it adds up alone, with a buffer for each level of the tree at most. Where a node's halves
lie in two processes, the right half travels to the left, so that the first process has the whole sum in the end, and
tells the others. A process sends what it has once, whatever the number of its micro-batches.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import rank, shares, warn_of_idle, world_size

Node = tuple[int, int]  # the first leaf of a node, and its size
Gradients = dict[int, Tensor]  # by the weight's number; one that was not reached has none


class GradientTree:
    """Adds up the gradients of `weights` over the micro-batches of a step.

    A step is `begin`, which tells the micro-batches of this process, `add` after the backward pass of each, and
    `finish`: then the weights have the sums as their gradients. Where nothing is divided, `begin` may be left out.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self.weights = list(weights)
        self.bytes = [len(self.weights), *(weight.nbytes for weight in self.weights)]  # of a message's parts
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
            self._merge((low - size, size), (low, size))
            low, size = low - size, 2 * size

    def finish(self) -> None:
        """Give the weights the sums over all micro-batches as their gradients, in every process."""
        if self.next % 2 == 1 and self.next > self.first:
            self.nodes[(self.next - 1, 1)] = self._take()
        self.n_leaves = self.shares[-1].stop if self.shares else self.next
        if self.n_leaves == 0 or not self.weights:
            return

        size = 1
        while size < self.n_leaves:
            size *= 2
        self._gather(0, size)

        # The first process has the first leaf, and so the root.
        root = self.nodes.pop((0, size), {})
        if len(self.shares) > 1:
            message = self._message(root)
            dist.broadcast(message, src=0)
            root = root or self._gradients(message)
        for i, gradient in root.items():
            self.weights[i].grad = gradient
        # From here on they are as those of a single micro-batch.
        self.reset()
        self.next = 1

    def _gather(self, low: int, size: int) -> int | None:
        """Add up a node; gives the process that has it then. None where it has no leaf."""
        if low >= self.n_leaves:
            return None
        end = low + size
        holder = self._holder(low)
        if end <= self.n_leaves and holder == self._holder(end - 1):
            return holder  # `add` has done it

        half = size // 2
        left, right = (low, half), (low + half, half)
        sender = self._gather(*right)
        self._gather(*left)
        if sender is not None and sender != holder:
            if rank() == sender:
                dist.send(self._message(self.nodes.pop(right)), dst=holder)
            elif rank() == holder:
                message = torch.empty(sum(self.bytes), dtype=torch.uint8, device=self.weights[0].device)
                dist.recv(message, src=sender)
                self.nodes[right] = self._gradients(message)
        if rank() == holder:
            self._merge(left, right)
        return holder

    def _holder(self, leaf: int) -> int:
        """The process that has computed a leaf, and has the sum of every node that begins with it."""
        return next((i for i, share in enumerate(self.shares) if leaf in share), rank())

    def _take(self) -> Gradients:
        """The weights' gradients, which they have no longer."""
        gradients = {i: weight.grad for i, weight in enumerate(self.weights) if weight.grad is not None}
        for i in gradients:
            self.weights[i].grad = None
        return gradients

    @torch.no_grad()
    def _merge(self, left: Node, right: Node) -> None:
        """Make the node of two halves, in the memory of the left one; a right one without leaves is not there."""
        sums, terms = self.nodes.pop(left), self.nodes.pop(right, {})
        both = [i for i in sums if i in terms]
        if both:
            torch._foreach_add_([sums[i] for i in both], [terms[i] for i in both])
        low, size = left
        self.nodes[low, 2 * size] = terms | sums

    def _message(self, gradients: Gradients) -> Tensor:
        """Gradients as bytes, all weights in their order, behind a byte for each that tells whether it has one."""
        present = torch.tensor([i in gradients for i in range(len(self.weights))], dtype=torch.uint8)
        parts = [present.to(self.weights[0].device)]
        for i, weight in enumerate(self.weights):
            gradient = gradients[i] if i in gradients else torch.zeros_like(weight)
            parts.append(gradient.contiguous().reshape(-1).view(torch.uint8))
        return torch.cat(parts)

    @torch.no_grad()
    def _gradients(self, message: Tensor) -> Gradients:
        """The gradients of a message, each laid out in memory as autograd does it: sums over them depend on that."""
        present, *parts = message.split(self.bytes)
        gradients = {}
        for i, is_there in enumerate(present.tolist()):
            if is_there:
                gradient = torch.empty_like(self.weights[i])
                gradients[i] = gradient.copy_(parts[i].clone().view(gradient.dtype).view(gradient.shape))
        return gradients
