"""Examples: which tokens, which targets, what happens to what doesn't fit, and what is always said."""

import pytest
from small_tokenizers import byte_level, llama_like, word_piece

from handtune.engine.chat.template import ChatTemplate
from handtune.engine.data.placed_rows import locations_of
from handtune.engine.tasks.encode import encode
from handtune.reporting.token_display import show

END = 0  # <|end|> of byte_level()
CLS, SEP = 2, 3  # of word_piece()


def ids(text: str) -> list[int]:
    return byte_level().encode(text).ids


def words(text: str) -> list[int]:
    return word_piece().encode(text, add_special_tokens=False).ids


def in_loss(example: dict) -> str:
    return byte_level().decode([target for target in example["targets"] if target != -100], skip_special_tokens=False)


def sft(rows: list[dict], max_length: int = 200, **settings):
    return encode(rows, byte_level(), "sft", max_length=max_length, eos=END, **settings)


def test_completion_has_the_loss_and_targets_are_shifted():
    examples, report = sft([{"prompt": "The cat", "completion": " sat on the mat"}])
    whole = [*ids("The cat"), *ids(" sat on the mat"), END]
    seam = len(ids("The cat"))
    assert examples == [{"input_ids": whole[:-1], "targets": [-100] * (seam - 1) + whole[seam:]}]
    assert (report.n_read, report.n_kept, report.tokens, report.targets) == (1, 1, len(whole) - 1, len(whole) - seam)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The cat", " sat"),
        ("The c", "at sat"),  # a seam inside a word
        ("Question: who?\n\n", "the woman"),  # "\n\n" is one token at the end, two in front of a word
        ("Answer: ", "the woman"),
        ("thank you", "  \n"),
        ("caf\u00e9 ", "\u00e9t\u00e9 \U0001f600"),
        ("", "The cat sat"),
    ],
)
def test_training_begins_where_generation_does(prompt, completion):
    example = sft([{"prompt": prompt, "completion": completion}])[0][0]
    tokens = example["input_ids"] + example["targets"][-1:]
    assert tokens[: len(ids(prompt))] == ids(prompt)
    assert byte_level().decode(tokens, skip_special_tokens=False) == prompt + completion + "<|end|>"
    if prompt:
        assert in_loss(example) == completion + "<|end|>"


def test_the_seam_in_question_is_real():
    assert ids("who?\n\n")[-1] != ids("who?\n\nthe")[-2]


def test_end_token_is_not_doubled():
    examples, _ = sft([{"prompt": "The cat", "completion": " sat<|end|>"}, {"text": "The cat<|end|>"}])
    assert [example["targets"].count(END) for example in examples] == [1, 1]


@pytest.mark.parametrize("max_length", [39, 38, 30, 21, 20])
def test_what_is_too_long_loses_its_end_or_its_start_or_goes(max_length):
    prompt, completion = "!?" * 10, ",." * 9  # a token a character
    whole, row = [*ids(prompt + completion), END], {"prompt": prompt, "completion": completion}
    for truncate, tokens, targets in (
        ("end", whole[: max_length + 1], min(max_length + 1, 39) - 20),
        ("start", whole[-max_length - 1 :], 19),
    ):
        (example,), report = sft([row], max_length, truncate=truncate)
        assert example["input_ids"] + example["targets"][-1:] == tokens
        assert sum(target >= 0 for target in example["targets"]) == targets
        assert len(report.truncated) == (max_length < 38)
    _, report = sft([row, {"prompt": "!", "completion": "?"}], max_length, truncate="drop")
    assert (len(report.dropped), len(report.truncated)) == (max_length < 38, max_length < 38)


