"""The command line: where models and engine are put together.

Parsing imports nothing heavy; the work of each command is in `handtune/commands/`. A mistake of the user is reported in
one line on standard error, with exit code 2; a fault of handtune in one line that says how to report it, with exit code
70. `--debug` shows the traceback of both.
"""

import argparse
import platform
import sys
import traceback

from . import __version__
from ._outside import explained_memory
from .processes import n_processes, of_one_process, together
from .reference.grammar import GRAMMAR, SHARED
from .terminal import INTERRUPTED, interruptible, safe_streams

MISTAKE = 2  # as argparse has it
FAULT = 70  # EX_SOFTWARE of sysexits.h


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    grammar = argparse.ArgumentParser(prog="handtune", description="Fine-tune a pretrained model on your own data.")
    grammar.add_argument("--version", action="version", version=f"handtune {__version__}")
    grammar.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = grammar.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, example, arguments) in GRAMMAR.items():
        command = commands.add_parser(
            name, help=text, description=text, epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        # Also behind the command; its default must not overwrite a --debug in front of it.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        # What is said here goes before what is shared.
        for names, settings in arguments.items():
            command.add_argument(*names.split(), **{**SHARED.get(names, {}), **settings})
    return grammar


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options. Changes to a configuration, and a file, may also follow the options, which argparse alone refuses.

    ValueError where an option that several commands have is out of its bounds.
    """
    grammar = parser()
    options, unparsed = grammar.parse_known_args(arguments)
    if (
        unparsed
        and "file" in options
        and options.file is None
        and (unparsed[0] == "-" or not unparsed[0].startswith("-"))
    ):
        options.file = unparsed.pop(0)
    if unparsed and ("override" not in options or any(argument.startswith("-") for argument in unparsed)):
        grammar.error(f"unrecognized arguments: {' '.join(unparsed)}{_hint(options.command, unparsed)}")
    if unparsed:
        options.override += unparsed

    if "batch_size" in options and options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: expected a positive number")
    return options


def _hint(command: str, unparsed: list[str]) -> str:
    """What to do about arguments that a command doesn't have, where one of them is an option."""
    if not any(argument.startswith("-") for argument in unparsed):
        return ""
    from .reference.foreign_names import field_hint, option_hint

    known = [name.split()[-1] for name in GRAMMAR[command][-1] if name.startswith("-")]
    hint = option_hint(unparsed, known)
    if "override" in GRAMMAR[command][-1] and not hint.startswith("did you mean"):
        # What other tools have as options are fields of its file.
        from .config import PPORunConfig, RunConfig

        hint = field_hint(unparsed, PPORunConfig if command == "ppo" else RunConfig)
    return f"; {hint}"


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for a mistake of the user, 70 for one of handtune, 130 if interrupted.

    This is the outermost frame: errors that nobody foresaw end here, and nowhere else.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    with safe_streams() as (output, _):
        try:
            code = _run(arguments)
        except SystemExit:  # of argparse, after its help or its complaint
            raise
        except BaseException as error:
            if "--debug" in arguments:  # the options themselves need not have been parsed
                traceback.print_exception(error)
            code, line = _exit_code_and_message(error, arguments)
            if n_processes() > 1:
                code, line = of_one_process(error, code, line)
            if line:
                print(f"handtune: {line}", file=sys.stderr)

        # A full disk, for example, which a command that only prints would not notice.
        output.flush()
        if output.error is not None and code == 0:
            print(f"handtune: standard output: {output.error}; not all is there that was printed", file=sys.stderr)
            code = MISTAKE
    return code


def _run(arguments: list[str]) -> int:
    # Python decodes other bytes to halves of surrogate pairs, which would fail much later, wherever they are written.
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the argument {argument[:60]!r} is not UTF-8; rename what it names") from None

    # Imported only after parsing, because torch takes seconds, and --help or a mistyped option should not.
    options = parsed(arguments)
    from . import commands

    less_memory = commands.LESS_MEMORY[options.command]
    with together(options.command), interruptible(), explained_memory(lambda: f"out of memory; {less_memory}"):
        return commands.COMMANDS[options.command](options)


def _exit_code_and_message(error: BaseException, arguments: list[str]) -> tuple[int, str]:
    """The exit code for an error, and the line that reports it."""
    if _was_interrupted(error):
        return INTERRUPTED, ""
    if isinstance(error, ValueError | OSError | ArithmeticError | MemoryError):
        return MISTAKE, " ".join(str(error).split()) or type(error).__name__

    # Nothing else is raised on purpose.
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return FAULT, (
        f"a fault of handtune, not of what it was given: {message}; please report this line, and what the same command "
        f"prints with --debug (handtune {command}: {_versions()})"
    )


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether a Ctrl-C caused the error: on its way out, through C code for example, it may have become another one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _versions() -> str:
    torch = getattr(sys.modules.get("torch"), "__version__", "not imported")
    return f"handtune {__version__}, torch {torch}, Python {platform.python_version()}, on {platform.platform()}"
