"""From examples to batches: which rows go into a step, in which order, and the tensors they become."""

import numpy as np
import pytest
import torch
from small_runs import bert, gpt2
from small_tokenizers import word_piece

from handtune.engine.data.batches import Batches, Collate, count_tokens, packed, padded, to_device
from handtune.engine.tasks.embedding import EmbeddingCollate
from handtune.engine.tasks.masked_lm import MaskedCollate, masked_rows


def rows(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [number + 1] * length, "targets": [7] * length} for number, length in enumerate(lengths)]


def ids(item: list[dict[str, int]]) -> list[int]:
    return [row["input_ids"][0] - 1 for row in item]


def seen(data: Batches) -> list[list[list[int]]]:
    return [list(step) for step in data]


def batches(lengths, **settings) -> Batches:
    return Batches(rows(*lengths), ids, **settings)


def test_steps_of_rows_and_micro_batches() -> None:
    data = batches([3] * 7, rows=3, micro_batch_size=2, shuffle=False)
    assert seen(data) == [[[0, 1], [2]], [[3, 4], [5]], [[6]]]
    assert data.steps(2) == 6
    assert seen(batches([3] * 4, rows=8, shuffle=False)) == [[[0, 1, 2, 3]]]


def test_steps_of_tokens() -> None:
    """As many rows as fit, in order; a row that is too long stands alone."""
    lengths = [3, 4, 9, 20, 2, 2, 2, 2, 2]
    data = batches(lengths, tokens=10, shuffle=False)
    assert seen(data) == [[[0, 1]], [[2]], [[3]], [[4, 5, 6, 7, 8]]]
    cut = batches(lengths, tokens=10, micro_batch_tokens=4, shuffle=False)
    assert seen(cut) == [[[0], [1]], [[2]], [[3]], [[4, 5], [6, 7], [8]]]


def test_every_row_once_an_epoch_and_another_order_each() -> None:
    data = batches(range(1, 24), rows=4, micro_batch_tokens=20, seed=3)
    epochs = [[row for step in data for micro in step for row in micro] for _ in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = batches(range(1, 24), rows=4, micro_batch_tokens=20, seed=3)
    assert [row for step in again for micro in step for row in micro] == epochs[0]
    other = batches(range(1, 24), rows=4, micro_batch_tokens=20, seed=4)
    assert [row for step in other for micro in step for row in micro] != epochs[0]


def test_goes_on_from_any_place() -> None:
    """The state after step k of epoch e gives the rest, whatever was done in between."""
    settings = {"rows": 4, "micro_batch_size": 3, "seed": 1}
    whole = batches([2] * 18, **settings)
    truth = [step for _ in range(3) for step in seen(whole)]
    for done in range(len(truth)):
        first = batches([2] * 18, **settings)
        steps = [list(step) for _, step in zip(range(done), (step for _ in range(3) for step in first), strict=False)]
        state = first.state_dict()
        second = batches([2] * 18, **settings)
        second.load_state_dict(state)
        while len(steps) < len(truth):
            steps += seen(second)
        assert steps == truth, f"after {done} steps"


def test_by_length_pads_little_and_still_shuffles() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 100, 400).tolist()

    def waste(by_length: bool) -> float:
        steps = [lengths_of for step in batches(lengths, rows=8, by_length=by_length) for lengths_of in step]
        full = sum(len(step) * max(lengths[row] for row in step) for step in steps)
        return full / sum(lengths) - 1

    assert waste(True) < 0.08 < 0.5 < waste(False)
    means = [np.mean([lengths[row] for row in step[0]]) for step in batches(lengths, rows=8, by_length=True)]
    assert sorted(means) != means != sorted(means, reverse=True)


def test_a_state_of_other_data_is_refused() -> None:
    state = batches([2] * 5, rows=2).state_dict()
    with pytest.raises(ValueError, match="the data has changed since the checkpoint: 6 examples instead of 5"):
        batches([2] * 6, rows=2).load_state_dict(state)


