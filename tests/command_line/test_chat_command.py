"""`handtune chat`: through a pipe, at a terminal that a process really has, and what happens to a conversation."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from project import ROOT
from small_adapters import shaken
from small_commands import run_command, talker_folder
from small_runs import gpt2_folder

from handtune.adapted.generator import generator_of
from handtune.cli import main
from handtune.conversation.turns import Conversation
from handtune.engine import LoRAConfig, add_lora, save_adapter
from handtune.engine.generation.completions import completions
from handtune.models import load
from handtune.prompts import prompt_of

GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker_folder(tmp_path_factory.mktemp("chat") / "talker")


@pytest.fixture(scope="module")
def adapters(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for number, name in enumerate(("law", "tone of voice")):
        model = load(talker, device="cpu")[0]
        add_lora(model, LoRAConfig(rank=4))
        folders.append(tmp_path_factory.mktemp("adapters") / name)
        save_adapter(shaken(model, number), folders[-1])
    return folders


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Lines to the command through a pipe: its exit code, its output, what it said beside that."""

    def chat(text: str | bytes, *arguments: object) -> tuple[int, str, str]:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        code = main(["chat", *map(str, arguments)])
        return code, *capsys.readouterr()

    return chat


def conversation(folder: Path, *adapters: Path, **settings: Any) -> tuple[Conversation, list[str]]:
    told: list[str] = []
    settings = {"temperature": 0, "max_new_tokens": 6, **settings}
    return Conversation(generator_of(str(folder), adapters, "auto"), told.append, **settings), told


def test_every_question_is_asked_with_all_before_it(talker: Path, piped: Any) -> None:
    """As `completions` answers the dialogue rendered as a whole, computed from the beginning."""
    model, words = load(talker, device="cpu")
    questions = ["the cat", "and the dog?", "who?"]
    turns: list[dict[str, str]] = []
    for question in questions:
        turns.append({"role": "user", "content": question})
        prompt = prompt_of({"messages": turns}, model)
        (answer,) = completions(model, words, [prompt], 3, temperature=0)
        turns.append({"role": "assistant", "content": answer.lstrip()})
    code, out, told = piped("\n".join(questions), talker, "--temperature", 0, "--max-new-tokens", 3)
    assert code == 0
    assert out == "\n".join(turn["content"] + "\n" for turn in turns[1::2])
    assert set(told.splitlines()) <= {"(cut off after 3 tokens; --max-new-tokens allows more)"}


def test_what_is_typed_beside_questions(talker: Path, piped: Any) -> None:
    lines = ["the cat", "/reset", "the cat", "", "  ", "/help", "/adapter", " /quit is a question here", "/quit", "no"]
    code, out, told = piped("\n".join(lines), talker, *GREEDY)
    answers = out.split("\n\n")
    assert code == 0
    assert len(answers) == 3
    assert answers[0] == answers[1]
    assert "(forgotten)" in told
    assert "/adapter NAME" in told
    assert "(the model answers, without adapters)" in told

    # An answer that is asked for again is another one.
    sampled = piped("the cat\n/reset\nthe cat\n", talker, "--max-new-tokens", 8)[1]
    first, second = sampled.split("\n\n")
    assert first != second.rstrip("\n")
    assert sampled == piped("the cat\n/reset\nthe cat\n", talker, "--max-new-tokens", 8)[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hi\n/nothing here\n", "/nothing here: no such command; /help lists them"),
        ("hi\n/adapter law\n", "there is no adapter 'law' here; choose among base"),
        ("hi\n" + "the cat " * 80, "this question has .* tokens, and the model 64 positions for it and the answer"),
        (b"hi\nth\xff\n", "standard input line 2: not UTF-8; save it as UTF-8"),
    ],
)
def test_a_mistake_ends_a_pipe_behind_what_was_answered(text: str | bytes, says: str, talker: Path, piped: Any) -> None:
    code, out, told = piped(text, talker, *GREEDY)
    assert code == 2
    assert re.search(f"^handtune: {says}", told.splitlines()[-1])
    assert out == piped("hi\n", talker, *GREEDY)[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--temperature", "-1"), "expected temperature ≥ 0"),
        (("--repetition-penalty", "0"), "repetition_penalty = 0.0: expected a number above 0"),
        (("--no-repeat-ngram", "-3"), "no_repeat_ngram = -3: expected a length of at least 1"),
        (("--temperature", "0", "--top-k", "3"), "--top-k: at --temperature 0 nothing is sampled"),
        (("--max-new-tokens", "0"), "max_new_tokens = 0: expected at least 1"),
    ],
)
def test_settings_are_refused_before_the_first_question(options: Any, says: str, talker: Path, piped: Any) -> None:
    code, out, told = piped("hi\n", talker, *options)
    assert (code, out) == (2, "")
    assert says in told


