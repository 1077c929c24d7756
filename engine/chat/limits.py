"""Jinja for chat templates, bounded: a template is a program by anybody.

jinja2's sandbox keeps a template from Python's internals, and a `range` from more than 100,000 numbers. But ten lines
of loops in loops, of texts that are repeated or put together, or of calls to itself run for years, or fill the memory.
Here everything that can grow or repeat goes through a `Budget`: each round of a loop, each call, filter and operation,
with the size of what it makes. What would be larger than `MAX_SIZE`, or comes when the time of one rendering is used
up, is an error. The time is the processor's in this thread: a machine that does other things changes nothing. No thread
or signal is needed.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from types import FunctionType
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .sizes import (
    ATTRIBUTES,
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
_ADDED = "a sum"
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

    def make_all(self, value: Any) -> Any:
        """The value, counted with all that is in it, as often as it is in it: what it would be as a text."""
        for inner in inner_values(value):
            self.make_all(inner)
        self.make(size_of(value))
        return value

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

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        # Without the optimizer nothing is computed while a template is compiled, when no budget applies.
        self.budget = Budget()
        super().__init__(optimized=False, finalize=self._finalized, **options)
        self.concat = self._concatenated  # type: ignore[method-assign, assignment]
        del self.globals["lipsum"]  # which makes a text of any length
        self.globals["namespace"] = _Namespace

        # jinja2's own filters first: ours count by themselves.
        for name, function in {**self.filters}.items():
            self.filters[name] = self.bounded(name, function)
        self.filters |= {_ROUNDS: self._rounds, _JOINED: self._joined, _SLICED: self._sliced}
        self.filters |= {_ADDED: self._added, _COUNTED: self.budget.make_all}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounding().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What a template may have of a value."""
        is_forbidden = isinstance(obj, str | bytes | int) and attr in FORBIDDEN
        return not is_forbidden and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An entry. Where there is none, the error shows what was asked for."""
        if not isinstance(argument, str | int):
            self.budget.make_all(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in a template. Its parameters are called as jinja2's, which leaves names to the template's own."""
        method = __obj
        if isinstance(__obj, FunctionType):
            method = vars(__obj).get("__wrapped__", __obj)  # the sandbox wraps `format` in a function
        owner = getattr(method, "__self__", None)

        # What may be large is counted before it is made, all else when it is there.
        if isinstance(owner, str | bytes):
            args = tuple(map(listed, args))
            __self._check_growth(METHODS, method.__name__, (owner, *args), kwargs)
        elif __obj is __self.globals.get("strftime_now"):
            __self.budget.make(256 * sum(map(size_of, (*args, *kwargs.values()))))  # as its widths may ask for

        out = super().call(__context, __obj, *args, **kwargs)
        if __obj is dict:
            __self.budget.make_all(out)
        else:
            __self.budget.make(size_of(out))
        return out

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation between two values whose result may be larger than both."""
        size = 1
        if operator == "%" and isinstance(left, str):
            # A format takes a tuple as several values, and an object as its values by name, or as one value.
            self.budget.make_all(right)
            values = right if isinstance(right, tuple) else (right,)
            if isinstance(right, dict):
                values = (right, *right.values())
            size = percent_size(left, values)
        elif operator != "%" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                size = MAX_SIZE + 1  # which is refused
        elif operator == "*" and isinstance(right, int):
            size = size_of(left) * right
        elif operator == "*" and isinstance(left, int):
            size = size_of(right) * left

        self.budget.make(max(0, size))
        return super().call_binop(context, operator, left, right)

    def _check_growth(
        self, table: dict[str, Callable[..., int]], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count what a filter or method makes before it does. What its arguments are wrong for, it says itself."""
        if name not in table:
            return

        # The sizes of the table look at the whole of a value, which is counted here, so that the look is bounded.
        for value in (*args, *kwargs.values()):
            if isinstance(value, list | tuple | dict | VIEWS):
                self.budget.make_all(value)
        try:
            size = table[name](*args, **kwargs)
        except (TypeError, ValueError, AttributeError):
            return
        self.budget.make(max(0, size))

    def bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts what it makes."""
        budget = self.budget
        first = int(hasattr(function, "jinja_pass_arg"))  # the value's position, as jinja2 may pass what is its own
        makes_text = name not in NO_TEXT
        grows = name in FILTERS

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if grows:  # what has no length until it is gone through is gone through
                args = (*args[:first], *map(listed, args[first:]))
                kwargs = {name: listed(value) for name, value in kwargs.items()}
            if name in ATTRIBUTES:
                args, kwargs = self._of_attribute(first, first + ATTRIBUTES[name], args, kwargs)

            # A list becomes as large as the text of all that is in it.
            if makes_text and not grows and type(args[first]) is not str:
                budget.make_all(args[first])
            if grows:
                self._check_growth(FILTERS, name, args[first:], kwargs)

            # Much as `budget.make`, written out: filters are called often, and this is most of what they cost.
            out = function(*args, **kwargs)
            budget.left -= STEP + (len(out) if type(out) is str else size_of(out))
            if budget.left < 0:
                budget.look()
                if isinstance(out, str) and len(out) > MAX_SIZE:
                    budget.make(len(out))
            return out

        return bounded

    def _of_attribute(
        self, first: int, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a filter with an attribute of each value in the place of the value, where one is asked for.

        So it is counted before the filter puts them together.
        """
        attribute = args[position] if len(args) > position else kwargs.get("attribute")
        if attribute is None:
            return args, kwargs

        values = list(self._rounds(map(make_attrgetter(self, attribute), args[first])))
        options = tuple(None if i == position else value for i, value in enumerate(args) if i > first)
        kwargs = {name: value for name, value in kwargs.items() if name != "attribute"}
        return (*args[:first], values, *options), kwargs

    def _finalized(self, value: Any) -> Any:
        """What is written: a list or an object as the text of all that is in it."""
        if type(value) is str:
            return value
        return self.budget.make_all(value)

    def _rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop, each of them counted as a step."""
        budget = self.budget
        for value in values:
            budget.left -= STEP
            if budget.left < 0:
                budget.look()
            yield value

    def _added(self, left: Any, right: Any) -> Any:
        out = left + right  # not counted before: each of the two is bounded, so that the sum is
        budget = self.budget
        budget.left -= STEP + (len(out) if type(out) is str else size_of(out))
        if budget.left < 0:
            budget.look()
        return out

    def _joined(self, parts: tuple[Any, ...]) -> str:
        texts = [str(self._finalized(part)) for part in parts]
        self.budget.make(sum(map(len, texts)))
        return "".join(texts)

    def _sliced(self, value: Any, *bounds: Any) -> Any:
        out = value[slice(*bounds)]
        self.budget.make(size_of(out))
        return out

    def _concatenated(self, pieces: Iterable[str]) -> str:
        """What a template, a macro or a block writes."""
        out = []
        room = MAX_SIZE
        for piece in pieces:
            room -= len(piece)
            if room < 0:
                self.budget.make(MAX_SIZE + 1)
            out.append(piece)
        self.budget.make(MAX_SIZE - room)
        return "".join(out)


class _Bounding(NodeTransformer):
    """Puts what jinja2 computes without a call through a filter of ours: loops, sums, slices, lists, objects."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _ROUNDS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _JOINED)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node.left, _ADDED, [node.right])

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if is_target or _is_constant(node) else _filtered(node, _COUNTED)

    visit_Dict = visit_Tuple = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return _filtered(node.node, _SLICED, bounds)


def _is_constant(node: nodes.Node) -> bool:
    inner = list(node.iter_child_nodes())
    return all(isinstance(child, nodes.Const | nodes.Pair) and _is_constant(child) for child in inner)


def _filtered(node: Any, name: str, arguments: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, arguments or [], [], None, None, lineno=node.lineno)
