"""Comparisons by people: pairs of completions shown side by side, answers written down so that none is lost or doubled.

A *session* is a folder: `items.jsonl`, what is to be compared, fixed when the session begins, and `answers.jsonl`, a
line an answer, appended and flushed to the disk before the next pair is shown. No answer is ever rewritten; taking one
back is a line, too. So a session may be killed at any moment, and goes on where it was. Each line has a checksum. A
damaged one of items.jsonl ends the session; one of answers.jsonl is moved aside, and its item asked again.

Which completion stands on the left is drawn at random, and some pairs come twice, later and turned around: how often
the two answers agree is what the comparisons are worth. Whoever answers, a person in a browser (`web_page.py`) or
at the terminal, or a function, goes through `Session.answer`.
"""

import json
import logging
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._files import LOCK, append_line, is_temporary, write_file
from .._locks import alone
from ..engine.training.journal import CHECK, Line, damaged_lines, is_sealed, read_journal, rewrite, sealed

log = logging.getLogger("handtune")
LEFT, RIGHT, TIE, SKIP = "left", "right", "tie", "skip"
ANSWERS = (LEFT, RIGHT, TIE, SKIP)


@dataclass(frozen=True)
class Item:
    """A pair as it is shown. `repeats`: the number of the item that it shows again, turned around."""

    id: int
    prompt: str
    left: str
    right: str
    repeats: int | None = None


def make_items(
    pairs: Iterable[tuple[str, str, str]], repeat: float = 0.1, seed: int = 0
) -> tuple[list[Item], list[int]]:
    """Items of (prompt, completion, completion), sides drawn at random; and the numbers (from 1) of those left out.

    Left out are pairs whose sides are equal, or one of them empty. A share `repeat` of the items comes again in the
    end. ValueError where no pair is left.
    """
    draw = random.Random(seed)
    items: list[Item] = []
    dropped: list[int] = []
    for number, (prompt, a, b) in enumerate(pairs, 1):
        if a == b or not a.strip() or not b.strip():
            dropped.append(number)
            continue
        left, right = (a, b) if draw.random() < 0.5 else (b, a)
        items.append(Item(len(items), prompt, left, right))
    if not items:
        raise ValueError("there is no pair to compare: all have equal sides, or an empty one")
    again = draw.sample(items, round(repeat * len(items)))
    items += [Item(len(items) + i, item.prompt, item.right, item.left, item.id) for i, item in enumerate(again)]
    return items, dropped