def test_a_model_that_nobody_can_talk_to(tmp_path: Path, piped: Any) -> None:
    base = gpt2_folder(tmp_path / "base")
    code, out, told = piped("hi\n", base)
    assert (code, out) == (2, "")
    assert f"{base}: this model has no chat template" in told
    assert "`handtune generate`" in told


def test_what_keeps_a_conversation_short(talker: Path) -> None:
    """The oldest turns are forgotten, and that is said; the system prompt stays; a question alone may be too long."""
    talk, told = conversation(talker, system="be good", max_new_tokens=12)
    for number in range(5):
        "".join(talk.ask(f"who sat on the mat {number}?"))
        assert len(talk.turns) % 2 == 0
    assert any("no longer fit into the model's 64 positions, and are forgotten" in text for text in told)
    assert talk.turns[-2]["content"] == "who sat on the mat 4?"
    assert len(talk.turns) < 8
    before = list(talk.turns)
    with pytest.raises(ValueError, match="this question has"):
        list(talk.ask("the cat " * 80))
    assert len(talk.turns) <= len(before)


def test_a_system_prompt_that_the_template_drops_is_refused(talker: Path, tmp_path: Path, piped: Any) -> None:
    template = "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content }}<|im_end|>{% endfor %}"
    folder = talker_folder(tmp_path / "talker")
    (folder / "chat_template.jinja").write_text(template)
    code, out, told = piped("hi\n", folder, "--system", "answer in Latin")
    assert (code, out) == (2, "")
    assert "does not write the content of this message of role 'system'" in told
    assert piped("hi\n", folder, *GREEDY)[0] == 0


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(talker: Path) -> None:
    talk, _ = conversation(talker, max_new_tokens=20)
    pieces = talk.ask("the cat")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert [turn["content"] for turn in talk.turns] == ["the cat", said]
    "".join(talk.ask("and then?"))
    other, _ = conversation(talker, max_new_tokens=20)
    other.turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": said}]
    "".join(other.ask("and then?"))
    assert talk.turns == other.turns

    # Before the first word there is no answer, and the question is dropped with it.
    n_turns = len(talk.turns)
    pieces = talk.ask("nothing")
    pieces.close()
    assert len(talk.turns) == n_turns


def test_each_adapter_answers_as_alone(talker: Path, adapters: list[Path], piped: Any) -> None:
    """Switched in the middle: what was computed with another one is not gone on with."""
    alone = {}
    for name, folders in (("law", adapters[:1]), ("tone of voice", adapters[1:]), ("base", [])):
        talk, _ = conversation(talker, *folders)
        talk.turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
        alone[name] = "".join(talk.ask("and the dog?"))
    assert len(set(alone.values())) == 3

    talk, _ = conversation(talker, *adapters)
    assert talk.adapter == "tone of voice"
    for name in ("law", "base", "tone of voice", "law"):
        talk.use(name)
        talk.turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
        assert "".join(talk.ask("and the dog?")) == alone[name]
        assert talk.adapter == name
    given = [option for folder in adapters for option in ("--adapter", folder)]
    lines = "/adapter\n/adapter tone of voice\n/adapter none\n/adapter law\n"
    code, out, told = piped(lines, talker, *given)
    assert (code, out) == (0, "")
    assert [line.partition(" answers")[0] for line in told.splitlines()] == [
        "(tone of voice", "(tone of voice", "(base", "(law",
    ]  # fmt: skip


# At a terminal


def _take_terminal() -> None:
    """In the process: the terminal is its own, so that the key of Ctrl-C reaches it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """A process of the command at a terminal of its own."""

    def __init__(self, *arguments: object, term: str = "xterm", columns: int = 80):
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": term}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "handtune", "chat", *map(str, arguments)], stdin=theirs, stdout=theirs,
            stderr=theirs, env=environment, start_new_session=True, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 30) -> str:
        """What comes up to a pattern, and with it."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.seen!r}"
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.ours, 4096).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"{pattern!r} is not in {self.seen!r}") from None
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*arguments: object, **settings: Any) -> Terminal:
        opened.append(Terminal(*arguments, **settings))
        return opened[-1]

    yield open_one
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.ours)


