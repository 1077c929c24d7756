"""Regular expressions on module paths, matched in bounded time.

The patterns of an adapter's `rank_pattern` come with its files, from anybody, and Python's matcher takes time that
doubles with each character for some of them: `(a+)+$`. What they mean is Python's all the same: `re` parses them. But
all positions that a part of the pattern can end at are followed at once (Thompson 1968), so that none is tried twice,
and the steps are counted.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from ..._shapes import shown

# Python's own parser, which has no public name.
from re import _constants as codes  # type: ignore[attr-defined]  # isort: skip
from re import _parser  # type: ignore[attr-defined]  # isort: skip

MAX_LENGTH, MAX_STEPS = 1_000, 200_000
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)
_AHEAD = (codes.ASSERT, codes.ASSERT_NOT)
_BEGINNINGS, _ENDS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING), (codes.AT_END, codes.AT_END_STRING)
_BOUNDARIES = (codes.AT_BOUNDARY, codes.AT_NON_BOUNDARY)
_KNOWN = {
    codes.ANY, codes.AT, codes.BRANCH, codes.IN, codes.LITERAL, codes.NOT_LITERAL, codes.SUBPATTERN, *_REPEATS, *_AHEAD,
}  # fmt: skip
_CLASSES = {
    codes.CATEGORY_DIGIT: r"\d", codes.CATEGORY_NOT_DIGIT: r"\D", codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S", codes.CATEGORY_WORD: r"\w", codes.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip

Nodes = Iterable[tuple[Any, Any]]  # what Python's parser makes of a pattern: operations with their arguments


@lru_cache(maxsize=4096)
def matches_end(pattern: str, path: str) -> bool:
    """Whether the pattern matches the whole path, or all behind one of its dots: `(.*\\.)?(pattern)`, as PEFT does.

    ValueError where it is no regular expression, or one that takes too long or does more than match characters.
    """
    starts = {0, *(i + 1 for i, character in enumerate(path) if character == ".")}
    return len(path) in _Matcher(pattern, path).ends(parsed(pattern), starts)


@lru_cache(maxsize=1024)
def parsed(pattern: str) -> Nodes:
    """What the pattern consists of. ValueError as `matches_end`."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"{shown(pattern)} has {len(pattern):,} characters, and a pattern at most {MAX_LENGTH:,}")
    try:
        nodes = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{shown(pattern)} is no regular expression ({error}), which is what stands here, not a glob"
        ) from None
    if nodes.state.flags & ~re.UNICODE.value:
        raise ValueError(f"{shown(pattern)}: flags in a pattern are not implemented")
    if unknown := next((code for code in _codes(nodes) if code not in _KNOWN), None):
        raise ValueError(f"{shown(pattern)}: {str(unknown).lower()} in a pattern is not implemented")
    return tuple(nodes)


def _codes(nodes: Nodes) -> Iterator[Any]:
    """What the pattern and its parts do. What is done otherwise than as usual counts by what makes it so."""
    for code, argument in nodes:
        yield code
        bodies: list[Nodes] = []
        if code is codes.BRANCH:
            bodies = argument[1]
        elif code in _REPEATS:
            bodies = [argument[2]]
        elif code is codes.SUBPATTERN:
            yield from ["flags"] if argument[1] or argument[2] else []
            bodies = [argument[3]]
        elif code in _AHEAD:
            yield from ["look-behind"] if argument[0] != 1 else []
            bodies = [argument[1]]
        elif code is codes.AT and argument not in (*_BEGINNINGS, *_ENDS, *_BOUNDARIES):
            yield argument
        for body in bodies:
            yield from _codes(body)


class _Matcher:
    """One pattern on one path."""

    def __init__(self, pattern: str, path: str) -> None:
        self.pattern, self.path, self.steps = pattern, path, 0

    def ends(self, nodes: Nodes, positions: set[int]) -> set[int]:
        """Where a match of the nodes can end that begins at one of the positions."""
        for code, argument in nodes:
            self.steps += 1 + len(positions)
            if self.steps > MAX_STEPS:
                raise ValueError(f"{shown(self.pattern)} takes too long to match ({MAX_STEPS:,} steps); simplify it")
            if not positions:
                break
            positions = self._after(code, argument, positions)
        return positions

    def _after(self, code: Any, argument: Any, positions: set[int]) -> set[int]:
        """The same for one operation."""
        if code is codes.BRANCH:
            return set().union(*(self.ends(branch, positions) for branch in argument[1]))
        if code is codes.SUBPATTERN:
            return self.ends(argument[3], positions)
        if code in _REPEATS:
            least, most, body = argument
            return self._repeated(least, most, body, positions)
        if code is codes.AT and argument in _BOUNDARIES:
            return {i for i in positions if self._is_at(argument, i)}
        if code is codes.AT:
            return positions & {0 if argument in _BEGINNINGS else len(self.path)}
        if code in _AHEAD:
            return {i for i in positions if bool(self.ends(argument[1], {i})) == (code is codes.ASSERT)}
        return {i + 1 for i in positions if i < len(self.path) and self._is(code, argument, self.path[i])}

    def _repeated(self, least: int, most: int, body: Nodes, positions: set[int]) -> set[int]:
        """After `least` to `most` times. Positions only move forward, so that they come to an end, or stay the same."""
        reached: set[int] = set(positions) if least == 0 else set()
        for count in range(1, most + 1):
            before, positions = positions, self.ends(body, positions)
            if count >= least:
                positions = positions - reached  # from the others it has gone on already
                reached |= positions
            elif positions == before:  # and stays so, however often
                return positions
            if not positions:
                break
        return reached

    def _is_at(self, kind: Any, position: int) -> bool:
        """Whether a word begins or ends here, with a word's character on one side and none on the other; or not."""
        if not self.path:  # which has no boundary, and in Python before 3.14 no other place either
            return kind is codes.AT_NON_BOUNDARY and re.search(r"\B", "") is not None
        before, after = (0 <= i < len(self.path) and re.match(r"\w", self.path[i]) for i in (position - 1, position))
        return (bool(before) != bool(after)) == (kind is codes.AT_BOUNDARY)

    def _is(self, code: Any, argument: Any, character: str) -> bool:
        """Whether the character is one that the operation stands for."""
        if code is codes.ANY:
            return character != "\n"
        if code in (codes.LITERAL, codes.NOT_LITERAL):
            return (argument == ord(character)) == (code is codes.LITERAL)
        if code is codes.RANGE:
            return bool(argument[0] <= ord(character) <= argument[1])
        if code is codes.CATEGORY:
            return re.match(_CLASSES[argument], character) is not None
        negated = argument[0][0] is codes.NEGATE  # of several, in brackets
        return any(self._is(kind, value, character) for kind, value in argument[negated:]) != negated
