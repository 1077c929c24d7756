"""Chat templates: rendering and masks, compared with transformers, and what is refused."""

import pytest
from small_tokenizers import byte_level

from handtune.engine.chat.template import ChatTemplate, token_mask
from handtune.engine.chat.turns import ChatTargets

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello, what is the capital of France?"},
    {"role": "assistant", "content": "The capital is Paris."},
    {"role": "user", "content": "thank you "},
    {"role": "assistant", "content": "  You are welcome!\n"},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_MARKED = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation -%}
        {{ message.content }}{{ '<|im_end|>' }}
        {%- endgeneration -%}
        {{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
INSTRUCT = """\
{{ bos_token }}{% set ns = namespace(system='') %}
{% for message in messages %}
  {% if message['role'] == 'system' %}
    {% set ns.system = message['content'] %}
    {% continue %}
  {% endif %}
  {% if message['role'] == 'user' %}
[INST] {{ (ns.system + '\\n\\n' if loop.index0 == 1 else '') + message['content'] | trim }} [/INST]
  {% else %}
{% generation %} {{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
  {% endif %}
{% endfor %}
{{ {'date': '<' + strftime_now('%Y') + '>'} | tojson }}
"""
TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|end|>"}


def spans_text(template: ChatTemplate, messages: list) -> list[str]:
    """What the assistant writes in a dialogue that gives one example."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    (whole,) = ChatTargets(template, byte_level()).trained(messages, turns)
    assert whole.text == template.render(messages[: turns[-1] + 1])
    return [whole.text[start:end] for start, end in whole.spans]


@pytest.mark.parametrize("source", [CHATML, CHATML_MARKED, INSTRUCT])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_as_transformers(source, add_generation_prompt):
    tokenizer = fast_tokenizer(source)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ChatTemplate(source, **TOKENS).render(CHAT, add_generation_prompt) == expected


@pytest.mark.parametrize("source", [CHATML_MARKED, INSTRUCT])
def test_marked_mask_is_that_of_transformers(source):
    expected = fast_tokenizer(source).apply_chat_template(
        CHAT, return_dict=True, tokenize=True, return_assistant_tokens_mask=True
    )
    text, spans = ChatTemplate(source, **TOKENS).render_marked(CHAT)
    encoding = byte_level().encode(text, add_special_tokens=False)
    assert encoding.ids == expected["input_ids"]
    assert token_mask(encoding.offsets, spans) == [bool(flag) for flag in expected["assistant_masks"]]
    assert 0 < len(spans) < sum(token_mask(encoding.offsets, spans)) < len(encoding.ids)
    whole = byte_level(trim_offsets=False).encode(text, add_special_tokens=False)
    assert token_mask(whole.offsets, spans) == token_mask(encoding.offsets, spans)


def fast_tokenizer(source: str):
    transformers = pytest.importorskip("transformers")
    # Untrimmed: where a turn begins with a space, transformers finds no token at a trimmed space and masks nothing.
    untrimmed = byte_level(trim_offsets=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=untrimmed, chat_template=source, **TOKENS)


def test_prefixes_give_the_spans_that_marks_give():
    expected = ["The capital is Paris.<|im_end|>", "  You are welcome!\n<|im_end|>"]
    assert spans_text(ChatTemplate(CHATML), CHAT) == expected
    assert spans_text(ChatTemplate(CHATML_MARKED), CHAT) == expected


def test_without_end_marker_the_line_end_is_the_end_of_turn():
    source = "{% for m in messages %}{{ m.role + '> ' + m.content + '\\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant> {% endif %}"
    assert spans_text(ChatTemplate(source), CHAT) == ["The capital is Paris.\n", "  You are welcome!\n\n"]


def test_default_template():
    template = ChatTemplate(eos_token="<|end|>")
    assert template.render(CHAT[:4], add_generation_prompt=True) == (
        "System: Be kind.\nUser: Hello, what is the capital of France?\nAssistant: The capital is Paris.<|end|>\n"
        "User: thank you \nAssistant:"
    )
    assert spans_text(template, CHAT) == [" The capital is Paris.<|end|>", "   You are welcome!\n<|end|>"]
    prompt = byte_level().encode(template.render(CHAT[:2], add_generation_prompt=True)).ids
    assert byte_level().encode(template.render(CHAT)).ids[: len(prompt)] == prompt


def test_conversation_without_assistant_has_no_spans():
    for source in (CHATML, CHATML_MARKED):
        assert ChatTargets(ChatTemplate(source), byte_level()).trained(CHAT[:2], []) == []


def test_a_special_token_that_nobody_defines_may_be_asked_for_but_not_written():
    """Where transformers writes nothing: a text without its beginning, or turns without an end."""
    message = [{"role": "user", "content": "a"}]
    asks = "{% if bos_token %}{{ bos_token }}{% endif %}{{ bos_token is defined }}{{ bos_token | default('-') }}"
    assert ChatTemplate(asks).render(message) == "False-"
    assert ChatTemplate(asks, bos_token="<s>").render(message) == "<s>True<s>"
    for writes in ("{{ bos_token }}", "{{ 'a' + bos_token }}", "{{ 'a' ~ bos_token }}", "{{ [bos_token] | join }}"):
        with pytest.raises(ValueError, match="cannot render 1 messages .*bos_token"):
            ChatTemplate(writes).render(message)
        assert "<s>" in ChatTemplate(writes, bos_token="<s>").render(message)
    assert ChatTemplate("{{ other }}{{ messages[0].end_token }}").render(message) == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only users may speak') }}", "cannot render 5 messages .*: only users may speak"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages[0].content + 3 }}", "cannot render"),
        ("{{ messages[0]['nothing']['more'] }}", "cannot render .*nothing"),
    ],
)
def test_a_template_that_fails_or_escapes_is_refused_in_one_line(source, message):
    with pytest.raises(ValueError, match=message) as error:
        ChatTemplate(source).render(CHAT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["line\n{% for %}", "a\n{% generation %}x"])
def test_broken_template_names_its_line(source):
    with pytest.raises(ValueError, match="chat template line 2: "):
        ChatTemplate(source)


def test_a_message_cannot_forge_marks():
    forged = [{"role": "user", "content": "\ue0e0\ue0e1\ue0e0 mine"}, CHAT[2]]
    with pytest.raises(ValueError, match="private-use characters"):
        ChatTemplate(CHATML_MARKED).render(forged)
    assert spans_text(ChatTemplate(CHATML), forged) == ["The capital is Paris.<|im_end|>"]


def test_null_keys_are_missing_keys():
    source = "{% for m in messages %}{{ m.content }}{% if m.tool_calls is defined %}CALL{% endif %}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": "a", "tool_calls": None}]) == "a"


CALL = {"id": "c1", "type": "function", "function": {"name": "tide_table", "arguments": {"harbour": "Wick"}}}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["absent", "null", "empty"])
@pytest.mark.parametrize("arguments", [{"harbour": "Wick"}, '{"harbour": "Wick"}'], ids=["object", "text"])
@pytest.mark.parametrize(
    "source",
    [
        "{% if m.content %}{{ m.content }}{% endif %}{{ call.function.arguments | tojson }}",
        "{{ m.content + call.function.arguments }}",
        "{% if m.content is none %}{{ '' + call.function.arguments }}{% endif %}",
        "{% for k, v in call.function.arguments.items() %}{{ '{\"' + k + '\": \"' + v + '\"}' }}{% endfor %}",
    ],
)
def test_calls_are_given_in_the_form_that_a_template_writes(source, arguments, content):
    """Arguments as an object or as text, and whatever stands for no content, mean the same."""
    loop = "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.name }}SOURCE{% endfor %}"
    template = ChatTemplate(loop.replace("SOURCE", source) + "{{ m.content if not m.tool_calls }}{% endfor %}")
    call = {**CALL, "function": {**CALL["function"], "arguments": arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call], **content}]
    assert template.render(messages) == '?tide_table{"harbour": "Wick"}'


def test_content_is_given_in_the_form_that_a_template_writes():
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    for source in (parts, "{% for m in messages %}{{ m.content }}{% endfor %}"):
        for content in ("one two", [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]):
            assert ChatTemplate(source).render([{"role": "user", "content": content}]) == "one two"


def test_reasoning_goes_by_all_of_its_names():
    for written, read in (("reasoning_content", "thinking"), ("reasoning", "reasoning_content")):
        template = ChatTemplate(f"{{% for m in messages %}}{{{{ m.content + m.{read} }}}}{{% endfor %}}")
        assert template.render([{"role": "assistant", "content": "a", written: "b"}]) == "ab"


def test_token_mask_counts_trimmed_spaces_as_the_character_before():
    # "ab" " " "cd" with the space's offsets trimmed to (3, 3)
    offsets = [(0, 2), (3, 3), (3, 5)]
    assert token_mask(offsets, [(3, 5)]) == [False, False, True]
    assert token_mask(offsets, [(0, 3)]) == [True, True, False]
    assert token_mask(offsets, [(1, 2), (4, 5)]) == [True, False, True]
    assert token_mask(offsets, []) == [False] * 3