def test_what_begins_a_text_stays_and_a_row_without_its_answer_goes():
    tokenizer, row = llama_like(), {"prompt": "the cat sat on the mat", "completion": " and the dog"}
    whole = [*tokenizer.encode("the cat sat on the mat and the dog").ids, 2]
    (example,), _ = encode([row], tokenizer, "sft", max_length=4, eos=2, truncate="start")
    assert example["input_ids"] + example["targets"][-1:] == [1, *whole[-4:]]
    rows, room = [row, {"prompt": "the", "completion": " cat"}], len(tokenizer.encode(row["prompt"]).ids) - 1
    examples, report = encode(rows, tokenizer, "sft", max_length=room, eos=2)
    assert len(examples) == 1
    assert report.dropped == report.truncated == report.masked
    assert "1 of 2 rows are longer than data.max_length" in str(report.warning)
    assert f"100 % {len(whole) - 1})" in str(report.warning)
    assert encode(rows, tokenizer, "sft", max_length=len(whole), eos=2)[1].warning is None


def test_text_becomes_windows_and_no_token_is_lost():
    text = "The cat sat on the mat, and the dog looked at the cat."
    tokens = [*ids(text), END]
    for objective in ("pretrain", "sft"):
        for max_length in (1, 5, len(tokens) - 1, 100):
            examples, report = encode([{"text": text}], byte_level(), objective, max_length=max_length, eos=END)
            assert tokens[:1] + [t for example in examples for t in example["targets"]] == tokens
            assert [t for example in examples for t in example["input_ids"]] == tokens[:-1]
            assert max(len(example["input_ids"]) for example in examples) <= max_length
            assert report.targets == report.tokens == len(tokens) - 1
            assert len(report.truncated) == 0


def test_pretrain_takes_every_shape_that_is_text():
    rows = [
        {"prompt": "The cat", "completion": " sat"},
        {"text": "The cat sat", "label": "x"},
        {"messages": [{"role": "user", "content": "hello"}]},
    ]
    examples, _ = encode(rows, byte_level(), "pretrain", max_length=50, eos=END)
    assert in_loss(examples[0]) == in_loss(examples[1])
    assert in_loss(examples[2]) == byte_level().decode(ids("User: hello\n")[1:]) + "<|end|>"
    assert -100 not in examples[2]["targets"]


CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good morning"},
    {"role": "user", "content": "thank you"},
    {"role": "assistant", "content": "you are welcome"},
]


def test_chat_has_loss_on_the_assistant_with_its_end_of_turn():
    template = ChatTemplate(CHATML, bos_token="<|end|>")
    examples, report = sft([{"messages": CHAT}], template=template)
    assert in_loss(examples[0]) == "good morning<|im_end|>you are welcome<|im_end|>"
    assert examples[0]["input_ids"] == ids(template.render(CHAT))[:-1]
    assert examples[0]["input_ids"].count(END) == 1  # the template's BOS, once
    assert report.targets == len(ids(in_loss(examples[0])))


def test_chat_without_a_template_ends_turns_with_the_end_token():
    examples, _ = sft([{"messages": CHAT}])
    assert in_loss(examples[0]) == " good morning<|end|> you are welcome<|end|>"
    with pytest.raises(ValueError, match="doesn't tokenise to the end token"):
        sft_end = byte_level().token_to_id("cat") or byte_level().token_to_id("\u0120")
        encode([{"messages": CHAT}], byte_level(), "sft", max_length=9, eos=sft_end)


def test_a_long_chat_loses_its_end():
    dialogue = {"messages": [*CHAT, {"role": "user", "content": "hello " * 50}, *CHAT[1:2]]}
    (example,), report = sft([dialogue], max_length=60)
    text = byte_level().decode(example["input_ids"], skip_special_tokens=False)
    assert text.startswith(byte_level().decode(sft([{"messages": CHAT}])[0][0]["input_ids"], skip_special_tokens=False))
    assert in_loss(example) == in_loss(sft([{"messages": CHAT}])[0][0])
    assert locations_of(report.truncated) == "row 1"


