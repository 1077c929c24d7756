"""Comparisons by people: pairs of completions shown side by side, and answers stored so that none is lost or doubled.

A *session* is a folder. Its `items.jsonl` lists what is to be compared, and is fixed when the session begins. Its
`answers.jsonl` has a line an answer, appended and flushed to the disk before the next pair is shown. No answer is ever
rewritten; taking one back is a line, too. So a session may be killed at any moment, and continues where it was. Each
line has a checksum. A damaged line of items.jsonl ends the session; one of answers.jsonl is moved aside, and its item
is asked again.

Which completion is on the left is drawn at random, and some pairs come twice, the second time later and swapped: how
often the two answers agree shows what the comparisons are worth. All answers go through `Session.answer`, whether of a
person in a browser (`web_page.py`) or at the terminal, or of a function.
"""

import json
import logging
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._files import LOCK, append_line, is_temporary, write_file
from .._locks import alone
from ..engine.training.journal import CHECK, Line, damaged_lines, is_sealed, read_journal, rewrite, sealed

log = logging.getLogger("handtune")
LEFT = "left"
RIGHT = "right"
TIE = "tie"
SKIP = "skip"
ANSWERS = (LEFT, RIGHT, TIE, SKIP)


@dataclass(frozen=True)
class Item:
    """A pair as it is shown."""

    id: int
    prompt: str
    left: str
    right: str
    repeats: int | None = None  # the id of the item that it shows again, with the sides swapped


def make_items(
    pairs: Iterable[tuple[str, str, str]], repeat: float = 0.1, seed: int = 0
) -> tuple[list[Item], list[int]]:
    """Items of (prompt, completion, completion), with the sides drawn at random, and the numbers of dropped pairs.

    Pairs whose sides are equal, or one of whose sides is empty, are dropped; they are numbered from 1. A share `repeat`
    of the items is repeated at the end. ValueError where no pair is left.
    """
    generator = random.Random(seed)
    items: list[Item] = []
    dropped: list[int] = []
    for number, (prompt, left, right) in enumerate(pairs, 1):
        if left == right or not left.strip() or not right.strip():
            dropped.append(number)
            continue
        if generator.random() >= 0.5:
            left, right = right, left
        items.append(Item(len(items), prompt, left, right))
    if not items:
        raise ValueError("there is no pair to compare: all have equal sides, or an empty one")

    for item in generator.sample(items, round(repeat * len(items))):
        items.append(Item(len(items), item.prompt, item.right, item.left, item.id))
    return items, dropped


