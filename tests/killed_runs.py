"""Training runs for test_resume.py, in processes of their own that may be killed. Started by a fork server that has
imported torch already, so that a life of such a process costs milliseconds."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from small_runs import TEXTS, assert_same_weights, bert, examples, gpt2
from torch import nn

from handtune.engine import LoRAConfig, TrainConfig, add_lora, losses, train
from handtune.engine.batches import Collate, Masking

torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports for seconds at its first call: before the forks
DONE = "done.safetensors"


class Noisy(Collate):
    """Draws from all three generators, as a user's augmentation may."""

    def __call__(self, rows: Any) -> Any:
        batch = super().__call__(rows)
        batch["noise"] = random.random() + np.random.rand() + torch.rand(()).item()
        return batch


def noisy_loss(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    loss, count = losses.masked_lm_loss(model, batch)
    return loss * (1 + 0.1 * batch["noise"]), count


def masked_lm(out: Path) -> Any:
    """Every weight of a BERT; noise from three generators, gradual unfreezing, the best a third of the way."""
    model, collate = bert("masked-lm"), Noisy(masking=Masking(4, 100, (0, 1, 2, 3, 4)))
    rows = examples(TEXTS * 2, "masked-lm")
    config = TrainConfig(
        epochs=12, batch_rows=3, micro_rows=2, lr=3e-2, eval_every=4, save_every=3, keep=2, seed=5,
        unfreeze={"head.*": 0, "layers.*": 1, "embed.*": 2},
    )  # fmt: skip
    return model, train(model, rows, noisy_loss, config, eval_data=rows[:4], collate=collate, out=out)


def lora(out: Path) -> Any:
    """An adapter with dropout on a bf16 GPT-2, packed rows, no evaluation, a checkpoint at every step."""
    model = gpt2().bfloat16()
    add_lora(model, LoRAConfig(rank=4, dropout=0.1))
    rows = examples(TEXTS * 3, "pretrain")
    config = TrainConfig(epochs=9, batch_tokens=70, micro_tokens=40, lr=1e-2, save_every=1, seed=7)
    return model, train(model, rows, losses.causal_lm_loss, config, collate=Collate(), out=out)


RUNS: dict[str, Callable[[Path], Any]] = {"masked_lm": masked_lm, "lora": lora}


def live(run: str, out: str, place: str, die_at: int | None = None, slow: bool = False) -> None:
    """One life of a run. When it comes to its end, weights and result are left in the folder `place`.

    die_at: kill this process before the n-th operation on files. slow: make every fsync take 3 ms, so that a kill at a
    random moment falls into the writing of a checkpoint.
    """
    random.seed(1)
    np.random.seed(2)
    if die_at is not None or slow:
        _slow_or_deadly_files(die_at)
    model, result = RUNS[run](Path(out))
    facts = {key: value for key, value in asdict(result).items() if key not in ("seconds", "peak_memory")}
    target = Path(place)
    target.mkdir(exist_ok=True)
    (target / "result.txt").write_text(repr(facts))
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, target / "tmp")
    (target / "tmp").rename(target / DONE)


def _slow_or_deadly_files(die_at: int | None) -> None:
    import safetensors.torch

    count = 0

    def watched(function: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if die_at is None:
                time.sleep(0.003)
            elif count == die_at:
                if half:  # die in the middle of the write: half of the file is there
                    function(*arguments, **named)
                    os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*arguments, **named)

        return call

    if die_at is None:
        os.fsync = watched(os.fsync)
        return
    os.fsync, os.replace = watched(os.fsync), watched(os.replace)
    os.unlink, os.rmdir = watched(os.unlink), watched(os.rmdir)
    Path.rename, Path.replace = watched(Path.rename), watched(Path.replace)  # type: ignore[method-assign]
    Path.mkdir, Path.write_text = watched(Path.mkdir), watched(Path.write_text)  # type: ignore[method-assign]
    safetensors.torch.save_file = watched(safetensors.torch.save_file, half=True)


def assert_same_end(place: Path, other: Path) -> None:
    """Bitwise the same weights, and the same result."""
    from safetensors.torch import load_file

    assert (place / "result.txt").read_text() == (other / "result.txt").read_text()
    assert_same_weights(load_file(place / DONE), load_file(other / DONE))
