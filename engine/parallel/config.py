"""How the processes of a run hold its model: the `[parallel]` table of a run."""

from dataclasses import dataclass

from ..._shapes import check_bounds, one_of

MODES = ("auto", "none", "full", "hybrid")


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes hold the model, where torchrun has started them; the results are the same."""

    # "none": each process has the whole model; "full": each has a part of every weight; "hybrid": those of a machine
    # have it together; "auto": in parts where a device's memory is too small for it.
    shard: str = one_of("auto", MODES)

    def __post_init__(self) -> None:
        check_bounds(self)
