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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .lora.dora import rescale
from .lora.factors import LinearPart, LoRAMatrixWeights, Merged
from .lora.per_row import AdapterRows
from .lora.products import cast_for_autocast, check_dtypes_and_dropout, draw_seed, drop

Pair = tuple[int, int]


@dataclass(frozen=True)
class _ConvArgs:
    """Everything about a call that is not a tensor."""

    stride: Pair  # in pixels, as padding and dilation: of the frozen convolution and of the one with A
    padding: Pair
    dilation: Pair
    groups: int  # of the frozen convolution and of B; A reads all channels
    scale: float  # s
    dropout: float  # a probability
    seed: int  # of the dropout mask

    def drop(self, x: Tensor) -> Tensor:
        return drop(x, self.dropout, self.seed)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def convolve_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, groups: int, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and weight, each only where it is needed."""
        if not (need_x or need_weight):
            return None, None
        geometry = (self.stride, self.padding, self.dilation, False, (0, 0), groups)  # not transposed
        needs = (need_x, need_weight, False)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, needs)[:2]

    def blocks(self, b: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
        """Each group's B as a matrix, its channels of y and of S."""
        m = b.shape[0] // self.groups
        rank = b.shape[1]
        for i in range(self.groups):
            channels = slice(i * m, (i + 1) * m)
            yield b[channels, :, 0, 0], channels, slice(i * rank, (i + 1) * rank)


class _LoRAConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, args: _ConvArgs):
        y = args.convolve(x, weight, bias, args.groups)  # (B, M, H', W')
        s = args.convolve(args.drop(x), a, None, 1).flatten(2)  # (B, R, H'W')

        # Into y in place, through a view that serves both memory formats.
        flat = y.view(*y.shape[:2], s.shape[2])  # (B, M, H'W')
        for matrix, channels, ranks in args.blocks(b):
            flat[:, channels].baddbmm_(matrix.expand(len(x), -1, -1), s[:, ranks], alpha=args.scale)
        ctx.args = args
        ctx.save_for_backward(x, weight, a, b, s)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, a, b, s = ctx.saved_tensors
        args: _ConvArgs = ctx.args
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad

        grad_bias = grad.sum((0, 2, 3)) if need_bias else None  # (M,)
        grad_x, grad_weight = args.convolve_backward(grad, x, weight, args.groups, need_x, need_weight)
        grad_b = _grad_b(grad.flatten(2), s, b, args) if need_b else None  # (M, R/groups, 1, 1)

        # Through the low-rank branch, whose input was dropped.
        grad_a = None
        if need_x or need_a:
            grad_s = _grad_s(grad.flatten(2), s, b, args).unflatten(2, grad.shape[2:])  # (B, R, H', W')
            # Where dA is not needed, the values of x are not read.
            dropped = args.drop(x) if need_a else x
            low_rank_x, grad_a = args.convolve_backward(grad_s, dropped, a, 1, need_x, need_a)
            if grad_x is not None and low_rank_x is not None:
                grad_x.add_(args.drop(low_rank_x))
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None


def _grad_s(grad: Tensor, s: Tensor, b: Tensor, args: _ConvArgs) -> Tensor:
    """s Bᵀ dy (B, R, H'W')."""
    grad_s = torch.empty_like(s)
    for matrix, channels, ranks in args.blocks(b):
        grad_s[:, ranks] = torch.matmul(matrix.T * args.scale, grad[:, channels])
    return grad_s


def _grad_b(grad: Tensor, s: Tensor, b: Tensor, args: _ConvArgs) -> Tensor:
    """s Σ dy Sᵀ; multiplied the other way round, which is up to seven times as fast on CPU.

    In low precision it is one product over all images, whose sum is one in fp32: those of single images would each be
    rounded before they are added up.
    """
    grad_b = torch.empty_like(b)
    for _, channels, ranks in args.blocks(b):
        s_t = s[:, ranks].mT  # (B, H'W', R)
        grad_t = grad[:, channels].mT  # (B, H'W', M)
        if grad.element_size() < 4:
            total = s_t.flatten(0, 1).T @ grad_t.flatten(0, 1)  # (R, M)
        else:
            total = torch.bmm(s_t.mT, grad_t).sum(0)  # (R, M)
        grad_b[channels, :, 0, 0] = total.mul_(args.scale).T
    return grad_b


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
    stride = _pair("stride", stride)
    padding = _pair("padding", padding)
    dilation = _pair("dilation", dilation)

    # Autocast is off inside, since it would not cast the operands of the product in place.
    if dropout and seed is None:
        seed = draw_seed()
    args = _ConvArgs(stride, padding, dilation, groups, scale, dropout, seed or 0)
    with torch.autocast(x.device.type, enabled=False):
        return _LoRAConv2d.apply(x, weight, bias, a, b, args)


def _pair(name: str, value: int | Pair) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name}: expected a number of pixels or a pair of them, got {value!r}")
    return pair


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, groups: int) -> None:
    of_weight = f"for weight {tuple(weight.shape)} with {groups} groups"
    m, channels_per_group, *kernel = weight.shape
    c = channels_per_group * groups
    if x.dim() != 4 or x.shape[1] != c:
        raise ValueError(f"x: expected (B, {c}, H, W) {of_weight}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias: expected ({m},) {of_weight}, got {tuple(bias.shape)}")
    if a.dim() != 4 or a.shape[1:] != (c, *kernel):
        expected = ", ".join(str(size) for size in ("R", c, *kernel))
        raise ValueError(f"a: expected ({expected}) {of_weight}, got {tuple(a.shape)}")
    if m % groups or len(a) % groups or b.shape != (m, len(a) // groups, 1, 1):
        raise ValueError(f"b: expected ({m}, R/groups, 1, 1) {of_weight} and a {tuple(a.shape)}, got {tuple(b.shape)}")


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
        y = lora_conv2d(
            x, self.weight, self.bias, factors.a.to(x.dtype), factors.b.to(x.dtype), stride=self.stride,
            padding=self.padding, dilation=self.dilation, groups=self.groups, scale=factors.scale,
            dropout=factors.dropout if self.training else 0.0,
        )  # fmt: skip
        return y if factors.m is None else rescale(y, factors.gain(self.matrix), self.bias, dim=1)

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
