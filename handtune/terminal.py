"""What surrounds a command: the streams that it prints to, and Ctrl-C.

A stream whose reader has gone (`handtune train run.toml | head -1`), or that was closed from the beginning, drops what
is printed, and the command goes on to its end. Text is escaped, because names from files could steer the terminal, and
characters that the stream's encoding lacks are written as their codes.

Before and after a command runs, Ctrl-C ends the process at once, with exit code 130 and without a message
(`leave_at_once`). Nothing has to be tidied up then, while an exception could be raised in an import, which may turn it
into any other, or in the interpreter's shutdown, which prints it. While a command runs, Ctrl-C is Python's
KeyboardInterrupt.
"""

import atexit
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn, TextIO, cast

from ._outside import visible

INTERRUPTED = 130


class Stream:
    """Standard output or error, in place of Python's own `stream` (None if it is closed)."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream
        self.closed = stream is None  # nobody reads it, or not any more
        self.error: Exception | None = None  # why the rest could not be written, although somebody reads it
        self.gone_codes = {errno.EPIPE, errno.ECONNRESET}  # of errors that mean that the reader has gone
        if self.isatty():
            self.gone_codes.add(errno.EIO)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text with its control characters escaped, except the carriage return that begins a progress bar."""
        is_bar = text.startswith("\r")
        return self.write_unescaped("\r" * is_bar + visible(text[is_bar:]))

    def write_unescaped(self, text: str) -> int:
        """Write a text as it is, except for characters that the stream's encoding lacks."""
        if not self.closed:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            self._call("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._call("flush")

    def _call(self, method: str, *arguments: str) -> None:
        """Call a method of the stream, whose failure ends the output and not the command."""
        if self.closed:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except (OSError, ValueError) as error:
            self.closed = True
            if isinstance(error, OSError) and error.errno not in self.gone_codes:
                self.error = error
            # What is still in Python's buffer, or comes from C code, must not fail again.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self.fileno())
        except RuntimeError:
            pass  # the write of a signal's handler, in the middle of a write that the signal interrupted

    def isatty(self) -> bool:
        return self.stream is not None and not self.closed and self.stream.isatty()


@contextmanager
def safe_streams() -> Iterator[tuple[Stream, Stream]]:
    """Inside, standard output and error are `Stream`s, which are flushed at the end."""
    streams = Stream(sys.stdout), Stream(sys.stderr)
    with redirect_stdout(cast(TextIO, streams[0])), redirect_stderr(cast(TextIO, streams[1])):
        try:
            yield streams
        finally:
            for stream in streams:
                stream.flush()


def print_unescaped(text: str, end: str = "\n") -> None:
    """Print a text as it is: data for a file or a pipe, or text that has been escaped and then colored."""
    write = getattr(sys.stdout, "write_unescaped", sys.stdout.write)
    write(text + end)
    sys.stdout.flush()


def print_text(text: str, end: str = "\n") -> None:
    """Print a text: escaped on a terminal, which it could steer, and otherwise as it is."""
    # Not by `write`, which lets a carriage return at the beginning through, as a progress bar's.
    print_unescaped(visible(text) if sys.stdout.isatty() else text, end)


def begin_process() -> None:
    """Prepare a process that belongs to the command line alone: no traceback for Ctrl-C, descriptors 0 to 2 in use."""
    # A shell has background processes ignore the signal, which stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
        # At exit the work is done: from then on, the signal would only disturb the interpreter's shutdown.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.unraisablehook = _unraisable

    # Fill closed descriptors 0 to 2: else the first opened file would get such a number, and C code print into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115


def leave_at_once(*_: Any) -> NoReturn:
    """End the process as Ctrl-C does; no file is left half written, because each is whole at any moment."""
    os._exit(INTERRUPTED)


def _unraisable(unraisable: Any) -> None:
    """A Ctrl-C during an object's `__del__` would otherwise be printed and forgotten."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        leave_at_once()
    sys.__unraisablehook__(unraisable)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, where it would otherwise end the process at once."""
    if signal.getsignal(signal.SIGINT) is not leave_at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, leave_at_once)


def read_standard_input() -> str:
    """All of standard input. ValueError, with the line, where it isn't UTF-8."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"standard input line {line}: not UTF-8; save it as UTF-8") from None