class Session:
    """The items and answers of a session folder; safe to use from several threads, and in `alone` from one process.

    `items` begin a new session; a session that has begun keeps its own. Raises ValueError for a folder that contains
    something else, and where `items` are not those of the session.
    """

    def __init__(self, folder: str | Path, items: Sequence[Item] | None = None):
        self.folder = Path(folder)
        self.lock = threading.Lock()
        listing = self.folder / "items.jsonl"
        if items is not None and not listing.is_file():
            self._begin(items, listing)

        # Begun or not, what counts is what the file says.
        self.items = self._read_items(listing)
        if items is not None and list(items) != self.items:
            raise ValueError(f"{folder} holds a session about other pairs; choose another --out")
        self._read_answers()

    def _begin(self, items: Sequence[Item], listing: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # The list makes the folder a session, and is there whole or not at all.
        with alone(self.folder, self.folder / LOCK):
            # Temporary files are of a process that was killed while it began.
            if any(path.name != LOCK and not is_temporary(path) for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no session; choose another --out")
            lines = (json.dumps(sealed(asdict(item)), ensure_ascii=False) + "\n" for item in items)
            write_file(listing, "".join(lines))

    def _read_items(self, listing: Path) -> list[Item]:
        """The items that a session began with. ValueError where a line of them is damaged."""
        items = []
        for line in read_journal(listing, is_sealed):
            if line.row is None:
                raise ValueError(f"{listing} line {line.number}: damaged; restore the file, or choose another --out")
            try:
                items.append(Item(**{name: value for name, value in line.row.items() if name != CHECK}))
            except TypeError as error:
                raise ValueError(f"{listing}: not the items of a session ({error}); restore the file") from None
        if [item.id for item in items] != list(range(len(items))):
            raise ValueError(f"{listing}: a line is missing or stands twice; restore the file")
        return items

    def _read_answers(self) -> list[Line]:
        """Read the answers so far, and return their lines. A damaged line does not count, and a warning says so."""
        path = self.folder / "answers.jsonl"
        self.answers: dict[int, str] = {}  # by the item's id, in the order in which they were given
        lines = read_journal(path, self._is_answer)
        for line in lines:
            if line.row is not None:
                self._apply(line.row)
        if text := damaged_lines(path, lines):
            log.warning("%s: what was answered there does not count", text)
        return lines

    def _is_answer(self, row: dict[str, Any]) -> bool:
        item = row.get("item")
        answer = row.get("answer", "")
        return is_sealed(row) and type(item) is int and 0 <= item < len(self.items) and answer in (*ANSWERS, None)

    def _apply(self, row: Mapping[str, Any]) -> None:
        """Have a line's answer count, or no longer count."""
        if row["answer"] is None:
            self.answers.pop(row["item"], None)
        else:
            self.answers[row["item"]] = row["answer"]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process answers. ValueError where one does already."""
        with alone(self.folder, self.folder / LOCK):
            lines = self._read_answers()  # again, because another process may have written some before it ended
            rewrite(self.folder / "answers.jsonl", lines)
            yield

    def next(self) -> Item | None:
        """The first item without an answer."""
        return next((item for item in self.items if item.id not in self.answers), None)

    def answer(self, item: int, answer: str, seconds: float | None = None) -> bool:
        """Write an answer down. Where the item has one already (another tab was faster), do nothing and return False.

        ValueError for an unknown item or answer.
        """
        if type(item) is not int or not 0 <= item < len(self.items) or answer not in ANSWERS:
            raise ValueError(
                f"item {item!r}, answer {answer!r}: expected one of the {len(self.items)} items, {ANSWERS}"
            )
        # Each tab of a browser has a thread of its own.
        with self.lock:
            if item in self.answers:
                return False
            row: dict[str, Any] = {"item": item, "answer": answer}
            if seconds is not None:
                row["seconds"] = seconds
            self._append(row)
        return True

    def undo(self) -> int | None:
        """Take the last answer back. Returns its item, or None where there is no answer."""
        with self.lock:
            last = next(reversed(self.answers), None)
            if last is not None:
                self._append({"item": last, "answer": None})
        return last

    def _append(self, row: dict[str, Any]) -> None:
        append_line(self.folder / "answers.jsonl", json.dumps(sealed(row)))
        self._apply(row)

    def progress(self) -> dict[str, Any]:
        """How far the session is, and how often repeated items were answered alike."""
        # Of two equal answers, one is for the left side and one for the right.
        swapped = {LEFT: RIGHT, RIGHT: LEFT, TIE: TIE}
        repeated = []
        for item in self.items:
            if item.repeats is not None:
                repeated.append((self.answers.get(item.repeats, SKIP), self.answers.get(item.id, SKIP)))
        answered = [answers for answers in repeated if SKIP not in answers]
        n_same = sum(second == swapped[first] for first, second in answered)
        return {
            "done": len(self.answers), "total": len(self.items), "repeated": len(answered),
            "agreement": n_same / len(answered) if answered else None,
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """The answers as rows that `train` reads: prompt, chosen, rejected, and tie where neither is better.

        Repeated items are left out: they would count twice, and one of the two could be held out while the other one is
        trained on.
        """
        rows = []
        for item in self.items:
            answer = self.answers.get(item.id, SKIP)
            if answer == SKIP or item.repeats is not None:
                continue
            row: dict[str, Any] = {"prompt": item.prompt, "chosen": item.left, "rejected": item.right}
            if answer == RIGHT:
                row |= {"chosen": item.right, "rejected": item.left}
            if answer == TIE:
                row["tie"] = True
            rows.append(row)
        return rows

    def export(self, path: str | Path) -> int:
        """Write `rows` as JSONL, unless the file has them already. Returns how many there are."""
        rows = self.rows()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        # The same contents keep their time of change.
        if not Path(path).is_file() or Path(path).read_bytes() != lines:
            write_file(path, lines)
        return len(rows)
