"""A model so small that its training can be followed by hand, with rows, and the forms that data comes in."""

import torch
from torch import nn

from handtune.engine import TrainConfig, train


class Line(nn.Module):
    """y = w·x, to be told how far it is: small enough to follow by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.seen: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def squares(model: Line, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Squared distance of w·x from 1."""
    model.seen.append(batch[:, 0].tolist())
    return (model(batch) - 1.0).square().sum(), len(batch)


ROWS = [torch.tensor([float(i + 1), 1.0, -0.5 * i]) / 8 for i in range(10)]


def line(data=ROWS, *, loss_fn=squares, eval_data=None, run_dir=None, collate=torch.stack, callbacks=(), **settings):
    model = Line()
    usual = {"batch_size": 2, "lr": 0.1, "schedule": "constant", "warmup": 0}
    config = TrainConfig(**{**usual, **settings})
    result = train(
        model, data, loss_fn, config, eval_data=eval_data, collate=collate, run_dir=run_dir, callbacks=callbacks
    )
    return model, result


class Stream:
    """An iterable of batches with a place, as a user may bring one."""

    def __init__(self, items: list):
        self.items, self.next = items, 0

    def __iter__(self):
        while self.next < len(self.items):
            self.next += 1
            yield self.items[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state) -> None:
        self.next = state["next"]


class Sized(Stream):
    def __len__(self) -> int:
        return len(self.items)


STEPS = [torch.stack(ROWS[i : i + 2]) for i in range(0, 10, 2)]
