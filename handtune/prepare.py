"""From a configuration to what a run needs: rows read and encoded, model loaded, frozen and adapted."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ._outside import located
from .adapted.run_models import model_info, opened_model
from .adapted.starting import NAME, attach_start, rank_on, take_options, with_head
from .config import ModelConfig, RunConfig
from .engine import add_lora, freeze, projections, quantize, train_rows, unfreeze
from .engine.adapters.token_rows import train_added_rows, trained_ids
from .engine.data.batches import Batches, CollateFn, Examples
from .engine.data.images import ImageCollate, checked_examples
from .engine.data.mixing import Draws
from .engine.data.readers import label_names
from .engine.data.schema import is_dialogue
from .engine.parallel.ranks import one_first
from .engine.tasks.encode import encode
from .engine.tasks.objectives import Objective, dpo, objective_of, with_loss_options
from .engine.training.config import needs_evaluation
from .inputs.rows import columns_of, corpora, data_files, draws_of, is_corpus, parts_of, read_splits, split_windows
from .models import add_tokens, load
from .models.checkpoint.info import CheckpointInfo
from .models.checkpoint.loading import fresh, open_checkpoint
from .models.checkpoint.local_rows import ShardFn
from .models.families import family_of_preset
from .models.layers.dropout import choose_dropout
from .models.tokenizer.build import CONVERT
from .prompts import adopt_template, check_tokenizer, learn_turn_end, template_of, through_template
from .saved_runs import only_head_trains

# Of a batch in evaluation.
EVAL_TOKENS = 8192
EVAL_IMAGES = 64


@dataclass
class Prepared:
    """A run's model, its examples and the way to score them."""

    model: Any
    tokenizer: Any
    objective: Objective
    labels: tuple[str, ...]
    examples: Examples
    eval_rows: Sequence[Any]
    eval_examples: Examples
    collate: CollateFn
    by_length: bool = False  # whether a batch has rows of similar length, as where rows are padded
    chat: bool = False  # whether plain prompts go through the chat template
    draws: Draws | None = None  # which examples an epoch has, where files have weights

    def score(self) -> Any:
        return self.objective.score(self.labels, self.eval_examples, self.eval_rows)

    def eval_batches(self) -> Batches | None:
        if len(self.eval_examples) == 0:
            return None
        if isinstance(self.collate, ImageCollate):
            collate = ImageCollate(self.collate.pixels)  # without augmentation
            return Batches(self.eval_examples, collate, rows=EVAL_IMAGES, shuffle=False)
        return Batches(self.eval_examples, self.collate, tokens=EVAL_TOKENS, shuffle=False)


@dataclass(frozen=True)
class RunBase:
    """The checkpoint or preset that a run starts from."""

    checkpoint: CheckpointInfo | None  # None for a preset
    objective: Objective  # what the run's method means for such a model
    weights: bool  # without them the model is on the meta device: enough to see the examples, but it computes nothing


def run_base(config: RunConfig, *, weights: bool = True) -> RunBase:
    """Look at a run's checkpoint or preset. ValueError or FileNotFoundError where there is no such thing."""
    if config.model.path is None:
        checkpoint = None
        family = family_of_preset(config.model.preset or "")
    else:
        checkpoint = model_info(config.model.path, weights)
        family = checkpoint.family

    if config.method == "dpo":  # whose loss has an option
        objective = dpo(config.dpo.beta)
    else:
        objective = objective_of(config.method, family.objectives)
    if config.model.task not in (None, objective.task):
        raise ValueError(f"model.task = {config.model.task!r}, but method {config.method!r} trains {objective.task!r}")
    return RunBase(checkpoint, objective, weights)


