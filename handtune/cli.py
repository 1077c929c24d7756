"""The command line: where models and engine are put together.

Parsing imports nothing heavy; each command's work is in `handtune/commands/`. A mistake of the user is one line on
standard error and exit code 2, a fault of handtune one that says how to report it, and exit code 70 (`--debug` shows
the traceback of both).
"""

import argparse
import platform
import sys
import traceback

from . import __version__
from ._outside import explained_memory
from .terminal import INTERRUPTED, interruptible, safe_streams

MISTAKE, FAULT = 2, 70  # as sysexits.h has it, EX_SOFTWARE


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="handtune", description="Fine-tune a pretrained model on your own data.")
    top.add_argument("--version", action="version", version=f"handtune {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return command

    train = add("train", "Train as a TOML file says; the same command on the same folder resumes.")
    train.add_argument("config", help="the TOML file")
    train.add_argument("override", nargs="*", help="a change to it, like train.lr=1e-4")

    check = add("check-data", "Show the rows as the model will see them, and which tokens are in the loss.")
    check.add_argument("config", help="the TOML file")
    check.add_argument("override", nargs="*", help="a change to it, like data.max_length=256")
    check.add_argument("-n", "--rows", type=int, default=3, help="how many (default 3)")

    evaluate = add("evaluate", "Evaluate a finished run on held-out rows.")
    evaluate.add_argument("run", help="the run's folder")
    evaluate.add_argument("--data", help="another file of rows (default: the run's own held-out rows)")
    evaluate.add_argument(
        "--rouge", action="store_true", help="compare generated texts with the rows' completions, too"
    )

    compare = add("compare", "Collect comparisons of a model's own completions; the same command goes on.")
    compare.add_argument("model", nargs="?", help="a checkpoint's folder or hub id, or the folder of a run")
    compare.add_argument("--prompts", help="a file of rows with a prompt, messages or a text each")
    compare.add_argument("--pairs", help="instead of a model: rows of prompt and completions, or chosen and rejected")
    compare.add_argument("--out", required=True, help="the comparisons (JSONL); the session lies beside it")
    compare.add_argument("--force", action="store_true", help="replace a file at --out that is of no session")
    compare.add_argument("--terminal", action="store_true", help="here, and not in a browser")
    compare.add_argument("--labeler", help="module:function answers: (prompt, left, right) → left, right, tie or skip")
    compare.add_argument("--repeat", type=float, default=0.1, help="share of pairs shown twice (default 0.1)")
    compare.add_argument("--port", type=int, default=0, help="of the page, on 127.0.0.1 (default: any)")
    compare.add_argument("--adapter", action="append", default=[], help="an adapter's folder")
    compare.add_argument("--max-new-tokens", type=int, default=64)
    compare.add_argument("--temperature", type=float, default=1.0)
    compare.add_argument("--stop", action="append", default=[], help="end at this text (may be repeated)")
    compare.add_argument("--batch-size", type=int, default=16)
    compare.add_argument("--seed", type=int, default=0)
    compare.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")

    generate = add("generate", "Continue prompts.")
    generate.add_argument("model", help="a checkpoint's folder or hub id, or the folder of a run")
    generate.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="an adapter's folder; several: rows of --prompts name theirs",
    )
    generate.add_argument("--prompt", action="append", help="a prompt (may be repeated)")
    generate.add_argument("--prompts", help="a file of rows with a prompt, messages or a text each")
    generate.add_argument("--raw", action="store_true", help="continue the prompts as they are, past a chat template")
    generate.add_argument("--out", help="write prompt/completion rows (JSONL) here instead of printing")
    generate.add_argument("--force", action="store_true", help="replace a file that is there")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, help="0 is greedy (default 1, with beams 0)")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--beams", type=int, default=1, help="look for the likeliest text with so many beams")
    generate.add_argument("--length-penalty", type=float, help="of beams: above 1 favours long texts (default 1)")
    generate.add_argument("--stop", action="append", default=[], help="end at this text (may be repeated)")
    generate.add_argument("--batch-size", type=int, default=16)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")

    ppo = add("ppo", "Improve a model on rewards, as a TOML file says; the same command on the same folder resumes.")
    ppo.add_argument("config", help="the TOML file")
    ppo.add_argument("override", nargs="*", help="a change to it, like ppo.kl_coef=0.05")
    ppo.add_argument("--quiet", action="store_true", help="show no samples")

    label = add("label", "Label texts by a causal model, with a confidence; people can review the least certain.")
    label.add_argument("model", help="a checkpoint's folder or hub id, or the folder of a run")
    label.add_argument("data", help="a file of rows with a text")
    label.add_argument("--labels", nargs="+", required=True, help="names, or name=words: what stands for each")
    label.add_argument("--template", default="{text}\\n{label}", help=r"a sentence (default {text}\n{label})")
    label.add_argument("--out", required=True, help="rows of text, label, confidence and second (JSONL)")
    label.add_argument("--force", action="store_true", help="replace a file that is there")
    label.add_argument("--sort", action="store_true", help="the least certain first")
    label.add_argument("--adapter", action="append", default=[], help="an adapter's folder")
    label.add_argument("--batch-size", type=int, default=16)
    label.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")

    merge = add("merge", "Merge an adapter into its base and write a plain checkpoint.")
    merge.add_argument("model", help="the base: a folder or hub id")
    merge.add_argument("adapter", help="the adapter's folder")
    merge.add_argument("out", help="where the merged checkpoint goes")

    report = add("report", "Compare runs in a table and in one self-contained HTML page.")
    report.add_argument("runs", nargs="+", help="run folders")
    report.add_argument("-o", "--out", default="report.html", help="the page (default report.html)")
    report.add_argument("--force", action="store_true", help="replace a file that is no page of handtune's")
    return top


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options; changes to a configuration may stand behind them, too, where argparse alone refuses them."""
    grammar = parser()
    options, rest = grammar.parse_known_args(arguments)
    if rest and ("override" not in options or any(word.startswith("-") for word in rest)):
        grammar.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.override += rest
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run a command; gives the exit code: 0, 2 for a mistake of the user, 70 for one of handtune, 130 if interrupted.

    This is the outermost frame: what nobody foresaw ends here, and nowhere else.
    """
    given = sys.argv[1:] if arguments is None else arguments
    with safe_streams() as (output, _):
        try:
            code = _run(given)
        except SystemExit:  # of argparse, after its help or its complaint
            raise
        except BaseException as error:
            if _debugged(given):
                traceback.print_exception(error)
            code, line = _judged(error, given)
            if line:
                print(f"handtune: {line}", file=sys.stderr)
        output.flush()
        if output.error is not None and code == 0:
            print(f"handtune: standard output: {output.error}; not all is there that was printed", file=sys.stderr)
            code = MISTAKE
    return code


