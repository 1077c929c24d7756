"""Runs that differ only in their seed are one series: a mean, and how far it can be trusted.

The interval is Student's, at 95 %: mean ± t · s / √n over n runs, where s is their standard deviation (n − 1) and t the
0.975 quantile of Student's distribution with n − 1 degrees of freedom (Student 1908, "The probable error of a mean").
It is the interval of the mean over seeds, on these training and held-out rows; other rows vary, too.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from .._files import resolved
from .runs import Row, Run, is_number, score

# The 0.975 quantiles for 1, 2, ... degrees of freedom; of more, the last one is a little too wide.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean, and how far the 95 % confidence interval reaches on each side of it."""

    mean: float
    half: float


@dataclass(frozen=True)
class Series:
    """One run, or several that differ only in their seed."""

    name: str
    runs: list[Run]


def series_of(runs: Sequence[Run]) -> list[Series]:
    """The runs as series, in their order. Runs of one seed are copies: they stay apart, for they say nothing new."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_all_but_the_seed(run), []).append(run)

    series = []
    for group in groups.values():
        seeds = {_seed(run) for run in group}
        if 1 < len(group) == len(seeds) and None not in seeds:
            series.append(Series(f"{_common_name(group)}, {len(group)} seeds", group))
        else:
            series += [Series(run.name, [run]) for run in group]
    return series


def interval(values: Sequence[Any]) -> Interval | None:
    """Mean and 95 % interval of the values; None where they are fewer than two, or one of them is no number."""
    if len(values) < 2 or not all(map(is_number, values)):
        return None
    degrees = len(values) - 1
    half = STUDENT[min(degrees, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), half)


def mean_score(metric: str, rows: Sequence[Row]) -> str:
    """Mean ± half of the interval of a metric over runs, of which these are the evaluations: 75.0 ± 1.2 %."""
    over_seeds = interval([row.get(metric) for row in rows])
    if over_seeds is None:
        return "–"
    mean = score(metric, over_seeds.mean)
    half = score(metric, over_seeds.half)
    unit = " %" if mean.endswith(" %") else ""
    return f"{mean.removesuffix(unit)} ± {half.removesuffix(unit)}{unit}"


def _common_name(runs: Sequence[Run]) -> str:
    """What the runs' names begin with, without a number: lora-1 and lora-2 are lora."""
    names = [str(run.info.get("name") or resolved(run.path).name) for run in runs]  # without their paths
    letters = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return "".join(column[0] for column in letters).rstrip("0123456789-_. ") or names[0]


def _all_but_the_seed(run: Run) -> str:
    """What runs of one series have in common: configuration and inputs, wherever these lie."""
    config = {key: value for key, value in run.info["config"].items() if key not in ("out", "name")}
    for table in ("train", "ppo"):
        if isinstance(config.get(table), dict):
            config[table] = {key: value for key, value in config[table].items() if key != "seed"}
    inputs = {name: [entry["files"] for entry in entries] for name, entries in run.info.get("inputs", {}).items()}
    return json.dumps([config, inputs], sort_keys=True)


def _seed(run: Run) -> int | None:
    tables = (run.info["config"].get(table) for table in ("train", "ppo"))
    seeds = (table.get("seed") for table in tables if isinstance(table, dict))
    return next((seed for seed in seeds if isinstance(seed, int)), None)
