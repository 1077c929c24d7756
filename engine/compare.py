"""Comparisons by people: pairs of completions shown side by side, answers written down so that none is lost or doubled.

A *session* is a folder: `items.jsonl`, what is to be compared, fixed when the session begins, and `answers.jsonl`, a
line an answer, appended and flushed to the disk before the next pair is shown. Nothing is ever rewritten; taking an
answer back is a line, too. So a session may be killed at any moment, and goes on where it was.

Which completion stands on the left is drawn at random, and some pairs come twice, later and turned around: how often
the two answers agree is what the comparisons are worth. Whoever answers, a person in a browser (`compare_page.py`) or
at the terminal, or a function, goes through `Session.answer`.
"""

import json
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._files import LOCK, append_line, is_temporary, write_file
from .._locks import alone

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
        self.items = [Item(**row) for row in _lines(listing)]
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
            write_file(listing, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items))

    def _read(self) -> None:
        self.answers: dict[int, str] = {}  # by item, in the order of their answers
        for row in _lines(self.folder / "answers.jsonl", cut_short=True):
            self._take(row)

    def _take(self, row: Mapping[str, Any]) -> None:
        if row["answer"] is None:
            self.answers.pop(row["item"], None)
        else:
            self.answers[row["item"]] = row["answer"]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process answers. ValueError where one does already."""
        with self._locked():
            self._read()  # what one that has just ended may have written
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
        append_line(self.folder / "answers.jsonl", json.dumps(row))
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


def _lines(path: Path, cut_short: bool = False) -> list[Any]:
    """The rows of a JSONL file, none where there is no file; with `cut_short` a line that isn't whole doesn't count."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if not cut_short:
                raise ValueError(f"{path}: damaged ({error}); restore it") from error
    return rows
