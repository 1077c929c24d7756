"""Activations that keep only their input for the backward pass.

    gelu(u)      = u Φ(u)                                 Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415
    gelu_tanh(u) = u/2 (1 + tanh(√(2/π)(u + 0.044715u³)))  the approximation of the same paper, GPT-2's `gelu_new`
    silu(u)      = u σ(u)
    swiglu(u)    = silu(g) ⊙ v,  u = [g | v]              Shazeer, https://arxiv.org/abs/2002.05202

Each is a pair (forward, backward) of plain functions: `forward(u)` and `backward(grad, u)`. A linear layer that
consumes the result takes the pair as its *prologue* (`kernels/lora.py`): it then saves u alone, and the activation's
output, as wide as the feed-forward, is rebuilt in the backward pass from one cheap elementwise sweep.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise (or gated) function and its gradient.

    `forward(u)` maps (..., F) to (..., F), or (..., 2F) to (..., F) where `gated`; `backward(grad, u)` gives the
    gradient with respect to u.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    gated: bool = False


def _swiglu(u: Tensor) -> Tensor:
    gate, up = u.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, u: Tensor) -> Tensor:
    gate, up = u.chunk(2, dim=-1)
    out = torch.empty_like(u)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    grad_gate.copy_(_aten.silu_backward(grad * up, gate))
    return out


def _tanh_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.tanh_backward(grad, torch.tanh(u))


ACTIVATIONS = {
    "gelu": Activation(F.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda u: F.gelu(u, approximate="tanh"), lambda grad, u: _aten.gelu_backward(grad, u, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda grad, u: _aten.threshold_backward(grad, u, 0)),
    "silu": Activation(F.silu, _aten.silu_backward),
    "swiglu": Activation(_swiglu, _swiglu_backward, gated=True),
    "tanh": Activation(torch.tanh, _tanh_backward),
}


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(u)
        return activation.forward(u)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (u,) = ctx.saved_tensors
        return ctx.activation.backward(grad, u), None


def activate(u: Tensor, name: str) -> Tensor:
    """Apply the activation called `name` (a key of `ACTIVATIONS`) to u (..., F); only u is saved.

    Raises ValueError for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; known: {', '.join(sorted(ACTIVATIONS))}")
    return _Activate.apply(u, ACTIVATIONS[name])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up for `gate_up` = [gate | up] of shape (..., 2F); gives (..., F).

    Raises ValueError where the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: the last dimension must be even (gate and up), got {tuple(gate_up.shape)}")
    return activate(gate_up, "swiglu")


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The formula in plain torch, differentiated by autograd: the oracle of the tests."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
