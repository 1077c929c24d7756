"""A loss over the embeddings of a whole step, cut into micro-batches or not: two passes are as good as one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_runs import PAIRS, bert, examples

from handtune.engine import TrainConfig, train
from handtune.engine.runtime import begin_draws
from handtune.engine.tasks.common import ByAdapter
from handtune.engine.tasks.embedding import EmbeddingCollate, embedding_loss, step_embedding_loss
from handtune.engine.tasks.step_loss import by_micro_batch
from handtune.models.layers.dropout import set_dropout


def rows_with_repetitions():
    """Texts that stand in several rows: as the positive of one and the negative of another, as an anchor, twice."""
    rows = examples(PAIRS, "embed")[:6]
    for i, row in enumerate(rows):
        row["negative"] = rows[(i + 1) % 6]["positive"] if i % 2 else row["anchor"]
    return [*rows, {**rows[0], "positive": rows[2]["positive"]}, dict(rows[1])]


@pytest.mark.parametrize("size", [1, 3])
def test_a_cut_step_trains_as_a_whole_one(size) -> None:
    def trained(**cut):
        model = bert("embedding")
        config = TrainConfig(epochs=3, batch_size=8, lr=1e-3, schedule="constant", best="last", **cut)
        result = train(model, rows_with_repetitions(), step_embedding_loss, config, collate=EmbeddingCollate())
        return result.train_loss, torch.cat([p.detach().flatten() for p in model.parameters()])

    loss, whole = trained()
    cut_loss, cut = trained(micro_batch_size=size)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    # A second pass that took its negatives from the micro-batch would be far from it.
    moved = (whole - torch.cat([p.detach().flatten() for p in bert("embedding").parameters()])).abs().max()
    assert (cut - whole).abs().max() < 0.01 * moved


def test_gradients_are_those_of_the_whole_step() -> None:
    rows = rows_with_repetitions()
    model = bert("embedding").double()
    loss, _ = embedding_loss(model, EmbeddingCollate()(rows))
    loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    batches = [EmbeddingCollate()(rows[i : i + 3]) for i in range(0, 8, 3)]
    loss_fns = by_micro_batch(step_embedding_loss, model, batches, range(3), [], lambda i: None)
    parts = [loss_fn(model, batch) for loss_fn, batch in zip(loss_fns, batches, strict=True)]
    assert [count for _, count in parts] == [3, 3, 2]
    assert sum(part.item() for part, _ in parts) == pytest.approx(loss.item(), rel=1e-6)
    sum(part for part, _ in parts).backward()
    for name, gradient in whole.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_both_passes_drop_the_same() -> None:
    model = bert("embedding").train()
    set_dropout(model, 0.3)
    seen = []

    def recorded(model, batch):
        states = step_embedding_loss.outputs(model, batch)
        seen.append(states.detach())
        return states

    batches = [EmbeddingCollate()(rows_with_repetitions()[i : i + 4]) for i in (0, 4)]
    loss_fn = replace(step_embedding_loss, outputs=recorded)
    for i, again in enumerate(by_micro_batch(loss_fn, model, batches, range(2), [], partial(begin_draws, 0))):
        begin_draws(0, i)
        again(model, batches[i])
    assert all(map(torch.equal, seen[:2], seen[2:]))
    begin_draws(1, 0)
    assert not torch.equal(recorded(model, batches[0]), seen[0])


def test_a_step_s_loss_is_not_over_rows_of_several_adapters() -> None:
    """It would take its negatives from the micro-batch, and say nothing."""
    with pytest.raises(ValueError, match="a loss over a whole step can't be over rows of several adapters"):
        by_micro_batch(ByAdapter(step_embedding_loss), bert("embedding"), [{}, {}], range(2), [], lambda i: None)
