"""The feed-forward of a pre-norm block, down(activation(up(norm(x)))), keeping what is widest in it or making it again.

`norm_linear` and `activation_linear` keep x and u = up(norm(x)) for the backward pass. u is the widest tensor of a
block: 2F of the 4.5D + 2F numbers a token that a Llama block keeps, 7 of 11.5 D in Llama-8B. With `recompute` it is not
kept: the backward pass of `down` makes it again from x. That costs the product up(norm(x)) once more, 2·D·2F FLOPs a
token: for Llama-8B, 27 % of the products of a LoRA step (which has no weight gradients), for GPT-2's F = 4D, 17 %.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .linear import Linear, activation_linear, bind_projection, norm_linear
from .norms import LayerNorm, RMSNorm


def feed_forward(
    x: Tensor, norm: LayerNorm | RMSNorm, up: Linear, activation: str, down: Linear, recompute: bool = False
) -> Tensor:
    """down(activation(up(norm(x)))) for x (..., D); see above for `recompute`."""
    if not (recompute and torch.is_grad_enabled()):
        return activation_linear(norm_linear(x, norm, up), activation, down)

    # Bound now: by the time of the backward pass another adapter may be active.
    project = bind_projection(x, up, norm)
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
        return activation_linear(u, activation, down)
