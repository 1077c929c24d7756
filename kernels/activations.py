"""Activations that keep only their input for the backward pass.

    gelu(u)      = u Φ(u)                                 Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415
    gelu_tanh(u) = u/2 (1 + tanh(√(2/π)(u + 0.044715u³)))  the approximation of the same paper, GPT-2's `gelu_new`
    silu(u)      = u σ(u)
    swiglu(u)    = silu(g) ⊙ v,  u = [g | v]              Shazeer, https://arxiv.org/abs/2002.05202
    geglu(u)     = gelu(g) ⊙ v,  geglu_tanh likewise      of the same paper; T5 1.1 has the tanh form

Each is a pair (forward, backward) of plain functions: `forward(u)` and `backward(grad, u)`. A linear layer that
consumes the result takes the pair as its *prologue* (`lora/linear.py`): it then saves u alone, and the activation's
output, as wide as the feed-forward, is rebuilt in the backward pass from one cheap elementwise sweep.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend

_aten = torch.ops.aten
CHUNK_BYTES = 2**21  # of the input that is worked on at once: fits in a CPU core's second-level cache


@dataclass(frozen=True)
class Activation:
    """An elementwise (or gated) function and its gradient.

    `forward(u)` maps (..., F) to (..., F), or (..., 2F) to (..., F) where `gated`; `backward(grad, u)` gives the
    gradient with respect to u.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    gated: bool = False


def _rows_in_cache(u: Tensor) -> int:
    """How many rows of u to take at once, so that what is made of them on the way stays in a CPU core's cache."""
    # A GPU gains nothing from chunks, and the compiler would unroll a loop over them.
    if not u.is_cpu or torch.compiler.is_compiling():
        return max(len(u), 1)
    return max(CHUNK_BYTES // (u.shape[-1] * u.element_size()), 1)


def _gated(name: str, gate: Activation) -> Activation:
    """gate(g) ⊙ v for u = [g | v]."""

    def forward(u: Tensor) -> Tensor:
        if backend.on_triton(u):
            from . import activations_triton

            return activations_triton.forward(u, name)
        g, v = u.chunk(2, dim=-1)  # (..., F) each
        return gate.forward(g).mul_(v)

    def backward(grad: Tensor, u: Tensor) -> Tensor:
        if backend.on_triton(grad, u):
            from . import activations_triton

            return activations_triton.backward(grad, u, name)
        grad_u = torch.empty_like(u)  # (..., 2F)
        n_rows = _rows_in_cache(u)
        for dy, u_rows, grad_rows in zip(grad.split(n_rows), u.split(n_rows), grad_u.split(n_rows), strict=True):
            g, v = u_rows.chunk(2, dim=-1)  # (..., F) each
            grad_g, grad_v = grad_rows.chunk(2, dim=-1)

            # The halves are views of grad_u: nothing has to be concatenated.
            grad_g.copy_(gate.backward(dy * v, g))
            grad_v.copy_(gate.forward(g).mul_(dy))
        return grad_u

    return Activation(forward, backward, gated=True)


def _tanh_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.tanh_backward(grad, torch.tanh(u))


_GELU = Activation(F.gelu, _aten.gelu_backward)
_GELU_TANH = Activation(
    lambda u: F.gelu(u, approximate="tanh"), lambda grad, u: _aten.gelu_backward(grad, u, approximate="tanh")
)
_SILU = Activation(F.silu, _aten.silu_backward)

ACTIVATIONS = {
    "geglu": _gated("geglu", _GELU),
    "geglu_tanh": _gated("geglu_tanh", _GELU_TANH),
    "gelu": _GELU,
    "gelu_tanh": _GELU_TANH,
    "relu": Activation(F.relu, lambda grad, u: _aten.threshold_backward(grad, u, 0)),
    "silu": _SILU,
    "swiglu": _gated("swiglu", _SILU),
    "tanh": Activation(torch.tanh, _tanh_backward),
}


class Activate(torch.autograd.Function):
    """An activation of u, of which only u is saved."""

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
    """Apply the activation `name`, a key of `ACTIVATIONS`, to u (..., F), or (..., 2F) if gated; only u is saved.

    Raises ValueError for an unknown name, and where a gated activation is given an odd last dimension.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; known: {', '.join(sorted(ACTIVATIONS))}")
    if ACTIVATIONS[name].gated and u.shape[-1] % 2:
        raise ValueError(f"gate_up: the last dimension must be even (gate and up), got {tuple(u.shape)}")
    return Activate.apply(u, ACTIVATIONS[name])


def soft_capped(z: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(z / softcap), which stays within ±softcap; z itself without one."""
    return z if softcap is None else softcap * activate(z / softcap, "tanh")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) ⊙ up for `gate_up` = [gate | up] of shape (..., 2F); gives (..., F).

    Raises ValueError where the last dimension is odd.
    """
    return activate(gate_up, "swiglu")


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The formula in plain torch, differentiated by autograd: the oracle of the tests."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
