"""A person who talks to a model at a terminal, or a pipe that does: a question a line, commands among them.

Standard output has the answers and nothing else: a terminal gets them word by word, with a blank line between them, and
so does a pipe. All else that is said goes to standard error. At a terminal a mistake is told, and Ctrl-C ends no more
than the answer or the line at which it comes; in a pipe both end the command, as they do elsewhere.
"""

import sys
from contextlib import closing, suppress
from itertools import chain

from ..engine.data.row_fields import check_characters
from ..terminal import print_text
from .turns import BASE, Conversation

HELP = """\
/reset           forget the conversation; the system prompt stays
/adapter         which adapters there are, and which one answers
/adapter NAME    let another one answer from here on; /adapter base: none
/help            this
/quit            end, as Ctrl-D does
Ctrl-C ends an answer; what has been said of it stays in the conversation.
A line that begins with a space is a question, whatever follows."""


class Session:
    """What is typed or piped, taken line by line to a conversation until it ends."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.is_terminal = sys.stdin.isatty()
        self._n_lines = 0
        self._n_answers = 0

    def run(self) -> None:
        """Go on until /quit, the end of the input, or until nobody reads the answers any more."""
        if self.is_terminal:
            # Lets a person edit a line, and get an earlier one back. Not every system has it.
            with suppress(ImportError):
                import readline  # noqa: F401
            tell(f"{self._adapters()}; /help lists what can be typed here, Ctrl-D ends")

        goes_on = True
        while goes_on:
            try:
                goes_on = self._take_line() and not sys.stdout.closed
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                print(flush=True)
            except ValueError as error:
                if not self.is_terminal:
                    raise
                tell(str(error))

    def _take_line(self) -> bool:
        """Read a line and do what it says; whether to go on."""
        line = self._read_line()
        if line is None or line.rstrip() == "/quit":
            return False
        if line.startswith("/"):
            self._obey(line)
        elif line.strip():
            self._answer(line.strip())
        return True

    def _read_line(self) -> str | None:
        """The next line, or None where there is no more. ValueError for one that isn't UTF-8."""
        if self.is_terminal:
            try:
                line = _typed_line()
            except EOFError:
                print(flush=True)  # the shell's prompt begins a line
                return None
            except UnicodeDecodeError:
                raise ValueError("this line is not UTF-8; set the terminal to it") from None
            check_characters(line, "this line")
            return line

        # As bytes, so that the lines before a damaged one are answered.
        data = sys.stdin.buffer.readline()
        if not data:
            return None
        self._n_lines += 1
        try:
            return data.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise ValueError(f"standard input line {self._n_lines}: not UTF-8; save it as UTF-8") from None

    def _obey(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        command, _, argument = line.strip().partition(" ")
        match command, argument.strip():
            case "/help", "":
                print(HELP, file=sys.stderr)
            case "/reset", "":
                self.conversation.reset()
                tell("forgotten")
            case "/adapter", name:
                if name:
                    self.conversation.use(name)
                tell(self._adapters())
            case _:
                raise ValueError(
                    f"{line.strip():.60}: no such command; /help lists them (to ask this, begin the line with a space)"
                )

    def _adapters(self) -> str:
        """Which adapter answers, and which could."""
        names = [*self.conversation.generator.adapters, BASE]
        if len(names) == 1:
            return "the model answers, without adapters"
        answering = self.conversation.adapter
        others = ", ".join(name for name in names if name != answering)
        return f"{answering} answers (/adapter NAME chooses another: {others})"

    def _answer(self, question: str) -> None:
        """Print the answer as it comes."""
        with closing(self.conversation.ask(question)) as pieces:
            first_piece = next(pieces, "")  # a question that is refused is so here, before anything is printed
            if self._n_answers and not self.is_terminal:
                print_text("")
            self._n_answers += 1
            for piece in chain([first_piece], pieces):
                print_text(piece, end="")
                if sys.stdout.closed:
                    return
        print_text("")
        if self.conversation.cut_off:
            tell(self.conversation.cut_off)
        if self.is_terminal:
            print_text("")


def _typed_line() -> str:
    """A line that a person types. EOFError for Ctrl-D."""
    if sys.stdout.isatty():
        return input("> ")
    # The answers go elsewhere, and the prompt doesn't belong to them.
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def tell(text: str) -> None:
    """Say something beside the answers."""
    print(f"({text})", file=sys.stderr, flush=True)
