"""The order in which gradients are added, the shares of the processes, and what they tell each other."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from many_ranks import fork_server, on_ranks
from torch import Tensor

from handtune.engine.parallel.ranks import (
    any_of,
    from_first,
    in_order,
    rank,
    require_agreement,
    shares,
    spread,
    sum_in_order,
    world_size,
)
from handtune.engine.parallel.statistics import Statistics
from handtune.engine.parallel.tree import GradientTree
from handtune.engine.runtime import begin_draws


def summed(leaves: list[Tensor | None]) -> Tensor | None:
    """The tree as the docstring has it: the left half of the next power of two, plus the right half."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else None
    half = 1 << (len(leaves) - 1).bit_length() - 1
    left, right = summed(leaves[:half]), summed(leaves[half:])
    if left is None or right is None:
        return right if left is None else left
    return left + right


def gradients(seed: int, n: int) -> list[list[Tensor | None]]:
    """Of n micro-batches the gradients of four weights, some of which are not reached; of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [((3, 5), torch.float32), ((7,), torch.float32), ((2, 2), torch.float64), ((4, 3), torch.float32)]
    table = []
    for _ in range(n):
        row: list[Tensor | None] = []
        for i, (shape, dtype) in enumerate(shapes):
            scale = 10.0 ** torch.randint(-4, 5, (), generator=generator).item()
            reached = i < 2 or torch.rand((), generator=generator) < 0.5
            row.append(scale * torch.randn(shape, generator=generator, dtype=dtype) if reached else None)
        table.append(row)
    return table


def divided_sums(seed: int, n: int) -> list[Tensor | None]:
    """The sums that a process of several comes to."""
    table = gradients(seed, n)
    weights = [torch.zeros(3, 5), torch.zeros(7), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, 4).T]
    tree = GradientTree(weights)
    sizes = [random.Random(seed * 100 + i).randint(1, 50) for i in range(n)]
    for leaf in tree.begin(n, lambda: sizes):
        # As autograd does it: into what is there, or as what is there.
        for weight, gradient in zip(weights, table[leaf], strict=True):
            if gradient is not None:
                weight.grad = gradient.clone() if weight.grad is None else weight.grad.add_(gradient)
        tree.add()
    tree.finish()
    sums = [weight.grad for weight in weights]
    tree.finish()  # changes nothing
    assert all(a is b for a, b in zip(sums, [weight.grad for weight in weights], strict=True))
    return sums


def assert_tree(sums: list[Tensor | None], seed: int, n: int) -> None:
    for column, found in zip(zip(*gradients(seed, n), strict=True), sums, strict=True):
        expected = summed(list(column))
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("n", range(1, 20))
def test_one_process_adds_in_the_tree(n) -> None:
    assert_tree(divided_sums(n, n), n, n)


def test_the_order_matters() -> None:
    """So that the tests of it say something."""
    column = [row[0] for row in gradients(7, 7)]
    assert not torch.equal(summed(column), sum(column))


def many_sums(most: int) -> dict[int, list[Tensor | None]]:
    return {n: divided_sums(n, n) for n in range(1, most)}


@pytest.fixture(scope="module", autouse=True)
def processes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with fork_server():
            yield


@pytest.mark.parametrize("n_processes", [2, 3, 5])
def test_several_processes_come_to_the_same(n_processes, tmp_path) -> None:
    """Also where there are fewer micro-batches than processes."""
    for found in on_ranks(n_processes, tmp_path / "ranks", many_sums, 20):
        for n, sums in found.items():
            assert_tree(sums, n, n)


def received_bytes() -> int:
    """What a process takes in for the sums of 16 weights over a micro-batch of each process."""
    weights = [torch.zeros(1000) for _ in range(16)]
    tree = GradientTree(weights)
    received = 0
    recv = dist.recv

    def counted(message: Tensor, src: int) -> int:
        nonlocal received
        received += message.nbytes
        return recv(message, src=src)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "recv", counted)
        tree.begin(world_size(), lambda: [1] * world_size())
        for weight in weights:
            weight.grad = torch.full((1000,), 2.0 ** rank())
        tree.add()
        tree.finish()
    total = 2.0 ** world_size() - 1
    assert all(torch.equal(weight.grad, torch.full((1000,), total)) for weight in weights)
    return received


@pytest.mark.parametrize("n", [4, 5, 8])
def test_no_process_takes_in_everything(n, tmp_path) -> None:
    """Where the root were always the first's, it would receive all gradients once for each level of the tree."""
    received = on_ranks(n, tmp_path / "ranks", received_bytes)
    assert sum(received) == pytest.approx((n - 1) * 64_000, rel=0.01)
    assert max(received) < 1.05 * 64_000


