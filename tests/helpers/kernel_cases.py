"""Each kernel with its formula in plain torch and inputs: what the tests of kernels go through."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from handtune.kernels import activate, layer_norm, lora_linear, rms_norm, rope, split_rope, swiglu
from handtune.kernels.activations import ACTIVATIONS, swiglu_reference
from handtune.kernels.lora.arguments import LoRAArgs
from handtune.kernels.lora.linear import fused_linear, lora_linear_reference
from handtune.kernels.norms import layer_norm_reference, rms_norm_reference
from handtune.kernels.rotary import rope_reference

M, R, SCALE, EPS = 6, 3, 0.7, 1e-5


@dataclass(frozen=True)
class Case:
    """An operation, its reference, and the float64 inputs of both, x first."""

    op: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def correction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return SCALE * (x @ a.T) @ b.T


def lora_inputs(k: int) -> tuple[Tensor, ...]:
    return draw(M, k, seed=1), draw(M, seed=2), draw(R, k, seed=3), draw(M, R, seed=4)


def lora(lead: tuple[int, ...], k: int) -> Case:
    return Case(
        lambda x, w, bias, a, b: lora_linear(x, w, bias, a, b, scale=SCALE),
        lambda x, w, bias, a, b: lora_linear_reference(x, w, bias, a, b, scale=SCALE),
        (draw(*lead, k), *lora_inputs(k)),
    )


def lora_without_bias(lead: tuple[int, ...], k: int) -> Case:
    w, _, a, b = lora_inputs(k)
    return Case(
        lambda x, w, a, b: lora_linear(x, w, None, a, b, scale=SCALE),
        lambda x, w, a, b: lora_linear_reference(x, w, None, a, b, scale=SCALE),
        (draw(*lead, k), w, a, b),
    )


def lora_parts(lead: tuple[int, ...], k: int) -> Case:
    """Two parts of different rank, height and scale, with rows before, between and behind them that have none."""

    def reference(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        first = 0.5 * (x @ a[:2].T) @ b1.T
        second = -2.0 * (x @ a[2:].T) @ b2.T
        gap = x.new_zeros(*x.shape[:-1], 1)
        return F.linear(x, w, bias) + torch.cat((gap, first, gap, second, gap), -1)

    return Case(
        lambda x, w, bias, a, *bs: lora_linear(x, w, bias, a, bs, scale=(0.5, -2.0), rows=(1, 5)),
        reference,
        (draw(*lead, k), draw(9, k, seed=1), draw(9), draw(5, k, seed=2), draw(3, 2), draw(3, 3)),
    )


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """What dropout multiplies x with, seen through a layer that does nothing else."""
    x = torch.ones_like(x, dtype=MASK_DTYPE.get(x.dtype, x.dtype), memory_format=torch.contiguous_format)
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return lora_linear(x, torch.zeros_like(one), None, one, one, dropout=p, seed=seed).detach()


def lora_dropout(lead: tuple[int, ...], k: int) -> Case:
    def reference(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, bias) + correction(x * dropped(x, 0.4, 7), a, b)

    return Case(
        lambda x, w, bias, a, b: lora_linear(x, w, bias, a, b, scale=SCALE, dropout=0.4, seed=7),
        reference,
        (draw(*lead, k), *lora_inputs(k)),
    )


MASK_DTYPE: dict[torch.dtype, torch.dtype] = {}  # the oracle's dtype -> the dtype whose mask it must use


def plain(lead: tuple[int, ...], k: int) -> Case:
    w, bias, _, _ = lora_inputs(k)
    return Case(
        lambda x, w, bias: fused_linear(x, w, bias, None, (), LoRAArgs()),
        lambda x, w, bias: F.linear(x, w, bias),
        (draw(*lead, k), w, bias),
    )


def after_layer_norm(lead: tuple[int, ...], k: int) -> Case:
    plan = LoRAArgs((0,), (SCALE,), eps=EPS)

    def reference(x: Tensor, nw: Tensor, nb: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = layer_norm_reference(x, nw, nb, EPS)
        return F.linear(x, w, bias) + correction(x, a, b)

    return Case(
        lambda x, nw, nb, w, bias, a, b: fused_linear(x, w, bias, a, (b,), plan, (nw, nb)),
        reference,
        (draw(*lead, k), draw(k, seed=5), draw(k, seed=6), *lora_inputs(k)),
    )


def after_rms_norm(lead: tuple[int, ...], k: int) -> Case:
    plan = LoRAArgs((0,), (SCALE,), eps=EPS)

    def reference(x: Tensor, nw: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = rms_norm_reference(x, nw, EPS)
        return F.linear(x, w, bias) + correction(x, a, b)

    return Case(
        lambda x, nw, w, bias, a, b: fused_linear(x, w, bias, a, (b,), plan, (nw, None)),
        reference,
        (draw(*lead, k), draw(k, seed=5), *lora_inputs(k)),
    )


def after_swiglu(lead: tuple[int, ...], k: int) -> Case:
    plan = LoRAArgs((0,), (SCALE,), activation=ACTIVATIONS["swiglu"])

    def reference(u: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = swiglu_reference(u)
        return F.linear(x, w, bias) + correction(x, a, b)

    return Case(
        lambda u, w, bias, a, b: fused_linear(u, w, bias, a, (b,), plan),
        reference,
        (draw(*lead, 2 * k), *lora_inputs(k)),
    )


def after_gelu(lead: tuple[int, ...], k: int) -> Case:
    """With dropout behind it, as a feed-forward has in training."""
    plan = LoRAArgs((0,), (SCALE,), activation=ACTIVATIONS["gelu_tanh"], dropout=0.4, seed=3)

    def reference(u: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = F.gelu(u, approximate="tanh")
        return F.linear(x, w, bias) + correction(x * dropped(x, 0.4, 3), a, b)

    return Case(
        lambda u, w, bias, a, b: fused_linear(u, w, bias, a, (b,), plan),
        reference,
        (draw(*lead, k), *lora_inputs(k)),
    )


def activation(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[tuple[int, ...], int], Case]:
    return lambda lead, k: Case(lambda u: activate(u, name), function, (draw(*lead, k),))


def gated(name: str, **form: str) -> Callable[[tuple[int, ...], int], Case]:
    """GEGLU in the form of GELU that `form` says."""

    def reference(u: Tensor) -> Tensor:
        gate, up = u.chunk(2, dim=-1)
        return F.gelu(gate, **form) * up

    return lambda lead, k: Case(lambda u: activate(u, name), reference, (draw(*lead, 2 * k),))


def rotary(lead: tuple[int, ...], k: int) -> Case:
    """q of three heads and k of one; the tables per position, or per row and position."""
    b, t, width = (lead if len(lead) == 2 else (1, *lead)) + (2 * k,)
    angle = draw(*((b, t) if b > 1 else (t,)), k, seed=9)
    cos, sin = angle.cos(), angle.sin()

    def with_tables(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda q, k: function(q, k, cos.to(q), sin.to(q))

    return Case(with_tables(rope), with_tables(rope_reference), (draw(b, t, 3, width), draw(b, t, 1, width, seed=1)))


def rotary_views(lead: tuple[int, ...], k: int) -> Case:
    """q and k are views into one projection that holds v too, behind its first position; one angle, of stride zero."""
    b, t, width = (lead if len(lead) == 2 else (1, *lead)) + (2 * k,)
    angle = draw(k, seed=9)

    def of_views(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def turned(x: Tensor) -> tuple[Tensor, Tensor]:
            tables = (table.to(x).expand(t, k) for table in (angle.cos(), angle.sin()))
            return function(x[:, 1:, :3], x[:, 1:, 3:4], *tables)

        return turned

    return Case(of_views(rope), of_views(rope_reference), (draw(b, t + 1, 5, width),))


def split_rotary(lead: tuple[int, ...], k: int) -> Case:
    """q of three heads, k and v of two, out of one projection that is a view itself."""
    b, t, width = (lead if len(lead) == 2 else (1, *lead)) + (2 * k,)
    angle = draw(b, t, k, seed=9)

    def tables(like: Tensor) -> tuple[Tensor, Tensor]:
        return angle.cos().to(like), angle.sin().to(like)

    def reference(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = x[:, 1:].split((3, 2, 2), 2)
        return *rope_reference(q, k, *tables(x)), v

    return Case(lambda x: split_rope(x[:, 1:], 3, *tables(x)), reference, (draw(b, t + 1, 7, width),))


CASES: dict[str, Callable[[tuple[int, ...], int], Case]] = {
    "lora": lora,
    "lora without bias": lora_without_bias,
    "lora parts": lora_parts,
    "lora dropout": lora_dropout,
    "linear": plain,
    "layer_norm linear": after_layer_norm,
    "rms_norm linear": after_rms_norm,
    "swiglu linear": after_swiglu,
    "gelu linear dropout": after_gelu,
    "layer_norm": lambda lead, k: Case(layer_norm, layer_norm_reference, (draw(*lead, k), draw(k), draw(k, seed=1))),
    "rms_norm": lambda lead, k: Case(rms_norm, rms_norm_reference, (draw(*lead, k), draw(k))),
    "layer_norm residual": lambda lead, k: Case(
        lambda x, r, w, b: layer_norm(x, w, b, EPS, residual=r),
        lambda x, r, w, b: layer_norm_reference(x + r, w, b, EPS),
        (draw(*lead, k), draw(*lead, k, seed=1), draw(k), draw(k, seed=1)),
    ),
    "rms_norm residual": lambda lead, k: Case(
        lambda x, r, w: rms_norm(x, w, EPS, residual=r),
        lambda x, r, w: rms_norm_reference(x + r, w, EPS),
        (draw(*lead, k), draw(*lead, k, seed=1), draw(k)),
    ),
    "swiglu": lambda lead, k: Case(swiglu, swiglu_reference, (draw(*lead, 2 * k),)),
    "geglu": gated("geglu"),
    "geglu_tanh": gated("geglu_tanh", approximate="tanh"),
    "gelu": activation("gelu", F.gelu),
    "gelu_tanh": activation("gelu_tanh", lambda u: F.gelu(u, approximate="tanh")),
    "relu": activation("relu", F.relu),
    "silu": activation("silu", lambda u: u * u.sigmoid()),
    "tanh": activation("tanh", torch.tanh),
    "rope": rotary,
    "rope of views": rotary_views,
    "split_rope": split_rotary,
}


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Copies in this dtype that want gradients, laid out in memory as the originals are."""
    return [t.to(device, dtype, copy=True).detach().requires_grad_() for t in tensors]


def run(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor | None]:
    """Outputs, then the gradients of the inputs under fixed incoming gradients."""
    out = outputs(function(*inputs))
    incoming = [draw(*y.shape, seed=11).to(y) for y in out]
    torch.autograd.backward(out, incoming)
    return [*(y.detach() for y in out), *(t.grad for t in inputs)]


def error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    return ((got.double().cpu() - truth.cpu()).abs().max() / truth.abs().max().clamp(min=1)).item()
