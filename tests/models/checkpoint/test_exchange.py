"""What is stored means to transformers and PEFT what it means here: the grid of `benchmarks/exchange.py`, and more.

The whole grid is deep; ordinarily, those of its cells are checked in which the two differed.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from project import BENCHMARKS
from small_models import both, padded, theirs, tiny_bert, tiny_gpt2, token_rows
from small_t5 import both_t5
from small_tokenizers import byte_level
from transformers import BertForQuestionAnswering

from handtune.engine import LoRAConfig, add_lora, save_adapter
from handtune.engine.data.batches import Collate, packed
from handtune.engine.rlhf.reward_model import Reward, load_reward
from handtune.engine.training.cached_features import compute_features
from handtune.models import load, save
from handtune.models.checkpoint.tasks import PADS
from handtune.models.layers.heads import last_position

sys.path.append(str(BENCHMARKS))

from exchange import ADAPTER, BOUND, FAMILIES, HEADS, SIDES, STORED_BY, cells, missing
from exchange_models import class_of, config_of, randomize, store, their_model, tokenizer_of

EOS, PAD = 7, 0
PARTED = [
    ("GPT-2", "sequence-classification", "they store"), ("GPT-2", "reward", "we store"), ("GPT-2", ADAPTER, "we store"),
    ("Llama", "sequence-classification", "we store"), ("Llama", "reward", "they store"),
    ("BLOOM", "sequence-classification", "they store"), ("T5 v1.1", "sequence-classification", "they store"),
    ("BERT", "question-answering", "we store"), ("XLNet", "embedding", "we store"),
]  # fmt: skip
REST = [(name, head, by) for name in FAMILIES for head in HEADS for by in STORED_BY if (name, head, by) not in PARTED]


def check(name: str, head: str, stored_by: str, folder: Path) -> None:
    found = cells(name, head, stored_by, folder)
    assert {*found} == {*SIDES}
    for side, cell in found.items():
        assert cell.reason if cell.error is None else cell.error <= BOUND, f"{side}: {cell}"


@pytest.mark.parametrize(("name", "head", "stored_by"), PARTED)
def test_stored_models_mean_the_same_to_both(tmp_path, name, head, stored_by):
    assert not missing(name, head)
    check(name, head, stored_by, tmp_path)


@pytest.mark.deep
@pytest.mark.parametrize(("name", "head", "stored_by"), REST)
def test_stored_models_mean_the_same_to_both_everywhere(tmp_path, name, head, stored_by):
    check(name, head, stored_by, tmp_path)


# Which token is read


def test_the_last_chosen_token_of_a_row():
    """Against counting by hand, padded on either side and packed; the first token of a row, where none is chosen."""
    rows = [[1, 0, 1, 0], [0], [1], [0, 0, 0], [1, 1, 0, 0, 1, 1, 0]]
    lasts = [2, 0, 0, 0, 5]
    starts = torch.tensor([0, 4, 5, 6, 9, 16], dtype=torch.int32)
    line = torch.tensor([value for row in rows for value in row]).bool()[None]
    assert last_position(line, None, starts).tolist() == [2, 4, 5, 6, 14]
    for side in ("right", "left"):
        inputs = padded(rows, side)
        for filling in (0, 1):  # what is chosen of the padding doesn't matter
            chosen = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], filling).bool()
            gaps = [0 if side == "right" else 7 - len(row) for row in rows]
            expected = [7 * i + gap + last for i, (gap, last) in enumerate(zip(gaps, lasts, strict=True))]
            assert last_position(chosen, inputs["attention_mask"], None).tolist() == expected


def texts_with(*ends: int) -> list[list[int]]:
    """Rows of tokens, some in the middle and all at the end eos or padding."""
    return [[*row[:2], PAD, EOS, *row[2:], *ends] for row in token_rows((6, 1, 9))]


@torch.no_grad()
@pytest.mark.parametrize("pad", [PAD, EOS, None])
def test_config_json_says_which_token_is_skipped_whatever_the_tokenizer_names(tmp_path, pad):
    """transformers' classifier knows config.json alone; texts that are all padding are read at their beginning."""
    reference, model = both(tmp_path, tiny_gpt2(pad_token_id=pad, eos_token_id=EOS), "sequence-classification")
    tokenizer = {"pad_token": "<|im_end|>", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    byte_level().save(str(tmp_path / "tokenizer.json"))
    model, words = load(tmp_path, device="cpu")
    save(model, words, tmp_path / "ours")
    again = type(reference).from_pretrained(tmp_path / "ours").eval()
    assert again.config.pad_token_id == pad
    rows = [row for ends in ((), (EOS,), (PAD,), (EOS, EOS, PAD)) for row in texts_with(*ends)] + [[EOS, EOS], [PAD]]
    for row, line in zip(rows, model(**packed(rows)), strict=True):
        ids = torch.tensor([row])
        for ours in (model(ids)[0], line):
            torch.testing.assert_close(ours, reference(ids).logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(again(ids).logits, reference(ids).logits)


@torch.no_grad()
def test_cached_features_are_read_at_the_same_token(tmp_path):
    _, model = both(tmp_path, tiny_gpt2(pad_token_id=EOS, eos_token_id=EOS), "sequence-classification")
    rows = texts_with(EOS, EOS)
    cached = compute_features(model, [{"input_ids": row} for row in rows], Collate())
    assert cached is not None
    for row, vector in zip(rows, cached, strict=True):
        ids = torch.tensor([row])
        last = max(i for i, token in enumerate(row) if token != EOS)
        torch.testing.assert_close(vector, model.hidden(ids)[0, last])
        torch.testing.assert_close(model.head(vector), model(ids)[0])


@torch.no_grad()
def test_t5_reads_the_last_eos_or_the_last_token_of_a_text_without(tmp_path):
    """As transformers does, which refuses the latter; behind eos stand tokens that a template may leave there."""
    reference, model = both_t5(tmp_path, "sequence-classification")
    eos = reference.config.eos_token_id
    rows = [[*row, eos, *row[:2]] for row in token_rows((6, 1, 9), vocab=eos)]
    truth = torch.cat([reference(torch.tensor([row])).logits for row in rows])
    for inputs in (padded(rows), padded(rows, "left"), packed(rows)):
        torch.testing.assert_close(model(**inputs), truth, atol=1e-4, rtol=1e-4)
    cut = [3, 4]
    with pytest.raises(ValueError, match="at least one <eos>"):
        reference(torch.tensor([cut]))
    alone = model.head(model.hidden(torch.tensor([cut]))[:, -1])
    for inputs in (padded([rows[0], cut]), padded([rows[0], cut], "left"), packed([rows[0], cut])):
        torch.testing.assert_close(model(**inputs), torch.cat((truth[:1], alone)), atol=1e-4, rtol=1e-4)


# A head that is new


def base_without_pad(folder: Path, family: str) -> Any:
    """A language model whose tokenizer names no pad token, stored in `folder`."""
    kind = FAMILIES[family]
    words = tokenizer_of(kind, "none")
    store(their_model(kind, config_of(kind, words), kind.base), words, folder)
    return kind


@pytest.mark.parametrize(("family", "token"), [("GPT-2", "<|end|>"), ("Mistral", "<unk>")])
def test_a_new_head_names_what_pads_and_a_language_model_does_not(tmp_path, caplog, family, token):
    base_without_pad(tmp_path / "base", family)
    caplog.set_level(logging.WARNING, "handtune")
    model, words = load(tmp_path / "base", "sequence-classification", device="cpu", labels=2)
    number = words.token_to_id(token)
    said = f"no pad token is named: id {number} ({token}) becomes it; a text is read at its last other token"
    assert said in caplog.messages
    save(model, words, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["pad_token_id"] == number
    assert json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())["pad_token"] == token
    caplog.clear()
    assert load(tmp_path / "ours", device="cpu")[0].tokens.config_pad_id == number
    model, words = load(tmp_path / "base", device="cpu")
    save(model, words, tmp_path / "lm")
    assert json.loads((tmp_path / "lm" / "config.json").read_text()).get("pad_token_id") is None
    assert "pad_token" not in json.loads((tmp_path / "lm" / "tokenizer_config.json").read_text())
    assert not caplog.messages


def test_a_pad_token_by_its_name_goes_before_eos(tmp_path):
    """Its name is looked for in the tokenizer; without a tokenizer it is eos, and without that there is none."""
    theirs(tiny_gpt2(pad_token_id=None, eos_token_id=EOS), "causal-lm").save_pretrained(tmp_path)
    settings: dict[str, Any] = {"device": "cpu", "labels": 2}
    assert load(tmp_path, "sequence-classification", **settings)[0].tokens.pad_id == EOS
    tokenizer = type(byte_level()).from_str(byte_level().to_str())
    tokenizer.add_special_tokens([PADS[2]])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model, words = load(tmp_path, "sequence-classification", **settings)
    assert model.tokens.pad_id == model.tokens.config_pad_id == words.token_to_id(PADS[2])
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / name).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert load(tmp_path, "sequence-classification", **settings)[0].tokens.config_pad_id is None


@torch.no_grad()
def test_a_reward_on_the_policys_base_reads_where_it_was_trained(tmp_path):
    """Its completions end with eos, which pads, too: alone, on the policy, and merged into a model of its own."""
    kind = base_without_pad(tmp_path / "base", "GPT-2")
    model, _ = load(tmp_path / "base", "reward", device="cpu")
    add_lora(model, LoRAConfig(rank=2, alpha=4), "reward")
    for name, parameter in model.named_parameters():
        if ".lora." in name or name.startswith("head."):
            randomize(torch.nn.ParameterList([parameter]))
    save_adapter(model, tmp_path / "adapter", "reward")
    end = model.tokens.eos_id
    prompts, completions = [[3, 4, 5], [6]], [[7, 8, end], [9, 9, 4, 3, end]]
    scores = Reward(model)(prompts, completions)
    unended = [completion[:-1] for completion in completions]
    torch.testing.assert_close(Reward(model)(prompts, unended), scores)
    policy, _ = load(tmp_path / "base", device="cpu")
    torch.testing.assert_close(load_reward(policy, tmp_path / "adapter")(prompts, completions), scores)

    from handtune.adapted.run_models import merge_model as merge

    merge(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    reference = class_of(kind, config_of(kind, tokenizer_of(kind, "none")), "reward")
    reference = reference.from_pretrained(tmp_path / "merged").eval()
    for side in ("right", "left"):
        inputs = padded([[*a, *b] for a, b in zip(prompts, completions, strict=True)], side)
        inputs["input_ids"].masked_fill_(inputs["attention_mask"] == 0, reference.config.pad_token_id)
        torch.testing.assert_close(reference(**inputs).logits[:, 0], scores, atol=1e-5, rtol=0)


# What else a head is stored with


@torch.no_grad()
def test_an_answer_head_is_not_stored_with_the_labels_of_the_head_before(tmp_path):
    """transformers would make as many outputs as there are labels, instead of two bounds."""
    theirs(tiny_bert(), "sequence-classification").save_pretrained(tmp_path / "base")
    model, _ = load(tmp_path / "base", "question-answering", device="cpu")
    save(model, None, tmp_path / "ours")
    assert "id2label" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    out = BertForQuestionAnswering.from_pretrained(tmp_path / "ours").eval()(ids := torch.tensor(token_rows((7, 7))))
    torch.testing.assert_close(model(ids), torch.stack((out.start_logits, out.end_logits), -1), atol=1e-5, rtol=0)
