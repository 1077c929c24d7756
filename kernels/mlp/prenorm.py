"""The feed-forward of a pre-norm block, down(activation(up(norm(x)))), keeping what is widest in it or making it again.

The projections keep x and u = up(norm(x)) for the backward pass, by themselves or in one function (`fused.py`). u is
the widest tensor of a block: 2F of the 4.5D + 2F numbers a token that a Llama block keeps, 7 of 11.5 D in Llama-8B.
With `recompute` it is not kept: the backward pass of `down` makes it again from x. That costs the product up(norm(x))
once more, 2·D·2F FLOPs a token: for Llama-8B, 27 % of the products of a LoRA step (which has no weight gradients), for
GPT-2's F = 4D, 17 %.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..linear import Linear, bind_projection
from ..norms import LayerNorm, RMSNorm
from .fused import fused_feed_forward, takes


def feed_forward(
    x: Tensor, norm: LayerNorm | RMSNorm, up: Linear, activation: str, down: Linear, recompute: bool = False
) -> Tensor:
    """down(activation(up(norm(x)))) for x (..., D); see above for `recompute`."""
    # Bound now: by the time of the backward pass another adapter may be active.
    project = bind_projection(x, up, norm)
    project_down = bind_projection(x, down, activation=ACTIVATIONS[activation])
    if takes(x, project, activation, project_down):
        return fused_feed_forward(x, project, activation, project_down, recompute)
    if not (recompute and torch.is_grad_enabled()):
        return project_down(project(x))

    u = project(x)  # (..., F), or (..., 2F) if gated
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    autocast_dtype = torch.get_autocast_dtype(device)
    u_address = u.data_ptr()
    u_size = u.numel()

    def recompute_u() -> Tensor:
        with torch.no_grad(), torch.autocast(device, autocast_dtype, enabled=autocast):
            return project(x)

    # Autograd saves the function instead of u, which it knows by its address: `down` saves u with its rows flattened.
    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        if saved.data_ptr() == u_address and saved.numel() == u_size:
            return recompute_u
        return saved

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return packed().flatten(0, -2)  # (N, F) or (N, 2F)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return project_down(u)