def _run(arguments: list[str]) -> int:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the argument {argument[:60]!r} is not UTF-8; rename what it names") from None

    options = parsed(arguments)
    from . import commands

    with interruptible(), explained_memory(lambda: f"out of memory; {commands.LESS_MEMORY[options.command]}"):
        return commands.COMMANDS[options.command](options)


def _debugged(arguments: list[str]) -> bool:
    return "--debug" in arguments


def _judged(error: BaseException, arguments: list[str]) -> tuple[int, str]:
    """The exit code that an error comes to, and the line that says it."""
    if _was_interrupted(error):
        return INTERRUPTED, ""
    if isinstance(error, ValueError | OSError | ArithmeticError | MemoryError):
        return MISTAKE, " ".join(str(error).split()) or type(error).__name__
    command = next((word for word in arguments if not word.startswith("-")), "")
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return FAULT, (
        f"a fault of handtune, not of what it was given: {said}; please report this line, and what the same command "
        f"prints with --debug (handtune {command}: {_versions()})"
    )


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether a Ctrl-C began it: on its way out, through C code for example, it may have turned into another error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _versions() -> str:
    torch = sys.modules.get("torch")
    known = {"handtune": __version__, "torch": getattr(torch, "__version__", "not imported")}
    known |= {"Python": platform.python_version(), "on": platform.platform()}
    return ", ".join(f"{name} {version}" for name, version in known.items())
