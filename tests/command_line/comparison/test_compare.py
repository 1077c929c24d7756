"""Comparisons by people: sessions that survive, the page's server against strangers, the terminal, the command."""

import http.client
import json
import math
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_kills import held_by_another
from small_runs import write_rows

from handtune.cli import main
from handtune.comparison.session import Item, Session, make_items
from handtune.comparison.web_page import ComparisonServer
from handtune.engine.data.readers import read_rows

PAIRS = [(f"prompt {i}", f"good {i}", f"bad {i}") for i in range(20)]


def test_sides_are_drawn_and_some_pairs_come_again_turned_around() -> None:
    items, dropped = make_items([*PAIRS, ("p", "same", "same"), ("p", " ", "x")], repeat=0.2, seed=3)
    assert dropped == [21, 22]
    assert [item.id for item in items] == list(range(24))
    lefts = sum(item.left.startswith("good") for item in items[:20])
    assert 3 < lefts < 17
    for item in items[20:]:
        first = items[item.repeats]
        assert (item.prompt, item.left, item.right) == (first.prompt, first.right, first.left)
    assert len({item.repeats for item in items[20:]}) == 4
    assert make_items(PAIRS, seed=3) == make_items(PAIRS, seed=3)
    with pytest.raises(ValueError, match="no pair to compare"):
        make_items([("p", "a", "a")])


def test_a_session_goes_on_after_anything(tmp_path: Path) -> None:
    """Answers, undone answers, a line that a kill cut short: what was written is there, once."""
    items = make_items(PAIRS, repeat=0)[0]
    session = Session(tmp_path / "s", items)
    for item, answer in ((0, "left"), (1, "right"), (2, "tie"), (3, "skip")):
        assert session.answer(item, answer)
    assert not session.answer(0, "right")  # the other tab was faster
    assert session.undo() == 3
    assert session.next() == items[3]
    with (tmp_path / "s/answers.jsonl").open("a") as file:
        file.write('{"item": 3, "ans')
    again = Session(tmp_path / "s")
    assert again.answers == session.answers == {0: "left", 1: "right", 2: "tie"}
    assert again.answer(3, "left")
    assert Session(tmp_path / "s").answers == {0: "left", 1: "right", 2: "tie", 3: "left"}
    rows = again.rows()
    assert rows[0] == {"prompt": items[0].prompt, "chosen": items[0].left, "rejected": items[0].right}
    assert rows[1]["chosen"] == items[1].right
    assert [row.get("tie", False) for row in rows] == [False, False, True, False]
    again.export(tmp_path / "rows.jsonl")
    assert [row["chosen"] for row in read_rows(tmp_path / "rows.jsonl")] == [row["chosen"] for row in rows]
    with pytest.raises(ValueError, match="a session about other pairs"):
        Session(tmp_path / "s", items[:3])
    for wrong in (99, -1, 0.5, "1"):
        with pytest.raises(ValueError, match=r"expected one of the 20 items"):
            again.answer(wrong, "left")
    with pytest.raises(ValueError, match="is not empty and holds no session"):
        Session(tmp_path, items)


def test_agreement_counts_repeated_items() -> None:
    items = [Item(0, "p", "a", "b"), Item(1, "q", "c", "d"), Item(2, "p", "b", "a", 0), Item(3, "q", "d", "c", 1)]
    session = Session.__new__(Session)
    session.items, session.answers = items, {0: "left", 1: "left", 2: "right", 3: "left"}
    assert session.progress() == {"done": 4, "total": 4, "repeated": 2, "agreement": 0.5}
    session.answers[3] = "skip"
    assert session.progress()["agreement"] == 1.0


