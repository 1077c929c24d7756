"""The model that `generate`, `compare` and `label` ask: a checkpoint or what a run produced, with any adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .._files import resolved
from ..config import DataConfig, ModelConfig, RunConfig
from ..engine.data.placed_rows import location_of
from ..inputs import BASE
from ..prepare import load_model, run_base
from ..prompts import learn_turn_end
from ..saved_runs import config_of, put_adapter, require_finished


class Generator(NamedTuple):
    """A model that generates, with its tokenizer and adapters."""

    model: Any
    tokenizer: Any
    adapters: dict[str, str]  # the name of each adapter in the model, by the name that rows call it by
    chat: dict[str | None, bool]  # whether each adapter, and None, the base, was trained through the chat template

    def asks_as_chat(self, adapters: Sequence[str | None] | None, rows: int) -> list[bool]:
        """Whether each row goes through the template. `adapters` are those of the rows; None: the last one for all."""
        if adapters is None:
            adapters = [list(self.chat)[-1]] * rows
        return [self.chat[name] for name in adapters]

    def adapters_of(self, rows: Sequence[Mapping[str, Any]]) -> list[str | None] | None:
        """The adapter of each row, or None where all have the same one. ValueError where a row leaves it open."""
        if len(self.adapters) < 2 and not any("adapter" in row for row in rows):
            return None

        adapters: list[str | None] = []
        for index, row in enumerate(rows):
            name = row.get("adapter")
            if name is None and "adapter" in row:
                adapters.append(None)  # the base alone
            elif name in self.adapters:
                adapters.append(self.adapters[name])
            else:
                raise ValueError(
                    f"{location_of(row, index)}: adapter {name!r} is not among the given ones "
                    f"({', '.join(self.adapters) or 'none'}); name one in each row of --prompts, as adapter"
                )
        return adapters


def generator_of(source: str, folders: Sequence[str | Path], dtype: str) -> Generator:
    """The model at `source`, a checkpoint's folder or hub id, or the folder of a run, with adapters from `folders`."""
    # A run has stored a model, or an adapter for a base that its configuration names.
    run = Path(source)
    config = None
    if (run / "run.json").is_file():
        require_finished(run)
        if (run / "model").is_dir():
            source = str(run / "model")
        else:
            config = config_of(run, BASE)
            folders = folders or [run / "adapter"]

    if config is None:  # a checkpoint is asked like the base of a run of sft
        config = RunConfig("sft", "", ModelConfig(path=source), DataConfig(train=[]))

    # A run's base may have changes of its own, such as tokens that were added; adapters come after it.
    options = replace(config.model, adapter=None)
    if dtype != "auto":
        options = replace(options, dtype=dtype)
    base = run_base(config)
    model, tokenizer = load_model(
        options, base.checkpoint, base.objective.task, tuple(options.labels or ()), seed=config.train.seed,
        head_follows=bool(folders),
    )  # fmt: skip
    if tokenizer is None:
        raise ValueError(f"{source}: no tokenizer.json there, and prompts need one")

    # `put_adapter` changes the model's tokens, and each adapter's settings start from those of the base.
    tokens = model.tokens
    adapters: dict[str, str] = {}
    chat: dict[str | None, bool] = {None: tokens.asks_as_chat}
    for folder in map(Path, folders):
        full_path = resolved(folder)
        if full_path.name == "adapter":  # an adapter in a run's folder goes by the run's name
            full_path = full_path.parent

        name = full_path.name
        if name in adapters:
            raise ValueError(f"--adapter {folder}: there is another called {name!r}; give one another name")
        # Numbered, because names that differ may become the same without their dots, which no module's name has.
        adapters[name] = f"{len(adapters)}: {name.replace('.', '_')}"
        put_adapter(model, tokenizer, folder, adapters[name])
        chat[adapters[name]] = tokens.with_adapter(folder, tokenizer).asks_as_chat
    learn_turn_end(model, tokenizer)
    return Generator(model, tokenizer, adapters, chat)
