"""`load`: a model from a folder in Hugging Face layout, a GGUF file or the hub; `open_checkpoint`: without weights."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..._outside import explained_memory, located
from ..._weightless import without_weights
from ...kernels import Linear
from ..families import Family, Model, family_of_preset
from ..layers.heads import MEAN, TEXT_TASKS
from ..layers.image_processor import ImageProcessor
from ..tensors.shards import Shards
from ..tokenizer.gguf_vocabulary import read_vocabulary
from ..tokenizer.special_tokens import SpecialTokens, load_tokenizer_file, read_tokenizer
from .info import CheckpointInfo, checkpoint_info
from .local_rows import ShardFn
from .pooling import read_pooling, read_prompts, refuse_lowercasing
from .renamed import by_module
from .tasks import Labels, head_rows, label_names, padding_of_new_head, reorder_head, stored_head, stored_tasks, task_of
from .weights import load_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of the weights, by the names that configurations have for them.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path | CheckpointInfo,
    task: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    labels: Labels = None,
    *,
    head_layers: int | None = None,
    quantize: Callable[[Model], Iterable[str]] | None = None,
    head_follows: bool = False,
    shard: ShardFn | None = None,
) -> tuple[Model, "Tokenizer | None"]:
    """The model at `path` (a folder in Hugging Face layout, a GGUF file, a hub id) in eval mode; its tokenizer or None.

    path: may be what `checkpoint_info` has read there already, with weights.
    task: one of the tasks of `layers/heads.py`; None takes it from config.json's `architectures`.
    dtype: "auto" is the checkpoint's own (fp16 becomes fp32 on a CPU).
    device: "auto" is CUDA where there is one.
    labels: names, or their number, for a task that classifies.
    head_layers: depth of the head. A stored head of another task, other labels or another depth than asked for is made
        anew; of the same labels in another order its rows are reordered.
    quantize: chooses projections, given the empty model, that are kept in NF4 and frozen (`engine.projections`: what
        `quantize` would take). Each is packed as it is read, so that the whole model is never in memory in full.
    head_follows: a head that is made anew is not announced, since one will be loaded, with an adapter for example.
    shard: puts each layer, then the model, given with its parameters by name, into shards: this process's are read.

    Raises FileNotFoundError for a missing folder or config.json, ValueError for everything that doesn't fit, and
    MemoryError where memory runs out.
    """
    opened = open_checkpoint(path, task, labels, head_layers=head_layers)
    model = opened.model
    target = _device(device)
    rows = opened.head_rows
    weight_dtype = _dtype(dtype, opened, target)

    # Projections to be quantised get no memory with the rest of the model, but each when its turn comes.
    projections = {}
    for name in quantize(model) if quantize else ():
        module = model.get_submodule(name)
        if isinstance(module, Linear):
            projections[f"{name}.weight"] = module

    with explained_memory(lambda: _too_large(model, weight_dtype)):
        load_weights(model, opened.shards, rows is None, projections, weight_dtype, target, not head_follows, shard)
        if rows and rows != sorted(rows):
            reorder_head(model.head, rows)
    model.eval()
    return model, opened.tokenizer


class Checkpoint(NamedTuple):
    """A checkpoint that is opened but not read: the model on the meta device, and where its weights lie."""

    model: Model
    tokenizer: "Tokenizer | None"
    shards: Shards
    published: dict[str, Any]  # config.json, with transformers' fields
    head_rows: list[int] | None  # rows of the stored head in the order of the model's labels; None: make it anew


def open_checkpoint(
    path: str | Path | CheckpointInfo, task: str | None = None, labels: Labels = None, *, head_layers: int | None = None
) -> Checkpoint:
    """All that `load` does before it needs memory for the weights; raises what it raises.

    What `checkpoint_info` has read without weights is enough to see what the model reads.
    """
    info = path if isinstance(path, CheckpointInfo) else checkpoint_info(path)
    folder, published, family = info.folder, info.published, info.family
    shards = Shards(folder, info.weights, info.tensors)  # only headers; the rest is read once all else was checked
    config_path = folder if info.gguf else folder / "config.json"
    with located(config_path):
        config = _config(published, family, "lm_head.weight" in shards.tensors)
        task = task or task_of(published, family)
        known, stored_depth = stored_head(published, family)
    if info.gguf is None:
        tokenizer, tokens = read_tokenizer(folder, published)
    else:
        tokenizer, tokens = read_vocabulary(info.gguf.metadata, folder)

    # What the head is to be, by the arguments or else by config.json.
    names = label_names(labels, known)
    if task in ("reward", "question-answering"):  # whose outputs transformers would make as many as there are labels
        names = ()
    depth = stored_depth if head_layers is None else head_layers
    pooling = read_pooling(folder, shards.tensors) if task == "embedding" else MEAN

    beyond_memory = f"{config_path}: its sizes make a model that no memory can hold; restore it"
    with without_weights(), explained_memory(lambda: beyond_memory):
        model = family(config, task, names, depth, pooling)
    shards.tensors = by_module(shards.tensors, model.key_map().values(), model.base_prefix)
    model.tokens = tokens
    model.source = info.source
    if task == "embedding":
        model.prompts = read_prompts(folder)
        refuse_lowercasing(folder, tokenizer)
    if family.reads_images:
        model.pixels = ImageProcessor.read(folder, published, len(model.pixels.mean)) or model.pixels

    rows = head_rows(model, published, known) if depth == stored_depth else None
    if rows is None or task not in TEXT_TASKS:
        model.tokens = padding_of_new_head(tokens, tokenizer, task)
    return Checkpoint(model, tokenizer, shards, published, rows)


def _too_large(model: Model, dtype: torch.dtype) -> str:
    """The message where memory runs out."""
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    return (
        f"out of memory while loading {model.source}: as {name} its weights take {size:,} bytes; give it more memory, "
        "load it in bfloat16 or quantised, or take a smaller model"
    )


def fresh(
    preset: str, tokenizer_path: str | Path | None, task: str, labels: tuple[str, ...], seed: int,
    dtype: str | torch.dtype = "auto", device: str | torch.device = "auto", *, head_layers: int | None = None,
    weights: bool = True, **overrides: Any,
) -> tuple[Model, "Tokenizer | None"]:  # fmt: skip
    """A freshly initialised model of a published size, with its tokenizer.

    `tokenizer_path` is a tokenizer.json. The vocabulary is the tokenizer's, and so are the tokens that end and pad
    texts (`SpecialTokens.of_tokenizer`). dtype: "auto" is float32; device: as in `load`. Without `weights` the model is
    on the meta device. ValueError as in `load`, MemoryError where memory runs out.
    """
    target = _device(device)
    weight_dtype = torch.float32 if dtype == "auto" else _named_dtype(dtype)
    family = family_of_preset(preset)
    tokenizer = None
    if tokenizer_path is not None:
        tokenizer = load_tokenizer_file(Path(tokenizer_path))
        fields = family.fields_for(SpecialTokens.of_tokenizer(tokenizer))
        overrides = {"vocab_size": tokenizer.get_vocab_size(), **fields, **overrides}

    torch.manual_seed(seed)
    too_large = f"out of memory: a fresh {preset} of these sizes is too large; take a smaller one"
    with nullcontext() if weights else without_weights(), explained_memory(lambda: too_large):
        model = family.from_name(preset, task=task, labels=labels, head_layers=head_layers or 1, **overrides)
        if weights:
            model = model.to(target)
            for parameter in model.parameters():  # no buffers, as in `allocate`
                parameter.data = parameter.data.to(weight_dtype)
    if tokenizer is not None:
        model.tokens = padding_of_new_head(SpecialTokens.of_tokenizer(tokenizer), tokenizer, task)
    return model.eval(), tokenizer


def _config(published: dict[str, Any], family: Family, has_lm_head: bool) -> Any:
    """The configuration; a language model without output matrix is tied, where config.json doesn't say."""
    is_causal_lm = "causal-lm" in stored_tasks(published, family)
    if is_causal_lm and not has_lm_head and published.get("tie_word_embeddings") is None:
        published = {**published, "tie_word_embeddings": True}
    return family.read_config({**published, "has_lm_head": has_lm_head})  # which decides for T5


