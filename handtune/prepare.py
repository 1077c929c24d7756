"""From a configuration to what a run needs: rows read and encoded, model loaded, frozen and adapted."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._files import parse_json
from .config import DataConfig, RunConfig
from .engine import add_lora, freeze, projections, quantize, train_rows, unfreeze
from .engine.adapters.token_rows import train_added_rows
from .engine.data.batches import Batches, Collate, CollateFn, Examples
from .engine.data.corpus import TokenCorpus, token_corpus
from .engine.data.images import ImageCollate, ImageExamples, class_counts
from .engine.data.readers import label_names, read_rows, split_rows
from .engine.data.schema import is_dialogue, normalise, row_shape
from .engine.tasks.encode import encode
from .engine.tasks.objectives import Objective, dpo, objective_of
from .engine.tasks.preferences import add_reference
from .engine.training.config import needs_evaluation
from .models import Bert, ResNet, XLNet, add_tokens, load
from .models.checkpoint.info import CheckpointInfo, checkpoint_info
from .models.checkpoint.loading import fresh, open_checkpoint
from .models.families import family_of_preset
from .models.tokenizer.build import CONVERT
from .prompts import adopt_template, learn_turn_end, template_of, through_template

EVAL_TOKENS, EVAL_IMAGES = 8192, 64


@dataclass
class Prepared:
    """A run's model, examples and the way to score them; `chat`: plain prompts go through the chat template."""

    model: Any
    tokenizer: Any
    objective: Objective
    labels: tuple[str, ...]
    examples: Examples
    eval_rows: Sequence[Any]
    eval_examples: Examples
    collate: CollateFn
    chat: bool = False

    @property
    def by_length(self) -> bool:
        """Whether rows of similar length are put together: where they are padded."""
        packed = isinstance(self.collate, Collate) and self.collate.layout == "packed"
        return not packed and not isinstance(self.collate, ImageCollate)

    def score(self) -> Any:
        return self.objective.score(self.labels, self.eval_examples, self.eval_rows)

    def eval_batches(self) -> Batches | None:
        if len(self.eval_examples) == 0:
            return None
        if isinstance(self.collate, ImageCollate):
            middle = ImageCollate(self.collate.pixels)
            return Batches(self.eval_examples, middle, rows=EVAL_IMAGES, shuffle=False)
        return Batches(self.eval_examples, self.collate, tokens=EVAL_TOKENS, shuffle=False)


@dataclass(frozen=True)
class RunBase:
    """What a run starts from."""

    checkpoint: CheckpointInfo | None  # None where it starts from a preset
    objective: Objective  # what the run's method means for such a model
    weights: bool  # without them the model is on the meta device: enough to see the examples, and it computes nothing


def run_base(config: RunConfig, *, weights: bool = True) -> RunBase:
    """Look at a run's checkpoint or preset. ValueError or FileNotFoundError where there is no such thing."""
    path = config.model.path
    checkpoint = None if path is None else checkpoint_info(path, weights)
    family = family_of_preset(config.model.preset or "") if checkpoint is None else checkpoint.family
    if config.method == "dpo":
        return RunBase(checkpoint, dpo(config.dpo.beta), weights)
    return RunBase(checkpoint, objective_of(config.method, family.objectives), weights)