def test_shares_are_contiguous_and_balanced() -> None:
    assert shares([1] * 6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    assert shares([5, 1, 1, 1], 2) == [range(0, 1), range(1, 4)]
    assert shares([1, 1, 1, 5], 2) == [range(0, 3), range(3, 4)]
    assert shares([3, 4], 4) == [range(0, 1), range(1, 2), range(2, 2), range(2, 2)]
    generator = random.Random(1)
    for _ in range(300):
        sizes = [generator.randint(1, 100) for _ in range(generator.randint(1, 40))]
        n = generator.randint(1, 9)
        parts = shares(sizes, n)
        assert [i for part in parts for i in part] == list(range(len(sizes)))
        assert len(parts) == n
        assert sum(map(bool, parts)) == min(n, len(sizes))
        if len(sizes) >= n:
            heaviest = max(sum(sizes[i] for i in part) for part in parts)
            assert heaviest <= sum(sizes) / n + max(sizes)


def told(folder: str) -> list:
    """What the functions of ranks.py give in a process of several."""
    mine = rank()
    squares = spread(iter(range(7)), lambda number, item: (number, item * item, mine))
    values = {i: torch.tensor(0.1 * i + 1e9 * (i == 2)) for i in range(5) if i % 3 == mine}
    failed = []
    for make in (lambda: 1 / 0, fails):
        try:
            from_first(make)
        except (ZeroDivisionError, ValueError) as error:
            failed.append(repr(error))
    try:
        require_agreement(seed=1, data=["a", mine == 1])
    except ValueError as error:
        failed.append(str(error))
    return [
        squares, sum_in_order(values, 5, torch.device("cpu")), in_order({mine: mine}), any_of(mine == 2),
        from_first(lambda: f"of {mine}"), failed,
    ]  # fmt: skip


def fails() -> None:
    raise ValueError("no")


def test_what_processes_tell_each_other(tmp_path) -> None:
    found = on_ranks(3, tmp_path / "ranks", told, str(tmp_path))
    total = torch.stack([torch.tensor(0.1 * i + 1e9 * (i == 2)) for i in range(5)]).double().sum()
    for mine, (squares, summed_up, ranks, flag, first, failed) in enumerate(found):
        assert [(number, square) for number, square, _ in squares] == [(i, i * i) for i in range(7)]
        assert {worker for _, _, worker in squares} == {0, 1, 2}
        assert summed_up == total
        assert (ranks, flag, first) == ([0, 1, 2], True, "of 0")
        assert failed[:2] == ["ZeroDivisionError('division by zero')", "ValueError('no')"]
        assert "different data" in failed[2]
        assert f"ranks {mine} and {0 if mine == 1 else 1} " in failed[2]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_statistics_are_means_over_micro_batches(n) -> None:
    """A batch norm's, which a single micro-batch leaves as torch does."""
    norm = torch.nn.BatchNorm1d(3)
    batches = torch.randn(n, 8, 3, generator=torch.Generator().manual_seed(1))
    statistics = Statistics(norm.buffers())
    statistics.begin(range(n), n)
    for batch in batches:
        norm(batch)
        statistics.add()
    statistics.finish()
    torch.testing.assert_close(norm.running_mean, 0.1 * batches.mean(1).mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * batches.var(1).mean(0))
    assert norm.num_batches_tracked == n


def test_constant_buffers_stay_as_they_are() -> None:
    """Also those that a mean in fp64 would round, or cut."""
    buffers = [
        torch.tensor([2**60 + 1]), torch.tensor([0.1, 1 / 3], dtype=torch.float64), torch.tensor([1 + 2j]),
        torch.tensor([True]), torch.tensor([0.1, 3e38]),
    ]  # fmt: skip
    copies = [buffer.clone() for buffer in buffers]
    statistics = Statistics(buffers)
    statistics.begin(range(3), 3)
    for _ in range(3):
        statistics.add()
    statistics.finish()
    assert all(map(torch.equal, buffers, copies))


def test_draws_follow_from_their_position() -> None:
    def drawn(*position: int) -> list[float]:
        begin_draws(*position)
        return [torch.rand(()).item(), random.random(), np.random.rand()]

    positions = [(0,), (0, 0), (0, 0, 0), (0, 1), (1, 0), (2**63 - 1, 5), (2**63 - 1, 6)]
    table = [drawn(*position) for position in positions]
    assert [drawn(*position) for position in positions] == table
    for column in zip(*table, strict=True):
        assert len(set(column)) == len(positions)