class Client:
    """Requests to a server as its page makes them."""

    def __init__(self, server: ComparisonServer):
        self.port, self.token = server.server_port, server.token

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        usual = {"X-Token": self.token, "Host": f"127.0.0.1:{self.port}"}
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, usual | given)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, json.loads(text) if reply.headers["Content-Type"] == "application/json" else text


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ComparisonServer]:
    with ComparisonServer(Session(tmp_path / "s", make_items(PAIRS, repeat=0)[0])) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_page_and_its_answers(server: ComparisonServer) -> None:
    ask = Client(server)
    status, page = ask("GET", f"/?token={server.token}")
    assert status == 200
    assert "{{nonce}}" not in page
    assert not re.search(r"(src|href)\s*=|https?://", page)
    status, state = ask("GET", "/next")
    assert state["progress"] == {"done": 0, "total": 20, "repeated": 0, "agreement": None}
    first = state["item"]["id"]
    status, state = ask("POST", "/answer", {"item": first, "answer": "left", "seconds": 1.5})
    assert (status, state["item"]["id"], state["progress"]["done"]) == (200, 1, 1)
    _, state = ask("POST", "/answer", {"item": first, "answer": "right"})  # from a second tab
    assert (server.session.answers, state["item"]["id"]) == ({first: "left"}, 1)
    _, state = ask("POST", "/undo", {})
    assert (server.session.answers, state["item"]["id"]) == ({}, first)


def test_strangers_are_refused(server: ComparisonServer) -> None:
    ask, answer = Client(server), {"item": 0, "answer": "left"}
    ours = f"http://127.0.0.1:{server.server_port}"
    for headers in (
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}, {"X_Token": "wrong"},
        {"Host": f"evil.example:{server.server_port}"}, {"X_Token": ""}, {"Origin": ours.replace("http", "https")},
    ):  # fmt: skip
        assert ask("POST", "/answer", answer, **headers)[0] == 403
        assert ask("GET", "/next", **headers)[0] == 403
    assert ask("GET", "/")[0] == 403
    assert ask("GET", "/?token=wrong")[0] == 403
    assert ask("GET", "/etc/passwd")[0] == 403
    assert ask("POST", "/answer", b"x" * 70_000)[0] == 413
    assert ask("POST", "/answer", b"[1, 2")[0] == 400
    assert ask("POST", "/answer", {"item": 0, "answer": "maybe"})[0] == 400
    assert ask("POST", "/elsewhere", {})[0] == 400
    assert ask("POST", "/answer", b"[" * 60_000)[0] == 400
    assert ask("POST", "/undo", b"")[0] == 400
    for seconds in (math.nan, {"a": 1}, 10**400):
        assert ask("POST", "/answer", answer | {"seconds": seconds})[0] == 400
    assert ask("GET", "http://[/")[0] == 400
    assert server.session.answers == {}
    assert server.server_address[0] == "127.0.0.1"
    assert ask("POST", "/answer", answer, Origin=ours)[0] == 200


def test_a_browser_that_hangs_up_leaves_no_trace(server: ComparisonServer, capfd: pytest.CaptureFixture[str]) -> None:
    """In the middle of a request's line, headers and body, and before it reads the answer; with and without a reset."""
    host, reset = f"Host: 127.0.0.1:{server.server_port}", struct.pack("ii", 1, 0)
    whole = f"POST /undo HTTP/1.1\r\n{host}\r\nX-Token: {server.token}\r\nContent-Length: 2\r\n\r\n{{}}"
    for sent in (whole[:9], whole[:30], whole[:-1], whole, whole * 50, "\r\n", "\x00\xff" * 40, "A" * 70_000):
        for is_reset in (True, False):
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                if is_reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                connection.sendall(sent.encode("latin-1"))
    assert Client(server)("GET", "/next")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_control_characters_are_shown_as_codes(tmp_path: Path) -> None:
    items = make_items([("p\x1b[2J", "a\u202eb", "c\x07\nd")], repeat=0)[0]
    with ComparisonServer(Session(tmp_path / "s", items)) as server:
        shown = server.state()["item"]
    assert (shown["prompt"], {shown["left"], shown["right"]}) == (r"p\x1b[2J", {r"a\u202eb", "c\\x07\nd"})


