"""What comes from outside: texts made safe to show, errors that name their file, other people's code, memory's end.

Nothing here imports more than the standard library, so that the command line can use it before torch is there (except
for `hub_reason`, which explains an error of another library).
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Control characters, which steer a terminal; characters that change the direction of writing, by which a name can pose
# as another one; halves of surrogate pairs, which no encoding has.
_UNSAFE = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_UNSAFE_IN_TEXT = re.compile(f"[{_UNSAFE}]")
_UNSAFE_IN_LINE = re.compile(f"[\t\n{_UNSAFE}]")
# The messages by which torch says it: its allocator on the CPU, the two of C++, CUDA and its libraries, and sizes that
# need more than 64 bits.
_OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory", "not enough memory", "bad_alloc", "bad alloc", "out of memory", "ALLOC_FAILED",
    "Storage size calculation overflowed", "Overflow when unpacking long",
)  # fmt: skip


def visible(text: object) -> str:
    """A text with its control characters escaped, line ends and tabs excepted: safe on a terminal and in a page."""
    return _UNSAFE_IN_TEXT.sub(_escaped, str(text))


def visible_line(text: object) -> str:
    """A name as a single line, escaped as by `visible`, and its line ends and tabs, too."""
    return _UNSAFE_IN_LINE.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


@contextmanager
def others_code(explain: Callable[[Exception], Exception]) -> Iterator[None]:
    """For code inside, of a library or of the user, that may raise anything. `explain` turns what it raises into an
    error of handtune, or returns it unchanged if it is clear enough. Memory that runs out is left alone.

    Rust's panics, which derive from BaseException, are caught, too. Apart from the command line's, this is the only
    `except` for all exceptions. It should enclose the foreign call alone: a mistake of handtune inside it would be
    taken for one of the user.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is error:
            raise
        raise explained from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise explain(RuntimeError(str(error))) from error


@contextmanager
def located(where: object) -> Iterator[None]:
    """Puts `where`, a file or a field, in front of every ValueError about what the code inside reads there."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def hub_reason(error: Exception) -> str:
    """Why the hub gave nothing and what to do, in one line; of other errors the first line of what is said."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or log in with `hf auth login`"
    if isinstance(error, LocalEntryNotFoundError):
        return "the hub can't be reached, and its cache doesn't have it: go online once, or give a folder"
    return str(error).strip().split("\n")[0] or type(error).__name__


class OutOfMemory(MemoryError):
    """Memory ran out, and the message says what to do."""


@contextmanager
def explained_memory(explain: Callable[[], str]) -> Iterator[None]:
    """Turns running out of memory, however Python, NumPy, torch or the system say it, into OutOfMemory(explain()).

    An error that has been explained further inside, where more is known, stays as it is.
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
    return isinstance(error, MemoryError) or any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES)
