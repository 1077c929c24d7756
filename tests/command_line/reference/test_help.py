"""--help of every command: each option explained, an example that is parsed, and torch not imported."""

import argparse
import shlex
import subprocess
import sys

import pytest
from project import ROOT

from handtune.cli import parsed, parser
from handtune.commands import COMMANDS, LESS_MEMORY
from handtune.reference.grammar import GRAMMAR


def commands() -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in parser()._actions if isinstance(action, argparse._SubParsersAction))


@pytest.mark.parametrize("command", GRAMMAR)
def test_every_option_is_explained(command: str) -> None:
    for action in commands()[command]._actions:
        assert action.help, f"{command}: {action.option_strings or action.dest}"


@pytest.mark.parametrize("command", GRAMMAR)
def test_every_command_has_an_example_that_is_parsed(command: str) -> None:
    example = GRAMMAR[command][1]
    assert f"\nexample:\n  {example}\n" in commands()[command].format_help()
    program, *arguments = shlex.split(example.partition(">")[0])
    assert (program, arguments[0]) == ("handtune", command)
    assert parsed(arguments).command == command


def test_every_command_is_there() -> None:
    assert GRAMMAR.keys() == COMMANDS.keys() == LESS_MEMORY.keys()


def test_help_imports_neither_torch_nor_what_only_some_need() -> None:
    """Of all commands in one process; `test_import_time.py` has the time of it."""
    code = (
        "import io, sys\nfrom contextlib import redirect_stdout\nfrom handtune.cli import main\n"
        f"for command in {list(GRAMMAR)}:\n"
        "    with redirect_stdout(io.StringIO()) as said:\n"
        "        try: main([command, '--help'])\n"
        "        except SystemExit: pass\n"
        "    assert 'example:' in said.getvalue()\n"
        "print([name for name in ('torch', 'numpy', 'pyarrow', 'gguf', 'tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
