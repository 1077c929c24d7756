"""A text in pieces: together the text of `completions`, each of them final, and nothing computed that is there."""

import random
from typing import Any

import pytest
import torch
from small_models import both, tiny_llama, token_rows
from small_runs import gpt2
from small_tokenizers import byte_level, llama_like, sentence_piece, word_piece
from test_generation import lively
from tokenizers import Tokenizer

from handtune.engine import generate
from handtune.engine.generation.completions import completions, text_of
from handtune.engine.generation.decoding import Decoding
from handtune.engine.generation.streaming import Pieces, Streamer
from handtune.models import XLNet

TEXTS = ["naïve café 😀👩‍👩‍👧 done", "the cat sat on the mat", "a\nb  c\t d", "中文字 and 한국어", "�x� y"]


def in_pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int], stop: list[str]) -> list[str]:
    pieces = Pieces(tokenizer, prompt, stop)
    shown = []
    for token in ids:
        shown.append(pieces.add(token))
        if pieces.stopped:
            break
    return [*shown, pieces.remainder()]


@pytest.mark.parametrize("tokenizer", [byte_level(), llama_like(), sentence_piece()], ids=["bytes", "llama", "pieces"])
@pytest.mark.parametrize("stop", [[], ["cat", "ca", "t s"], ["\nb"], ["never there"], ["😀"], ["é 😀", "x"]])
def test_pieces_are_the_text(tokenizer, stop):
    prompt = tokenizer.encode("the dog looked at", add_special_tokens=False).ids
    for text in TEXTS:
        for ids in (tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.encode(" " + text).ids):
            shown = in_pieces(tokenizer, prompt, ids, stop)
            assert "".join(shown) == text_of(ids, (), stop, tokenizer, prompt)


def test_pieces_of_any_tokens():
    """Random tokens are mostly bytes that make no character."""
    tokenizer = byte_level()
    draw = random.Random(0)
    for _ in range(60):
        ids = [draw.randrange(3, 259) for _ in range(30)]
        shown = in_pieces(tokenizer, ids[:5], ids[5:], [])
        assert "".join(shown) == text_of(ids[5:], (), (), tokenizer, ids[:5])


def test_nothing_is_shown_that_may_still_change():
    words = byte_level()
    ids = words.encode("é 😀 end", add_special_tokens=False).ids
    shown = in_pieces(words, [], ids, [])
    assert "".join(shown) == "é 😀 end"
    assert [piece for piece in shown if piece][:2] == ["é", " "]
    assert not any("\ufffd" in piece for piece in shown)
    assert sum(not piece for piece in shown) >= 4  # bytes of a character that is not there yet

    # Of "<stop", nothing is shown before it is known not to be a stop string.
    ids = words.encode("ab<sto no <stop> more", add_special_tokens=False).ids
    shown = in_pieces(words, [], ids, ["<stop>"])
    assert "".join(shown) == "ab<sto no "
    assert not any(piece.rstrip().endswith(("<", "<s", "<st")) for piece in shown)


def test_a_word_piece_is_shown_once_and_for_all():
    words = word_piece()
    ids = words.encode("the capital, of france.", add_special_tokens=False).ids
    shown = in_pieces(words, ids[:1], ids[1:], [])
    assert "".join(shown) == text_of(ids[1:], (), (), words, ids[:1])


