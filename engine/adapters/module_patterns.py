"""Regular expressions on module paths, matched in bounded time.

The patterns of an adapter's `rank_pattern` come with its files, from anybody, and Python's matcher takes time that
doubles with each character for some of them: `(a+)+$`. What they mean is Python's all the same: `re` parses them. But
all positions that a part of the pattern can end at are followed at once (Thompson 1968), so that none is tried twice,
and the steps are counted.

A parsed pattern is a sequence of operations, each a pair of an opcode and its argument: (LITERAL, 97) for an "a".
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from ..._shapes import shown

# Python's own parser, which has no public name.
from re import _constants as codes  # type: ignore[attr-defined]  # isort: skip
from re import _parser  # type: ignore[attr-defined]  # isort: skip

MAX_LENGTH = 1_000  # characters of a pattern
MAX_STEPS = 200_000  # operations times positions that a match may take, a fraction of a second

_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)
_LOOK_AROUND = (codes.ASSERT, codes.ASSERT_NOT)
_BEGINNINGS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING)
_ENDS = (codes.AT_END, codes.AT_END_STRING)
_BOUNDARIES = (codes.AT_BOUNDARY, codes.AT_NON_BOUNDARY)
_IMPLEMENTED = {
    codes.ANY, codes.AT, codes.BRANCH, codes.IN, codes.LITERAL, codes.NOT_LITERAL, codes.SUBPATTERN,
    *_REPEATS, *_LOOK_AROUND,
}  # fmt: skip
_CATEGORIES = {
    codes.CATEGORY_DIGIT: r"\d", codes.CATEGORY_NOT_DIGIT: r"\D", codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S", codes.CATEGORY_WORD: r"\w", codes.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip

Operations = Iterable[tuple[Any, Any]]


@lru_cache(maxsize=4096)
def matches_end(pattern: str, path: str) -> bool:
    """Whether the pattern matches the whole path, or all behind one of its dots: `(.*\\.)?(pattern)`, as in PEFT.

    ValueError where it is no regular expression, or one that takes too long or does more than match characters.
    """
    starts = {0, *(i + 1 for i, character in enumerate(path) if character == ".")}
    return len(path) in _Matcher(pattern, path).ends(parsed(pattern), starts)


@lru_cache(maxsize=1024)
def parsed(pattern: str) -> Operations:
    """The operations of the pattern. Raises ValueError as `matches_end` does."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"{shown(pattern)} has {len(pattern):,} characters, and a pattern at most {MAX_LENGTH:,}")
    try:
        operations = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{shown(pattern)} is no regular expression ({error}), which is what stands here, not a glob"
        ) from None

    # A text pattern has UNICODE; any other flag comes from the pattern itself, "(?i)", and changes what matches.
    if operations.state.flags & ~re.UNICODE.value:
        raise ValueError(f"{shown(pattern)}: flags in a pattern are not implemented")
    if unknown := next((opcode for opcode in _opcodes(operations) if opcode not in _IMPLEMENTED), None):
        raise ValueError(f"{shown(pattern)}: {str(unknown).lower()} in a pattern is not implemented")
    return tuple(operations)


def _opcodes(operations: Operations) -> Iterator[Any]:
    """The opcodes of the pattern and of its parts, and the name of a variant of one that isn't implemented."""
    for opcode, argument in operations:
        yield opcode

        bodies: list[Operations] = []
        if opcode is codes.BRANCH:
            _, bodies = argument
        elif opcode in _REPEATS:
            bodies = [argument[2]]
        elif opcode is codes.SUBPATTERN:
            _, added_flags, removed_flags, body = argument
            if added_flags or removed_flags:
                yield "flags"
            bodies = [body]
        elif opcode in _LOOK_AROUND:
            direction, body = argument
            if direction != 1:
                yield "look-behind"
            bodies = [body]
        elif opcode is codes.AT and argument not in (*_BEGINNINGS, *_ENDS, *_BOUNDARIES):
            yield argument

        for body in bodies:
            yield from _opcodes(body)


class _Matcher:
    """One pattern on one path."""

    def __init__(self, pattern: str, path: str) -> None:
        self.pattern = pattern
        self.path = path
        self.steps = 0

    def ends(self, operations: Operations, positions: set[int]) -> set[int]:
        """Where a match of the operations can end that begins at one of the positions."""
        for opcode, argument in operations:
            # At least one, because a repeat of nothing takes its time, too.
            self.steps += 1 + len(positions)
            if self.steps > MAX_STEPS:
                raise ValueError(f"{shown(self.pattern)} takes too long to match ({MAX_STEPS:,} steps); simplify it")
            if not positions:
                break
            positions = self._ends_of_one(opcode, argument, positions)
        return positions

    def _ends_of_one(self, opcode: Any, argument: Any, positions: set[int]) -> set[int]:
        """The same for one operation."""
        if opcode is codes.BRANCH:
            return set().union(*(self.ends(branch, positions) for branch in argument[1]))
        if opcode is codes.SUBPATTERN:
            return self.ends(argument[3], positions)
        if opcode in _REPEATS:
            least, most, body = argument
            return self._ends_of_repeat(least, most, body, positions)

        # Operations that consume no character.
        if opcode is codes.AT and argument in _BOUNDARIES:
            return {i for i in positions if self._is_at(argument, i)}
        if opcode is codes.AT:
            return positions & {0 if argument in _BEGINNINGS else len(self.path)}
        if opcode in _LOOK_AROUND:
            return {i for i in positions if bool(self.ends(argument[1], {i})) == (opcode is codes.ASSERT)}

        return {i + 1 for i in positions if i < len(self.path) and self._matches_character(opcode, argument, i)}

    def _ends_of_repeat(self, least: int, most: int, body: Operations, positions: set[int]) -> set[int]:
        """Where `least` to `most` repeats end. Positions only move forward, so that they run out, or stay the same."""
        reached: set[int] = set()
        if least == 0:
            reached |= positions
        for count in range(1, most + 1):
            previous = positions
            positions = self.ends(body, positions)
            if count >= least:
                positions = positions - reached  # what begins at the others has been followed already
                reached |= positions
            elif positions == previous:  # further repeats won't change them, either
                return positions
            if not positions:
                break
        return reached

    def _is_at(self, boundary: Any, position: int) -> bool:
        """Whether a word begins or ends here, with a word's character on one side only; or not, for NON_BOUNDARY."""
        if not self.path:  # it has no boundary, and in Python before 3.14 no position that isn't one, either
            return boundary is codes.AT_NON_BOUNDARY and re.search(r"\B", "") is not None
        sides = [self.path[i] for i in (position - 1, position) if 0 <= i < len(self.path)]
        n_in_words = sum(re.match(r"\w", character) is not None for character in sides)
        return (n_in_words == 1) == (boundary is codes.AT_BOUNDARY)

    def _matches_character(self, opcode: Any, argument: Any, position: int) -> bool:
        """Whether the character at this position is one that the operation stands for."""
        character = self.path[position]
        if opcode is codes.ANY:
            return character != "\n"
        if opcode in (codes.LITERAL, codes.NOT_LITERAL):
            return (argument == ord(character)) == (opcode is codes.LITERAL)
        if opcode is codes.RANGE:
            return bool(argument[0] <= ord(character) <= argument[1])
        if opcode is codes.CATEGORY:
            return re.match(_CATEGORIES[argument], character) is not None

        # What is left is a set, [...] or [^...], of such operations.
        negated = argument[0][0] is codes.NEGATE
        return any(self._matches_character(op, value, position) for op, value in argument[negated:]) != negated
