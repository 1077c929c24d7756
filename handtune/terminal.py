"""Where a command stands: the streams that it prints to, and Ctrl-C.

A stream whose reader has gone (`handtune train run.toml | head -1`), or that was closed from the beginning, silences
what is printed and no more: the command goes on to its end. What is printed is escaped, since names from files could
steer the terminal, and what an encoding lacks is written as its code.

Ctrl-C ends the process at once, with 130 and without a word, before a command runs and after it (`leave_at_once`):
nothing is there then to be tidied up, while an exception could fall into an import, where it may turn into any other,
or into the interpreter's shutdown, which shows it. While a command runs it is Python's KeyboardInterrupt.
"""

import atexit
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, cast

from ._outside import visible

INTERRUPTED = 130


class Stream:
    """Standard output or error, in the place of the `stream` that Python made of it (None: it is closed).

    `closed`: nobody reads it any more. `error`: why the rest could not be written, where nobody meant it to be lost.
    """

    def __init__(self, stream: TextIO | None):
        self.stream, self.closed = stream, stream is None
        self.error: Exception | None = None
        self.gone = {errno.EPIPE, errno.ECONNRESET} | ({errno.EIO} if self.isatty() else set())  # no reader any more

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text with its control characters escaped; a progress bar begins with a carriage return."""
        is_bar = text.startswith("\r")
        return self.write_unescaped("\r" * is_bar + visible(text[is_bar:]))

    def write_unescaped(self, text: str) -> int:
        """Write a text as it is, apart from what the stream's encoding lacks."""
        if self.stream is not None and not self.closed:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            try:
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self._give_up(error)
            except RuntimeError:
                pass  # the handler of a signal writes in the middle of a write that it interrupted
        return len(text)

    def flush(self) -> None:
        if self.stream is not None and not self.closed:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)
            except RuntimeError:
                pass

    def isatty(self) -> bool:
        return self.stream is not None and not self.closed and self.stream.isatty()

    def _give_up(self, error: Exception) -> None:
        """Nothing more is written: what still waits in Python's buffer, or comes from C, goes nowhere either."""
        self.closed = True
        if isinstance(error, OSError) and error.errno not in self.gone:
            self.error = error
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())


@contextmanager
def safe_streams() -> Iterator[tuple[Stream, Stream]]:
    """Inside, standard output and error are `Stream`s, which are flushed in the end."""
    before, streams = (sys.stdout, sys.stderr), (Stream(sys.stdout), Stream(sys.stderr))
    sys.stdout, sys.stderr = cast(TextIO, streams[0]), cast(TextIO, streams[1])
    try:
        yield streams
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def print_unescaped(text: str) -> None:
    """Print a text as it is: data for a file or a pipe, or what has been escaped and coloured."""
    write = getattr(sys.stdout, "write_unescaped", sys.stdout.write)
    write(text + "\n")
    sys.stdout.flush()


def begin_process() -> None:
    """Make a process ready that is the command line's alone: descriptors 0 to 2 in use, Ctrl-C without a traceback."""
    signal_now = signal.getsignal(signal.SIGINT)
    if signal_now is signal.default_int_handler:  # a shell has background processes ignore it
        signal.signal(signal.SIGINT, leave_at_once)
        # When threads have ended, all is done: what the interpreter still takes down would be cut off by the signal.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.unraisablehook = _unraisable

    # What is closed would be given to the first file that is opened, and that would get what C code prints.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115


def leave_at_once(*_: Any) -> NoReturn:
    """End the process as Ctrl-C does; what is stored is whole at any moment."""
    os._exit(INTERRUPTED)


def _unraisable(unraisable: Any) -> None:
    """A Ctrl-C that falls into the end of an object would be shown, and forgotten."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        leave_at_once()
    sys.__unraisablehook__(unraisable)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt where it would else leave at once."""
    if signal.getsignal(signal.SIGINT) is not leave_at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, leave_at_once)
