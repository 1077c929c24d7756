"""What a training run keeps for its report: what the model writes before and after, what it forgets, where it errs.

    examples.json   texts       prompts of held-out rows, what follows them (gold), what the model wrote before, after
                    general     the loss on general text before and after, nats a token
                    mistakes    the held-out rows where the model was wrong and surest of it, with gold and prediction

All of it is bounded: three texts of 40 tokens are written twice, some 490 words read twice, and mistakes are what the
scores of the evaluations have seen anyway. Texts are greedy, so that a resumed run keeps the same ones.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from .._files import write_json
from ..engine import evaluate
from ..engine.data.batches import Batches
from ..engine.data.labels import label_name
from ..engine.data.placed_rows import location_of
from ..engine.data.text import completion_text
from ..engine.generation.completions import text_of
from ..engine.generation.sampling import continuations
from ..engine.tasks.encode import encode
from ..engine.tasks.objectives import objective_of
from ..engine.tasks.preferences import SIDES
from ..prepare import EVAL_TOKENS, Prepared, RunBase
from .general_text import TEXTS
from .runs import EXAMPLES

N_TEXTS = 3  # that are written
NEW_TOKENS = 40  # of each
BEGINNING = 32  # tokens that a text without a prompt of its own is continued from
GENERAL_LENGTH = 512  # tokens of general text that are read at once


class Abilities(NamedTuple):
    """What a model can do: what it writes for each prompt, and its loss on general text, if that can be asked of it."""

    texts: list[str]
    general: float | None


class _Prompt(NamedTuple):
    """Token ids to continue, and those that follow in the row."""

    ids: list[int]
    gold: list[int]


def abilities(ready: Prepared, base: RunBase) -> Abilities:
    """Let the model write, and read general text; where it began as a preset, there is nothing to forget."""
    prompts = _prompts(ready)
    model = ready.model
    texts: list[str] = []
    if prompts:
        ends = list(model.tokens.ends)
        inputs = [prompt.ids for prompt in prompts]
        try:
            written = continuations(model, inputs, NEW_TOKENS, temperature=0, eos_id=ends)
        except FloatingPointError:  # a model that has diverged writes nothing, which is no reason to lose the run
            written = [[] for _ in prompts]
        for prompt, ids in zip(inputs, written, strict=True):
            # What an encoder-decoder writes is no prompt's continuation.
            texts.append(text_of(ids, ends, (), ready.tokenizer, () if model.task == "seq2seq-lm" else prompt))
    return Abilities(texts, _general_loss(ready) if base.checkpoint is not None else None)


def keep_examples(run: Path, ready: Prepared, before: Abilities, after: Abilities, metrics: dict[str, Any]) -> None:
    """Write the run's examples.json. `metrics` are of the evaluation of the weights that are stored."""
    texts = []
    for prompt, text_before, text_after in zip(_prompts(ready), before.texts, after.texts, strict=True):
        shown = {"prompt": ready.tokenizer.decode(prompt.ids), "gold": _gold_text(ready, prompt)}
        texts.append({**shown, "before": text_before, "after": text_after})
    general = None
    if before.general is not None and after.general is not None:
        general = {"before": before.general, "after": after.general}
    mistakes = mistakes_in_words(ready, metrics.get("mistakes", ()))
    write_json(run / EXAMPLES, {"texts": texts, "general": general, "mistakes": mistakes})


