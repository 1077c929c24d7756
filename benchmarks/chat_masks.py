"""Are the right tokens trained, for the chat templates that people use? Compared with templates that say so themselves.

    pip download --no-deps trl==1.16.0 && unzip trl-1.16.0-*.whl -d trl
    python benchmarks/chat_masks.py trl/trl/chat_templates [--out FILE.json]

The folder has pairs of templates: X.jinja as a model comes with it, and X_training.jinja, in which somebody has put
{% generation %} marks around what the assistant writes. Dialogues of 1 to 5 turns, with and without a system prompt,
tools and thinking (in a field of its own, or in the content), and with answers that are empty or look like markup, are
encoded under X, as `method = "sft"` does it. What gets a loss is compared with what transformers says is marked in the
rendering of the twin; what stands before it with the prompt that transformers makes of the dialogue before the turn.

A turn is "equal", or differs by rule, which is how a mark of the twin is read that is arguable:

    behind the end      what the template writes behind the token that ends the turn is no target (a line end)
    the end             that token is a target: behind tool calls, Gemma's twin leaves it out
    the prompt's        what the generation prompt writes already is no target
    the header          what stands before an answer and the generation prompt does not write is one
    empty thinking      an empty <think></think> that the template puts before an answer is no target
    thinking stays      the thinking in the row is a target, where the twin drops it
    as the last turn    a turn is trained as the last one of its dialogue, as which the model writes it

Or else the dialogue is refused, with the reason, which has to be true for transformers, too; or it is wrong.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Tokens of the templates that are no special ones in the models' tokenizers, though each is a whole.
PLAIN = {
    f"<{slash}{name}>" for slash in ("", "/") for name in ("think", "tool_call", "tool_response", "tools", "arg_key")
}
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide_table",
            "description": "Tides of a harbour",
            "parameters": {"type": "object", "properties": {"harbour": {"type": "string", "description": "its name"}}},
        },
    }
]
ANSWERS = {
    "usual": ["It is calm.", "The wind comes from the east.", "Not before noon.", "Yes.", "At the old pier."],
    "odd": [">", "", "<b>now</b>", "</s", "  two\n\nlines\n"],
}
TOKEN = re.compile(r"<[|｜][^<>{}\s']+?[|｜]>|<[a-z_]+\|>|<\|[a-z_]+>|</?s>|<\w+_of_\w+>|<sop>|\[gMASK\]")
EMPTY = re.compile(r"\s*<(\w+)>\s*</\1>\s*")
OPENED = re.compile(r"<\w+>\s*\Z")

Row = dict[str, Any]


def dialogue(turns: int, system: bool, tools: str, thinking: str, answers: str) -> Row:
    """A row as a data file has it."""
    messages: list[Row] = [{"role": "system", "content": "Speak like a sailor."}] if system else []
    for i in range(turns):
        messages.append({"role": "user", "content": f"Question {i + 1}: how is the sea?"})
        if tools:
            call = {"name": "tide_table", "arguments": {"harbour": f"Wick {i + 1}"}}
            calls = [{"id": f"call0000{i}", "type": "function", "function": call}]
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            messages.append({"role": "tool", "tool_call_id": f"call0000{i}", "name": "tide_table", "content": "06:12"})
        answer: Row = {"role": "assistant", "content": ANSWERS[answers][i]}
        if thinking in ("field", "asked"):
            answer["reasoning_content"] = f"I look out, for the {i + 1}. time."
        if thinking == "content":
            answer["content"] = f"<think>\nI look out, for the {i + 1}. time.\n</think>\n\n{answer['content']}"
        messages.append(answer)
    return {
        "messages": messages,
        **({"tools": TOOLS} if tools == "tools" else {}),
        **({"enable_thinking": True} if thinking == "asked" else {}),
    }


class Oracle:
    """transformers' rendering of a template, in whichever form of messages it shows all that they say."""

    def __init__(self, jinja: str) -> None:
        self.jinja = jinja

    def __call__(
        self, messages: list[Row], prompt: bool = False, **arguments: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        error: Exception = ValueError("it drops a text or a call of the dialogue")
        for as_text, nothing, parts in product((False, True), ({}, {"content": ""}, {"content": None}), (False, True)):
            try:
                (text,), (marks,) = render_jinja_template(
                    [[_formed(message, as_text, nothing, parts) for message in messages]],
                    chat_template=self.jinja, add_generation_prompt=prompt, return_assistant_tokens_mask=True,
                    **TOKENS, **arguments,
                )  # fmt: skip
            except Exception as caught:
                error = caught if isinstance(error, ValueError) else error
                continue
            asked = [message["content"] for message in messages if message["role"] == "user"]
            calls = sum(len(message.get("tool_calls", ())) for message in messages)
            if all(question in text for question in asked) and text.count("Wick") >= calls:
                return text, marks
        raise ValueError(str(error))


def _formed(message: Row, as_text: bool, nothing: Row, parts: bool) -> Row:
    formed = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in message:
        (call,) = message["tool_calls"]
        function = call["function"]
        arguments = json.dumps(function["arguments"]) if as_text else function["arguments"]
        formed["tool_calls"] = [{**call, "function": {**function, "arguments": arguments}}]
        if not message["content"]:
            formed.pop("content", None)
            return formed | nothing
    if parts:
        formed["content"] = [{"type": "text", "text": message["content"]}]
    return formed


def tokenizer_for(jinja: str) -> Any:
    """Bytes, and the special tokens that stand in a template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = set(
        re.findall(r"<[|｜][^<>{}\s']+?[|｜]>|<[a-z_]+\|>|<\|[a-z_]+>|</?s>|<\w+_of_\w+>|<sop>|\[gMASK\]", jinja)
    )
    tokenizer.add_special_tokens(sorted({*special, *TOKENS.values()} - PLAIN))
    tokenizer.add_tokens([AddedToken(token, special=False) for token in sorted(PLAIN)])
    return tokenizer


def targets(row: Row, template: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """Each stretch of text that gets a loss, and the text before it, of all examples of a row."""
    from handtune.engine.data.schema import normalize
    from handtune.engine.tasks.encode import encode

    examples, _ = encode([normalize(row)], tokenizer, "sft", max_length=100_000, template=template)
    stretches = []
    for example in examples:
        ids = [*example["input_ids"], -1]
        trained = [False, *(target >= 0 for target in example["targets"]), False]
        ids[1:] = [target if target >= 0 else token for target, token in zip(example["targets"], ids[1:], strict=True)]
        edges = [i for i in range(1, len(trained)) if trained[i] != trained[i - 1]]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            stretches.append(
                (tokenizer.decode(ids[:start], skip_special_tokens=False),
                 tokenizer.decode(ids[start:end], skip_special_tokens=False))
            )  # fmt: skip
    return stretches


def marked(twin: Oracle, messages: list[Row], turn: int, **arguments: Any) -> list[tuple[str, str, str]]:
    """What the twin marks of a turn, the text before and behind: within the whole dialogue, and as the last turn."""
    out = []
    for upto in (messages, messages[: turn + 1]):
        text, marks = twin(upto, **arguments)
        bounds = []
        for length in (turn, turn + 1):
            try:
                before = twin(messages[:length], **arguments)[0]
            except ValueError:
                before = ""
            bounds.append(len(_common(text, before)) if length < len(upto) else len(text))
        spans = [(start, end) for start, end in marks if end > bounds[0] and start < bounds[1]]
        first, last = (spans[0][0], spans[-1][1]) if spans else (len(text), len(text))
        out.append(("".join(text[start:end] for start, end in spans), text[:first], text[last:]))
    return out


def _common(first: str, second: str) -> str:
    return first[: next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))]


def rule(context: str, target: str, prompt: str, twin: tuple[str, str, str]) -> tuple[str, ...] | None:
    """The rules by which a target is what the twin marks; none: equal. None where it is something else.

    context: what stands before the target; prompt: what the model is given; twin: an entry of `marked`.
    """
    marks, before, after = twin
    header = OPENED.sub("", prompt)
    used = []
    near = before[-12:]
    size = next((n for n in range(len(marks), 0, -1) if header.endswith(near + marks[:n])), 0)
    if size:
        used.append("the prompt's")
    left = marks[size:]
    tail = header[-12:]
    gap = before[before.rfind(tail) + len(tail) :] if tail in before and not size else ""
    if gap and target.startswith(gap) and not left.startswith(gap):
        target = target[len(gap) :]
        used.append("the header")

    # What stands between the header of the turn and the target: nothing, or what the prompt opens, or no thinking.
    between = context[len(header) :]
    if "</think>" in target and "</think>" not in left:
        left = target[: target.index("</think>") + len("</think>")] + left
        used, between = [*used, "thinking stays"], ""
    if between:
        used.append("empty thinking" if EMPTY.fullmatch(between) else "the prompt's")
    elif (empty := EMPTY.match(left)) and not EMPTY.match(target):
        left = left[empty.end() :]
        used.append("empty thinking")

    whole = between + target
    if (ending := whole.removeprefix(left)) and len(ending) == len(whole) - len(left) and after.startswith(ending):
        return (*used, "the end") if TOKEN.fullmatch(ending) else None
    behind = left.removeprefix(whole)
    if len(behind) != len(left) - len(whole) or behind.replace(TOKENS["eos_token"], "").strip():
        return None
    return (*used, "behind the end") if behind else tuple(used)


def answers_to(prompt: str, context: str) -> bool:
    """Whether a target's context is the prompt, less the thinking that it opens, or with empty thinking behind it."""
    header = OPENED.sub("", prompt)
    return context in (prompt, header) or (
        context.startswith(header) and EMPTY.fullmatch(context, len(header)) is not None
    )


class Pair:
    """A template, and its twin with marks."""

    def __init__(self, folder: Path, name: str) -> None:
        from handtune.engine.chat.template import ChatTemplate

        jinja = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        self.template = ChatTemplate(jinja, **TOKENS)
        self.tokenizer = tokenizer_for(jinja)
        self.original = Oracle(jinja)
        self.twin = Oracle((folder / f"{name}_training.jinja").read_text(encoding="utf-8"))

    def outcome(self, row: Row) -> tuple[str, str]:
        """What became of a dialogue: equal, by rule, refused or wrong, and by which rule or why."""
        messages = row["messages"]
        arguments = {name: value for name, value in row.items() if name != "messages"}
        try:
            stretches = targets(row, self.template, self.tokenizer)
        except ValueError as error:
            reason = re.sub(r"row 1: |messages\[\d+\](: )?|\d+ messages \(.*?\)", "", str(error)).partition(";")[0]
            return ("refused" if self._is_true(reason, messages, arguments) else "wrong"), reason
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(stretches) != len(turns):
            return "wrong", f"{len(stretches)} targets for {len(turns)} turns"

        used: set[str] = set()
        for turn in turns:
            prompt = self.original(messages[:turn], True, **arguments)[0]
            fitting = [stretch for stretch in stretches if answers_to(prompt, stretch[0])]
            twins = marked(self.twin, messages, turn, **arguments)
            readings = [
                (*by, *(["as the last turn"] if last else []))
                for last, twin in enumerate(twins)
                for context, target in fitting
                if (by := rule(context, target, prompt, twin)) is not None
            ]
            if not readings:
                return "wrong", f"turn {turn}: {[text for _, text in fitting]!r} where {[twin[0] for twin in twins]!r}"
            used |= set(readings[0])
        return ("by rule", ", ".join(sorted(used))) if used else ("equal", "")

    def _is_true(self, reason: str, messages: list[Row], arguments: Row) -> bool:
        """Whether the reason of a refusal holds in transformers, too."""
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if match := re.search(r"without the (\S+) that ends", reason):
            calling = [turn for turn in turns if "tool_calls" in messages[turn]]
            texts = [self.original(messages[: turn + 1], **arguments)[0] for turn in calling]
            return len({text.rstrip().endswith(match[1]) for text in texts}) == 2
        if "begins" in reason:  # an answer otherwise than its prompt
            asked = [OPENED.sub("", self.original(messages[:turn], True, **arguments)[0]) for turn in turns]
            texts = [self.original(messages[: turn + 1], **arguments)[0] for turn in turns]
            return not all(text.startswith(prompt) for text, prompt in zip(texts, asked, strict=True))
        without = [{key: value for key, value in message.items() if f"'{key}'" not in reason} for message in messages]
        named = {name: value for name, value in arguments.items() if f"'{name}'" not in reason}
        if "tool_calls" in reason:
            return "tool_calls" not in self.original.jinja
        try:
            same = self.original(messages, **arguments) == self.original(without, **named)
            return "does not use" in reason and same
        except ValueError:
            return "cannot render" in reason or "tools" in reason


def rows(asks: bool) -> Iterator[tuple[str, Row]]:
    """The dialogues, and in short what they have; `asks`: also with the wish that the model thinks.

    Calls of tools come with the list of tools and without, as some templates write calls and no list.
    """
    thoughts = ("", "field", "content", *(["asked"] if asks else []))
    for system, tools, thinking, answers in product((False, True), ("", "calls", "tools"), thoughts, ANSWERS):
        if answers == "odd" and (tools or thinking):
            continue
        for turns in range(1, 6):
            traits = [answers] * (answers == "odd") + ["system"] * system + [tools] * bool(tools)
            traits += [f"thinking: {thinking}"] * bool(thinking)
            yield " + ".join(traits or ["plain"]), dialogue(turns, system, tools, thinking, answers)


def main() -> None:
    sys.path[0] = str(ROOT)  # the package from a bare clone; the folder `benchmarks` itself is not wanted there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out")
    options = parser.parse_args()

    totals: Counter[str] = Counter()
    results: dict[str, dict[str, dict[str, int]]] = {}
    for path in sorted(options.folder.glob("*_training.jinja")):
        name = path.stem.removesuffix("_training")
        pair = Pair(options.folder, name)
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("equal", "by rule", "refused", "wrong")}
        for traits, row in rows("enable_thinking" in pair.template.variables):
            kind, detail = pair.outcome(row)
            counts[kind][f"{traits}: {detail}" if kind == "wrong" else detail] += 1
        results[name] = {kind: dict(details) for kind, details in counts.items()}
        sums = {kind: details.total() for kind, details in counts.items()}
        totals.update(sums)
        print(f"{name:24}" + "".join(f"{kind} {number:4}   " for kind, number in sums.items()), flush=True)
        for kind in ("by rule", "refused", "wrong"):
            for detail, number in counts[kind].most_common():
                print(f"{'':8}{kind} {number:3}  {detail}")
    print("\n" + ", ".join(f"{kind} {number}" for kind, number in totals.items()) + f", of {totals.total()}")
    if options.out:
        facts = {
            "benchmark": "chat_masks", "transformers": version("transformers"), "jinja2": version("jinja2"),
            "templates": "trl 1.16.0", "totals": dict(totals), "results": results,
        }  # fmt: skip
        Path(options.out).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
