"""What comes from outside: texts made safe to show, exceptions of other people's code, memory that runs out.

Nothing here imports more than the standard library, so that the command line can use it before torch is there.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Control characters, which steer a terminal; the ones that turn the direction of writing, by which a name can pose as
# another; halves of surrogate pairs, which no encoding has.
_UNSAFE = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_IN_TEXT, _IN_LINE = re.compile(f"[{_UNSAFE}]"), re.compile(f"[\t\n{_UNSAFE}]")
# How torch says it: its allocator on the CPU, the two of C++, CUDA and its libraries, sizes beyond 64 bits.
_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "bad_alloc", "bad alloc", "out of memory", "ALLOC_FAILED",
    "Storage size calculation overflowed", "Overflow when unpacking long",
)  # fmt: skip


def visible(text: object) -> str:
    """A text with its control characters escaped, line ends and tabs excepted: safe on a terminal and in a page."""
    return _IN_TEXT.sub(_escaped, str(text))


def visible_line(text: object) -> str:
    """The same in one line, of a name: line ends and tabs are escaped, too."""
    return _IN_LINE.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


@contextmanager
def others_code(explain: Callable[[Exception], Exception]) -> Iterator[None]:
    """Code inside that may raise anything, of a library or the user's: `explain` makes an error of ours of it, or gives
    it back where it says enough. Memory that runs out is told as it is.

    Also Rust's panics, which derive from BaseException. It has the only `except` of all exceptions but the command
    line's, and is for calls of such code alone: a mistake of ours in it would be taken for the user's.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if (explained := explain(error)) is error:
            raise
        raise explained from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise explain(RuntimeError(str(error))) from error


class OutOfMemory(MemoryError):
    """Memory ran out, and the message says what to do."""


@contextmanager
def explained_memory(explain: Callable[[], str]) -> Iterator[None]:
    """Out of memory, as Python, NumPy, torch or the system say it, as an OutOfMemory of `explain()`'s words.

    One that has been explained inside passes.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError, OSError, TypeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemory(explain()) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)
