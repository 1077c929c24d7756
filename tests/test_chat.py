"""Chat templates: rendering and masks, compared with transformers, and what is refused."""

import pytest
from small_tokenizers import byte_level

from handtune.engine.chat import ChatTemplate, token_mask

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
    text, spans = template.spans(messages)
    assert text == template.render(messages)
    return [text[start:end] for start, end in spans]


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
    text, spans = ChatTemplate(source, **TOKENS).spans(CHAT)
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
        assert ChatTemplate(source).spans(CHAT[:2])[1] == []


THINKING = (
    "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last else m.content.split('</think>')[-1]) + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_template_that_rewrites_earlier_turns_is_refused():
    thought = [dict(message) for message in CHAT]
    thought[2]["content"] = "I think</think>Paris."
    with pytest.raises(ValueError, match=r"renders messages\[2\] differently within the conversation"):
        ChatTemplate(THINKING).spans(thought)
    assert spans_text(ChatTemplate(THINKING), thought[:3]) == ["I think</think>Paris.\n"]
    assert spans_text(ChatTemplate(THINKING), CHAT[:4]) == ["The capital is Paris.\n"]


def test_template_whose_turn_does_not_follow_its_generation_prompt_is_refused():
    source = CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant: ' }}{% endif")
    with pytest.raises(ValueError, match=r"messages\[2\]"):
        ChatTemplate(source).spans(CHAT)


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
        ChatTemplate(CHATML_MARKED).spans(forged)
    assert spans_text(ChatTemplate(CHATML), forged) == ["The capital is Paris.<|im_end|>"]


def test_null_keys_are_missing_keys():
    source = "{% for m in messages %}{{ m.content }}{% if m.tool_calls is defined %}CALL{% endif %}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": "a", "tool_calls": None}]) == "a"


def test_token_mask_counts_trimmed_spaces_as_the_character_before():
    # "ab" " " "cd" with the space's offsets trimmed to (3, 3)
    offsets = [(0, 2), (3, 3), (3, 5)]
    assert token_mask(offsets, [(3, 5)]) == [False, False, True]
    assert token_mask(offsets, [(0, 3)]) == [True, True, False]
    assert token_mask(offsets, [(1, 2), (4, 5)]) == [True, False, True]
    assert token_mask(offsets, []) == [False] * 3
