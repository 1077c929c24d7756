"""Operations with hand-written gradients, each with a torch-like function and a reference in plain torch.

    backend                                               where an operation runs: Triton kernels, or torch's operations
    norms  activations  rotary  cross_entropy             one operation a file; Triton kernels in a `_triton` twin
    matmul_cpu                                            the fastest of a CPU's ways to x Wᵀ
    attn/  optim/  quant/                                 attention; AdamW; frozen weights in four bits
    lora/                                                 the low-rank operations: read `lora/linear.py` first
    linear  conv  mlp/                                    layers of models, put together from all of these

Every backward pass keeps as little as it can and rebuilds what else it needs (`lora/linear.py` has the reasoning);
gradients are computed only for inputs that require them. Names are imported at first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import activate as activate
    from .activations import swiglu as swiglu
    from .attn.attend import attention as attention
    from .conv import Conv2d as Conv2d
    from .conv import lora_conv2d as lora_conv2d
    from .cross_entropy.loss import linear_cross_entropy as linear_cross_entropy
    from .linear import Linear as Linear
    from .linear import activation_linear as activation_linear
    from .linear import norm_linear as norm_linear
    from .lora.batched import lora_linear_batched as lora_linear_batched
    from .lora.factors import LoRALinearWeights as LoRALinearWeights
    from .lora.linear import lora_linear as lora_linear
    from .lora.row_groups import Segments as Segments
    from .mlp.prenorm import feed_forward as feed_forward
    from .norms import LayerNorm as LayerNorm
    from .norms import RMSNorm as RMSNorm
    from .norms import layer_norm as layer_norm
    from .norms import rms_norm as rms_norm
    from .rotary import rope as rope
    from .rotary import split_rope as split_rope

_HOME = {
    "Conv2d": "conv",
    "LayerNorm": "norms",
    "Linear": "linear",
    "LoRALinearWeights": "lora.factors",
    "RMSNorm": "norms",
    "Segments": "lora.row_groups",
    "activate": "activations",
    "activation_linear": "linear",
    "attention": "attn.attend",
    "feed_forward": "mlp.prenorm",
    "layer_norm": "norms",
    "linear_cross_entropy": "cross_entropy.loss",
    "lora_conv2d": "conv",
    "lora_linear": "lora.linear",
    "lora_linear_batched": "lora.batched",
    "norm_linear": "linear",
    "rms_norm": "norms",
    "rope": "rotary",
    "split_rope": "rotary",
    "swiglu": "activations",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value
