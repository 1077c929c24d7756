"""The command line: where models and engine are put together.

Parsing imports nothing heavy; the work of each command is in `handtune/commands/`. A mistake of the user is reported in
one line on standard error, with exit code 2; a fault of handtune in one line that says how to report it, with exit code
70. `--debug` shows the traceback of both.
"""

import argparse
import platform
import sys
import traceback
from typing import Any

from . import __version__
from ._outside import explained_memory
from .terminal import INTERRUPTED, interruptible, safe_streams

MISTAKE = 2  # as argparse has it
FAULT = 70  # EX_SOFTWARE of sysexits.h


Arguments = dict[str, dict[str, Any]]  # the settings of each argument, as `add_argument` takes them, by its names

# What several commands have; a command need not say it again, but may say it otherwise.
SHARED: Arguments = {
    "config": {"help": "the TOML file"},
    "override": {"nargs": "*"},
    "model": {"help": "a checkpoint's folder or hub id, or the folder of a run"},
    "--prompts": {"help": "a file of rows with a prompt, messages or a text each, or what its prompts are made of"},
    "--adapter": {"action": "append", "default": [], "help": "an adapter's folder"},
    "--force": {"action": "store_true", "help": "replace a file that is there"},
    "--max-new-tokens": {"type": int, "default": 64},
    "--temperature": {"type": float},
    "--stop": {"action": "append", "default": [], "help": "end at this text (may be repeated)"},
    "--batch-size": {"type": int, "default": 16},
    "--seed": {"type": int, "default": 0},
    "--dtype": {"default": "auto", "help": "auto, float32 or bfloat16"},
}

# What each command does, and its arguments in the order of its help.
GRAMMAR: dict[str, tuple[str, Arguments]] = {
    "train": (
        "Train as a TOML file says; the same command on the same folder resumes.",
        {"config": {}, "override": {"help": "a change to it, like train.lr=1e-4"}},
    ),
    "check-data": (
        "Show the rows as the model will see them, and which tokens are in the loss.",
        {
            "config": {},
            "override": {"help": "a change to it, like data.max_length=256"},
            "-n --rows": {"type": int, "default": 3, "help": "how many (default 3)"},
        },
    ),
    "evaluate": (
        "Evaluate a finished run on held-out rows.",
        {
            "run": {"help": "the run's folder"},
            "--data": {"help": "another file of rows (default: the run's own held-out rows)"},
            "--rouge": {"action": "store_true", "help": "compare generated texts with the rows' completions, too"},
        },
    ),
    "compare": (
        "Collect comparisons of a model's own completions; the same command goes on.",
        {
            "model": {"nargs": "?"},
            "--prompts": {},
            "--pairs": {"help": "instead of a model: rows of prompt and completions, or chosen and rejected"},
            "--out": {"required": True, "help": "the comparisons (JSONL); the session lies beside it"},
            "--force": {"help": "replace a file at --out that is of no session"},
            "--terminal": {"action": "store_true", "help": "here, and not in a browser"},
            "--labeler": {"help": "module:function answers: (prompt, left, right) → left, right, tie or skip"},
            "--repeat": {"type": float, "default": 0.1, "help": "share of pairs shown twice (default 0.1)"},
            "--port": {"type": int, "default": 0, "help": "of the page, on 127.0.0.1 (default: any)"},
            "--adapter": {},
            "--max-new-tokens": {},
            "--temperature": {"default": 1.0},
            "--stop": {},
            "--batch-size": {},
            "--seed": {},
            "--dtype": {},
        },
    ),
    "generate": (
        "Continue prompts.",
        {
            "model": {},
            "--adapter": {"help": "an adapter's folder; several: rows of --prompts name theirs"},
            "--prompt": {"action": "append", "help": "a prompt (may be repeated)"},
            "--prompts": {},
            "--raw": {"action": "store_true", "help": "continue the prompts as they are, past any template"},
            "--out": {"help": "write prompt/completion rows (JSONL) here instead of printing"},
            "--force": {},
            "--max-new-tokens": {},
            "--temperature": {"help": "0 is greedy (default 1, with beams 0)"},
            "--top-k": {"type": int, "default": 0},
            "--top-p": {"type": float, "default": 1.0},
            "--beams": {"type": int, "default": 1, "help": "look for the likeliest text with so many beams"},
            "--length-penalty": {"type": float, "help": "of beams: above 1 favours long texts (default 1)"},
            "--stop": {},
            "--batch-size": {},
            "--seed": {},
            "--dtype": {},
        },
    ),
    "ppo": (
        "Improve a model on rewards, as a TOML file says; the same command on the same folder resumes.",
        {
            "config": {},
            "override": {"help": "a change to it, like ppo.kl_coef=0.05"},
            "--quiet": {"action": "store_true", "help": "show no samples"},
        },
    ),
    "label": (
        "Label texts by a causal model, with a confidence; people can review the least certain.",
        {
            "model": {},
            "data": {"help": "a file of rows with a text"},
            "--labels": {"nargs": "+", "required": True, "help": "names, or name=words: what stands for each"},
            "--template": {"default": "{text}\\n{label}", "help": r"a sentence (default {text}\n{label})"},
            "--out": {"required": True, "help": "rows of text, label, confidence and second (JSONL)"},
            "--force": {},
            "--sort": {"action": "store_true", "help": "the least certain first"},
            "--adapter": {},
            "--batch-size": {},
            "--dtype": {},
        },
    ),
    "merge": (
        "Merge an adapter into its base and write a plain checkpoint.",
        {
            "model": {"help": "the base: a folder or hub id"},
            "adapter": {"help": "the adapter's folder"},
            "out": {"help": "where the merged checkpoint goes"},
        },
    ),
    "report": (
        "Compare runs in a table and in one self-contained HTML page.",
        {
            "runs": {"nargs": "+", "help": "run folders"},
            "-o --out": {"default": "report.html", "help": "the page (default report.html)"},
            "--force": {"help": "replace a file that is no page of handtune's"},
            "--watch": {
                "action": "store_true",
                "help": "while a run goes on, keep the page up to date: it reloads itself",
            },
        },
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    grammar = argparse.ArgumentParser(prog="handtune", description="Fine-tune a pretrained model on your own data.")
    grammar.add_argument("--version", action="version", version=f"handtune {__version__}")
    grammar.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = grammar.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, arguments) in GRAMMAR.items():
        command = commands.add_parser(name, help=text, description=text)
        # Also behind the command; its default must not overwrite a --debug in front of it.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        # What is said here goes before what is shared.
        for names, settings in arguments.items():
            command.add_argument(*names.split(), **{**SHARED.get(names, {}), **settings})
    return grammar


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options. Changes to a configuration may also follow the options, which argparse alone refuses.

    ValueError where an option that several commands have is out of its bounds.
    """
    grammar = parser()
    options, unparsed = grammar.parse_known_args(arguments)
    if unparsed and ("override" not in options or any(argument.startswith("-") for argument in unparsed)):
        grammar.error(f"unrecognized arguments: {' '.join(unparsed)}")
    if unparsed:
        options.override += unparsed

    if "batch_size" in options and options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: expected a positive number")
    return options


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

    with interruptible(), explained_memory(lambda: f"out of memory; {commands.LESS_MEMORY[options.command]}"):
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