def _prompts(ready: Prepared) -> list[_Prompt]:
    """Prompts of held-out examples, at even distances, as their tokens were in training; none where nothing is written.

    Those that leave no room for the new tokens are passed over.
    """
    encoding = ready.objective.encoding
    if ready.objective.task not in ("causal-lm", "seq2seq-lm") or encoding == "span-corruption":
        return []
    examples = ready.eval_examples
    n = min(N_TEXTS, len(examples))
    prompts = [_prompt_of(examples[i * len(examples) // n], encoding) for i in range(n)]

    # The last new token needs no position.
    limit = ready.model.config.max_positions
    return [p for p in prompts if p.ids and (limit is None or len(p.ids) + NEW_TOKENS - 1 <= limit)]


def _prompt_of(example: Any, encoding: str) -> _Prompt:
    """Where an example is parted: in front of the first token of an answer, or behind the beginning of a text."""
    if encoding == "seq2seq":
        return _Prompt(_ints(example["input_ids"]), _ints(example["target_ids"]))
    if encoding == "pairs":
        ids = _ints(example[SIDES[0]])
        start = example["starts"][0]
        return _Prompt(ids[:start], ids[start:])

    # Targets are shifted: the first one follows the last token of the prompt.
    ids = _ints(example["input_ids"])
    targets = _ints(example["targets"])
    first = next(i for i, target in enumerate(targets) if target >= 0)
    if first == 0:  # the loss is on every token
        first = min(BEGINNING, len(ids)) - 1
    return _Prompt(ids[: first + 1], list(takewhile(lambda target: target >= 0, targets[first:])))


def _ints(ids: Sequence[Any]) -> list[int]:
    return [int(i) for i in ids]


def _gold_text(ready: Prepared, prompt: _Prompt) -> str:
    """What follows a prompt in its row, as much as the model may write, and a sign where there is more."""
    before = () if ready.objective.task == "seq2seq-lm" else prompt.ids
    text = completion_text(ready.tokenizer, before, prompt.gold[:NEW_TOKENS])
    return f"{text} …" if len(prompt.gold) > NEW_TOKENS else text


def _general_loss(ready: Prepared) -> float | None:
    """Mean loss on general text, as the model was pretrained; None for models of labels, spans or vectors.

    An encoder-decoder without sentinels can't be asked, nor a model whose tokenizer knows no English.
    """
    model = ready.model
    tokenizer = ready.tokenizer
    if model.task not in ("causal-lm", "masked-lm", "seq2seq-lm"):
        return None
    method = "masked-lm" if model.task == "masked-lm" else "pretrain"
    objective = objective_of(method, type(model).objectives)
    if objective.encoding == "span-corruption" and tokenizer.token_to_id("<extra_id_99>") is None:
        return None
    if not all(len(encoding) for encoding in tokenizer.encode_batch(list(TEXTS), add_special_tokens=False)):
        return None

    length = min(GENERAL_LENGTH, model.config.max_positions or GENERAL_LENGTH)
    rows = [{"text": text} for text in TEXTS]
    examples, _ = encode(rows, tokenizer, objective.encoding, max_length=length, eos=model.tokens.eos_id)
    batches = Batches(examples, objective.collate(model, tokenizer, True), tokens=EVAL_TOKENS, shuffle=False)
    loss: float = evaluate(model, batches, objective.loss)["loss"]
    return loss


def mistakes_in_words(ready: Prepared, mistakes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of an evaluation's mistakes where each row stands, its text, gold, prediction and probability."""
    return [_mistake(ready, mistake) for mistake in mistakes]


def _mistake(ready: Prepared, mistake: dict[str, Any]) -> dict[str, Any]:
    row = ready.eval_rows[mistake["row"]]
    predicted = mistake["predicted"]
    if "tags" in row:
        i = mistake["word"]
        text = " ".join(f"«{token}»" if number == i else token for number, token in enumerate(row["tokens"]))
        gold = label_name(row["tags"][i])
    elif "answers" in row:
        text = row["question"]
        gold = " / ".join(dict.fromkeys(row["answers"]["text"])) or "no answer"
        predicted = predicted or "no answer"
    else:
        text = "\n".join(str(row[field]) for field in ("text", "text_pair", "image") if field in row)
        gold = label_name(row["label"])
        predicted = ready.labels[predicted]
    where = location_of(row, mistake["row"])
    return {"row": where, "text": text, "gold": gold, "predicted": predicted, "probability": mistake["probability"]}