def prepare(
    config: RunConfig, base: RunBase, cache: Path, *, head_follows: bool = False, shard: ShardFn | None = None
) -> Prepared:
    """Read the data, load the model, encode; prints what was read, dropped, truncated and masked.

    `head_follows`: a new head is not announced, because its weights will be loaded. `shard`: as in `load`.
    """
    torch.manual_seed(config.train.seed)  # a new head and a new adapter are drawn from it
    objective = base.objective
    _check_training_options(config)

    # A corpus is read once there is a tokenizer for it, because it is tokenized as it is read.
    columns = columns_of(config.data)
    from_corpus = config.method == "pretrain" and all(is_corpus(file, columns) for file in data_files(config.data))
    parts, eval_rows = ([], []) if from_corpus else read_splits(config.data, config.train.seed)
    rows = [row for part in parts for row in part]

    # Labels that are not configured are those of the adapter that training goes on from, or those in the data.
    options = with_head(config.model, objective.task)
    labels = tuple(options.labels or ())
    if not labels and objective.encoding in ("classify", "tag", "images"):
        labels = tuple(label_names(rows))
    if objective.encoding in ("classify", "images") and len(labels) == 1:
        raise ValueError(f"data.train: all rows are of one class, {labels[0]!r}; there is nothing to tell apart")

    model, tokenizer = load_model(
        options, base.checkpoint, objective.task, labels, seed=config.train.seed, weights=base.weights,
        head_follows=head_follows or options.adapter is not None, shard=shard,
    )  # fmt: skip
    if objective.encoding == "images":
        ready = _prepare_images(config, objective, model, labels, rows, eval_rows)
        return replace(ready, draws=draws_of(config.data, [len(part) for part in parts], config.train.seed))
    max_length = _check_text(config, objective, model, tokenizer)

    # A model without a template that trains on dialogues adopts the plain one.
    train_dialogues, eval_dialogues = (through_template(config, part, model) for part in (rows, eval_rows))
    template = None
    if any(map(is_dialogue, (*train_dialogues, *eval_dialogues))):
        template = template_of(model)
        adopt_template(model)
    model.tokens = model.tokens.asking_as_chat(template is not None).asking_by(columns.remembered)

    def encoded(split: str, split_rows: Sequence[Any]) -> Sequence[Any]:
        with located(f"data.{split}"):
            examples, report = encode(
                split_rows, tokenizer, objective.encoding, max_length=max_length, labels=labels,
                eos=model.tokens.eos_id, turn_ends=model.tokens.ends[1:], template=template,
                evaluation=split == "eval", truncate=config.data.truncate, prompts=model.prompts,
            )  # fmt: skip
        print(f"{split}: {report}", file=sys.stderr)
        if report.warning is not None:
            print(f"{split}: {report.warning}", file=sys.stderr)
        return examples

    examples: Examples
    eval_examples: Examples = []
    if from_corpus:
        # The first process on a machine makes the cache that the others read.
        examples, eval_examples, counts = one_first(
            partial(corpora, config.data, tokenizer, cache, max_length, model.tokens.eos_id)
        )
    else:
        encoded_parts = [encoded("train", part) for part in parts_of(train_dialogues, parts)]
        examples = [example for part in encoded_parts for example in part]
        counts = [len(part) for part in encoded_parts]
        if eval_rows:
            eval_examples = encoded("eval", eval_dialogues)
        elif config.data.eval is not None:
            examples, eval_examples = split_windows(examples, config.data.eval)

    objective = with_loss_options(objective, config.loss, labels, examples)
    collate = objective.collate(model, tokenizer, config.data.packing)
    by_length = objective.by_length or not config.data.packing
    return Prepared(
        model, tokenizer, objective, labels, examples, eval_rows, eval_examples, collate, by_length,
        chat=template is not None, draws=draws_of(config.data, counts, config.train.seed),
    )  # fmt: skip


def _check_training_options(config: RunConfig) -> None:
    """ValueError for options of [train] that the data or the method leave without effect."""
    if config.data.eval is None and (idle := needs_evaluation(config.train)):
        names = ", ".join(f"train.{name}" for name in idle)
        raise ValueError(f"{names}: no rows are held out to evaluate on; name them with data.eval, or leave this out")


def _check_text(config: RunConfig, objective: Objective, model: Any, tokenizer: Any) -> int:
    """The longest that a row may be, in tokens. ValueError where options or the tokenizer don't fit the model."""
    if model.reads_images:
        raise ValueError(f"method {config.method!r}: {model.title} reads images, for which there is method classify")
    if config.data.image_size is not None or not config.data.augment:
        raise ValueError(f"data.image_size, data.augment: method {config.method!r} of this model reads text, no images")
    remedy = CONVERT if config.model.path else "name one with model.tokenizer"
    check_tokenizer(model, tokenizer, config.model.path or config.model.preset, remedy)

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
    return length  # type: ignore[no-any-return]