def _device(device: str | torch.device) -> torch.device:
    """The device asked for; ValueError for one that is unknown, or that this machine doesn't have."""
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    expected = f'device {device!r}: expected "auto", "cpu" or "cuda"'
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(expected) from error
    if target.type not in ("cpu", "cuda"):
        raise ValueError(expected)
    if target.type == "cuda" and not has_cuda:
        raise ValueError(f'device {device!r}: torch finds no CUDA here; use "cpu" or "auto"')
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: torch finds {torch.cuda.device_count()} GPUs here, which count from 0")
    return target


def _dtype(dtype: str | torch.dtype, opened: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype asked for, or that of the checkpoint; ValueError for one that no model computes in."""
    if dtype != "auto":
        return _named_dtype(dtype)

    published = opened.published
    stored = (published.get("dtype") or published.get("torch_dtype") or "auto").removeprefix("torch.")
    if stored not in (*DTYPES, "auto"):
        raise ValueError(f"{opened.shards.folder / 'config.json'}: dtype = {stored!r} is not implemented; pass dtype=")
    checkpoint_dtype = opened.shards.dtype() if stored == "auto" else DTYPES[stored]
    if checkpoint_dtype == torch.float16 and device.type == "cpu":
        return torch.float32
    return checkpoint_dtype


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype that is meant; ValueError for one that no model computes in."""
    if isinstance(dtype, torch.dtype):
        if dtype not in (*DTYPES.values(), torch.float64):
            raise ValueError(f"dtype {dtype}: expected float32, bfloat16, float16 or float64")
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f'dtype {dtype!r}: expected "auto", {", ".join(DTYPES)}')
    return DTYPES[dtype]