def test_a_mistake_of_ours_ends_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is raised where the server was started, and so reaches the command line's last handler."""
    with ComparisonServer(Session(tmp_path / "s", make_items(PAIRS, repeat=0)[0])) as server:
        server.session.answer = lambda *_: {}["planted"]  # type: ignore[method-assign]
        asked = threading.Thread(target=hung_up_on, args=(server,))
        asked.start()
        with pytest.raises(KeyError, match="planted"):
            server.serve_forever(0.01)
        asked.join()
    assert capfd.readouterr() == ("", "")


def hung_up_on(server: ComparisonServer) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        Client(server)("POST", "/answer", {"item": 0, "answer": "left"})


def test_a_disk_that_takes_no_answer_is_said_on_the_page(server: ComparisonServer) -> None:
    ask, answers = Client(server), server.session.folder / "answers.jsonl"
    answers.mkdir()  # so that it can't be opened
    assert ask("POST", "/answer", {"item": 0, "answer": "left"})[0] == 500
    answers.rmdir()
    assert ask("POST", "/answer", {"item": 0, "answer": "left"})[0] == 200
    assert server.session.answers == {0: "left"}


def test_a_session_is_begun_by_one(tmp_path: Path) -> None:
    """While one process writes down what is compared, or answers, another one begins nothing there."""
    items, folder = make_items(PAIRS, repeat=0)[0], tmp_path / "s"
    folder.mkdir()
    with held_by_another(folder / ".lock") as other, pytest.raises(ValueError, match=f"process {other} works there"):
        Session(folder, items)
    assert Session(folder, items).items == items


def test_many_tabs_at_once_answer_each_item_once(server: ComparisonServer) -> None:
    def tab() -> None:
        ask = Client(server)
        state = ask("GET", "/next")[1]
        while state["item"] is not None:
            state = ask("POST", "/answer", {"item": state["item"]["id"], "answer": "tie"})[1]

    tabs = [threading.Thread(target=tab) for _ in range(4)]
    for one in tabs:
        one.start()
    for one in tabs:
        one.join()
    lines = [json.loads(line) for line in (server.session.folder / "answers.jsonl").read_text().splitlines()]
    assert sorted(line["item"] for line in lines) == list(range(20))


def pairs_file(tmp_path: Path) -> Path:
    rows = [{"prompt": prompt, "completions": [a, b]} for prompt, a, b in PAIRS]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def test_killed_in_the_middle_and_started_again(tmp_path: Path) -> None:
    """A real process: no answer that the page saw written down is lost, and none is doubled."""
    command = [sys.executable, "-m", "handtune", "compare", "--pairs", str(pairs_file(tmp_path))]
    command += ["--out", str(tmp_path / "out.jsonl"), "--repeat", "0"]
    seen: dict[int, str] = {}
    for stop_after in (7, 20):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)/\?token=(\S+)", process.stdout.readline())
            assert found is not None
            ask = Client.__new__(Client)
            ask.port, ask.token = int(found[1]), found[2]
            state = ask("GET", "/next")[1]
            assert state["progress"]["done"] == len(seen)
            while state["item"] is not None and len(seen) < stop_after:
                item = state["item"]["id"]
                answer = "left" if state["item"]["left"].startswith("good") else "right"
                state = ask("POST", "/answer", {"item": item, "answer": answer})[1]
                seen[item] = answer
            process.send_signal(signal.SIGKILL if stop_after < 20 else signal.SIGINT)
            try:
                process.wait(20)
            finally:
                process.kill()
    assert Session(tmp_path / "out.jsonl.session").answers == seen
    rows = read_rows(tmp_path / "out.jsonl")
    assert len(rows) == 20
    assert all(row["chosen"].startswith("good") for row in rows)


def test_a_function_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "judge.py").write_text(
        "def best(prompt, left, right):\n    return 'left' if 'good' in left else 'right'\n"
        "def torn(prompt, left, right):\n    return 'maybe'\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--pairs", str(pairs_file(tmp_path)), "--out", "out.jsonl", "--labeler", "judge:best"]) == 0
    assert "22 of 22 answered, 100 % agreement on 2 repeated; 20 comparisons written" in capsys.readouterr().out
    assert all(row["chosen"].startswith("good") for row in read_rows("out.jsonl"))
    assert main(["compare", "--pairs", "pairs.jsonl", "--out", "other.jsonl", "--labeler", "judge:worst"]) == 2
    assert "'judge:worst'" in capsys.readouterr().err
    assert main(["compare", "--pairs", "pairs.jsonl", "--out", "other.jsonl", "--labeler", "judge:torn"]) == 2
    assert "the labeler answered 'maybe'; expected one of left, right, tie, skip" in capsys.readouterr().err