@pytest.mark.parametrize("settings", [{}, {"rows": 2, "tokens": 5}, {"rows": 0}, {"tokens": 9, "micro_batch_size": -1}])
def test_steps_that_make_no_sense_are_refused(settings) -> None:
    with pytest.raises(ValueError):
        batches([1, 2], **settings)
    with pytest.raises(ValueError, match="no example"):
        batches([], rows=1)


def test_packed_and_padded() -> None:
    line = packed([[5, 6, 7], [8], [9, 3]])
    assert line["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3]]
    assert line["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert line["cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert line["cu_seqlens"].dtype == torch.int32
    assert line["max_seqlen"] == 3
    block = padded([[5, 6, 7], [8]], 99)
    assert block["input_ids"].tolist() == [[5, 6, 7], [8, 99, 99]]
    assert block["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    typed = [{"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1]}, {"input_ids": [8], "token_type_ids": [0]}]
    assert Collate("padded", 99)(typed)["inputs"]["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_targets_keep_their_places(layout) -> None:
    examples = [
        {"input_ids": [11, 12, 13], "targets": [-100, 13, 14]},
        {"input_ids": [21], "targets": [-100]},
        {"input_ids": [31, 32], "targets": [32, 33]},
    ]
    batch = Collate(layout)(examples)
    flat = batch["inputs"]["input_ids"].flatten()
    assert flat[batch["index"]].tolist() == [12, 13, 31, 32]
    assert batch["targets"].tolist() == [13, 14, 32, 33]
    assert batch["counts"] == [2, 0, 2]
    assert batch["lengths"] == [3, 1, 2]


def test_labels_spans_and_pairs() -> None:
    labelled = Collate()([{"input_ids": [1, 2], "label": 3}, {"input_ids": [4], "label": 0}])
    assert labelled["labels"].tolist() == [3, 0]
    spans = Collate("padded")([{"input_ids": [1, 2], "token_type_ids": [0, 1], "start": 1, "end": 1}])
    assert (spans["starts"].tolist(), spans["ends"].tolist()) == ([1], [1])
    assert spans["inputs"]["token_type_ids"].tolist() == [[0, 1]]
    pairs = EmbeddingCollate()([{"anchor": [1, 2], "positive": [3]}, {"anchor": [4], "positive": [5, 6]}])
    assert pairs["anchors"]["input_ids"].tolist() == [[1, 2, 4]]
    assert pairs["candidates"]["cu_seqlens"].tolist() == [0, 1, 3]


def test_a_text_of_several_pairs_stands_in_a_batch_once() -> None:
    rows = [([1], [5, 6], [7]), ([2], [5, 6], [8]), ([1], [8], [7]), ([8], [9], [8])]
    batch = EmbeddingCollate()([{"anchor": a, "positive": p, "negative": n} for a, p, n in rows])
    assert batch["anchors"]["input_ids"].tolist() == [[1, 2, 1, 8]]
    assert batch["candidates"]["input_ids"].tolist() == [[5, 6, 8, 9, 7]]  # 8 is a positive too
    assert batch["targets"].tolist() == [0, 0, 1, 2]
    assert batch["also_right"].nonzero().tolist() == [[0, 1], [2, 0], [3, 1]]  # 8 is the last anchor's own text
    alone = EmbeddingCollate()([{"anchor": [1], "positive": [2], "negative": [2]}])
    assert "negative" not in alone and alone["also_right"].tolist() == [[False]]


def test_masking_noise_is_bert_s() -> None:
    """15 % of the tokens, never a special one; 80 % of them [MASK], 10 % random, 10 % kept."""
    torch.manual_seed(0)
    tokens = torch.randint(10, 1000, (1, 200_000))
    tokens[0, ::10] = 2
    noisy, index, targets = MaskedCollate(4, 1000, (2, 4)).mask(tokens)
    assert abs(len(index) / 180_000 - 0.15) < 0.005
    assert torch.equal(tokens[0, index], targets)
    assert not (targets == 2).any()
    assert torch.equal(noisy[0, ::10], tokens[0, ::10])
    untouched = torch.ones(200_000, dtype=torch.bool)
    untouched[index] = False
    assert torch.equal(noisy[0, untouched], tokens[0, untouched])
    became = noisy[0, index]
    assert abs((became == 4).float().mean().item() - 0.8) < 0.01
    assert abs((became == targets).float().mean().item() - 0.1) < 0.01


def test_masking_has_a_target_always_and_is_new_each_time() -> None:
    short = torch.tensor([[2, 17, 3]])
    for seed in range(20):
        torch.manual_seed(seed)
        _, index, targets = MaskedCollate(4, 50, (2, 3, 4)).mask(short)
        assert index.tolist() == [1]
        assert targets.tolist() == [17]
    examples = [{"input_ids": list(range(10, 60))}]
    collate = MaskedCollate(4, 99, (2,))
    torch.manual_seed(0)
    first, second = collate(examples), collate(examples)
    assert not torch.equal(first["inputs"]["input_ids"], second["inputs"]["input_ids"])
    with pytest.raises(ValueError, match="packed"):
        masked_rows(bert("masked-lm"), word_piece(), packing=False)


def test_counting_and_moving_any_batch() -> None:
    ones = torch.ones(2, 5)
    assert count_tokens(Collate()(rows(3, 2))) == 5
    assert count_tokens({"input_ids": ones, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}) == 3
    assert count_tokens({"input_ids": ones}) == 10
    assert count_tokens(EmbeddingCollate()([{"anchor": [1, 2], "positive": [3]}])) == 3
    assert count_tokens((ones, ones)) == 0
    meta = torch.device("meta")
    moved = to_device({"a": (ones, [ones, 3]), "b": "text", "lengths": [1, 2]}, meta)
    assert moved["a"][0].device == moved["a"][1][0].device == meta
    assert (moved["a"][1][1], moved["b"], moved["lengths"]) == (3, "text", [1, 2])


@pytest.mark.parametrize("build", [gpt2, bert])
def test_packed_rows_never_see_each_other(build) -> None:
    """The states of a row are the same whatever lies beside it, and those of it alone."""
    model = build("causal-lm" if build is gpt2 else "masked-lm").eval()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 100, (n,), generator=generator).tolist() for n in (9, 1, 17, 4)]
    others = [[7] * len(texts[0]), *texts[1:]]
    with torch.no_grad():
        together = model.hidden(**packed(texts))[0].split([len(text) for text in texts])
        changed = model.hidden(**packed(others))[0].split([len(text) for text in texts])
        for number, text in enumerate(texts):
            alone = model.hidden(torch.tensor([text]))[0]
            assert (together[number] - alone).abs().max() < 2e-6
            if number:
                assert torch.equal(together[number], changed[number])


def test_rows_without_tokens_do_not_fill_a_budget_of_tokens() -> None:
    """They would all count 0, and the whole data set be one step."""
    rows = [{"x": torch.zeros(4)} for _ in range(6)]
    for data in (rows, [row["x"] for row in rows], [{"input_ids": [1]}, *rows]):
        for budget in ({"tokens": 8}, {"rows": 2, "micro_batch_tokens": 8}):
            with pytest.raises(ValueError, match=r"row [12] counts 0 tokens.*give rows with input_ids, or cut by"):
                Batches(data, list, **budget)
    assert len(Batches(rows, list, rows=2).plan(0)) == 3
    assert len(Batches(rows, list, tokens=2, size=lambda row: 1).plan(0)) == 3


def test_padded_rows_of_one_length_have_no_mask() -> None:
    """It would hide nothing, and cost attention its faster ways."""
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}]
    assert "attention_mask" not in Collate("padded")(rows)["inputs"]
    shorter = Collate("padded")([rows[0], {"input_ids": [4, 5]}])["inputs"]
    assert shorter["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
