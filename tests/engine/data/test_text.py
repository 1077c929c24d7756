"""What begins and ends a text, where a prompt stops, and what a completion is behind its prompt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tokenizers import byte_level, llama_like, sentence_piece
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from handtune.engine import generate
from handtune.engine.chat.template import ChatTemplate
from handtune.engine.data.corpus import token_corpus
from handtune.engine.data.text import append_eos, bos_ids, completion_text, prompt_tokens, tokenize_pairs
from handtune.engine.tasks.encode import encode
from handtune.models import GPT2

BOS, EOS = 1, 2
PAIRS = [
    ("the cat", " sat on the mat"),
    ("the c", "at sat"),
    ("the cat ", "sat"),
    ("the cat\n\n", "sat"),
    ("the cat\n", "\n sat"),
    ("", "the cat"),
    ("Question: who?\nAnswer:", " the woman"),
    ("Question: who?\nAnswer: ", "the woman"),
    ("thé", "é cat"),
    ("the cat.", ".. and 1920 é"),
]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_a_prompt_keeps_its_tokens_and_the_text_is_whole(pair: tuple[str, str], begins: bool) -> None:
    for tokenizer in (llama_like(begins), byte_level(), sentence_piece()):
        (ids, start), *_ = tokenize_pairs(tokenizer, [pair])
        assert ids[:start] == prompt_tokens(tokenizer, pair[:1])[0]
        whole = tokenizer.encode("".join(pair), add_special_tokens=False).ids
        assert tokenizer.decode(ids) == tokenizer.decode(whole)
        if "\n" not in "".join(pair) or tokenizer is not sentence_piece():  # whose line ends are spaces
            assert tokenizer.decode(ids[:start]) + completion_text(tokenizer, ids[:start], ids[start:]) == (
                tokenizer.decode(whole)
            )


def test_a_completion_alone_would_lose_its_space() -> None:
    tokenizer = llama_like()
    (ids, start), *_ = tokenize_pairs(tokenizer, [("the cat", " sat")])
    assert tokenizer.decode(ids[start:]) == "sat"
    assert completion_text(tokenizer, ids[:start], ids[start:]) == " sat"


class AlwaysTheSame(torch.nn.Module):
    """A head that finds one token the likeliest."""

    def __init__(self, token: int, size: int) -> None:
        super().__init__()
        self.logits = torch.nn.functional.one_hot(torch.tensor(token), size).float()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*states.shape[:-1], -1)


def test_a_stop_string_begins_with_a_space() -> None:
    """It is found in the first new token, too, which alone would be decoded without it."""
    tokenizer = llama_like()
    word = tokenizer.encode("the cat sat", add_special_tokens=False).ids[-1]
    model = GPT2.from_name("gpt2", n_layer=1, n_head=1, d_model=8, vocab_size=tokenizer.get_vocab_size())
    model.head = AlwaysTheSame(word, tokenizer.get_vocab_size())
    prompt = torch.tensor([prompt_tokens(tokenizer, ["the cat"])[0]])
    out = generate(model, prompt, max_new_tokens=5, temperature=0, stop=[" sat"], tokenizer=tokenizer)
    assert out.shape[1] == prompt.shape[1] + 1


def test_texts_begin_as_transformers_has_them() -> None:
    tokenizer = llama_like()
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert bos_ids(tokenizer) == [BOS]
    assert [bos_ids(other) for other in (llama_like(False), byte_level(), sentence_piece())] == [[], [], []]
    begun_already = theirs("<s>the cat", add_special_tokens=False).input_ids
    assert prompt_tokens(tokenizer, ["the cat", "<s>the cat"]) == [theirs("the cat").input_ids, begun_already]


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        ("pretrain", {"text": "the cat"}),
        ("pretrain", {"text": "<s>the cat"}),
        ("sft", {"text": "the cat"}),
        ("sft", {"prompt": "the cat", "completion": " sat"}),
        ("sft", {"prompt": "<s>the cat", "completion": " sat"}),
        ("sft", {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]}),
        ("pairs", {"prompt": "the cat", "chosen": " sat", "rejected": " looked"}),
        (
            "pairs",
            {
                "prompt": [{"role": "user", "content": "the"}],
                "chosen": [{"role": "assistant", "content": "cat"}],
                "rejected": [{"role": "assistant", "content": "dog"}],
            },
        ),
    ],
)
def test_every_row_begins_once(objective: str, row: dict) -> None:
    examples, _ = encode([row], llama_like(), objective, max_length=64, eos=EOS)
    for side in (
        [examples[0]["input_ids"]] if objective != "pairs" else [examples[0]["chosen"], examples[0]["rejected"]]
    ):
        assert side[0] == BOS
        assert side.count(BOS) == 1


def line_ends() -> Tokenizer:
    """`byte_level` with a token for two line ends, which in front of a word are two tokens."""
    table = json.loads(byte_level().to_str())
    table["model"]["vocab"]["ĊĊ"] = len(table["model"]["vocab"])
    table["model"]["merges"].insert(0, ["Ċ", "Ċ"])
    return Tokenizer.from_str(json.dumps(table))


@pytest.mark.parametrize("answer", ["\n\nsat", "sat", "\n", " on the mat"])
@pytest.mark.parametrize("tokenizer", [line_ends(), llama_like()], ids=["byte-level", "llama"])
def test_a_turn_is_trained_behind_the_tokens_of_its_prompt(tokenizer: Tokenizer, answer: str) -> None:
    """Also where the whole dialogue would merge the end of the prompt with the answer's first characters."""
    source = (
        "{% for m in messages %}{{ m.role + ':\n\n' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n\n' }}{% endif %}"
    )
    end = 2 if tokenizer is llama_like() else 0
    template = ChatTemplate(source, eos_token=tokenizer.id_to_token(end))
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": answer}]
    alone = tokenizer.encode(template.render(turns[:1], True)).ids
    if tokenizer is not llama_like() and answer == "sat":
        assert tokenizer.encode(template.render(turns)).ids[: len(alone)] != alone  # the seam in question is real
    for messages in (turns, [*turns, *turns]):
        (example,), _ = encode([{"messages": messages}], tokenizer, "sft", max_length=99, eos=end, template=template)
        prompt = template.render(messages[:1], True)
        (ids, start), *_ = tokenize_pairs(tokenizer, [(prompt, answer)])
        whole = [*example["input_ids"], example["targets"][-1]]
        assert whole[: len(ids) + 1] == [*ids, end]
        assert [target for target in example["targets"] if target >= 0][: len(ids) + 1 - start] == [*ids[start:], end]


def test_documents_of_a_corpus_begin_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, line = llama_like(), "the cat sat on the mat\n"
    (tmp_path / "a.txt").write_text(line * 40)
    (tmp_path / "ended.txt").write_text(line + "</s>")
    ended = token_corpus([tmp_path / "ended.txt"], tokenizer, tmp_path / "ended", 64, EOS)
    assert np.asarray(ended.tokens).tolist().count(EOS) == 1
    monkeypatch.setattr("handtune.engine.data.corpus._PIECE", 50)
    cut = token_corpus([tmp_path / "a.txt", tmp_path / "a.txt"], tokenizer, tmp_path / "cut", 64, EOS)
    whole = [BOS, *tokenizer.encode(line * 40, add_special_tokens=False).ids, EOS]
    assert np.asarray(cut.tokens).tolist() == whole * 2


def test_a_chat_ends_as_its_earlier_turns_did() -> None:
    assert append_eos([5, 9, 6, 7], 2, EOS, (9,)) == [5, 9, 6, 7, 9]
    assert append_eos([5, 6, 7], 2, EOS, (9,)) == [5, 6, 7, EOS]
    assert append_eos([5, 6, 9], 2, EOS, (9,)) == [5, 6, 9]
