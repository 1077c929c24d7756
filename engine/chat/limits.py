"""Jinja for chat templates, bounded: a template is a program by anybody.

jinja2's sandbox keeps a template from Python's internals, and a `range` from more than 100,000 numbers. But ten lines
of loops in loops, of texts that are repeated or put together, or of calls to itself run for years, or fill the memory.
Here everything that can grow or repeat goes through a `Budget`: each round of a loop, each call, filter and operation,
with the size of what it makes. What would be larger than `MAX_SIZE`, or comes when the time of one rendering is used
up, is an error. The time is the processor's in this thread: a machine that does other things changes nothing. No thread
or signal is needed.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from inspect import unwrap
from itertools import chain, islice
from math import prod
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .sizes import (
    FILTERS,
    FORBIDDEN,
    MAX_BITS,
    MAX_SIZE,
    METHODS,
    NO_TEXT,
    VIEWS,
    inner_values,
    listed,
    percent_size,
    size_of,
)

MAX_SECONDS = 2.0  # of one rendering, which takes a millisecond as a rule
MAX_MADE = 2**28  # of all that one rendering makes, with STEP for each thing that it does
STEP = 64  # what an operation counts
PORTION = 8192  # what is made from one look at the clock to the next, as a look costs more than most operations

# Filters that we put in. Their names hold spaces, so that no template can call them.
_ROUNDS = "rounds of a loop"
_JOINED = "texts put together"
_SLICED = "a part of a text"
_COUNTED = "a list or object"


class _Namespace(Namespace):
    """jinja2's, whose text shows nothing of what is in it."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Budget:
    """What one rendering may still take, in characters, with STEP for each operation.

    `left` is what may be made before the next look at the clock, `made` what was made before the last one, `until` the
    time at which the rendering has to end.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Another rendering."""
        self.left = PORTION
        self.made = 0
        self.is_spent = False
        self.until = time.thread_time() + MAX_SECONDS

    def make(self, size: int) -> None:
        """Make a value of at most this size. TemplateRuntimeError where that is too large, or the time is used up."""
        if size > MAX_SIZE:
            self._refuse(f"it makes a text of more than {MAX_SIZE:,} characters")
        self.left -= size + STEP
        if self.left < 0:
            self.look()

    def count(self, value: Any) -> Any:
        """A value that was made, counted without what is in it."""
        self.make(len(value) if type(value) is str else size_of(value))
        return value

    def count_all(self, value: Any) -> Any:
        """The value, counted with all that is in it, as often as it is in it: what it would be as a text."""
        for inner in inner_values(value):
            self.count_all(inner)
        return self.count(value)

    def look(self) -> None:
        """See how much was made, and how much time is left."""
        # `left` may be far below 0, where one thing was larger than a portion.
        self.made += PORTION - self.left
        self.left = PORTION
        if self.made > MAX_MADE:
            self._refuse(f"it makes more than {MAX_MADE:,} characters")
        if time.thread_time() > self.until:
            self._refuse(f"it takes more than {MAX_SECONDS:g} seconds")

    def _refuse(self, reason: str) -> None:
        self.is_spent = True
        raise TemplateRuntimeError(f"{reason}; correct the template")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a budget; call `budget.begin()` before each rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        # Without the optimizer nothing is computed while a template is compiled, when no budget applies.
        self.budget = Budget()
        super().__init__(optimized=False, finalize=self._finalized, **options)
        self.concat = self._concatenated  # type: ignore[method-assign, assignment]
        del self.globals["lipsum"]  # which makes a text of any length
        self.globals["namespace"] = _Namespace

        # jinja2's own filters first: ours count by themselves.
        self.filters = {name: self.bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"join": self._joined, "sum": self._summed, _ROUNDS: self._rounds, _JOINED: self._joined}
        self.filters |= {_SLICED: self._sliced, _COUNTED: self.budget.count_all}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounding().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What a template may have of a value."""
        is_forbidden = isinstance(obj, str | bytes | int) and attr in FORBIDDEN
        return not is_forbidden and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An entry. Where there is none, the error shows what was asked for."""
        if not isinstance(argument, str | int):
            self.budget.count_all(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in a template. Its parameters are called as jinja2's, which leaves names to the template's own."""
        method = unwrap(__obj)  # the sandbox wraps `format` in a function
        owner = getattr(method, "__self__", None)

        # What may be large is counted before it is made, all else when it is there.
        if isinstance(owner, str | bytes) and method.__name__ in METHODS:
            (_, *inputs), kwargs = __self._check_growth(METHODS[method.__name__], (owner, *args), kwargs)
            args = tuple(inputs)
        out = super().call(__context, __obj, *args, **kwargs)
        return __self.budget.count_all(out) if __obj is dict else __self.budget.count(out)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation between two values whose result may be larger than both."""
        if operator == "+":
            return self.budget.count(left + right)  # not counted before: each is bounded, so that their sum is

        size = 1
        if operator == "%" and isinstance(left, str):
            # A format takes a tuple as several values, and an object as its values by name, each smaller than it is.
            self.budget.count_all(right)
            size = percent_size(left, *(right if isinstance(right, tuple) else (right,)))
        elif operator != "%" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                size = MAX_SIZE + 1  # which is refused
        elif operator == "*":
            size = prod(value if isinstance(value, int) else size_of(value) for value in (left, right))

        self.budget.make(max(0, size))
        return super().call_binop(context, operator, left, right)

    def _check_growth(
        self, size: Callable[..., int], args: Iterable[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Count what a filter or method makes before it does. What its arguments are wrong for, it says itself.

        Returns the arguments, of which those that have no length until they are gone through are lists.
        """
        args = [*map(listed, args)]
        kwargs = {name: listed(value) for name, value in kwargs.items()}
        # The sizes of the table look at the whole of a value, which is counted here, so that the look is bounded.
        for value in (*args, *kwargs.values()):
            if isinstance(value, list | tuple | dict | VIEWS):
                self.budget.count_all(value)

        with suppress(TypeError, ValueError, AttributeError):
            self.budget.make(max(0, size(*args, **kwargs)))
        return args, kwargs

    def bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts what it makes."""
        first = int(hasattr(function, "jinja_pass_arg"))  # the value's position, as jinja2 may pass what is its own
        makes_text = name not in NO_TEXT
        size = FILTERS.get(name)

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if size is not None:
                values, kwargs = self._check_growth(size, args[first:], kwargs)
                args = (*args[:first], *values)
            elif makes_text and type(args[first]) is not str:
                self.budget.count_all(args[first])  # a list becomes as large as the text of all that is in it
            return self.budget.count(function(*args, **kwargs))

        return bounded

    def _finalized(self, value: Any) -> Any:
        """What is written: a list or an object as the text of all that is in it."""
        if type(value) is str:
            return value
        return self.budget.count_all(value)

    def _rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop, each of them counted as a step."""
        for value in values:
            self.budget.make(0)
            yield value

    def _values_of(self, values: Iterable[Any], attribute: str | int | None) -> list[Any]:
        """The values of a list, or an attribute of each of them, counted with all that is in them."""
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        return self.budget.count_all(list(self._rounds(values)))

    def _joined(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        """jinja2's filter `join`, and its operator `~`."""
        separator = str(self._finalized(d))
        pairs = ((separator, str(part)) for part in self._values_of(value, attribute))
        return self._concatenated(islice(chain.from_iterable(pairs), 1, None))

    def _summed(self, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        """jinja2's filter `sum`."""
        values = self._values_of(iterable, attribute)
        start = sum((), start)  # which refuses texts, as jinja2's does
        if isinstance(start, int | float):
            return self.budget.count(sum(values, start))
        for value in values:  # a list, and each is added to a copy of those before it
            start = self.budget.count(start + value)
        return start

    def _sliced(self, value: Any, *bounds: Any) -> Any:
        return self.budget.count(value[slice(*bounds)])

    def _concatenated(self, pieces: Iterable[str]) -> str:
        """What a template, a macro or a block writes."""
        out = []
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > MAX_SIZE:
                break
            out.append(piece)
        self.budget.make(size)
        return "".join(out)


class _Bounding(NodeTransformer):
    """Puts what jinja2 computes without a call through a filter of ours: loops, `~`, slices, lists, objects."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node)
        match node:
            case nodes.For():
                node.iter = _filtered(node.iter, _ROUNDS)
            case nodes.Concat():
                return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _JOINED)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") if not _is_constant(node):
                return _filtered(node, _COUNTED)
            case nodes.Getitem(arg=nodes.Slice(start=start, stop=stop, step=step)):
                return _filtered(node.node, _SLICED, *(bound or nodes.Const(None) for bound in (start, stop, step)))
        return node


def _is_constant(node: nodes.Node) -> bool:
    return all(isinstance(inner, nodes.Const | nodes.Pair) for inner in node.find_all(nodes.Node))


def _filtered(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [*arguments], [], None, None, lineno=node.lineno)
