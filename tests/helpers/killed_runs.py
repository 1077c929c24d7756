"""Training runs for test_resume.py, in processes of their own that may be killed. Started by a fork server that has
imported torch already, so that a life of such a process costs milliseconds."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from small_runs import TEXTS, assert_same_weights, bert, examples, gpt2
from small_tokenizers import byte_level, sentence_piece
from torch import nn

from handtune.engine import LoRAConfig, TrainConfig, add_lora, train
from handtune.engine.data.batches import Batches, Collate
from handtune.engine.data.images import ImageCollate
from handtune.engine.tasks.causal_lm import causal_lm_loss
from handtune.engine.tasks.classification import classification_loss
from handtune.engine.tasks.encode import encode
from handtune.engine.tasks.masked_lm import MaskedCollate, masked_lm_loss
from handtune.engine.tasks.permutation_lm import PermutationCollate
from handtune.engine.tasks.seq2seq import Seq2SeqCollate, SpanCorruption
from handtune.models import T5, Bloom, ResNet, XLNet
from handtune.models.layers.image_processor import ImageProcessor

torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports for seconds at its first call: before the forks
DONE = "done.safetensors"


class Noisy(MaskedCollate):
    """Draws from all three generators, as a user's augmentation may."""

    def __call__(self, rows: Any) -> Any:
        batch = super().__call__(rows)
        batch["noise"] = random.random() + np.random.rand() + torch.rand(()).item()
        return batch


