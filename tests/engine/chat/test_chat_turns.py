"""What is trained of a dialogue: turn by turn, behind the prompt that asks for it, to the token that ends it."""

import re
from functools import cache
from itertools import product
from typing import Any

import pytest
from small_templates import CHATML, KINDS, PLAIN, THINKER, TOKENS, TOOLS, Kind, tokenizer
from small_tokenizers import byte_level

from handtune.engine.chat.ends import turn_end
from handtune.engine.chat.template import ChatTemplate
from handtune.engine.chat.turns import ChatTargets
from handtune.engine.data.schema import normalize
from handtune.engine.tasks.encode import encode

EMPTY = re.compile(r"<think>\s*</think>\s*")
ANSWERS = {"usual": ["It is calm.", "From the east.", "Yes.", "Not yet.", "At noon."],
           "odd": [">", "", "<b>now</b>", "</s", "  two\n\nlines"]}  # fmt: skip


def dialogue(turns: int, system: bool, tools: bool, thinking: str, answers: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []
    for i, answer in enumerate(ANSWERS[answers][:turns]):
        messages.append({"role": "user", "content": f"How is the sea, {i}?"})
        if tools:
            function = {"name": "tide_table", "arguments": {"harbour": f"Wick {i}"}}
            messages.append({"role": "assistant", "tool_calls": [{"id": f"c{i}", "function": function}]})
            messages.append({"role": "tool", "tool_call_id": f"c{i}", "content": "06:12"})
        spoken = {"content": answer}
        if thinking == "field":
            spoken = {"content": answer, "reasoning_content": f"Let me see, {i}."}
        if thinking == "content":
            spoken = {"content": f"<think>\nLet me see, {i}.\n</think>\n\n{answer}"}
        messages.append({"role": "assistant", **spoken})
    return {"messages": messages, **({"tools": TOOLS} if tools else {})}


@cache
def compiled(jinja: str) -> ChatTemplate:
    return ChatTemplate(jinja, **TOKENS)


def trained(row: dict[str, Any], kind: Kind) -> list[tuple[str, str]]:
    """Each stretch of tokens with a loss as text, and the text before it; the examples one after the other."""
    examples, _ = encode([normalize(row)], tokenizer(), "sft", max_length=5000, template=compiled(kind.jinja))
    stretches = []
    for example in examples:
        ids = [example["input_ids"][0]]
        ids += [t if t >= 0 else i for t, i in zip(example["targets"], [*example["input_ids"][1:], -1], strict=True)]
        masks = [False, *(target >= 0 for target in example["targets"]), False]
        edges = [i for i in range(1, len(masks)) if masks[i] != masks[i - 1]]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            stretches.append(tuple(tokenizer().decode(part, False) for part in (ids[:start], ids[start:end])))
    return stretches


def hugging_face_prompt(kind: Kind, messages: list[dict[str, Any]], tools: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    if "part.type" in kind.jinja:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    messages = [{"content": None if "content is none" in kind.jinja else "", **m} for m in messages]
    if "call.function.arguments +" in kind.jinja:
        messages = [_with_text(message) for message in messages]
    texts, _ = utils.render_jinja_template(
        [messages], chat_template=kind.jinja, tools=tools, add_generation_prompt=True, **TOKENS
    )
    return texts[0]


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    function = message["tool_calls"][0]["function"]
    text = str(function["arguments"]).replace("'", '"')
    return {**message, "tool_calls": [{"function": {**function, "arguments": text}}]}


@pytest.mark.parametrize("name", KINDS)
def test_every_turn_of_every_dialogue_is_trained_behind_its_prompt(name: str) -> None:
    """Against answers by hand, and prompts rendered by transformers."""
    kind, count = KINDS[name], 0
    shapes = product(range(1, 6), (False, True), {False, kind.tools}, kind.thinking, ANSWERS)
    for turns, system, tools, thinking, answers in shapes:
        if answers == "odd" and (tools or thinking):
            continue
        row = dialogue(turns, system, tools, thinking, answers)
        messages = row["messages"]
        stretches = dict(trained(row, kind))
        assert len(stretches) == turns * (2 if tools else 1)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = hugging_face_prompt(kind, messages[:turn], row.get("tools"))
            opened = prompt.removesuffix("<think>\n")
            target = kind.answers({"content": "", **message})
            fitting = [(c, t) for c, t in stretches.items() if c == prompt or EMPTY.sub("", c) == EMPTY.sub("", opened)]
            assert target in [t for _, t in fitting], (turn, target, stretches)
            count += 1
    assert count >= 60


@pytest.mark.parametrize("name", KINDS)
def test_the_token_that_ends_a_turn(name: str) -> None:
    assert turn_end(ChatTemplate(KINDS[name].jinja, **TOKENS), tokenizer()) == tokenizer().token_to_id(KINDS[name].end)


def test_a_turn_that_calls_a_tool_may_end_by_a_token_of_its_own() -> None:
    ends = {"thinker": "<|im_end|>", "endless": "<|observation|>", "channels": "<|call|>", "chatml": None}
    for name, end in ends.items():
        token = turn_end(compiled(KINDS[name].jinja), tokenizer(), calls=True)
        assert token == (None if end is None else tokenizer().token_to_id(end))


def test_the_end_of_a_turn_may_be_no_token_or_no_special_one() -> None:
    assert turn_end(ChatTemplate(PLAIN), tokenizer()) is None
    assert turn_end(ChatTemplate(CHATML), byte_level()) == byte_level().token_to_id("<|im_end|>")
    plain = tokenizer().from_str(tokenizer().to_str())
    plain.add_tokens(["##END"])
    assert turn_end(ChatTemplate(CHATML.replace("<|im_end|>", "##END")), plain) == plain.token_to_id("##END")
    assert turn_end(ChatTemplate("{{ raise_exception('not today') }}"), tokenizer()) is None
    assert turn_end(ChatTemplate(eos_token="</s>"), tokenizer()) == tokenizer().token_to_id("</s>")


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each() -> None:
    thinking = trained(dialogue(3, False, False, "field", "usual"), KINDS["thinker"])
    prompt = "<|im_start|>user\nHow is the sea, 0?<|im_end|>\n<|im_start|>assistant\n"
    assert thinking[0] == (prompt, "<think>\nLet me see, 0.\n</think>\n\nIt is calm.<|im_end|>")
    second = prompt + "It is calm.<|im_end|>\n" + prompt.replace("0", "1")
    assert thinking[1] == (second, "<think>\nLet me see, 1.\n</think>\n\nFrom the east.<|im_end|>")
    template, row = ChatTemplate(THINKER), dialogue(3, False, False, "", "usual")
    (whole,) = ChatTargets(template, tokenizer()).trained(
        row["messages"], [1, 3, 5]
    )  # nothing is lost without thinking
    assert [whole.text[a:b] for a, b in whole.spans] == [f"{answer}<|im_end|>" for answer in ANSWERS["usual"][:3]]
    assert whole.text[: whole.spans[2][0]].endswith("assistant\n<think>\n\n</think>\n\n")


def test_an_empty_thinking_of_the_row_is_a_target() -> None:
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>\n\n</think>\n\nA"}]}
    assert trained(row, KINDS["thinker"])[0][1] == "<think>\n\n</think>\n\nA<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "headers", "endless", "parts", "closed"])
def test_a_dialogue_may_open_with_the_assistant(name: str) -> None:
    messages = [{"role": "assistant", "content": "Ahoy"}, *dialogue(1, False, False, "", "usual")["messages"]]
    kind = KINDS[name]
    (before, first), (_, second) = trained({"messages": messages}, kind)
    assert (first, second) == (kind.answers(messages[0]), kind.answers(messages[2]))
    assert before.endswith(hugging_face_prompt(kind, messages[1:2], None).rpartition("?")[2].partition(">\n")[2][-9:])


def test_marks_are_what_counts() -> None:
    """And the token behind that ends the turn; turns that a template rewrites are marked as the last ones."""
    kind = Kind(THINKER.replace("{{- content }}", "{% generation %}{{- content }}{% endgeneration %}"), "", str)
    ended = [f"{answer}<|im_end|>" for answer in ANSWERS["usual"][:2]]
    assert [t for _, t in trained(dialogue(2, True, True, "", "usual"), kind)] == ended
    thought = "{{- '<think>\\n' + thinking + '\\n</think>\\n\\n' }}"
    marked = THINKER.replace(thought, f"{{% generation %}}{thought}{{% endgeneration %}}")
    stretches = trained(dialogue(2, False, False, "field", "usual"), Kind(marked, "", str))
    assert [t for _, t in stretches] == [f"<think>\nLet me see, {i}.\n</think>\n\n" for i in range(2)]


OTHER_HEADER = CHATML.replace("assistant\\n' }}{% endif", "assistant: ' }}{% endif")
NO_END = CHATML.replace("'<|im_end|>", "('' if m.content == 'It is calm.' else '<|im_end|>') + '")
SILENT = THINKER.replace("enable_thinking is defined and", "")


@pytest.mark.parametrize(
    ("jinja", "thinking", "says"),
    [
        (OTHER_HEADER, "", r"begins messages\[1\] otherwise than its generation prompt .* marks into it"),
        (NO_END, "", r"ends messages\[1\] without the <\|im_end\|> that ends other turns"),
        (SILENT, "content", "say in the row whether the model thinks"),
    ],
)
def test_a_template_that_contradicts_itself_is_refused(jinja: str, thinking: str, says: str) -> None:
    with pytest.raises(ValueError, match="row 1: .*" + says):
        trained(dialogue(1, False, False, thinking, "usual"), Kind(jinja, "", str))
