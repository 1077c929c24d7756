"""Damage for files: of every kind that handtune reads, drawn from a seed.

A change says what may come of it. `may_pass`: whatever the command makes of it, in one line and without a traceback.
`refused`: a length, shape or offset is wrong, and nothing but a refusal is right. `named`: a number is NaN or infinite,
and the refusal says so.
"""

import json
import math
import os
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAY_PASS, PASSES, REFUSED, NAMED = "may pass", "passes", "refused", "named"
DEEP = 100_000  # lists in a list: more than any parser goes down
DIGITS = "9" * 5000  # more than Python converts
VALUES: list[Any] = [
    None, True, False, [], {}, "", "x", -1, 0, 1, 2, 7, 10**6, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e300, math.nan,
    math.inf, -math.inf, [0], [[]], [None], ["x"], ["x", 1], [1, 2, 3], {"x": 1}, {"x": {}}, {"": None}, [{}], " ",
    "NaN", "1", "\ud800", "\x1b[31mred\x1b[0m", "\x00", "a\nb", "../..", "/dev/zero", "x" * 10_000, "(a*)*b", "(",
]  # fmt: skip
TEMPLATES = [
    "{% for i in range(1000000000) %}x{% endfor %}", "{{ 'x' * 10000000000 }}", "{{ messages.nothing.at.all }}",
    "{% if",
    "{{ messages[99] }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ ''.__class__ }}", "{% include 'x' %}",
    "{{ unknown() }}", "{{ messages | nothing }}", "{% set x = messages.pop() %}", "{{ 'x'.encode() + 1 }}", "\x00",
    "{{ [].append(1) }}", "{{ 2 ** 100000000 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(9 ** 9) | list }}",
]  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What becomes of a file: other contents, or something else under its name (`kind`)."""

    what: str
    contents: bytes = b""
    kind: str = "file"
    outcome: str = MAY_PASS


class Raw(str):
    """JSON text that stands as it is where a value is expected."""


def change_of(path: Path, generator: random.Random) -> Change:
    """A change of the file at `path`, which differs from what is there."""
    contents = path.read_bytes()
    for _ in range(100):
        change = _drawn(path, contents, generator)
        if change.kind != "file" or change.contents != contents:
            return change
    raise AssertionError(f"{path}: nothing to change")


def put(path: Path, change: Change) -> None:
    """Make the change where it belongs."""
    path.unlink()
    if change.kind == "file":
        path.write_bytes(change.contents)
    elif change.kind == "folder":
        path.mkdir()
    elif change.kind == "pipe":
        os.mkfifo(path)
    elif change.kind == "loop":
        path.symlink_to(path.name)
    elif change.kind == "device":
        path.symlink_to("/dev/zero")


def _drawn(path: Path, contents: bytes, generator: random.Random) -> Change:
    by_suffix: dict[str, Callable[[bytes, random.Random], Change]] = {
        ".json": _json, ".jsonl": _jsonl, ".toml": _toml, ".safetensors": _safetensors, ".jinja": _template,
        ".csv": _text, ".tsv": _text, ".conll": _text, ".txt": _text,
    }  # fmt: skip
    kind = by_suffix.get(path.suffix)
    draw = generator.random()
    if draw < 0.06:
        kind_of = generator.choice(["folder", "pipe", "loop", "device", "missing"])
        return Change(f"a {kind_of} in its place", kind=kind_of)
    if kind is not None and draw < 0.8:
        return kind(contents, generator)
    return _bytes(contents, generator)


def _bytes(contents: bytes, generator: random.Random) -> Change:
    """Bytes flipped, cut off, doubled, left out; other encodings."""
    ways = ["flip", "cut", "double", "drop", "zero", "empty", "mark", "utf-16", "crlf", "latin", "blanks"]
    way = generator.choice(ways)
    first = generator.randrange(len(contents) + 1)
    end = min(len(contents), first + generator.choice([1, 2, 10, 100, 1000]))
    if way == "flip":
        changed = bytearray(contents)
        for _ in range(generator.choice([1, 1, 3, 20])):
            if changed:
                changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        return Change("bits flipped", bytes(changed))
    if way == "cut":
        return Change(f"cut at byte {first}", contents[:first])
    if way == "double":
        return Change(f"bytes {first} to {end} doubled", contents[:end] + contents[first:end] + contents[end:])
    if way == "drop":
        return Change(f"bytes {first} to {end} dropped", contents[:first] + contents[end:])
    if way == "zero":
        return Change(f"bytes {first} to {end} zero", contents[:first] + bytes(end - first) + contents[end:])
    if way == "utf-16":
        return Change("as UTF-16", contents.decode("utf-8", "replace").encode("utf-16"))
    other = {
        "empty": b"", "mark": b"\xef\xbb\xbf" + contents, "crlf": contents.replace(b"\n", b"\r\n"),
        "latin": contents[:first] + b"\xe9" + contents[first:], "blanks": b" \n\t\n",
    }  # fmt: skip
    return Change({"mark": "a byte-order mark"}.get(way, way), other[way])


def _json(contents: bytes, generator: random.Random) -> Change:
    try:
        value = json.loads(contents)
    except ValueError:
        return _bytes(contents, generator)
    what, text = _json_text(value, generator)
    return Change(what, text)


def _jsonl(contents: bytes, generator: random.Random) -> Change:
    """One line changed as JSON, doubled, left out, or something that is none put in."""
    lines = contents.split(b"\n")
    number = generator.randrange(max(1, len(lines) - 1))
    way = generator.choice(["value"] * 6 + ["double", "drop", "junk"])
    if way == "value":
        try:
            what, lines[number] = _json_text(json.loads(lines[number]), generator)
        except ValueError:
            return _bytes(contents, generator)
        return Change(f"line {number + 1}: {what}", b"\n".join(lines))
    if way == "junk":
        lines[number] = generator.choice([b"[]", b"null", b"3", b'"x"', b"{", b"{}", b"\x1b[31m", b"NaN", b"[" * DEEP])
    else:
        lines[number : number + 1] = [lines[number]] * 2 if way == "double" else []
    return Change(f"line {number + 1}: {way}", b"\n".join(lines))


def _json_text(value: Any, generator: random.Random) -> tuple[str, bytes]:
    """A JSON value with one thing changed somewhere in it; what was changed, and the text."""
    what = _change_inside(holder := [value], generator)
    return what, _dumped(holder[0]).encode("utf-8", "surrogatepass")


def _change_inside(holder: list[Any], generator: random.Random) -> str:
    """Change one thing in the value that `holder` has."""
    # Down at random: fields of outer objects are changed as often as those of inner ones.
    container, key, name = holder, 0, ""
    while isinstance(inner := container[key], dict | list) and inner and generator.random() < 0.8:
        key = generator.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        container, name = inner, f"{name}.{key}"
    way = generator.choice(["swap"] * 6 + ["delete", "unknown", "repeat", "deep", "digits", "near"])
    if way == "delete" and name:
        del container[key]
    elif way == "unknown" and isinstance(container, dict):
        container[generator.choice(["unknown", "\x1b[31m", "\ud800", "", "label", "text", "x" * 5000])] = 1
    elif way == "repeat" and isinstance(container, dict):
        container[key] = Raw(f"{_dumped(container[key])}, {_dumped(str(key))}: {_dumped(generator.choice(VALUES))}")
    elif way == "deep":
        container[key] = Raw("[" * DEEP + "]" * DEEP if generator.random() < 0.5 else '{"a":' * 990 + "1" + "}" * 990)
    elif way == "digits":
        container[key] = Raw(generator.choice([DIGITS, "-" + DIGITS, "1e999", "0." + DIGITS]))
    elif way == "near" and type(container[key]) in (int, float):
        container[key] = generator.choice([container[key] + 1, container[key] - 1, -container[key], container[key] * 2])
    else:
        way = "swap"
        container[key] = generator.choice(VALUES)
    return f"{name or 'all'}: {way} {_dumped(container[key])[:60] if way not in ('delete', 'unknown') else ''}"


def _dumped(value: Any) -> str:
    """JSON in which `Raw` stands as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_dumped(str(key))}: {_dumped(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_dumped, value)) + "]"
    return json.dumps(value)