def prepare(config: RunConfig, base: RunBase, cache: Path, *, head_follows: bool = False) -> Prepared:
    """Read the data, load the model, encode; says what was read, dropped, truncated and masked.

    `head_follows`: the head will be loaded, and a new one is not announced.
    """
    torch.manual_seed(config.train.seed)  # of a new head and a new adapter
    if config.data.eval is None and (idle := needs_evaluation(config.train)):
        names = ", ".join(f"train.{name}" for name in idle)
        raise ValueError(f"{names}: no rows are held out to evaluate on; name them with data.eval, or leave this out")
    objective = base.objective
    if config.method == "embed" and (config.train.micro_batch_size or config.train.micro_batch_tokens):
        raise ValueError(
            "train.micro_batch_size, micro_batch_tokens: embed takes its negatives from the whole step; lower "
            "batch_size"
        )
    corpus = config.method == "pretrain" and all(_is_corpus(Path(file)) for file in data_files(config.data))
    rows, eval_rows = ([], []) if corpus else _rows(config.data, config.train.seed)
    labels = tuple(config.model.labels or ())
    if not labels and objective.encoding in ("classify", "tag", "images"):
        labels = tuple(label_names(rows))
    if objective.encoding in ("classify", "images") and len(labels) == 1:
        raise ValueError(f"data.train: all rows are of one class, {labels[0]!r}; there is nothing to tell apart")
    model, tokenizer = run_model(config, base, labels, head_follows=head_follows)
    if objective.encoding == "images":
        return _images(config, objective, model, labels, rows, eval_rows)
    if config.data.image_size is not None:
        raise ValueError(f"data.image_size: method {config.method!r} of this model reads text, no images")
    if tokenizer is None:
        remedy = CONVERT if config.model.path else "name one with model.tokenizer"
        raise ValueError(f"{config.model.path or config.model.preset}: no tokenizer.json, and text needs one; {remedy}")
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= (size := model.config.vocab_size):
        raise ValueError(
            f"{config.model.path or config.model.tokenizer}: the tokenizer counts to {highest}, the model has "
            f"{size} tokens; give the model the tokenizer.json that belongs to it"
        )
    limit = model.config.max_positions
    length = limit if config.data.max_length is None else config.data.max_length
    if length is None:
        raise ValueError(
            "data.max_length: the model takes rows of any length; say how long they may be, 512 for example"
        )
    if limit is not None and length > limit:
        raise ValueError(f"data.max_length = {length} exceeds the model's {limit} positions; choose at most {limit}")

    if config.data.truncate != "end" and objective.encoding not in ("sft", "pairs"):
        raise ValueError(
            f'data.truncate = "{config.data.truncate}": it is for dialogues, prompts with completions and comparisons; '
            f"method {config.method!r} of this model cuts the end, or nothing"
        )
    trained, evaluated = (through_template(config, part, model) for part in (rows, eval_rows))
    template = template_of(model) if any(map(is_dialogue, (*trained, *evaluated))) else None
    if template is not None:
        adopt_template(model)
    model.tokens = model.tokens.asking_as_chat(template is not None)

    def encoded(what: str, part: Sequence[Any]) -> Sequence[Any]:
        try:
            examples, report = encode(
                part, tokenizer, objective.encoding, max_length=length, labels=labels, eos=model.tokens.eos_id,
                more_ends=model.tokens.more_ends, template=template, evaluation=what == "eval",
                truncate=config.data.truncate,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"data.{what}: {error}") from error
        print(f"{what}: {report}", file=sys.stderr)
        if report.warning is not None:
            print(f"{what}: {report.warning}", file=sys.stderr)
        return examples

    examples: Examples
    eval_examples: Examples
    if corpus:
        examples, eval_examples = _corpora(config.data, tokenizer, cache, length, model.tokens.eos_id)
    else:
        examples, eval_examples = encoded("train", trained), encoded("eval", evaluated) if evaluated else []
        if not eval_rows and config.data.eval is not None:
            examples, eval_examples = _split_windows(examples, config.data.eval)
    if config.method == "dpo" and base.weights:
        for part in filter(len, (examples, eval_examples)):
            add_reference(model, part)
    collate = objective.collate(model, tokenizer, config.data.packing)
    return Prepared(
        model, tokenizer, objective, labels, examples, eval_rows, eval_examples, collate, template is not None
    )


def _images(
    config: RunConfig, objective: Objective, model: Any, labels: tuple[str, ...], rows: list[Any], eval_rows: list[Any]
) -> Prepared:
    """A run on images: each is decoded once, so that a broken one is named before training begins."""
    if config.train.batch_tokens or config.train.micro_batch_tokens or config.data.max_length:
        raise ValueError(
            "train.batch_tokens, train.micro_batch_tokens, data.max_length: images have no tokens; use "
            "train.batch_size, "
            "train.micro_batch_size, data.image_size"
        )
    if config.data.image_size is not None:
        model.pixels = model.pixels.at(config.data.image_size)
    parts = {}
    for what, part in (("train", rows), ("eval", eval_rows)):
        try:
            parts[what] = ImageExamples(part, labels, model.pixels)
            parts[what].check()
        except ValueError as error:
            raise ValueError(f"data.{what}: {error}") from error
        if part:
            print(f"{what}: {class_counts(part)}", file=sys.stderr)
    collate = ImageCollate(model.pixels, config.data.augment)
    return Prepared(model, None, objective, labels, parts["train"], eval_rows, parts["eval"], collate)


def data_files(data: DataConfig) -> list[str]:
    """All files that a run reads rows from."""
    files = [data.train] if isinstance(data.train, str) else data.train
    return [*files, data.eval] if isinstance(data.eval, str) else files


def _is_corpus(path: Path) -> bool:
    """Whether a file is plain text, or JSONL whose first row is a text: what is tokenised once and memory-mapped."""
    if path.suffix != ".jsonl" or not path.is_file():
        return path.suffix == ".txt"
    with path.open("rb") as file:
        line = file.readline()
    try:
        return row_shape(normalise(parse_json(line, str(path)))) == "text"
    except (ValueError, TypeError):
        return False  # `read_rows` says what is wrong with it