def noisy_loss(model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    loss, count = masked_lm_loss(model, batch)
    return loss * (1 + 0.1 * batch["noise"]), count


def masked_lm(out: Path) -> Any:
    """Every weight of a BERT; noise from three generators, gradual unfreezing, the best a third of the way."""
    model, collate = bert("masked-lm"), Noisy(4, 100, (0, 1, 2, 3, 4))
    rows = examples(TEXTS * 2, "masked-lm")
    config = TrainConfig(
        epochs=12, batch_size=3, micro_batch_size=2, lr=3e-2, eval_every=4, save_every=3, keep_last=2, seed=5,
        unfreeze={"head.*": 0, "layers.*": 1, "embed.*": 2},
    )  # fmt: skip
    return model, train(model, rows, noisy_loss, config, eval_data=rows[:4], collate=collate, run_dir=out)


def lora_run(out: Path) -> Any:
    """An adapter with dropout on a bf16 GPT-2, packed rows, no evaluation, a checkpoint at every step."""
    model = gpt2().bfloat16()
    add_lora(model, LoRAConfig(rank=4, dropout=0.1))
    rows = examples(TEXTS * 3, "pretrain")
    config = TrainConfig(epochs=9, batch_tokens=70, micro_batch_tokens=40, lr=1e-2, save_every=1, seed=7)
    return model, train(model, rows, causal_lm_loss, config, collate=Collate(), run_dir=out)


def seq2seq(out: Path) -> Any:
    """Every weight of a T5; spans drawn anew each time a row comes up."""
    torch.manual_seed(0)
    words = sentence_piece()
    sizes = {"n_layer": 2, "d_model": 32, "n_head": 2, "head_width": 16, "d_ff": 64}
    model = T5.from_name("t5-small", vocab_size=words.get_vocab_size(), **sizes)
    rows = encode(TEXTS * 3, words, "span-corruption", max_length=24)[0]
    collate = Seq2SeqCollate(0, 0, SpanCorruption.of(words, 1))
    config = TrainConfig(epochs=6, batch_size=4, micro_batch_size=3, lr=1e-2, eval_every=5, save_every=2, seed=3)
    return model, train(model, rows, causal_lm_loss, config, eval_data=rows[:4], collate=collate, run_dir=out)


def permutation(out: Path) -> Any:
    """An XLNet whose upper layer waits for its turn; orders drawn anew each time a row comes up."""
    torch.manual_seed(0)
    sizes = {"vocab_size": byte_level().get_vocab_size(), "n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 64}
    model, rows = XLNet.from_name("xlnet-base-cased", **sizes), examples(TEXTS * 3, "pretrain")
    config = TrainConfig(
        epochs=5, batch_size=4, micro_batch_size=2, lr=1e-2, eval_every=4, save_every=2, keep_last=2, seed=4,
        unfreeze={"*": 0, "layers.1.*": 1},
    )  # fmt: skip
    collate = PermutationCollate()
    return model, train(model, rows, causal_lm_loss, config, eval_data=rows[:4], collate=collate, run_dir=out)


def bloom(out: Path) -> Any:
    """An adapter with dropout on a bf16 BLOOM, packed rows."""
    torch.manual_seed(0)
    sizes = {"vocab_size": byte_level().get_vocab_size(), "n_layer": 2, "n_head": 2, "d_model": 32}
    model, rows = Bloom.from_name("bloom-560m", **sizes).bfloat16(), examples(TEXTS * 3, "pretrain")
    add_lora(model, LoRAConfig(rank=4, dropout=0.1))
    config = TrainConfig(epochs=5, batch_tokens=70, micro_batch_tokens=40, lr=1e-2, eval_every=7, save_every=2, seed=6)
    return model, train(model, rows, causal_lm_loss, config, eval_data=rows[:4], collate=Collate(), run_dir=out)


def image_run(out: Path) -> Any:
    """Every weight of a ResNet with its batch norms' statistics; windows and mirrors drawn anew for each image."""
    torch.manual_seed(0)
    sizes = {"stem_width": 8, "widths": (8, 16), "depths": (1, 1), "small_images": True}
    model, pixels = ResNet.from_name("resnet18", labels=("dark", "bright"), **sizes), ImageProcessor(12, 12)
    pictures = torch.randint(0, 200, (24, 3, 16, 16), dtype=torch.uint8)
    rows = [{"image": picture + 40 * (i % 2), "label": i % 2} for i, picture in enumerate(pictures)]
    data = Batches(rows, ImageCollate(pixels, augment=True), rows=8, micro_batch_size=4, seed=2)
    held = Batches(rows[:6], ImageCollate(pixels), rows=6, shuffle=False)
    config = TrainConfig(epochs=6, batch_size=8, lr=1e-2, eval_every=4, save_every=2, seed=2)
    return model, train(model, data, classification_loss, config, eval_data=held, run_dir=out)


RUNS: dict[str, Callable[[Path], Any]] = {"masked_lm": masked_lm, "lora": lora_run}
MORE_RUNS = {"seq2seq": seq2seq, "permutation": permutation, "bloom": bloom, "images": image_run}


def live(run: str, out: str, place: str, slow: bool = False) -> None:
    """One life of a run. When it comes to its end, weights and result are left in the folder `location`.

    slow: make every fsync take 3 ms, so that a kill at a random moment falls into the writing of a checkpoint.
    """
    random.seed(1)
    np.random.seed(2)
    if slow:
        _slow_files()
    model, result = (RUNS | MORE_RUNS)[run](Path(out))
    facts = {key: value for key, value in asdict(result).items() if key not in ("seconds", "peak_memory")}
    target = Path(place)
    target.mkdir(exist_ok=True)
    (target / "result.txt").write_text(repr(facts))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, target / "tmp")
    (target / "tmp").rename(target / DONE)


def _slow_files() -> None:
    flush = os.fsync

    def slowly(descriptor: int) -> None:
        time.sleep(0.003)
        flush(descriptor)

    os.fsync = slowly


def assert_same_end(place: Path, other: Path) -> None:
    """Bitwise the same weights, and the same result."""
    from safetensors.torch import load_file

    assert (place / "result.txt").read_text() == (other / "result.txt").read_text()
    assert_same_weights(load_file(place / DONE), load_file(other / DONE))