def llama(folder: Any) -> Any:
    """Ours, tiny, with the vocabulary of `byte_level` and answers that vary."""
    _, model = both(folder, tiny_llama(vocab_size=byte_level().get_vocab_size()), "causal-lm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(
    ("settings", "stop"),
    [({"temperature": 0}, []), ({"temperature": 1.0, "top_k": 9}, ["e", "the"]), ({"top_p": 0.9}, ["<|im_end|>"])],
)
def test_a_stream_is_the_completion(tmp_path, settings, stop):
    """The text that `completions` gives, drawn by the same seed, repeated as little."""
    torch.manual_seed(0)
    model, words = llama(tmp_path), byte_level()
    settings = {**settings, "repetition_penalty": 1.2, "no_repeat_ngram": 3}
    streamer = Streamer(model, words, stop=stop, **settings)
    for seed in range(3):
        (text,) = completions(model, words, ["The cat sat"], 20, seed=seed, stop=stop, **settings)
        prompt = words.encode("The cat sat").ids
        assert "".join(streamer.pieces(prompt, 20, seed)) == text
    model.train()
    list(streamer.pieces(prompt, 2))
    assert model.training


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_kept_of_the_text_before_changes_nothing(tmp_path, kind):
    """Prompts that go on, go back, differ in the middle, are shorter, longer than there was room for, the same."""
    torch.manual_seed(0)
    model = llama(tmp_path) if kind == "llama" else lively(tmp_path, vocab_size=500)[1]
    prompts = token_rows((6, 2))
    long = prompts[0] + prompts[1] + [7, 8, 9, 9, 8, 7]
    changed = [*long[:5], 1, *long[6:]]
    decoding = None
    for prompt, n in ((prompts[0], 0), (long, 6), (changed, 5), (changed[:3], 2), (long, 3), (long, 13)):
        ids = torch.tensor([prompt])
        if decoding is None:
            decoding = Decoding(model, ids, None, 4)
        else:
            decoding.restart(ids, 4)
        assert decoding.n_cached == n
        for _ in range(4):
            logits = decoding.logits()
            whole = model(decoding.tokens)[:, -1]
            torch.testing.assert_close(logits, whole, atol=2e-5, rtol=0)
            decoding.extend(whole.argmax(-1))


def test_a_conversation_is_not_computed_again(tmp_path, monkeypatch):
    model, words = llama(tmp_path), byte_level()
    read: list[int] = []
    hidden = type(model).hidden

    def counted(self, ids, *arguments, **inputs):
        read.append(ids.shape[1])
        return hidden(self, ids, *arguments, **inputs)

    monkeypatch.setattr(type(model), "hidden", counted)
    streamer = Streamer(model, words, temperature=0)
    first = words.encode("The cat sat on the mat").ids
    list(streamer.pieces(first, 6))
    assert read == [len(first), 1, 1, 1, 1, 1]
    written = generate(model, torch.tensor([first]), None, 6, 0)[0].tolist()
    read.clear()
    second = [*written, 9, 10, 11]
    list(streamer.pieces(second, 3))
    # The last token was written and never read.
    assert read == [4, 1, 1]
    assert streamer.n_kept == len(written) - 1
    read.clear()
    streamer.forget()
    list(streamer.pieces(second, 1))
    assert read == [len(second)]


def test_a_stream_that_is_left_goes_on_elsewhere(tmp_path):
    """After a Ctrl-C: what is in the cache belongs to the tokens that it stands for."""
    model, words = llama(tmp_path), byte_level()
    streamer = Streamer(model, words, temperature=0)
    prompt = words.encode("The cat sat on the mat").ids
    pieces = streamer.pieces(prompt, 30)
    for _ in range(5):
        next(pieces)
    pieces.close()
    again = [*prompt, 5, 6]
    assert "".join(streamer.pieces(again, 8)) == "".join(Streamer(model, words, temperature=0).pieces(again, 8))
    assert streamer.n_kept >= len(prompt)


@torch.no_grad()
def test_xlnet_reads_anew(tmp_path):
    """What it has read has seen what stood behind it, so that nothing is kept."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_layer": 2, "d_model": 16, "n_head": 2, "d_ff": 32}
    model = XLNet.from_name("xlnet-base-cased", **sizes).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    decoding = Decoding(model, torch.tensor([[5, 6, 7]]), None, 4)
    decoding.extend(decoding.logits().argmax(-1))
    again = torch.tensor([[*decoding.tokens[0].tolist(), 8, 9]])
    decoding.logits()
    decoding.restart(again, 4)
    torch.testing.assert_close(decoding.logits(), Decoding(model, again, None, 4).logits())


def test_refusals(tmp_path):
    model, words = gpt2(), byte_level()
    for settings, message in (
        ({"temperature": -1}, "expected temperature ≥ 0"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"stop": ["<|end|> and more"]}, "holds a special token and more"),
    ):
        with pytest.raises(ValueError, match=message):
            Streamer(model, words, **settings)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        next(Streamer(model, words).pieces([1] * 60, 9))
    with pytest.raises(ValueError, match="at least one token"):
        next(Streamer(model, words).pieces([], 9))