def _corpora(data: DataConfig, tokenizer: Any, cache: Path, length: int, eos: int | None) -> tuple[TokenCorpus, Any]:
    """Token windows to train on and held out; a held-out share is the end of the corpus."""
    files = [Path(file) for file in ([data.train] if isinstance(data.train, str) else data.train)]
    corpus = token_corpus(files, tokenizer, cache, length, eos)
    held_out: Any = []
    if isinstance(data.eval, str):
        held_out = token_corpus([Path(data.eval)], tokenizer, cache, length, eos)
    elif data.eval is not None:
        if not 0 < data.eval < 1:
            raise ValueError(f"the share held out must lie between 0 and 1, not {data.eval}; 0.1 holds out a tenth")
        cut = int(len(corpus.tokens) * (1 - data.eval))
        held_out, corpus = TokenCorpus(corpus.tokens[cut:], length), TokenCorpus(corpus.tokens[:cut], length)
    for what, part in (("train", corpus), ("eval", held_out)):
        if data.eval is not None or part is corpus:
            if len(part) == 0:
                raise ValueError(f"data.{what}: no target left to train on: fewer than two tokens")
            print(f"{what}: {len(part.tokens):,} tokens in {len(part):,} windows of {length}", file=sys.stderr)
    return corpus, held_out


def _rows(data: DataConfig, seed: int) -> tuple[list[Any], list[Any]]:
    files = [data.train] if isinstance(data.train, str) else data.train
    rows = [row for file in files for row in read_rows(file)]
    if len(shapes := sorted({row_shape(row) for row in rows})) > 1:
        raise ValueError(f"data.train: the files hold rows of different shapes ({', '.join(shapes)})")
    if data.eval is None:
        return rows, []
    if isinstance(data.eval, str):
        return rows, read_rows(data.eval)
    if len(rows) == 1 and row_shape(rows[0]) == "text":
        return rows, []  # one long text: windows of it are held out, see `_split_windows`
    return split_rows(rows, data.eval, seed)


def _split_windows(examples: Examples, share: Any) -> tuple[Examples, Examples]:
    """One long text: the last windows are held out."""
    windows = list(examples)
    cut = len(windows) - max(1, round(len(windows) * share))
    if cut < 1:
        raise ValueError(f"data.eval = {share}: the text is too short to hold out a part of it")
    print(f"held out: the last {len(windows) - cut} of {len(windows)} windows", file=sys.stderr)
    return windows[:cut], windows[cut:]


def run_model(
    config: RunConfig, base: RunBase, labels: tuple[str, ...], *, head_follows: bool = False
) -> tuple[Any, Any]:
    """The model that a run starts from, and its tokenizer or None. `head_follows`: as in `prepare`."""
    wanted, objective = config.model, base.objective
    task = wanted.task or objective.task
    if task != objective.task:
        raise ValueError(f"model.task = {task!r}, but method {config.method!r} trains {objective.task!r}")
    if base.checkpoint is None:
        assert wanted.preset is not None
        model, words = fresh(
            wanted.preset, wanted.tokenizer, task, labels, config.train.seed, weights=base.weights, **wanted.overrides
        )
    elif base.weights:
        model, words = load(
            base.checkpoint, task, wanted.dtype, wanted.device, labels or None, head_layers=wanted.head_layers,
            quantize=projections if wanted.quantize is not None else None, head_follows=head_follows,
        )  # fmt: skip
    else:
        opened = open_checkpoint(base.checkpoint, task, labels or None, head_layers=wanted.head_layers)
        model, words = opened.model, opened.tokenizer
    if wanted.add_tokens:
        try:
            add_tokens(model, words, wanted.add_tokens)
        except ValueError as error:
            raise ValueError(f"model.add_tokens: {error}") from error
    if wanted.quantize is not None and base.weights:
        freeze(model, "*")
        quantize(model)
    if wanted.recompute:
        if isinstance(model, Bert | ResNet | XLNet):
            name = type(model).__name__
            raise ValueError(f"model.recompute: {name} has no norm in front of a feed-forward to make it again from")
        for block in model.layers:
            block.recompute = True  # type: ignore[assignment]
    learn_turn_end(model, words)
    return model, words


def choose_trained(ready: Prepared, config: RunConfig) -> str:
    """Freeze and adapt as the configuration says; gives a few words for what trains."""
    model, objective = ready.model, ready.objective
    if config.lora is not None:
        add_lora(model, config.lora)
        if objective.new_head or model.head_is_new:
            unfreeze(model, "head.*")
            if objective.encoding != "images":
                freeze(model, "embed.tokens.weight")  # which a masked-LM head is tied to
    if config.freeze.names:
        freeze(model, *config.freeze.names)
    if config.freeze.except_:
        unfreeze(model, *config.freeze.except_)
    if config.freeze.token_rows:
        train_rows(model, _ids_of([*config.freeze.token_rows, *config.model.add_tokens], ready.tokenizer))
    elif config.model.add_tokens:
        train_added_rows(model, _ids_of(config.model.add_tokens, ready.tokenizer))
    if config.lora is not None:
        return f"LoRA r={config.lora.rank}"
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen and not config.freeze.token_rows:
        return "full"
    return (
        "frozen features"
        if all(n.startswith("head.") for n, p in model.named_parameters() if p.requires_grad)
        else "part"
    )


def _ids_of(tokens: list[str], tokenizer: Any) -> list[int]:
    known: dict[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            raise ValueError(f"freeze.token_rows: there is no token {token!r}; model.add_tokens adds it")
    return [known[token] for token in tokens]
