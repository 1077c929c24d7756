"""How far a long piece of work has come: a bar on a terminal, elsewhere (`2> log`, CI) a line every half a minute."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

INTERVAL = 30.0  # seconds between two lines

Item = TypeVar("Item")


class Progress:
    """Counts units of work, `total` in all, on standard error; in a `with` block, at whose end the bar is closed."""

    def __init__(self, total: int, unit: str):
        self.total = total
        self.unit = unit
        self.count = 0
        self.begun = self.told = time.perf_counter()
        self.bar = tqdm(desc=f"{unit}s", total=total, unit=unit, disable=None)  # None: where there is no terminal

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, n: int = 1) -> None:
        """So many units more are done."""
        self.count += n
        self.bar.update(n)
        now = time.perf_counter()
        if self.bar.disable and now - self.told >= INTERVAL and self.count < self.total:
            left = (now - self.begun) / self.count * (self.total - self.count)
            text = f"{self.unit} {self.count:,} of {self.total:,}, {tqdm.format_interval(left)} left"
            tqdm.write(text, file=sys.stderr)
            self.told = now


def counted(items: Iterable[Item], total: int, unit: str) -> Iterator[Item]:
    """The items, which are counted as they come."""
    with Progress(total, unit) as progress:
        for item in items:
            yield item
            progress.update()