def _toml(contents: bytes, generator: random.Random) -> Change:
    try:
        value = tomllib.loads(contents.decode())
    except ValueError:
        return _bytes(contents, generator)
    what = _change_inside(holder := [value], generator)
    table = holder[0]
    if not isinstance(table, dict):
        return _bytes(contents, generator)
    return Change(what, _toml_text(table).encode("utf-8", "replace"))


def _toml_text(table: dict[str, Any]) -> str:
    """TOML, tables written inline. What it has no form for becomes a text."""

    def value(item: Any) -> str:
        if isinstance(item, Raw):
            return str(item)
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{json.dumps(str(key))} = {value(inner)}" for key, inner in item.items()) + " }"
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        if isinstance(item, float):
            return str(item) if math.isfinite(item) else repr(item).replace("nan", "nan")
        return '"null"' if item is None else json.dumps(item)

    return "".join(f"{json.dumps(str(key))} = {value(item)}\n" for key, item in table.items())


def _text(contents: bytes, generator: random.Random) -> Change:
    """A line or a separator too many or too few, quotes, control characters."""
    lines = contents.decode("utf-8", "replace").split("\n")
    number = generator.randrange(len(lines))
    line, way = lines[number], generator.choice(["insert"] * 4 + ["replace", "double", "drop", "empty"])
    signs = ['"', ",", "\t", "\r", "\0", "\x1b[31m", "\u2028", "'", " ", "\x0c", "NaN", "x" * 200_000]
    if way == "insert":
        at, sign = generator.randrange(len(line) + 1), generator.choice(signs)
        lines[number] = line[:at] + sign + line[at:]
        way += f" {sign[:10]!r}"
    elif way == "replace":
        lines[number] = generator.choice(["", ",,,,", "\t\t\t", '"', "text,label", "-DOCSTART-", "nan,inf", "\ufffe"])
    else:
        lines[number : number + 1] = {"double": [line, line], "drop": [], "empty": [line, ""]}[way]
    return Change(f"line {number + 1}: {way}", "\n".join(lines).encode())


