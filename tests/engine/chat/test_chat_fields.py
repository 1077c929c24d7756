"""What a row says beside its texts: used, or refused by its name."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_templates import CHATML, DISTILLED, HEADERS, THINKER, TOKENS, TOOLS, tokenizer

from handtune.engine.chat.template import DEFAULT_TEMPLATE, ChatTemplate
from handtune.engine.data.readers import read_prompts, read_rows
from handtune.engine.data.schema import normalize
from handtune.engine.tasks.encode import encode
from handtune.models.tokenizer.special_tokens import SpecialTokens
from handtune.prompts import prompt_of

Row = dict[str, Any]
ASKED = {"role": "user", "content": "High water at Wick?"}
CALLS = [
    {"id": name, "type": "function", "function": {"name": name, "arguments": {"harbour": "Wick"}}}
    for name in ("tide_table", "wind_force")
]
CALLING = {"role": "assistant", "content": None, "tool_calls": CALLS}
RESULTS = [
    {"role": "tool", "tool_call_id": call["id"], "content": text}
    for call, text in zip(CALLS, ("06:12", "4"), strict=True)
]
ANSWER = {"role": "assistant", "content": "At 06:12."}
PLAIN = [ASKED, ANSWER]


def trained(row: Row, jinja: str = THINKER, objective: str = "sft") -> list[str]:
    """What has a loss, of each example."""
    template = ChatTemplate(jinja, **TOKENS)
    examples, _ = encode([normalize(row)], tokenizer(), objective, max_length=5000, eos=1, template=template)
    return [tokenizer().decode([t for t in example["targets"] if t >= 0], False) for example in examples]


def text(row: Row, jinja: str = THINKER) -> str:
    examples, _ = encode([normalize(row)], tokenizer(), "sft", max_length=5000, template=ChatTemplate(jinja, **TOKENS))
    return tokenizer().decode(examples[-1]["input_ids"], False)


def refused(row: Row, says: str, jinja: str = THINKER, objective: str = "sft") -> None:
    with pytest.raises(ValueError, match=says):
        trained(row, jinja, objective)


def test_what_a_template_gets_besides_messages_is_shown_or_refused() -> None:
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert "Tides of a harbour" in text({"messages": PLAIN, "tools": tools})
    for name in ("tools", "functions", "documents"):
        refused({"messages": PLAIN, name: TOOLS}, f"row 1: .* does not use the field '{name}'", CHATML)
        shown = f"{{% for entry in {name} or [] %}}{{{{ entry | tojson }}}}{{% endfor %}}" + CHATML
        assert "Tides of a harbour" in text({"messages": PLAIN, name: TOOLS}, shown)
    assert trained({"messages": PLAIN, "tools": [], "documents": None}, CHATML) == ["At 06:12.<|im_end|>"]
    only_named = CHATML + "{% if tools and false %}{{ tools }}{% endif %}"
    refused({"messages": PLAIN, "tools": TOOLS}, "does not use the field 'tools'", only_named)
    for given in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert text({"messages": PLAIN, **given}).count("<think>") == 1
        refused({"messages": PLAIN, **given}, "does not use the field 'enable_thinking'", CHATML)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tools", "a knife", "field 'tools' must be a list of objects"),
        ("tools", ["knife"], "field 'tools' must be a list of objects"),
        ("documents", {"title": "x"}, "field 'documents' must be a list of objects"),
        ("enable_thinking", "no", "field 'enable_thinking' must be true or false"),
        ("chat_template_kwargs", {"messages": []}, "field 'chat_template_kwargs' must be an object"),
        ("tools", [{"name": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_fields_of_another_type_are_refused(field: str, value: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": PLAIN, field: value}) + "\n")
    with pytest.raises(ValueError, match="line 1: .*" + says):
        read_rows(tmp_path / "rows.jsonl")


def test_rows_that_go_through_no_template_cannot_say_such_things() -> None:
    plain = {"prompt": "High water?", "completion": " At 06:12."}
    refused({**plain, "tools": TOOLS}, "row 1: only a chat template uses tools")
    refused({"prompt": "a", "chosen": "b", "rejected": "c", "documents": TOOLS}, "uses documents", CHATML, "pairs")
    refused({"instruction": "a", "output": "b", "system": "Be kind."}, "field 'system' has no place")
    refused({**plain, "history": [["a", "b"]]}, "field 'history' has no place")
    refused({"messages": [{"role": "system", "content": "A"}, *PLAIN], "system": "B"}, "field 'system' is another")


def test_parts_that_a_template_drops_are_named() -> None:
    """One call of two, a system prompt whose words stand elsewhere, thinking in what is pretrained on."""
    first_name = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    function = {"name": "tide_table", "arguments": {"harbour": "Wick"}}
    calls = [{"id": f"call0000{i}", "type": "function", "function": function} for i in range(2)]
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]}
    refused(row, r"does not write the arguments of tool call 1", first_name)
    last_call = first_name.replace("m.tool_calls[0].function.name", "m.tool_calls[-1].function | tojson")
    refused(row, r"does not write the name of tool call 1", last_call)

    silent = CHATML.replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'system' %}")
    refused({"messages": [{"role": "system", "content": "At"}, *PLAIN]}, "does not write the content", silent)

    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nAt noon."}
    refused({"messages": [ASKED, thought, *PLAIN]}, "drops its thinking", THINKER, "pretrain")
    for field in ({"weight": 0}, {"train": False}, {"images": ["a.png"]}):
        with pytest.raises(ValueError, match="of a whole row is not implemented"):
            normalize({"messages": [ASKED, *PLAIN], **field})


def test_a_turn_that_is_not_to_be_trained_has_no_loss() -> None:
    wrong = {"role": "assistant", "content": "At noon."}
    for mark in ({"weight": 0}, {"train": False}, {"weight": 0.0, "train": 0}, {"loss": False}):
        assert trained({"messages": [ASKED, {**wrong, **mark}, *PLAIN]}, CHATML) == ["At 06:12.<|im_end|>"]
    for mark in ({"weight": 1}, {"train": True}, {"weight": None}):
        assert trained({"messages": [ASKED, {**wrong, **mark}, *PLAIN]}, CHATML) == [
            "At noon.<|im_end|>At 06:12.<|im_end|>"
        ]
    marked = "{% for m in messages %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% endfor %}"
    assert trained({"messages": [ASKED, {**wrong, "weight": 0}, *PLAIN]}, marked) == ["At 06:12.</s>"]
    for mark, says in (
        ({"weight": 0.5}, "weight must be 0 or 1, true or false, not 0.5"),
        ({"train": "no"}, "train must be 0 or 1"),
        ({"weight": 1, "train": False}, "weight and train contradict each other"),
    ):
        refused({"messages": [ASKED, {**ANSWER, **mark}]}, r"row 1: messages\[1\]: " + says)
    refused({"messages": [{**ASKED, "train": True}, ANSWER]}, "only the assistant's are trained")
    refused({"messages": [ASKED, {**ANSWER, "weight": 0}]}, "pretrain trains on every token", CHATML, "pretrain")
    sides = {"chosen": [{**ANSWER, "weight": 0}], "rejected": [wrong]}
    refused({"prompt": [ASKED], **sides}, "chosen: an answer is compared as a whole", CHATML, "pairs")


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "Ann"), ("reasoning_content", "Hm."), ("thinking", "Hm."), ("refusal", "No."), ("tool_calls", CALLS)],
)
def test_a_key_that_changes_what_a_message_says_is_written_or_refused(key: str, value: Any) -> None:
    row = {"messages": [ASKED, {**ANSWER, key: value}]}
    for objective in ("sft", "pretrain"):
        refused(row, rf"row 1: messages\[1\]: the chat template does not use '{key}'", CHATML, objective)
    written = CHATML.replace("m.content +", f"m.content + (m.{key} | tojson if m.{key} else '') +")
    assert str(value)[:3] in text(row, written) or "tide_table" in text(row, written)
    assert trained({"messages": [ASKED, {**ANSWER, key: None, "timestamp": "1 May"}]}, CHATML) == [
        "At 06:12.<|im_end|>"
    ]


def test_contents_that_a_template_drops_are_refused() -> None:
    no_tools = HEADERS.replace("for m in messages %}", "for m in messages if m.role != 'tool' %}")
    refused({"messages": [*PLAIN, {"role": "tool", "content": "06:12"}, ANSWER]}, "message of role 'tool'", no_tools)
    beside = [ASKED, {**CALLING, "content": "I look."}, *RESULTS, ANSWER]
    drops = THINKER.replace("{{- content }}", "{{- content if not m.tool_calls }}")
    refused({"messages": beside}, r"messages\[1\]: .* does not write the content .* role 'assistant'", drops)
    assert "I look.<tool_call>" in trained({"messages": beside})[0]


def test_tool_calls_and_what_answers_them() -> None:
    for content in ({}, {"content": None}, {"content": ""}):
        calling = {key: value for key, value in CALLING.items() if key != "content"} | content
        (loss,) = trained({"messages": [ASKED, calling, *RESULTS, ANSWER]})
        assert loss.startswith('<tool_call>tide_table{"harbour": "Wick"}</tool_call><tool_call>wind_force')
        assert loss.endswith("</tool_call><|im_end|>At 06:12.<|im_end|>")
    named = [{**result, "name": call["function"]["name"]} for result, call in zip(RESULTS, CALLS, strict=True)]
    assert trained({"messages": [ASKED, CALLING, *named, ANSWER]}) == [loss]
    named[0]["name"] = "wind_force"
    refused(
        {"messages": [ASKED, CALLING, *named, ANSWER]}, r"messages\[2\]: .*'name' \('wind_force', in answer to a call"
    )
    refused(
        {"messages": [ASKED, CALLING, *RESULTS[::-1], ANSWER]}, "put the answers of tools in the order of the calls"
    )
    by_id = THINKER.replace("<tool>' +", "<tool>' + m.tool_call_id +")
    assert trained({"messages": [ASKED, CALLING, *RESULTS[::-1], ANSWER]}, by_id) == [loss]
    refused({"messages": [ASKED, CALLING, {**RESULTS[0], "tool_call_id": "x"}, ANSWER]}, "'x' is the id of no call")
    for calls in ({"name": "a"}, [{"function": {}}], ["a"]):
        with pytest.raises(ValueError, match=r"messages\[0\]: tool_calls must be a list of calls"):
            normalize({"messages": [{"role": "assistant", "tool_calls": calls}]})


def test_content_is_text_parts_of_text_or_beside_calls_nothing() -> None:
    parts = [{"type": "text", "text": "At "}, {"type": "text", "text": "06:12."}]
    assert trained({"messages": [ASKED, {**ANSWER, "content": parts}]}) == ["At 06:12.<|im_end|>"]
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(ValueError, match=r"messages\[1\]: content holds a part that is no text \('image_url'\)"):
        normalize({"messages": [ASKED, {**ANSWER, "content": [*parts, image]}]})
    with pytest.raises(ValueError, match=r"messages\[1\]: field 'content' must be text, not null"):
        normalize({"messages": [ASKED, {**ANSWER, "content": None}]})


def pair(chosen: Row, rejected: Row, jinja: str = THINKER, **more: Any) -> tuple[str, str, str]:
    """Prompt and both answers of a comparison as they are encoded."""
    row = normalize({"prompt": [ASKED], "chosen": [chosen], "rejected": [rejected], **more})
    (example,), _ = encode([row], tokenizer(), "pairs", max_length=5000, template=ChatTemplate(jinja, **TOKENS))
    start, other = example["starts"]
    prompt = tokenizer().decode(example["chosen"][:start], False)
    assert prompt == tokenizer().decode(example["rejected"][:other], False)
    return prompt, *(
        tokenizer().decode(example[side][n:], False) for side, n in (("chosen", start), ("rejected", other))
    )


def test_comparisons_of_turns_with_calls_thinking_and_tools() -> None:
    prompt, chosen, rejected = pair(CALLING, ANSWER, tools=TOOLS)
    assert "Tides of a harbour" in prompt
    assert chosen.startswith("<tool_call>tide_table")
    assert rejected == "At 06:12.<|im_end|>"
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    prompt, chosen, rejected = pair({**ANSWER, "reasoning_content": "Hm."}, {**ANSWER, "content": "> "})
    assert prompt.endswith("assistant\n")
    assert chosen == "<think>\nHm.\n</think>\n\nAt 06:12.<|im_end|>"
    assert rejected == "<think>\n\n</think>\n\n> <|im_end|>"
    assert pair({**ANSWER, "content": "> "}, {**ANSWER, "reasoning_content": "Hm."}) == (prompt, rejected, chosen)
    thought = {**ANSWER, "content": "<think>\nHm.\n</think>\n\nAt 06:12."}
    prompt, chosen, _ = pair(thought, {**thought, "content": "<think>\nUm.\n</think>\n\nAt six."}, DISTILLED)
    assert (prompt[-9:], chosen) == ("|><think>\n"[-9:], "Hm.\n</think>\n\nAt 06:12.</s>")
    with pytest.raises(ValueError, match="no target left"):
        pair(ANSWER, {**ANSWER, "content": " "})
    with pytest.raises(ValueError, match="row 1: chosen must begin and end with a message of the assistant"):
        pair(ASKED, ANSWER)


def model_with(jinja: str | None) -> Any:
    return SimpleNamespace(tokens=SpecialTokens(ends=(1,), chat_template=jinja, names=TOKENS))


@pytest.mark.parametrize("jinja", [THINKER, HEADERS, DISTILLED, None])
def test_a_prompt_is_the_beginning_of_what_is_trained(jinja: str | None) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *PLAIN, {**ASKED, "content": "And at Fowey?"}]
    prompt = prompt_of({"messages": messages}, model_with(jinja))
    whole = text(
        {"messages": [*messages, {**ANSWER, "content": "<think>\nHm.\n</think>\n\nNo."}]}, jinja or DEFAULT_TEMPLATE
    )
    assert whole.startswith(prompt)
    assert len(prompt) > 40


def test_prompts_get_what_their_rows_say(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": PLAIN, "tools": TOOLS, "enable_thinking": False}) + "\n")
    (row,) = read_prompts(rows)
    prompt = prompt_of(row, model_with(THINKER))
    assert "Tides of a harbour" in prompt
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(ValueError, match="does not use the field 'tools'"):
        prompt_of(row, model_with(CHATML))
    rows.write_text(json.dumps({"prompt": "High water?", "tools": TOOLS}) + "\n")
    (row,) = read_prompts(rows)
    with pytest.raises(ValueError, match="only a chat template uses tools"):
        prompt_of(row, model_with(THINKER))
    assert "Tides of a harbour" in prompt_of(row, model_with(THINKER), chat=True)
    rows.write_text(json.dumps({"prompt": "High water?", "system": "Be kind."}) + "\n")
    with pytest.raises(ValueError, match="line 1: field 'system' has no place"):
        read_prompts(rows)
