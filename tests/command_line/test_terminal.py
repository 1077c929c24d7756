"""Where a command stands: readers that go, full disks, encodings, control characters, Ctrl-C; and the last handler."""

import ast
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from project import ROOT
from small_commands import command_lines

from handtune import commands
from handtune._files import read_json
from handtune._outside import others_code, visible, visible_line
from handtune.cli import main
from handtune.terminal import Stream, print_unescaped, safe_streams

COMMANDS = list(commands.COMMANDS)


@pytest.fixture
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\nand the dog?\n")))


def without_reader() -> io.TextIOWrapper:
    """A pipe whose other end is closed, as behind `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", encoding="utf-8")


# Streams


def test_every_command_is_tried() -> None:
    assert {*command_lines(Path())} == {*PLANTED} == {*commands.LESS_MEMORY} == {*COMMANDS}


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_has_gone_silences_a_command_and_no_more(command, tmp_path, monkeypatch) -> None:
    arguments, left = command_lines(tmp_path)[command]
    with without_reader() as output, without_reader() as errors:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", errors)
        assert main(arguments) == 0
    assert left is None or left.is_file()


@pytest.mark.usefixtures("_here")
def test_generating_ends_where_nobody_reads_on(tmp_path, monkeypatch) -> None:
    texts = iter(range(9))
    monkeypatch.setattr("handtune.commands.generate.completions", lambda *_, **__: (str(next(texts)) for _ in range(4)))
    with without_reader() as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["generate", "base", "--prompts", "rows.jsonl"]) == 0
    assert next(texts) == 1


@pytest.mark.usefixtures("_here")
def test_output_that_is_closed_from_the_beginning(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    arguments, left = command_lines(tmp_path)["train"]
    assert main(arguments) == 0
    assert left is not None and left.is_file()
    assert main(["train", "none.toml"]) == 2


@pytest.mark.usefixtures("_here")
def test_a_full_disk_behind_the_output_is_said_in_the_end(tmp_path, monkeypatch, capsys) -> None:
    """What was to be stored is stored, but what was printed is lost: not what anybody wanted."""
    arguments, left = command_lines(tmp_path)["train"]
    with open("/dev/full", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(arguments) == 2
    assert left is not None and left.is_file()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "handtune: standard output: [Errno 28] No space left on device; not all is there that was printed"
    )


def test_a_progress_bar_outlives_its_terminal(monkeypatch) -> None:
    from tqdm import tqdm

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with safe_streams() as (_, errors):
            bar = tqdm(total=9, disable=None, mininterval=0)
            assert not bar.disable
            bar.update()
            seen = b""
            while b"1/9" not in seen:
                assert select.select([ours], [], [], 10)[0], seen
                seen += os.read(ours, 4096)
            os.close(ours)
            bar.update()
            tqdm.write("a note", file=sys.stderr)
            bar.close()
            assert errors.closed and errors.error is None


def test_what_an_encoding_lacks_is_written_as_its_code(monkeypatch) -> None:
    raw = io.BytesIO()
    stream = Stream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("– \ud800\n")
    stream.write_unescaped("before → after \udcff\n")
    stream.flush()
    assert raw.getvalue() == b"\\u2013 \\ud800\nbefore \\u2192 after \\udcff\n"


def test_a_signal_may_write_in_the_middle_of_a_write() -> None:
    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    stream = Stream(Busy())
    stream.write("finishing this step")
    assert not stream.closed


# Control characters

EVIL = "a\x1b[31mb\x07\x9b2J\u202ec\ud800\r\x00"


def test_control_characters_are_escaped() -> None:
    assert visible(EVIL + "\n\té → 😀") == r"a\x1b[31mb\x07\x9b2J\u202ec\ud800\r\x00" + "\n\té → 😀"
    assert visible_line("a\nb\tc") == r"a\nb\tc"
    shown = io.StringIO()
    stream = Stream(shown)
    stream.write("\r 10%|#  |\r\x1b[2J")  # a bar begins with a carriage return
    assert shown.getvalue() == "\r 10%|#  |\\r\\x1b[2J"


def harmless(text: str) -> bool:
    """Whether no character of a text steers a terminal."""
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)


@pytest.mark.usefixtures("_here")
def test_names_steer_no_terminal(folder, tmp_path, capsys) -> None:
    """Of files, labels, runs, tokens and metrics, in lines of errors and in what is printed."""

    from small_images import class_folders

    evil = "a\x1b[31mb\x9b2J\u202ec"
    run = tmp_path / evil
    assert main(["train", "train.toml", f"out={run}", f"name={json.dumps(evil)}"]) == 0
    facts = json.loads((run / "run.json").read_text()) | {"name": evil}
    (run / "run.json").write_text(json.dumps(facts))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval": {EVIL: 1.0, "loss": 1.0}}) + "\n")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert harmless(page) and r"\x1b[31m" in page

    pictures = class_folders(tmp_path / "images", count=2)
    next(pictures.iterdir()).rename(pictures / evil)
    for arguments in (
        ["merge", "base", evil, "out"], ["generate", evil, "--prompt", "a"], ["label", "base", evil, "--out", "x"],
        ["train", "train.toml", f"model.path={json.dumps(evil)}"], ["train", "train.toml", f"model.{evil}=1"],
        ["check-data", "train.toml", f"data.train={json.dumps(str(pictures))}"],
        ["compare", "--pairs", evil, "--out", "x"], ["evaluate", evil], ["report", evil], ["ppo", evil],
    ):  # fmt: skip
        with suppress(SystemExit):
            main(arguments)
    told = capsys.readouterr()
    assert harmless(told.out + told.err)
    assert told.err.count(r"\x1b[31m") >= 8
    assert "Traceback" not in told.err


def test_texts_that_no_file_could_hold_are_refused(tmp_path, capsys) -> None:
    """Half of a surrogate pair in a JSON file, and an argument that isn't UTF-8, which Python gives as such halves."""
    (tmp_path / "config.json").write_text(r'{"chat_template": "a\ud83d"}')
    with pytest.raises(ValueError, match=r"config.json: half of a surrogate pair .* remove it"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(r'{"chat_template": "\ud83d\ude00, \\ud83d"}')
    assert read_json(tmp_path / "config.json") == {"chat_template": "😀, \\ud83d"}
    assert main(["generate", "base", "--prompt", "a\udcff"]) == 2
    assert capsys.readouterr().err == "handtune: the argument 'a\\udcff' is not UTF-8; rename what it names\n"


@pytest.mark.usefixtures("_here")
def test_texts_are_data_in_a_pipe_and_escaped_on_a_terminal(monkeypatch) -> None:
    monkeypatch.setattr("handtune.commands.generate.completions", lambda *_, **__: iter(["\x1b[31mred"]))
    for is_terminal, shown in ((False, "the cat\x1b[31mred\n"), (True, "the cat\\x1b[31mred\n")):
        output = io.StringIO()
        output.isatty = lambda is_terminal=is_terminal: is_terminal  # type: ignore[method-assign]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            assert main(["generate", "base", "--prompt", "the cat"]) == 0
        assert output.getvalue() == shown


def test_what_is_coloured_goes_through(capsys) -> None:
    with safe_streams():
        print_unescaped("\x1b[1;32mgreen\x1b[0m")
    print_unescaped("plain")
    assert capsys.readouterr().out == "\x1b[1;32mgreen\x1b[0m\nplain\n"


# The one handler

# Where a mistake of ours is planted for each command: somewhere behind its arguments.
PLANTED = {
    "train": "handtune.engine.training.loop.Optimizer.step",
    "chat": "handtune.engine.generation.streaming.check_prompt",
    "config": "handtune.commands.config.template",
    "check-data": "handtune.commands.check_data.show",
    "compare": "handtune.commands.compare.make_items",
    "evaluate": "handtune.commands.evaluate.put_weights",
    "generate": "handtune.prepare.load",
    "label": "handtune.engine.prediction.zero_shot.tokenize_pairs",
    "merge": "handtune.adapted.merging.match_keys",
    "predict": "handtune.engine.prediction.trained.token_rows",
    "ppo": "handtune.engine.rlhf.run.lr_factor",
    "report": "handtune.reporting.side_by_side.costs",
}


def mistake(*_: Any, **__: Any) -> Any:
    return {}["planted"]


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_of_ours_is_said_to_be_one(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(PLANTED[command], mistake)
    assert main(command_lines(tmp_path)[command][0]) == 70
    told = capsys.readouterr()
    line = told.err.splitlines()[-1]
    assert line.startswith("handtune: a fault of handtune, not of what it was given: KeyError: 'planted'; please ")
    assert all(part in line for part in ("--debug", f"(handtune {command}: handtune ", "torch 2.", "Python 3."))
    assert "Traceback" not in told.out + told.err


@pytest.mark.parametrize("place", ["handtune.cli.parser", "handtune.commands.COMMANDS", "handtune.cli.interruptible"])
def test_so_is_one_before_any_command(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(place, mistake)
    assert main(["report", "none", "--debug"]) == 70
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert told.splitlines()[-1].startswith("handtune: a fault of handtune")


@pytest.mark.usefixtures("_here")
def test_what_the_user_s_functions_raise_is_the_user_s(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "wrong.py").write_text("def reward(prompts, completions):\n    return {}['mine']\n")
    (tmp_path / "torn.py").write_text("def reward(:\n")
    arguments, _ = command_lines(tmp_path)["ppo"]
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*arguments, "reward=wrong:reward"]) == 2
    assert "handtune: 'wrong:reward' raised KeyError: 'mine'" in capsys.readouterr().err
    assert main([*arguments, "reward=torn:reward"]) == 2
    assert "handtune: 'torn:reward': SyntaxError: invalid syntax" in capsys.readouterr().err


def catches_all(source: str) -> list[int]:
    """The lines of handlers that catch every exception and don't let it go on."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            names = {ast.unparse(part) for part in ast.walk(node.type)} if node.type else {"BaseException"}
            last = node.body[-1]
            goes_on = isinstance(last, ast.Raise) and last.exc is None
            if names & {"Exception", "BaseException"} and not goes_on:
                lines.append(node.lineno)
    return lines


def test_nowhere_else_are_all_exceptions_caught() -> None:
    allowed = {"handtune/cli.py": 1, "handtune/_outside.py": 2}
    files = [path for name in ("engine", "models", "kernels") for path in (ROOT / name).rglob("*.py")]
    files += (ROOT / "handtune").rglob("*.py")
    caught = {str(path.relative_to(ROOT)): len(catches_all(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: count for name, count in caught.items() if count} == allowed
    for handler in ("except:", "except Exception:", "except (ValueError, Exception) as e:", "except BaseException:"):
        assert catches_all(f"try:\n    pass\n{handler}\n    pass\n") == [3]
    assert not catches_all("try:\n    pass\nexcept BaseException:\n    raise\nexcept ValueError:\n    pass\n")


def test_other_people_s_code_is_explained() -> None:
    panic = type("PanicException", (BaseException,), {})
    for error in (KeyError("x"), panic("x"), RecursionError()):
        with pytest.raises(ValueError, match="^explained$"), others_code(lambda error: ValueError("explained")):
            raise error
    for error in (KeyboardInterrupt(), MemoryError(), SystemExit()):
        with pytest.raises(type(error)), others_code(lambda error: ValueError("explained")):
            raise error


# Ctrl-C


def test_an_interrupt_that_turned_into_another_error_is_one(monkeypatch, capsys) -> None:
    def imports(*_: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy._core.multiarray failed to import") from error

    monkeypatch.setattr("handtune.cli.interruptible", imports)
    assert main(["report", "none"]) == 130
    assert capsys.readouterr() == ("", "")


INTERRUPTING = """
import os, signal, sys
class Finder:
    left = None
    def find_spec(self, name, *_):
        if name == "handtune.cli" and {moment} >= 0:
            self.left = {moment}
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                os.kill(os.getpid(), signal.SIGINT)
if {moment} < 0:
    import atexit, threading
    register = threading._register_atexit if {moment} == -1 else atexit.register
    register(os.kill, os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
import runpy
runpy.run_module("handtune", run_name="__main__", alter_sys=True)
"""


def interrupted(moment: int, *arguments: str, **settings: Any) -> subprocess.CompletedProcess:
    """The command line in a process that gets a Ctrl-C before its n-th import; -1: when its threads end, -2: later."""
    command = [sys.executable, "-c", INTERRUPTING.format(moment=moment), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **settings,
    )  # fmt: skip


@pytest.mark.parametrize(("moment", "code"), [(0, 130), (3, 130), (300, 130), (-1, 130), (-2, 0)])
def test_ctrl_c_is_silent_while_it_imports_and_at_the_end(moment, code, tmp_path) -> None:
    """Before the grammar, in it, in the middle of torch, and when all is done."""
    arguments = ["--version"] if moment < 0 else ["report", "none"]
    done = interrupted(moment, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.deep
@pytest.mark.parametrize("moment", range(60, 1600, 140))
def test_ctrl_c_at_every_other_import(moment, folder, tmp_path) -> None:
    """Of torch, of the commands, and of what is imported while one of them runs."""
    done = interrupted(moment, *command_lines(tmp_path)["train"][0], cwd=folder)
    assert done.returncode in (0, 130)
    assert "Traceback" not in done.stderr and "KeyboardInterrupt" not in done.stderr


@pytest.mark.deep
@pytest.mark.parametrize("command", ["train", "generate", "merge", "ppo"])
def test_ctrl_c_at_any_time(command, folder, tmp_path) -> None:
    """Seven moments of a process's life, sometimes twice in a row: 130, no traceback, and in the end it goes well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begun = tmp_path / "begun"  # made once our first line has run: before that, Ctrl-C is the interpreter's
    program = f"from handtune.__main__ import main; open({str(begun)!r}, 'w').close(); raise SystemExit(main())"

    def start(out: Path) -> tuple[subprocess.Popen, Path | None]:
        arguments, left = command_lines(out)[command]
        begun.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        return process, left

    begin = time.perf_counter()
    assert start(tmp_path)[0].wait(120) == 0
    whole = time.perf_counter() - begin
    (tmp_path / "new").mkdir()
    for number, share in enumerate((0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)):
        process, left = start(tmp_path / "new")
        while not begun.exists():
            time.sleep(0.001)
        time.sleep(share * whole)
        for _ in range(1 + number % 2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors and "KeyboardInterrupt" not in errors
        assert process.returncode in (0, 130), errors
        if process.returncode == 0:
            break
    else:
        process, left = start(tmp_path / "new")
        assert process.wait(120) == 0, process.communicate()
    assert left is not None and left.is_file()