def _template(contents: bytes, generator: random.Random) -> Change:
    text = generator.choice(TEMPLATES)
    if generator.random() < 0.5:
        return Change(f"template {text[:40]!r}", text.encode())
    return Change(f"template with {text[:40]!r}", contents + text.encode())


def _safetensors(contents: bytes, generator: random.Random) -> Change:
    """A header that doesn't fit, names and dtypes that are others, numbers that are none."""
    length = int.from_bytes(contents[:8], "little")
    header, body = json.loads(contents[8 : 8 + length]), bytearray(contents[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    name = generator.choice(names)
    entry = header[name]
    way = generator.choice([
        "length", "length", "cut", "longer", "shape", "shape", "offset", "offset", "dtype", "field", "value", "value",
        "rename", "drop", "swap", "not finite", "not finite", "junk",
    ])  # fmt: skip
    outcome = REFUSED
    if way == "length":
        other = generator.choice([0, 1, length - 1, length + 1, 2**40, 2**64 - 1, len(contents) - 8])
        return Change(f"header length {other}", other.to_bytes(8, "little") + contents[8:], outcome=REFUSED)
    if way in ("cut", "longer"):
        at = generator.randrange(len(contents))
        changed = contents[:at] if way == "cut" else contents + bytes(generator.choice([1, 8, 100]))
        return Change(f"{way} at {at}", changed, outcome=REFUSED)
    if way == "shape":
        shape = list(entry["shape"])
        others = [[*shape, 2], [2**40, *shape], [*shape[1:], 3], [-1, *shape[1:]], [*shape, 0], [2**63] * 3, None, "x"]
        entry["shape"] = generator.choice(others)
    elif way == "offset":
        first, end = entry["data_offsets"]
        others = [
            [first + 4, end + 4], [first, end + 4], [first, end - 4], [end, first], [-4, end - first - 4], [0, 2**62],
            [first], None, [first, "x"], [first + 0.5, end],
        ]  # fmt: skip
        entry["data_offsets"] = generator.choice(others)
    elif way == "dtype":
        entry["dtype"] = generator.choice(["F64", "I64", "F16", "X", "", None, 3, [], "I32", "U32", "F32 "])
    elif way == "field":
        del entry[generator.choice(list(entry))]
    elif way == "value":
        outcome = MAY_PASS
        what = _change_inside(holder := [header], generator)
        return Change(f"header {what}", _file(_dumped(holder[0]).encode("utf-8", "surrogatepass"), body))
    elif way == "rename":
        outcome = MAY_PASS
        header[
            generator.choice(["x", "", "\x1b[31m", name + ".weight", name.replace("lora_A", "lora_B"), "h" * 9999])
        ] = header.pop(name)
    elif way == "drop":
        del header[name]  # and leaves a gap
    elif way == "swap":
        other = generator.choice(names)
        header[name], header[other] = header[other], header[name]
        outcome = MAY_PASS
    elif way == "not finite":
        first = entry["data_offsets"][0]
        if entry["dtype"] != "F32" or entry["data_offsets"][1] == first:
            return _safetensors(contents, generator)
        number = generator.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"])
        at = first + 4 * generator.randrange((entry["data_offsets"][1] - first) // 4)
        body[at : at + 4] = number
        return Change(f"{name}: {number.hex()} at byte {at}", _file(contents[8 : 8 + length], body), outcome=NAMED)
    else:
        header = generator.choice([[], 3, None, "x", Raw("{"), Raw("[" * DEEP), Raw('{"a": 1, "a": 2}')])
    return Change(f"{name}: {way} {str(entry)[:80]}", _file(_dumped(header).encode(), body), outcome=outcome)


def _file(header: bytes, body: bytes | bytearray) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(body)
