"""The LoRA convolution: a frozen (or trained) one plus a trained correction of low rank. Hu et al., 2106.09685

For x (B, C, H, W), weight (M, C/groups, k, k), A (R, C, k, k), B (M, R/groups, 1, 1) as PEFT has them, scale s:

    S = conv(drop(x), A)                               (B, R, H', W')
    y = conv(x, weight) + bias + s B S                 (B, M, H', W')     B as a matrix, at each place

    dS = s Bᵀ dy         dB = s Σ dy Sᵀ               dA, dx: the convolutions' own gradients, of dS and dy

`Conv2d` is the layer: a convolution with a slot for adapters, as `Linear` is for projections.

The 1×1 convolution is a matrix product, added to y in place: measured on CPU at ResNet's sizes, fp32, 2 to 4 times as
fast as a convolution and an addition, forward and backward. Views of (B, ·, H'W') serve both memory formats, so y keeps
the one that the convolution chose. Saved are x and S; convolutions whose gradient nobody wants are not computed.

Shapes: B images, C channels of x, M channels of y, R the rank, k the kernel, H'W' the places of y.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dropout import drop, seed_for
from .lora.arguments import (
    LoRAArgs,
    cast_for_autocast,
    check_dtypes_and_dropout,
    check_shape,
    parts_of,
)
from .lora.dora import rescale
from .lora.factors import LinearPart, Merged
from .lora.matrix_factors import LoRAMatrixWeights
from .lora.per_row import AdapterRows

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair]  # stride, padding and dilation in pixels, of the frozen convolution and that with A


class _LoRAConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, args: LoRAArgs, geometry: Geometry, x, weight, bias, a, b):
        groups = len(args.rows)
        y = F.conv2d(x, weight, bias, *geometry, groups)  # (B, M, H', W')
        s = F.conv2d(drop(x, args.dropout, args.seed), a, None, *geometry).flatten(2)  # (B, R, H'W')

        # Into y in place, through a view that serves both memory formats.
        flat = y.view(*y.shape[:2], s.shape[2])  # (B, M, H'W')
        for matrix, scale, channels, ranks in parts_of(b.flatten(1).chunk(groups), args):
            flat[:, channels].baddbmm_(matrix.expand(len(x), -1, -1), s[:, ranks], alpha=scale)
        ctx.args = args
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight, a, b, s)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, a, b, s = ctx.saved_tensors
        args: LoRAArgs = ctx.args
        _, _, need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad

        grad_bias = None
        if need_bias:
            grad_bias = grad.sum((0, 2, 3))  # (M,)
        grad_x, grad_weight = _convolution_backward(grad, x, weight, ctx.geometry, len(args.rows), need_x, need_weight)
        grad_s, grad_b = _factors_backward(grad.flatten(2), s, b, args, need_x or need_a, need_b)

        # Through the low-rank branch, whose input was dropped. Where dA is not needed, the values of x are not read.
        grad_a = None
        if grad_s is not None:
            grad_s = grad_s.unflatten(2, grad.shape[2:])  # (B, R, H', W')
            if need_a:
                x = drop(x, args.dropout, args.seed)
            low_rank_x, grad_a = _convolution_backward(grad_s, x, a, ctx.geometry, 1, need_x, need_a)
            if grad_x is not None and low_rank_x is not None:
                grad_x.add_(drop(low_rank_x, args.dropout, args.seed))
        return None, None, grad_x, grad_weight, grad_bias, grad_a, grad_b


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, each only where it is needed."""
    if not (need_x or need_weight):
        return None, None
    options = (*geometry, False, (0, 0), groups)  # transposed, output padding, groups
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *options, (need_x, need_weight, False))[:2]