def _prepare_images(
    config: RunConfig, objective: Objective, model: Any, labels: tuple[str, ...], rows: list[Any], eval_rows: list[Any]
) -> Prepared:
    """A run on images."""
    if config.train.batch_tokens or config.train.micro_batch_tokens or config.data.max_length:
        raise ValueError(
            "train.batch_tokens, train.micro_batch_tokens, data.max_length: images have no tokens; use "
            "train.batch_size, train.micro_batch_size, data.image_size"
        )
    if config.data.image_size is not None:
        model.pixels = model.pixels.at(config.data.image_size)
    if model.image_size not in (None, model.pixels.size):
        raise ValueError(
            f"images of {model.pixels.size} pixels a side, but the positions of this model are for {model.image_size}; "
            f"set data.image_size = {model.image_size}"
        )

    examples = checked_examples({"train": rows, "eval": eval_rows}, labels, model.pixels)
    objective = with_loss_options(objective, config.loss, labels, examples["train"])
    collate = ImageCollate(model.pixels, config.data.augment)
    return Prepared(model, None, objective, labels, examples["train"], eval_rows, examples["eval"], collate)


def load_model(
    options: ModelConfig,
    checkpoint: CheckpointInfo | None,
    task: str,
    labels: tuple[str, ...] = (),
    *,
    seed: int = 0,
    weights: bool = True,
    head_follows: bool = False,
    shard: ShardFn | None = None,
) -> tuple[Any, Any]:
    """The model of a configuration, whose checkpoint was looked at, and its tokenizer or None.

    `seed` is that of a preset's weights; without `weights` it is on the meta device. The others are those of `load`.
    """
    if checkpoint is None:
        assert options.preset is not None
        model, tokenizer = fresh(
            options.preset, options.tokenizer, task, labels, seed, options.dtype, options.device,
            head_layers=options.head_layers, weights=weights, **options.overrides,
        )  # fmt: skip
    else:
        with opened_model(checkpoint) as opened:
            if weights:
                model, tokenizer = load(
                    opened, task, options.dtype, options.device, labels or None, head_layers=options.head_layers,
                    quantize=projections if options.quantize is not None else None, head_follows=head_follows,
                    shard=shard,
                )  # fmt: skip
            else:
                model, tokenizer, *_ = open_checkpoint(opened, task, labels or None, head_layers=options.head_layers)

    if options.add_tokens and options.adapter is None:
        with located("model.add_tokens"):
            add_tokens(model, tokenizer, options.add_tokens)
    # Each projection was packed as it was read, and nothing of the base trains.
    if options.quantize is not None and weights:
        freeze(model, "*")
        quantize(model)
    if options.recompute:
        if not all(hasattr(block, "recompute") for block in model.layers):
            name = type(model).__name__
            raise ValueError(f"model.recompute: {name} has no norm in front of a feed-forward to make it again from")
        for block in model.layers:
            block.recompute = True  # type: ignore[assignment]
    attach_start(model, tokenizer, options, weights)
    learn_turn_end(model, tokenizer)
    return model, tokenizer


def choose_trained(ready: Prepared, config: RunConfig) -> str:
    """Freeze and adapt as the configuration says; returns a short name for what trains, such as "LoRA r=8"."""
    model = ready.model
    objective = ready.objective
    if config.lora is not None and config.model.adapter is None:
        add_lora(model, config.lora)
    take_options(model, config)
    # A new head has nothing that a low-rank update could start from: it trains in full.
    if config.trains_adapter and (objective.new_head or model.head_is_new):
        unfreeze(model, "head.*")
        if objective.encoding != "images" and not trained_ids(model):
            freeze(model, "embed.tokens.weight")  # a masked-LM head is tied to it

    # Exceptions after the rule, and single rows last, because they train in a matrix that is frozen.
    if config.freeze.names:
        freeze(model, *config.freeze.names)
    if config.freeze.except_:
        unfreeze(model, *config.freeze.except_)
    if config.freeze.token_rows:
        ids = _ids_of([*config.freeze.token_rows, *config.model.add_tokens], ready.tokenizer)
        train_rows(model, [*ids, *trained_ids(model)])  # those of an adapter to go on from train on
    elif config.model.add_tokens:
        train_added_rows(model, _ids_of(config.model.add_tokens, ready.tokenizer))

    # A base of which nothing trains gives the same features each time, which are computed once.
    choose_dropout(model, config.model.dropout, frozen_base=only_head_trains(model, config))

    # A name for reports.
    if config.trains_adapter:
        return f"LoRA r={rank_on(model, NAME)}"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if len(trained) == len(list(model.parameters())) and not config.freeze.token_rows:
        return "full"
    return "frozen features" if all(name.startswith("head.") for name in trained) else "part"


def _ids_of(tokens: list[str], tokenizer: Any) -> list[int]:
    vocabulary: dict[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ValueError(f"freeze.token_rows: there is no token {token!r}; model.add_tokens adds it")
    return [vocabulary[token] for token in tokens]