def test_rows_without_targets_are_dropped_and_said():
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT[:2]}, {"messages": CHAT[2:3]}]
    examples, report = sft(rows)
    assert len(examples) == report.n_kept == report.examples == 2
    assert (len(report.masked), locations_of(report.masked), report.dropped) == (2, "row 2, row 4", report.masked)
    assert str(report) == (
        "4 rows read, 2 kept as 2 examples; dropped 2 (row 2, row 4), truncated 0, fully masked 2 (row 2, row 4); "
        f"{report.tokens:,} tokens, {report.targets:,} targets"
    )
    with pytest.raises(ValueError, match=r"no target left to train on: 1 rows read.*fully masked 1 \(row 1\)"):
        sft(rows[1:2])
    with pytest.raises(
        ValueError, match=r"no target left.*dropped 7 \(row 1, row 2, row 3, row 4, row 5, ...\), .*fully masked 0"
    ):
        encode([{"text": ""}] * 7, byte_level(), "pretrain", max_length=9, eos=END)


def test_a_template_error_names_the_row():
    template = ChatTemplate(
        "{{ raise_exception('no') if messages | length == 1 }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"row 2: the chat template cannot render 1 messages \(user\): no"):
        sft([{"messages": CHAT}, {"messages": CHAT[:1]}], template=template)


def test_masked_lm_windows_stand_between_special_tokens():
    text = "The cat sat on the mat, and the dog looked at the cat."
    examples, report = encode([{"text": text}], word_piece(), "masked-lm", max_length=8)
    assert all(e["input_ids"][0] == CLS and e["input_ids"][-1] == SEP for e in examples)
    assert [t for e in examples for t in e["input_ids"][1:-1]] == words(text)
    assert max(len(e["input_ids"]) for e in examples) == 8
    assert (report.targets, report.tokens) == (len(words(text)), len(words(text)) + 2 * len(examples))
    with pytest.raises(ValueError, match="max_length 2 leaves no room beside 2 special tokens"):
        encode([{"text": text}], word_piece(), "masked-lm", max_length=2)


def test_classify():
    rows = [{"text": "the cat", "label": "b"}, {"text": "the dog looked at the mat", "label": "a"}]
    examples, report = encode(rows, word_piece(), "classify", max_length=6)
    assert examples[0] == {"input_ids": [CLS, *words("the cat"), SEP], "label": 1}
    assert examples[1] == {"input_ids": [CLS, *words("the dog looked at")[:4], SEP], "label": 0}
    assert locations_of(report.truncated) == "row 2"
    assert report.targets == 2
    examples, _ = encode(rows, byte_level(), "classify", max_length=50, labels=["a", "b", "c"])
    assert examples[0] == {"input_ids": ids("the cat"), "label": 1}
    with pytest.raises(ValueError, match=r"row 1: label 'b' is not among the known labels \(a, c\)"):
        encode(rows, word_piece(), "classify", max_length=6, labels=["a", "c"])


def test_classify_pairs_cut_the_longer_text_first():
    row = {"text": "the cat", "text_pair": "the dog looked at the mat", "label": "x"}
    examples, _ = encode([row], word_piece(), "classify", max_length=8)
    first, second = words("the cat"), words("the dog looked at the mat")
    assert examples[0]["input_ids"] == [CLS, *first, SEP, *second[: 5 - len(first)], SEP]
    assert examples[0]["token_type_ids"] == [0] * (len(first) + 2) + [1] * (6 - len(first))
    examples, _ = encode([row], byte_level(), "classify", max_length=80)
    assert examples[0] == {"input_ids": ids("the cat\nthe dog looked at the mat"), "label": 0}


def test_a_row_without_text_is_dropped_from_classification():
    rows = [{"text": "", "label": "a"}, {"text": "cat", "label": "b"}]
    examples, report = encode(rows, word_piece(), "classify", max_length=9)
    assert [example["label"] for example in examples] == [1]
    assert locations_of(report.dropped) == "row 1"


def test_tags_stand_on_the_first_sub_token():
    rows = [{"tokens": ["welcome", "\u200b", "mat", "dogcat"], "tags": ["B-x", "O", "I-x", "O"]}]
    examples, report = encode(rows, word_piece(), "tag", max_length=30)
    pieces = [words(word) for word in rows[0]["tokens"]]
    assert len(pieces[1]) == 0  # the normalizer drops the zero-width space, and no other word gets its tag
    expected = [-100]
    for tag, piece in zip([1, 0, 2, 0], pieces, strict=True):
        expected += ([tag] + [-100] * (len(piece) - 1)) if piece else []
    assert examples == [
        {"input_ids": [CLS, *(token for piece in pieces for token in piece), SEP], "targets": [*expected, -100]}
    ]
    assert report.targets == 3
    assert any(len(piece) > 1 for piece in pieces)
    with pytest.raises(ValueError, match=r"row 1: tag of token 3 'I-x' is not among the known labels \(O, B-x\)"):
        encode(rows, word_piece(), "tag", max_length=30, labels=["O", "B-x"])
    examples, report = encode(rows, word_piece(), "tag", max_length=3)
    assert examples[0]["targets"] == [-100, 1, -100]
    assert len(report.truncated) == 1


def answered(question: str, context: str, answer: str | None) -> dict:
    answers = (
        {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return {"question": question, "context": context, "answers": answers}


def test_qa_positions_and_offsets():
    row = answered("who wrote the book?", "the Cat and the Woman wrote the book in 1920.", "the Woman")
    (example,), report = encode([row], word_piece(), "qa", max_length=60)
    question, context = words(row["question"]), words(row["context"])
    assert example["input_ids"] == [CLS, *question, SEP, *context, SEP]
    assert example["token_type_ids"] == [0] * (len(question) + 2) + [1] * (len(context) + 1)
    start, end = example["offsets"][example["start"]][0], example["offsets"][example["end"]][1]
    assert row["context"][start:end] == "the Woman"
    assert example["offsets"][: len(question) + 2] == [None] * (len(question) + 2)
    assert example["offsets"][-1] is None
    assert (example["row"], report.targets) == (0, 1)


def test_qa_answer_between_tokens_without_spaces():
    row = answered("who?", "the dog,cat,mat", "cat")
    (example,), _ = encode([row], word_piece(), "qa", max_length=60)
    assert example["start"] == example["end"]
    assert row["context"][slice(*example["offsets"][example["start"]])] == "cat"


def test_qa_windows_cover_the_context_and_overlap():
    context = " ".join(["the cat sat on the mat"] * 80 + ["Paris"] + ["the dog"] * 100)
    rows = [answered("cat?", "the cat", "cat"), answered("what is the capital?", context, "Paris")]
    examples, report = encode(rows, word_piece(), "qa", max_length=300)
    windows = [example for example in examples if example["row"] == 1]
    assert report.n_kept == 2
    assert len(windows) == report.examples - 1 > 3
    covered = [[offset for offset in window["offsets"] if offset] for window in windows]
    assert sorted(set().union(*covered)) == word_piece().encode(context, add_special_tokens=False).offsets
    assert len(set(covered[0]) & set(covered[1])) == 128
    assert all(len(window["input_ids"]) <= 300 for window in windows)
    with_answer = [window for window in windows if window["start"]]
    assert 0 < len(with_answer) < len(windows)
    for window in windows:
        inside = any(
            context[slice(*offset)] == "P" or context[slice(*offset)] == "Paris"
            for offset in window["offsets"]
            if offset
        )
        assert bool(window["start"]) == inside
        if window["start"]:
            span = window["offsets"][window["start"]][0], window["offsets"][window["end"]][1]
            assert context[slice(*span)] == "Paris"
        else:
            assert window["end"] == 0


def test_qa_without_answer_points_at_zero_and_an_answer_no_window_holds_is_dropped():
    rows = [answered("who?", "the cat sat", None), answered("who?", "cat " * 40, ("cat " * 40).strip())]
    examples, report = encode(rows, word_piece(), "qa", max_length=20)
    assert [(e["row"], e["start"], e["end"]) for e in examples] == [(0, 0, 0)]
    assert locations_of(report.dropped) == locations_of(report.masked) == "row 2"


def test_qa_cuts_a_question_that_fills_the_window():
    (*_, last), report = encode([answered("cat " * 40, "the dog sat", "sat")], word_piece(), "qa", max_length=21)
    assert len(last["input_ids"]) <= 21
    assert last["start"] > 0
    assert last["token_type_ids"].count(0) == 11  # [CLS], 9 of the question, [SEP]
    assert len(report.truncated) == 1


def test_embed():
    rows = [{"anchor": "the cat", "positive": "the dog"}, {"anchor": "", "positive": "cat"}]
    examples, report = encode(rows, word_piece(), "embed", max_length=9)
    assert examples == [{"anchor": [CLS, *words("the cat"), SEP], "positive": [CLS, *words("the dog"), SEP]}]
    assert locations_of(report.dropped) == "row 2"
    rows = [{"anchor": "the cat", "positive": "the dog", "negative": "a mat"}]
    examples, report = encode(rows, word_piece(), "embed", max_length=3)
    assert list(examples[0]) == ["anchor", "positive", "negative"]
    assert all(len(value) == 3 for value in examples[0].values())
    assert len(report.truncated) == 1


def test_row_numbers_hold_across_batches_and_shapes():
    rows = [{"text": "cat", "label": "a"}] * 600 + [{"text": "", "label": "a"}]
    rows += [{"text": "cat", "text_pair": "dog", "label": "a"}] * 2
    examples, report = encode(rows, word_piece(), "classify", max_length=9)
    assert locations_of(report.dropped) == "row 601"
    assert len(examples) == 602
    with pytest.raises(ValueError, match="row 603: label 'z'"):
        encode([*rows[:-1], {**rows[-1], "label": "z"}], word_piece(), "classify", max_length=9, labels=["a"])


@pytest.mark.parametrize(
    ("objective", "rows", "settings", "message"),
    [
        ("dream", [{"text": "a"}], {}, "unknown objective 'dream'; use one of pretrain, sft"),
        (
            "sft",
            [{"text": "a", "label": "b"}],
            {},
            "row 1: a text/label row, but sft needs prompt/completion or messages",
        ),
        ("tag", [{"text": "a"}], {}, "row 1: a text row, but tag needs tokens/tags"),
        ("sft", [{"text": "a"}], {"max_length": 0}, "max_length must be at least 1"),
        ("sft", [{"text": "a"}], {"eos": 10_000}, "no token 10000 to end texts with; its ids end at"),
        ("sft", [], {}, "no target left to train on: 0 rows read"),
    ],
)
def test_refused(objective, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        encode(rows, byte_level(), objective, **{"max_length": 10, **settings})


def test_show_marks_what_is_in_the_loss():
    examples, _ = sft([{"prompt": "cat\n", "completion": " dog\x1b[2J"}])
    plain = show(examples, byte_level(), "sft", 3, color=False)
    assert plain.startswith("example 1 of 1: ")
    assert plain.splitlines()[1].replace("]|[", "").replace("|[", "[") == "c|at|↵[ dog\\x1b[2J<|end|>]"
    assert "\x1b" not in plain
    assert "\x1b[1;32m<|end|>\x1b[0m" in show(examples, byte_level(), "sft", 1, color=True)


def test_show_of_the_other_objectives():
    def shown(row: dict, objective: str, labels: tuple = ()) -> str:
        examples, _ = encode([row], word_piece(), objective, max_length=50)
        return show(examples * 2, word_piece(), objective, 1, False, labels)

    assert shown({"text": "cat", "label": "x"}, "classify", ("good",)).splitlines() == [
        "example 1 of 2: 3 tokens, label good",
        "[CLS]|cat|[SEP]",
    ]
    assert shown({"tokens": ["cat", "dog"], "tags": ["O", "B"]}, "tag", ("O", "B")).endswith(
        "[CLS]|[cat:O]|[dog:B]|[SEP]"
    )
    assert shown(answered("cat", "the dog", "dog"), "qa").endswith("[CLS]|cat|[SEP]|the|[dog]|[SEP]")
    assert "no answer here" in shown(answered("cat", "the dog", None), "qa")
    assert shown({"anchor": "cat", "positive": "dog"}, "embed").endswith(
        "anchor:|[CLS]|cat|[SEP]|positive:|[CLS]|dog|[SEP]"
    )
    assert "masked anew" in shown({"text": "cat"}, "masked-lm")