def test_at_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    keys = iter(["a", "x", "b", "u", "t", "s", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(keys))
    out = tmp_path / "out.jsonl"
    assert (
        main(["compare", "--pairs", str(pairs_file(tmp_path)), "--out", str(out), "--terminal", "--repeat", "0"]) == 0
    )
    assert Session(tmp_path / "out.jsonl.session").answers == {0: "left", 1: "tie", 2: "skip"}
    assert "3 of 20 answered; 2 comparisons written" in capsys.readouterr().out


def test_the_samples_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "And the king said"}, {"prompt": "In the beginning"}])
    (tmp_path / "taste.py").write_text(
        "def longer(prompt, left, right):\n    return 'left' if len(left) > len(right) else 'right'\n"
    )
    model = str(Path("tests/kjv-gpt").resolve())
    monkeypatch.chdir(tmp_path)
    command = ["compare", model, "--prompts", "prompts.jsonl", "--out", "out.jsonl", "--max-new-tokens", "8"]
    assert main([*command, "--labeler", "taste:longer"]) == 0
    rows = read_rows("out.jsonl")
    assert {row["prompt"] for row in rows} == {"And the king said", "In the beginning"}
    assert all(len(row["chosen"]) >= len(row["rejected"]) for row in rows)
    assert main(["compare", "--out", "new.jsonl"]) == 2
    assert "give a MODEL with --prompts" in capsys.readouterr().err
    assert main(["compare", model, "--out", "new.jsonl"]) == 2


def test_nothing_that_was_there_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Files that are no session's, a session about other pairs, one that another process answers, a torn beginning."""
    monkeypatch.setattr("builtins.input", lambda prompt: "q")
    pairs, out = pairs_file(tmp_path), tmp_path / "out.jsonl"
    before = pairs.read_bytes()
    assert main(["compare", "--pairs", str(pairs), "--out", str(pairs), "--terminal"]) == 2
    assert "pairs.jsonl: is there already; give another name, or --force" in capsys.readouterr().err
    assert pairs.read_bytes() == before
    folder = tmp_path / "out.jsonl.session"
    folder.mkdir()
    (folder / ".items.jsonl.4000000-12345678.tmp").write_text('{"id": 0, "pro')  # a kill while it began
    command = ["compare", "--pairs", str(pairs), "--out", str(out), "--terminal"]
    assert main(command) == 0
    assert main(command) == 0
    assert "going on with" in capsys.readouterr().err
    with held_by_another(folder / ".lock") as other:
        assert main(command) == 2
    assert f"out.jsonl.session: process {other} works there; wait for its end, or end it" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"items.jsonl"}
    out.write_text("mine")
    shutil.rmtree(folder)
    assert main(command) == 2
    assert out.read_text() == "mine"
    assert main([*command, "--force"]) == 0
    assert out.read_text() == ""
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert main(["compare", "--pairs", str(other), "--out", str(out), "--terminal"]) == 2
    assert "a session about other pairs" in capsys.readouterr().err
    other.write_text('{"prompt": "p", "completions": "hello"}')
    assert main(["compare", "--pairs", str(other), "--out", str(tmp_path / "new.jsonl"), "--terminal"]) == 2
    assert "other.jsonl line 1: expected prompt and completions" in capsys.readouterr().err
    other.write_text(r'{"prompt": "p", "chosen": "a", "rejected": "\ud800"}')
    assert main(["compare", "--pairs", str(other), "--out", str(tmp_path / "new.jsonl"), "--terminal"]) == 2
    assert "other.jsonl line 1: what is compared must be texts" in capsys.readouterr().err
    assert not (tmp_path / "new.jsonl.session").exists()
