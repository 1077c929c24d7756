"""Dropout whose mask is not kept: it is drawn from a seed, and drawn again in the backward pass.

    y = x ⊙ mask / (1 − p),  mask ~ Bernoulli(1 − p)          dx = dy ⊙ mask / (1 − p)

Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html. The seeds come from torch's default CPU
generator, whose state is in every checkpoint: a run that is resumed draws the masks of one that ran through.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def seed_for(dropout: float, seed: int | None = None) -> int:
    """The seed of the mask: the one given, or a fresh one; 0 where there is no dropout.

    It is drawn from torch's default CPU generator, so that one saved generator state repeats every mask. RuntimeError
    where a CUDA graph is being recorded.
    """
    if seed is not None:
        return seed
    if not dropout:
        return 0
    refuse_in_graph("the seed of dropout")
    return int(torch.randint(2**62, ()))


def refuse_in_graph(number: str) -> None:
    """RuntimeError where a CUDA graph is being recorded, which would repeat a number of the host in every replay."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{number} is a number of the host: a CUDA graph would repeat it in every replay; leave it out"
        )


def drop(x: Tensor, dropout: float, seed: int) -> Tensor:
    """x with entries zeroed at random and the rest scaled up; the same seed gives the same mask."""
    if dropout == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)

    # The mask is contiguous whatever x's strides are, so that it does not depend on them.
    mask = x.new_empty(x.shape).bernoulli_(1 - dropout, generator=generator)
    return mask.mul_(x).div_(1 - dropout)


class _Dropout(torch.autograd.Function):
    """`drop`, of which the seed alone is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p = p
        ctx.seed = seed
        return drop(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return drop(grad, ctx.p, ctx.seed), None, None


def dropout(x: Tensor, p: float, seed: int | None = None) -> Tensor:
    """Dropout of x (...) with probability p in [0, 1); the same `seed` gives the same mask, None a fresh one.

    With p = 0 it is x itself. Raises ValueError where p is no such probability.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {p}")
    if p == 0:
        return x
    return _Dropout.apply(x, p, seed_for(p, seed))


class Dropout(nn.Module):
    """A place where the published model has dropout, in training.

    `published` is the probability that its configuration says; `p` is the one applied, which is 0 until it is set.
    """

    def __init__(self, published: float):
        super().__init__()
        self.published = published
        self.p = 0.0

    @property
    def rate(self) -> float:
        """The probability now: 0 in eval mode."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.rate)

    def extra_repr(self) -> str:
        return f"p={self.p}, published={self.published}"