class Session:
    """The items and answers of a session folder; safe to use from several threads, and in `alone` from one process.

    `items`: for a new session; one that has begun keeps its own. Raises ValueError for a folder that holds other
    things, and where items are given for a session that has others.
    """

    def __init__(self, folder: str | Path, items: Sequence[Item] | None = None):
        self.folder, self.lock = Path(folder), threading.Lock()
        listing = self.folder / "items.jsonl"
        if items is not None and not listing.is_file():
            self._begin(items, listing)
        if not listing.is_file():
            raise ValueError(f"{folder}: no session there (items.jsonl is missing)")
        self.items = self._listed(listing)
        if items is not None and list(items) != self.items:
            raise ValueError(f"{folder} holds a session about other pairs; choose another --out")
        self._read()

    def _begin(self, items: Sequence[Item], listing: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if listing.is_file():  # another process was faster
                return
            if any(path.name != LOCK and not is_temporary(path) for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no session; choose another --out")
            lines = (json.dumps(sealed(asdict(item)), ensure_ascii=False) + "\n" for item in items)
            write_file(listing, "".join(lines))

    def _listed(self, listing: Path) -> list[Item]:
        """The items that a session began with. ValueError where a line of them is damaged."""
        lines = read_journal(listing, is_sealed)
        if broken := [line.number for line in lines if line.row is None]:
            raise ValueError(f"{listing} line {broken[0]}: damaged; restore the file, or choose another --out")
        rows = [{key: value for key, value in line.row.items() if key != CHECK} for line in lines if line.row]
        try:
            items = [Item(**row) for row in rows]
        except TypeError as error:
            raise ValueError(f"{listing}: not the items of a session ({error}); restore the file") from None
        if [item.id for item in items] != list(range(len(items))):
            raise ValueError(f"{listing}: a line is missing or stands twice; restore the file")
        return items

    def _read(self) -> list[Line]:
        """Take the answers that are written down; their lines. A damaged one does not count, which is said."""
        path = self.folder / "answers.jsonl"
        self.answers: dict[int, str] = {}  # by item, in the order of their answers
        lines = read_journal(path, self._is_answer)
        for line in lines:
            if line.row is not None:
                self._take(line.row)
        if text := damaged_lines(path, lines):
            log.warning("%s: what was answered there does not count", text)
        return lines

    def _is_answer(self, row: dict[str, Any]) -> bool:
        item, answer = row.get("item"), row.get("answer", "")
        return is_sealed(row) and type(item) is int and 0 <= item < len(self.items) and answer in (*ANSWERS, None)

    def _take(self, row: Mapping[str, Any]) -> None:
        if row["answer"] is None:
            self.answers.pop(row["item"], None)
        else:
            self.answers[row["item"]] = row["answer"]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process answers. ValueError where one does already."""
        with self._locked():
            lines = self._read()  # what one that has just ended may have written
            rewrite(self.folder / "answers.jsonl", lines)
            yield

    def _locked(self) -> AbstractContextManager[None]:
        return alone(self.folder, self.folder / LOCK)

    def next(self) -> Item | None:
        """The first item without an answer."""
        return next((item for item in self.items if item.id not in self.answers), None)

    def answer(self, item: int, answer: str, seconds: float | None = None) -> bool:
        """Write an answer down; False, and nothing, where the item has one (another tab was faster).

        ValueError for an item or an answer that there is not.
        """
        if type(item) is not int or not 0 <= item < len(self.items) or answer not in ANSWERS:
            raise ValueError(
                f"item {item!r}, answer {answer!r}: expected one of the {len(self.items)} items, {ANSWERS}"
            )
        with self.lock:
            if item in self.answers:
                return False
            self._append({"item": item, "answer": answer} | ({} if seconds is None else {"seconds": seconds}))
        return True

    def undo(self) -> int | None:
        """Take the last answer back; its item, or None where there is none."""
        with self.lock:
            last = next(reversed(self.answers), None)
            if last is not None:
                self._append({"item": last, "answer": None})
        return last

    def _append(self, row: dict[str, Any]) -> None:
        append_line(self.folder / "answers.jsonl", json.dumps(sealed(row)))
        self._take(row)

    def progress(self) -> dict[str, Any]:
        """How far the session is, and how often repeated items were answered alike."""
        same = total = 0
        for item in self.items:
            if item.repeats is None:
                continue
            first, second = self.answers.get(item.repeats), self.answers.get(item.id)
            if first in (None, SKIP) or second in (None, SKIP):
                continue
            total += 1
            same += second == {LEFT: RIGHT, RIGHT: LEFT, TIE: TIE}[str(first)]
        done = len(self.answers)
        return {"done": done, "total": len(self.items), "repeated": total, "agreement": same / total if total else None}

    def rows(self) -> list[dict[str, Any]]:
        """The answers as rows that `train` reads: prompt, chosen, rejected, and tie where neither is better.

        Without the repeated items, which would count twice, and could be held out although they were trained on.
        """
        out = []
        for item in self.items:
            answer = self.answers.get(item.id, SKIP)
            if answer == SKIP or item.repeats is not None:
                continue
            chosen, rejected = (item.right, item.left) if answer == RIGHT else (item.left, item.right)
            row = {"prompt": item.prompt, "chosen": chosen, "rejected": rejected}
            out.append(row | ({"tie": True} if answer == TIE else {}))
        return out

    def export(self, path: str | Path) -> int:
        """Write `rows` as JSONL, where they aren't there already; how many."""
        rows = self.rows()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        if not Path(path).is_file() or Path(path).read_bytes() != text:
            write_file(path, text)
        return len(rows)
