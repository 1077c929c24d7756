"""The model that `predict` asks: a checkpoint with a head, or what a run produced."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .._shapes import parse_json, with_fields
from ..engine.chat.template import ChatTemplate
from ..engine.data.columns import Columns
from ..engine.data.placed_rows import PlacedRow
from ..engine.data.schema import as_dialogue
from ..engine.prediction.trained import predictions, rows_to_predict
from ..engine.tasks.objectives import IMAGE_PREDICTORS, PREDICTORS
from ..inputs.fingerprints import is_run
from ..inputs.rows import columns_of
from ..models import load
from ..models.checkpoint.info import checkpoint_info
from ..models.checkpoint.tasks import task_of
from ..models.tokenizer.build import CONVERT
from ..prompts import check_tokenizer, learn_turn_end, template_of
from ..saved_runs import config_of, facts_of, put_adapter
from .stored import load_base, stored_model

LONGEST = "sentence_bert_config.json"  # where sentence-transformers says how many tokens of a text are read


@dataclass(frozen=True)
class Predictor:
    """A model with a head, and how it reads rows."""

    model: Any
    tokenizer: Any  # None for images
    max_length: int | None = None  # tokens of a row; None: as many as the model has positions
    truncate: str = "end"  # which side of a longer completion, with its prompt, is cut
    columns: Columns = field(default_factory=Columns)  # which columns of the rows are which fields

    def inputs(self, rows: Iterable[Mapping[str, Any] | str]) -> list[PlacedRow]:
        """What the model reads of each row; ValueError, with the row's place, where that is not there."""
        inputs = rows_to_predict(map(self._renamed, rows), self.model)
        if not self.model.tokens.asks_as_chat:
            return inputs

        # A reward model of dialogues reads a prompt and its completion as one, too.
        template = template_of(self.model)
        return [
            PlacedRow(as_dialogue(row), row.file, row.line, "messages")
            if row.shape == "prompt/completion" and not template.has_rendered(row["prompt"])
            else row
            for row in inputs
        ]

    def _renamed(self, row: Mapping[str, Any] | str) -> Mapping[str, Any] | str:
        if isinstance(row, str):
            return row
        fields = self.columns.renamed(row)
        return PlacedRow(fields, row.file, row.line) if isinstance(row, PlacedRow) else fields

    def predictions(self, inputs: Sequence[PlacedRow], batch_size: int) -> Iterator[dict[str, Any]]:
        """The prediction for each of the `inputs`, batch by batch."""
        template: ChatTemplate | None = template_of(self.model) if self.model.task == "reward" else None
        return predictions(
            self.model, self.tokenizer, inputs, max_length=self.max_length, batch_size=batch_size,
            truncate=self.truncate, template=template,
        )  # fmt: skip


def predict(
    model: Any,
    rows: Iterable[Mapping[str, Any] | str],
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """What a model with a head predicts for each of the rows, in their order.

    model: the folder of a run, a checkpoint's folder or hub id, or a model of `handtune.models.load`, with its
        `tokenizer`.
    rows: texts (paths of images), or mappings with the fields that the task reads; others may be there.
    max_length: tokens of a row that are read; None: as many as the run was trained on, or the model has positions.

    A prediction has these fields (see the tasks' files in engine/tasks/):

        sequence- and image-classification    predicted, probability, probabilities by label
        token-classification                  entities: type, start, end, text, probability (and the tags, `predicted`,
                                              of a row of tokens)
        question-answering                    answer, start, end, score
        embedding                             embedding, a list of numbers
        reward                                score

    Raises ValueError for a model without a head to predict with, and for rows that lack what it reads;
    FileNotFoundError and ValueError as `load` does.
    """
    if isinstance(rows, str):
        raise TypeError("rows is one text; give a list of texts or of rows")
    if isinstance(model, str | Path):
        predictor = predictor_of(str(model))
    else:
        _require_head(model.source or type(model).__name__, model.task)
        _check_tokenizer(model, tokenizer, "give it as tokenizer=")
        predictor = Predictor(model, tokenizer)
    if max_length is not None:
        predictor = replace(predictor, max_length=max_length)
    return list(predictor.predictions(predictor.inputs(rows), batch_size))


def predictor_of(source: str, dtype: str = "auto") -> Predictor:
    """The model at `source`, a checkpoint's folder or hub id, or the folder of a run.

    ValueError where it has no head to predict with.
    """
    checkpoint, config = stored_model(source)
    if config is not None:
        _require_head(source, str(facts_of(Path(source)).get("task")))
        model, tokenizer = load_base(config, dtype, head_follows=True)
        put_adapter(model, tokenizer, Path(source) / "adapter")
    else:
        info = checkpoint_info(checkpoint)
        _require_head(source, task_of(info.published, info.family))
        model, tokenizer = load(info, dtype=dtype, head_follows=True)
        learn_turn_end(model, tokenizer)
        if model.head_is_new:
            raise ValueError(f"{source}: no weights there for the head of {model.task}; train it first")
        _require_classes(source, model, info.published.get("problem_type"))

    _check_tokenizer(model, tokenizer, CONVERT)
    if is_run(Path(source)):
        data = config_of(Path(source)).data
        return Predictor(model, tokenizer, data.max_length, data.truncate, columns_of(data))
    return Predictor(model, tokenizer, _longest_text(model))


def _require_head(source: str, task: str) -> None:
    """ValueError for a model of a task that predicts nothing."""
    if task in (*PREDICTORS, *IMAGE_PREDICTORS):
        return
    if task in ("causal-lm", "seq2seq-lm"):
        raise ValueError(f"{source}: a model that writes ({task}) has no head to predict with; ask it by `generate`")
    raise ValueError(
        f"{source}: a model of {task} has no head to predict with; train one onto it, with method classify, tag, qa, "
        "embed or reward"
    )


def _require_classes(source: str, model: Any, problem: Any) -> None:
    """ValueError for a published classifier that does not choose one of several classes."""
    if model.task not in ("sequence-classification", "image-classification"):
        return
    if len(model.labels) == 1 or problem in ("regression", "multi_label_classification"):
        kind = "several labels at once" if problem == "multi_label_classification" else "a number"
        raise ValueError(f"{source}: its head says {kind}, and one class of several is predicted here")


def _check_tokenizer(model: Any, tokenizer: Any, remedy: str) -> None:
    if not model.reads_images:
        check_tokenizer(model, tokenizer, model.source, remedy)


def _longest_text(model: Any) -> int | None:
    """How many tokens of a text sentence-transformers would read, where the checkpoint says it."""
    stored = model.tokens.files.get(LONGEST)
    if stored is None or model.task != "embedding":
        return None
    settings = with_fields(parse_json(stored, LONGEST), LONGEST, max_seq_length=int | None)
    longest: int | None = settings.get("max_seq_length")
    if longest is None or model.config.max_positions is None:
        return longest
    return min(longest, model.config.max_positions)
