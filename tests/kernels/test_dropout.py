"""Dropout from a seed, of tensors and of attention's probabilities: masks drawn again, gradients, what is kept."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from handtune.engine.training.optimizers import update_
from handtune.kernels import attention
from handtune.kernels.attn import blocks
from handtune.kernels.attn.reference import attention_reference
from handtune.kernels.dropout import Dropout, drop, dropout

T, HEADS, WIDTH = 9, 4, 6


def heads(t: int = T, kv_heads: int = HEADS, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q (1, T, H, hd), k and v (1, T, K, hd)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, t, HEADS, WIDTH), (1, t, kv_heads, WIDTH), (1, t, kv_heads, WIDTH)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def test_the_mean_is_what_goes_in_and_the_backward_pass_has_the_same_mask() -> None:
    x = torch.ones(200, 500, requires_grad=True)
    y = dropout(x, 0.3, seed=1)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert y.mean().item() == pytest.approx(1, abs=0.005)
    y.backward(torch.full_like(y, 2.0))
    assert torch.equal(x.grad, 2 * y)
    assert torch.equal(dropout(x, 0.3, seed=1), y) and not torch.equal(dropout(x, 0.3, seed=2), y)


def test_nothing_is_kept_and_without_dropout_it_is_the_tensor_itself() -> None:
    kept: list[Tensor] = []
    x = torch.ones(8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(x, 0.5)
    assert kept == []
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x and torch.equal(torch.get_rng_state(), state)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\)"):
            dropout(x, wrong)


def test_a_graph_takes_no_seed_and_no_learning_rate_of_the_host(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="seed of dropout is a number of the host"):
        dropout(x, 0.1)
    dropout(x, 0.1, seed=1)  # a seed that is given is meant to stay
    dropout(x, 0.0)
    with pytest.raises(RuntimeError, match="learning rate is a number of the host"):
        update_([], 1e-3, (0.9, 0.99), 1e-8, None)


def test_a_place_drops_in_training_only_and_after_it_is_asked_to() -> None:
    place, x = Dropout(0.4), torch.ones(50)
    assert place(x) is x
    place.p = 0.4
    torch.manual_seed(3)
    first = place(x)
    torch.manual_seed(3)
    assert torch.equal(place(x), first) and not torch.equal(place(x), first)
    assert place.eval()(x) is x


CASES = {
    "causal": {},
    "not causal": {"causal": False},
    "window": {"window": 3},
    "mask": {"bias": torch.arange(T).remainder(3).ne(1)[None, None, None], "causal": False},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)},
}


def assert_alike(out: Tensor, expected: Tensor, ours: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """The outputs of two ways are equal, and so are the gradients of their inputs."""
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(incoming)
    expected.backward(incoming)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [128, 4], ids=["one block", "blocks of 4"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("case", CASES)
def test_attention_without_dropped_entries_is_the_formula(
    case: str, kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask that drops nothing, outputs and gradients are those of attention."""
    monkeypatch.setattr(blocks, "QUERY_BLOCK", block)
    monkeypatch.setattr(blocks, "drop", lambda x, p, seed: x)
    ours, truth = heads(kv_heads=kv_heads), heads(kv_heads=kv_heads)
    out = attention(*ours, dropout=0.5, **CASES[case])
    expected = attention_reference(*truth, **CASES[case])
    assert_alike(out, expected, ours, truth)


def test_dropped_probabilities_by_the_formula() -> None:
    """One block: softmax, the mask of its seed, product."""
    q, k, v = heads()
    scores = torch.einsum("bthd,bshd->bhts", q, k) * WIDTH**-0.5
    p = drop(scores.softmax(-1), 0.3, 7)
    expected = torch.einsum("bhts,bshd->bthd", p, v)
    torch.testing.assert_close(attention(q, k, v, causal=False, dropout=0.3, seed=7), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, HEADS, T, T), (HEADS, 1, T), (1, 1, T, T)], ids=str)
def test_gradcheck(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 4)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias=bias, dropout=0.4, seed=11)

    assert torch.autograd.gradcheck(attend, (*heads(kv_heads=2), bias), fast_mode=True)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
@pytest.mark.parametrize("lengths", [(9,), (3, 1, 5), (40, 2, 33, 7)], ids=str)
def test_packed_segments_never_see_each_other(
    lengths: tuple[int, ...], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "drop", lambda x, p, seed: x)
    ours, truth = heads(sum(lengths), 2), heads(sum(lengths), 2)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    out = attention(*ours, cu_seqlens=bounds, causal=causal, dropout=0.5)
    expected = attention_reference(*truth, cu_seqlens=bounds, causal=causal)
    assert_alike(out, expected, ours, truth)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_segments_that_see_keys_of_others(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's, in front of their own: texts that begin alike."""
    monkeypatch.setattr(blocks, "drop", lambda x, p, seed: x)
    ours, truth = heads(9, 2), heads(9, 2)
    settings = {
        "cu_seqlens": torch.tensor([0, 4, 6, 9]).int(), "window": window,
        "keys": (torch.tensor([0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 2, 6, 7, 8]), torch.tensor([0, 4, 8, 14]).int()),
    }  # fmt: skip
    out = attention(*ours, **settings, dropout=0.5)
    assert_alike(out, attention_reference(*truth, **settings), ours, truth)


def test_packed_segments_have_masks_of_their_own() -> None:
    """Also those of other lengths, which are computed apart: uniform attention to one-hot values shows its mask."""
    lengths = [32, 64, 96]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    q = torch.zeros(1, sum(lengths), 1, 96)
    v = torch.cat([torch.eye(96)[:length] for length in lengths])[None, :, None]
    out = attention(q, q, v, cu_seqlens=bounds, causal=False, dropout=0.5, seed=5)[0, :, 0]
    # Row by row, as they are drawn: of one seed each would begin as the others do.
    masks = [(part[:, : len(part)] > 0).flatten()[:1024] for part in out.split(lengths)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < (masks[a] == masks[b]).double().mean() < 0.6


def test_the_mean_of_many_masks_is_attention() -> None:
    """Over the rows of a batch, which have masks of their own; the same seed gives the same bits."""
    q, k, v = heads(kv_heads=2)
    with torch.no_grad():
        expected = attention(q, k, v)
        mean = attention(*(x.expand(2000, -1, -1, -1) for x in (q, k, v)), dropout=0.2, seed=1).mean(0)
    assert (mean - expected[0]).abs().max() < 0.08
    first, again = (attention(q, k, v, dropout=0.2, seed=3) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, attention(q, k, v, dropout=0.2, seed=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_are_queries_keys_and_values_alone(dtype: torch.dtype) -> None:
    """No probabilities and no mask: the bytes grow with T, not with T²."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    q, k, v = heads(200, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = attention(q, k, v, dropout=0.1)
    assert sum(kept.values()) == 3 * q.numel() * q.element_size()
    out.float().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == dtype for x in (q, k, v))
