"""Weighted files: how often each example comes, the same again from a seed, and nothing of it to store."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from small_lines import ROWS

from handtune.engine.data.batches import Batches
from handtune.engine.data.corpus import TokenCorpus
from handtune.engine.data.mixing import Draws, Joined


def draws(counts: tuple[int, ...], weights: tuple[float, ...], seed: int = 0) -> Draws:
    return Draws(counts, weights, tuple(f"file {i}" for i in range(len(counts))), seed)


@pytest.mark.parametrize("weight", [1, 2, 0.5, 0.1, 0.3, 1.5, 7.25, 1 / 3])
def test_over_the_epochs_every_example_comes_as_often_as_its_weight_says(weight: float) -> None:
    count = 20
    chosen = draws((3, count, 2), (1, weight, 1))
    seen: Counter[int] = Counter()
    for epoch in range(40):
        examples = chosen.of_epoch(epoch)
        own = [i - 3 for i in examples.tolist() if 3 <= i < 3 + count]
        assert sorted(i for i in examples.tolist() if not 3 <= i < 3 + count) == [0, 1, 2, 23, 24]
        seen.update(own)

        # As many as the weight says, no example twice as long as another was left out, up to a rounding.
        exact = Fraction(weight).limit_denominator(1000) * count * (epoch + 1)
        assert abs(sum(seen.values()) - exact) <= 0.5
        times = [seen[i] for i in range(count)]
        assert max(times) - min(times) <= 1


def test_epochs_are_drawn_anew_and_alike() -> None:
    half = draws((10,), (0.5,))
    epochs = [half.of_epoch(epoch).tolist() for epoch in range(6)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 2
    assert all(sorted(a + b) == list(range(10)) for a, b in zip(epochs[::2], epochs[1::2], strict=True))
    assert half.of_epoch(5).tolist() == epochs[5]
    assert draws((10,), (0.5,), seed=1).of_epoch(0).tolist() != epochs[0]
    # Files of one length are not drawn in one order.
    both = draws((10, 10), (0.5, 0.5)).of_epoch(0)
    assert sorted(both[:5]) != sorted(both[5:] - 10)


def test_a_weight_of_less_than_one_example_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.mix: weight 0\.01 of 20 examples in file 1 is less than one an epoch"):
        draws((3, 20), (1, 0.01))


def test_batches_have_the_examples_of_the_epoch() -> None:
    """By rows and by tokens, in length order or not; a resumed one goes on with the same."""
    rows = [{"input_ids": [i] * (i % 5 + 1)} for i in range(30)]
    mix = draws((10, 20), (2, 0.25))
    for settings in ({"rows": 4}, {"tokens": 11}, {"rows": 4, "by_length": True}):
        batches = Batches(rows, lambda examples: [row["input_ids"][0] for row in examples], draws=mix, **settings)
        epochs = [[ids for step in batches for batch in step for ids in batch] for _ in range(3)]
        for epoch, ids in enumerate(epochs):
            assert sorted(ids) == sorted(mix.of_epoch(epoch).tolist())
        assert batches.steps(3) == sum(len(batches.plan(epoch)) for epoch in range(3))

        resumed = Batches(rows, batches.collate, draws=mix, **settings)
        resumed.load_state_dict({"epoch": 2, "position": 1, "examples": 30})
        assert [ids for step in resumed for batch in step for ids in batch] == epochs[2][
            -sum(len(plan) for plan in batches.plan(2)[1:]) :
        ]


def test_training_steps_count_what_an_epoch_has() -> None:
    batches = Batches(ROWS, lambda rows: np.stack(rows), rows=2, draws=draws((4, 6), (2, 0.5)))
    assert len(batches.plan(0)) == 6  # 8 of the first file, 3 of the second


def test_joined_parts_are_one_sequence() -> None:
    parts = [TokenCorpus(np.arange(start, start + 8), 3) for start in (0, 100, 200)]
    joined = Joined(parts)
    assert len(joined) == sum(map(len, parts)) == 9
    flat = [window["input_ids"].tolist() for part in parts for window in part]
    assert [window["input_ids"].tolist() for window in joined] == flat
    assert [joined[i]["input_ids"].tolist() for i in range(9)] == flat
    assert joined[-1]["input_ids"].tolist() == flat[-1]
    for index in (9, -10):
        with pytest.raises(IndexError):
            joined[index]