@pytest.mark.deep
def test_at_a_terminal(talker: Path, terminal: Callable[..., Terminal]) -> None:
    """Typed lines, a mistake that is told, Ctrl-C in an answer and at the prompt, Ctrl-D; no escapes on a dumb one."""
    one = terminal(talker, "--temperature", "0", "--max-new-tokens", "9999", term="dumb", columns=20)
    one.until("Ctrl-D ends\\)\r\n> ")
    one.type("/nothing\n")
    one.until(r"\(/nothing: no such command;")
    one.until("> ")
    one.type("the cat\n")
    one.until("positions are full; /reset begins anew\\)\r\n\r\n> ")
    one.type("not this")
    one.until("not this")
    time.sleep(1)  # as a person does: a signal while readline takes a letter is seen with the next letter only
    one.type("\x03")
    one.until("\r\n> ")
    one.type("/reset\n")
    shown = one.until("\\(forgotten\\)\r\n> ")
    assert "\x1b" not in shown
    one.type("\x04")
    assert one.process.wait(30) == 0


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets lines come from a person, with Ctrl-D behind them."""

    def lines(*texts: str) -> None:
        left = list(texts)

        def read() -> str:
            if not left:
                raise EOFError
            return left.pop(0)

        stdin = io.StringIO()
        stdin.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr("handtune.conversation.session._typed_line", read)

    return lines


def test_bytes_from_a_model_steer_no_terminal(talker: Path, monkeypatch: pytest.MonkeyPatch, piped: Any, typed: Any):
    """Also a carriage return at the beginning of a piece, where a progress bar may have one."""
    pieces = ["\r", "\x1b", "[31mred", "\x9b2J", "\n", "plain"]
    monkeypatch.setattr(Conversation, "ask", lambda self, question: (piece for piece in pieces))
    assert piped("hi\n", talker)[1] == "".join(pieces) + "\n"
    output = io.StringIO()
    output.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", output)
    typed("hi")
    assert main(["chat", str(talker)]) == 0
    assert output.getvalue() == "\\r\\x1b[31mred\\x9b2J\nplain\n\n\n"


def interrupted_once(asked: list[str]) -> Callable[..., Iterator[str]]:
    """Answers, the one to "one" interrupted."""

    def ask(self: Conversation, question: str) -> Iterator[str]:
        asked.append(question)
        yield "begun"
        if question == "one":
            raise KeyboardInterrupt

    return ask


def test_ctrl_c_ends_an_answer_and_no_more(talker: Path, monkeypatch: Any, capsys: Any, piped: Any, typed: Any):
    asked: list[str] = []
    monkeypatch.setattr(Conversation, "ask", interrupted_once(asked))
    typed("one", "two")
    assert main(["chat", str(talker)]) == 0
    assert asked == ["one", "two"]
    assert capsys.readouterr().out == "begun\nbegun\n\n\n"

    # In a pipe it ends the command, as it does everywhere.
    assert piped("one\ntwo\n", talker)[0] == 130
    assert asked == ["one", "two", "one"]


def test_nobody_reads_on(talker: Path, monkeypatch: pytest.MonkeyPatch, piped: Any) -> None:
    """`| head -1` ends the conversation: what follows is not computed."""
    asked: list[str] = []

    def ask(self: Conversation, question: str) -> Iterator[str]:
        asked.append(question)
        yield question

    monkeypatch.setattr(Conversation, "ask", ask)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert piped("one\ntwo\nthree\n", talker)[0] == 0
    assert asked == ["one"]


def test_generate_takes_the_same_options(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, words = load(talker, device="cpu")
    (text,) = completions(model, words, ["the cat"], 12, temperature=0, repetition_penalty=1.5, no_repeat_ngram=2)
    run_command(
        "generate", talker, "--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 12,
        "--repetition-penalty", 1.5, "--no-repeat-ngram", 2,
    )  # fmt: skip
    assert capsys.readouterr().out == f"the cat{text}\n"