def _factors_backward(
    grad: Tensor, s: Tensor, b: Tensor, args: LoRAArgs, need_s: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dS = s Bᵀ dy (B, R, H'W') and dB = s Σ dy Sᵀ (M, R/groups, 1, 1), each where it is needed; grad (B, M, H'W').

    dB is multiplied the other way round, which is up to seven times as fast on CPU. In low precision it is one product
    over all images, whose sum is one in fp32: those of single images would each be rounded before they are added up.
    """
    grad_s = grad_b = None
    if need_s:
        grad_s = torch.empty_like(s)
    if need_b:
        grad_b = torch.empty_like(b)
    for matrix, scale, channels, ranks in parts_of(b.flatten(1).chunk(len(args.rows)), args):
        if grad_s is not None:
            grad_s[:, ranks] = torch.matmul(matrix.T * scale, grad[:, channels])
        if grad_b is not None:
            s_t = s[:, ranks].mT  # (B, H'W', R)
            grad_t = grad[:, channels].mT  # (B, H'W', M)
            if grad.element_size() < 4:
                total = s_t.flatten(0, 1).T @ grad_t.flatten(0, 1)  # (R, M)
            else:
                total = torch.bmm(s_t.mT, grad_t).sum(0)  # (R, M)
            grad_b[channels, :, 0, 0] = total.mul_(scale).T
    return grad_s, grad_b


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """conv(x, weight) + bias + scale · conv₁ₓ₁(conv(drop(x), a), b), for x (B, C, H, W) in either memory format.

    weight (M, C/groups, k, k), bias (M,) or None, a (R, C, k, k), b (M, R/groups, 1, 1). Stride, padding and dilation,
    in pixels, hold for weight and a; `groups` for weight and b. `dropout` is a probability; `seed` fixes the mask (None
    draws a seed from torch's default generator). All tensors have one dtype and device. Hu et al.,
    https://arxiv.org/abs/2106.09685

    Raises ValueError where shapes, dtypes or devices don't fit.
    """
    x, weight, bias, a, b = cast_for_autocast((x, weight, bias, a, b), x.device.type)
    _check(x, weight, bias, a, b, groups)
    check_dtypes_and_dropout(x, weight, a, (b,), dropout)
    geometry = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation))

    # A group is a part with channels and ranks of its own.
    rows = tuple(range(0, len(weight), len(weight) // groups))
    args = LoRAArgs(rows, (scale,) * groups, dropout=dropout, seed=seed_for(dropout, seed))

    # Autocast is off inside, since it would not cast the operands of the product in place.
    with torch.autocast(x.device.type, enabled=False):
        return _LoRAConv2d.apply(args, geometry, x, weight, bias, a, b)


def _pair(name: str, value: int | Pair) -> Pair:
    if isinstance(value, int):
        return value, value
    pair = tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name}: expected a number of pixels or a pair of them, got {value!r}")
    return pair


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, groups: int) -> None:
    m, channels_per_group, *kernel = weight.shape
    c = channels_per_group * groups
    weight_shape = f"weight {tuple(weight.shape)} with {groups} groups"
    check_shape("x", x, ("B", c, "H", "W"), weight_shape)
    if bias is not None:
        check_shape("bias", bias, (m,), weight_shape)
    check_shape("a", a, ("R", c, *kernel), weight_shape)
    if m % groups or len(a) % groups or b.shape != (m, len(a) // groups, 1, 1):
        raise ValueError(
            f"b: expected ({m}, R/groups, 1, 1) for {weight_shape} and a {tuple(a.shape)}, got {tuple(b.shape)}"
        )


def lora_conv2d_reference(x, weight, bias, a, b, *, groups=1, scale=1.0, **geometry) -> Tensor:
    """The formula without dropout, differentiated by autograd: the oracle of the tests."""
    low_rank = F.conv2d(F.conv2d(x, a, **geometry), b, groups=groups)
    return F.conv2d(x, weight, bias, groups=groups, **geometry) + scale * low_rank


class Conv2d(nn.Module):
    """y = conv(x, weight) + bias for x (B, C, H, W), weight (M, C/groups, k, k); plus the active adapter's correction.

    `lora` holds adapters by name, of which `active` is applied. `merged` says which one stands in the weight.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._set_up((stride, stride), (padding, padding), (1, 1), 1)

    def _set_up(self, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> None:
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.parts = (LinearPart("", 0, len(self.weight)),)

        # The slot of the adapters, as `Linear` has it.
        self.lora = nn.ModuleDict()
        self.active: str | AdapterRows | None = None
        self.merged: Merged | None = None  # the adapter that stands in the weight

    @classmethod
    def around(cls, conv: nn.Conv2d) -> "Conv2d":
        """A `Conv2d` that holds an existing one's parameters: how a foreign layer becomes one of ours, keys unchanged.

        Raises ValueError where it pads with anything but zeros, or more on one side than on the other.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode {conv.padding_mode!r} is not implemented for an adapter; only zeros are")
        new = cls.__new__(cls)  # without __init__, which would make parameters
        nn.Module.__init__(new)
        new.weight = conv.get_parameter("weight")
        new.bias = None if conv.bias is None else conv.get_parameter("bias")
        new._set_up((conv.stride[0], conv.stride[1]), _zeros(conv), (conv.dilation[0], conv.dilation[1]), conv.groups)
        return new

    @property
    def matrix(self) -> Tensor:
        """The weight with its rows first, (M, C/groups, k, k)."""
        return self.weight

    def new_adapter(
        self, parts: list[LinearPart], ranks: list[int], scales: list[float], dropout: float
    ) -> LoRAMatrixWeights:
        """A fresh adapter of the sum 0, not attached yet: `a` (R, C, k, k), `b` (M, R/groups, 1, 1).

        A is Kaiming uniform with a = √5, which is U(±1/√(C k k)); B is zero. As in PEFT, the groups of the convolution
        are those of B, among which the rank is divided, while A reads all channels.
        """
        m, channels_per_group, *kernel = self.weight.shape
        fan_in = (channels_per_group * self.groups, *kernel)
        bound = 1 / math.sqrt(math.prod(fan_in))
        a = torch.empty(ranks[0], *fan_in, device=self.weight.device).uniform_(-bound, bound)
        b = torch.zeros(m, ranks[0] // self.groups, 1, 1, device=self.weight.device)
        return LoRAMatrixWeights(parts[0], a, b, scales[0], dropout)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.active, AdapterRows):
            return self.active.apply(x, 1, self.active.on(self.lora), self._convolve)
        return self._convolve(x, self.active)

    def _convolve(self, x: Tensor, adapter: str | None) -> Tensor:
        if adapter is None:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

        factors: LoRAMatrixWeights = self.lora[adapter]  # type: ignore[assignment]
        dropout = 0.0
        if self.training:
            dropout = factors.dropout
        y = lora_conv2d(
            x, self.weight, self.bias, factors.a.to(x.dtype), factors.b.to(x.dtype), stride=self.stride,
            padding=self.padding, dilation=self.dilation, groups=self.groups, scale=factors.scale,
            dropout=dropout,
        )  # fmt: skip
        if factors.m is not None:
            y = rescale(y, factors.gain(self.matrix), self.bias, dim=1)
        return y

    def extra_repr(self) -> str:
        m, c, *kernel = self.weight.shape
        return f"{c * self.groups}, {m}, {tuple(kernel)}, stride={self.stride}, active={self.active}"


def _zeros(conv: nn.Conv2d) -> Pair:
    """How many zeros it pads on each side, in pixels."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return _pair("padding", conv.padding)  # type: ignore[arg-type]

    # "same" adds up to dilation · (k − 1), of which each side gets half.
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if total[0] % 2 or total[1] % 2:
        raise ValueError(f'padding "same" of an even kernel {conv.kernel_size} is uneven, which is not implemented')
    return total[0] // 2, total[1] // 2
