"""Chat templates of the kinds that people use, written for this project, each with what its answers are by hand.

`answers(message)` is what the assistant writes in a turn, from what the generation prompt leaves it to the token that
ends the turn; `prompted` is how much of that the generation prompt has opened already.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

Message = dict[str, Any]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "tide_table", "description": "Tides of a harbour"}}]
SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|header|>", "<|/header|>", "<|eot|>",
    "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|end|>", "<|start|>",
    "<|message|>", "<|channel|>", "<|return|>", "<|call|>",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A template; what it can render; and its answers."""

    jinja: str
    end: str
    answers: Callable[[Message], str]
    tools: bool = False
    thinking: tuple[str, ...] = ("", "content")  # where the assistant's thinking may stand
    system: bool = True


@cache
def tokenizer() -> Tokenizer:
    """Bytes, and the special tokens of the templates; <think> and <tool_call> are whole, too, and not special."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    plain = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(token, special=False) for token in plain])
    return tokenizer


def thoughts(message: Message) -> tuple[str, str]:
    """The thinking of a turn and what it says then, wherever the thinking stands."""
    thinking, closed, content = message.get("content", "").rpartition("</think>")
    if closed:
        return thinking.removeprefix("<think>").strip("\n"), content.lstrip("\n")
    return message.get("reasoning_content", ""), content


def arguments_of(call: Message) -> str:
    return json.dumps(call["function"]["arguments"], ensure_ascii=False)


CHATML = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Qwen3's kind: turns before the last question lose their thinking, the last turn has at least an empty one.
THINKER = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}{{ '<|im_start|>system\\n' + system + 'Tools:\\n' }}
    {%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif system %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages if m.role != 'system' %}
    {%- set content, thinking = m.content, m.reasoning_content or '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
        {%- if loop.index0 + (1 if system else 0) > ns.last and (loop.last or thinking) %}
            {{- '<think>\\n' + thinking + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool>' + content + '</tool><|im_end|>\\n' }}
    {%- else %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

# DeepSeek's kind: the prompt opens the thinking, which all turns lose; calls have arguments as text and null content.
DISTILLED = """\
{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'tool' %}{{ '<|observation|>' + m.content }}
{%- elif m.content is none %}{{ '<|Assistant|>' }}{% for call in m.tool_calls %}
    {{- '<|call|>' + call.function.name + ' ' + call.function.arguments + '</s>' }}{% endfor %}
{%- else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- if messages[0].role != 'system' %}{{ '<|header|>system<|/header|>\\n\\nToday.<|eot|>' }}{% endif %}
{%- for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}
"""

BRACKETS = """\
{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}
{%- elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}
"""

# GLM's kind: no turn has an end, the next role's token ends it.
ENDLESS = """\
{%- for tool in tools or [] %}{{ '<|system|>' + tool | tojson }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}
    {%- endfor %}
{%- else %}{{ '<|' + {'tool': 'observation'}.get(m.role, m.role) + '|>\\n' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

# Phi-3's kind: the dialogue has an end behind that of its last turn.
CLOSED = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""

# gpt-oss' kind: the last turn ends otherwise than those before it, and a call otherwise than an answer.
CHANNELS = """\
{%- if tools %}{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
    {%- set call = m.tool_calls[0].function %}
    {{- '<|start|>assistant to=' + call.name + '<|message|>' + call.arguments | tojson + '<|call|>' }}
{%- elif m.role == 'assistant' %}
    {%- if loop.last and m.thinking is defined %}
        {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
    {%- endif %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
    {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""

# A template for images, too: content is a list of parts.
PARTS = """\
{%- for m in messages %}{{ m.role | capitalize + ': ' }}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{{- '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""

PLAIN = """\
{%- for m in messages %}{{ m.role + '> ' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}
"""


def _thought(message: Message) -> str:
    thinking, content = thoughts(message)
    calls = "".join(
        f"<tool_call>{call['function']['name']}{arguments_of(call)}</tool_call>"
        for call in message.get("tool_calls", ())
    )
    return (f"<think>\n{thinking}\n</think>\n\n" if thinking else "") + content + calls + "<|im_end|>"


def _distilled(message: Message) -> str:
    if "tool_calls" in message:
        return "".join(f"<|call|>{call['function']['name']} {arguments_of(call)}</s>" for call in message["tool_calls"])
    return message["content"].removeprefix("<think>\n") + "</s>"


def _endless(message: Message) -> str:
    calls = "".join(
        f"<tool_call>{call['function']['name']}{arguments_of(call)}</tool_call>"
        for call in message.get("tool_calls", ())
    )
    return "\n" + message.get("content", "") + calls + ("<|observation|>" if calls else "<|user|>")


def _channels(message: Message) -> str:
    if calls := message.get("tool_calls"):
        return f" to={calls[0]['function']['name']}<|message|>{arguments_of(calls[0])}<|call|>"
    thinking = message.get("reasoning_content")
    analysis = f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant" if thinking else ""
    return analysis + "<|channel|>final<|message|>" + message["content"] + "<|return|>"


BOTH = ("", "field", "content")
KINDS = {
    "chatml": Kind(CHATML, "<|im_end|>", lambda m: m["content"] + "<|im_end|>"),
    "thinker": Kind(THINKER, "<|im_end|>", _thought, tools=True, thinking=BOTH),
    "distilled": Kind(DISTILLED, "</s>", _distilled, tools=True),
    "headers": Kind(HEADERS, "<|eot|>", lambda m: m["content"].strip() + "<|eot|>"),
    "brackets": Kind(BRACKETS, "</s>", lambda m: f" {m['content']}</s>"),
    "endless": Kind(ENDLESS, "<|user|>", _endless, tools=True),
    "closed": Kind(CLOSED, "<|end|>", lambda m: m["content"] + "<|end|>"),
    "channels": Kind(CHANNELS, "<|return|>", _channels, tools=True, thinking=("", "field")),
    "parts": Kind(PARTS, "<|end|>", lambda m: f" {m['content']}<|end|>"),
}
