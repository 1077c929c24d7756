"""The model that `generate`, `compare` and `label` ask: a checkpoint or what a run produced, with any adapters."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._files import resolved
from ..config import DataConfig, ModelConfig, RunConfig
from ..engine.data.columns import PromptTemplate
from ..engine.data.placed_rows import PlacedRow, location_of
from ..engine.data.readers import read_prompts
from ..engine.data.schema import is_dialogue
from ..engine.peft.format import CONFIG
from ..inputs.fingerprints import adapter_in, is_run, of_model
from ..models.tokenizer.special_tokens import SpecialTokens
from ..prompts import learn_turn_end, prompt_template_of, template_of
from ..saved_runs import facts_of, put_adapter
from .starting import other_base
from .stored import load_base, stored_model


class Generator(NamedTuple):
    """A model that generates, with its tokenizer and adapters."""

    model: Any
    tokenizer: Any
    adapters: dict[str, str]  # the name of each adapter in the model, by the name that rows call it by
    tokens: dict[str | None, SpecialTokens]  # what each adapter, and None, the base, was trained with

    def asks_as_chat(self, adapters: Sequence[str | None] | None, rows: int) -> list[bool]:
        """Whether each row goes through the template. `adapters` are those of the rows; None: the last one for all."""
        if adapters is None:
            adapters = [list(self.tokens)[-1]] * rows
        return [self.tokens[name].asks_as_chat for name in adapters]

    def tell_if_raw(
        self, rows: Sequence[Mapping[str, Any]], adapters: Sequence[str | None] | None, chats: Sequence[bool]
    ) -> None:
        """Say so where a model that answers chats continues prompts as they stand. Arguments as of `asks_as_chat`."""
        names = [list(self.tokens)[-1]] * len(rows) if adapters is None else adapters
        template = template_of(self.model)
        if any(
            self.tokens[name].answers_chats
            and not (chat or is_dialogue(row) or template.has_rendered(row.get("prompt", row.get("text"))))
            for row, name, chat in zip(rows, names, chats, strict=True)
        ):
            print("prompts are continued as they stand, past the model's chat template; rows of messages and "
                  "`handtune chat` go through it", file=sys.stderr)  # fmt: skip

    def template_of(self, raw: Mapping[str, Any]) -> PromptTemplate | None:
        """The template by which a raw row makes its prompt: that of the adapter it names, else of the last one."""
        name = raw.get("adapter")
        if "adapter" in raw and (name is None or name in self.adapters):
            tokens = self.tokens[None if name is None else self.adapters[name]]
        else:
            tokens = list(self.tokens.values())[-1]
        return prompt_template_of(tokens)

    def read_prompts(self, path: str | Path) -> list[PlacedRow]:
        """The rows of a file to be continued, with the prompts that the model was trained to be asked with."""
        if not any(map(prompt_template_of, self.tokens.values())):
            return read_prompts(path)
        return read_prompts(path, self.template_of)

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
    task = facts_of(Path(source)).get("task") if is_run(Path(source)) else None
    if task not in (None, "causal-lm", "seq2seq-lm"):
        raise ValueError(f"{source}: it writes no text, being for {task}; `handtune predict` asks such a model")
    checkpoint, config = stored_model(source)
    folders = [adapter_in(Path(folder)) or folder for folder in folders]  # a run may stand for its adapter
    if config is not None:
        own = Path(source) / "adapter"
        _check_beside_own(source, own, folders)
        folders = folders or [own]
    else:  # a checkpoint is asked like the base of a run of sft
        config = RunConfig("sft", "", ModelConfig(path=checkpoint), DataConfig(train=[]))

    model, tokenizer = load_base(config, dtype, head_follows=bool(folders))
    if tokenizer is None:
        raise ValueError(f"{source}: no tokenizer.json there, and prompts need one")

    # `put_adapter` changes the model's tokens, and each adapter's settings start from those of the base.
    base_tokens = model.tokens
    adapters: dict[str, str] = {}
    tokens: dict[str | None, SpecialTokens] = {None: base_tokens}
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
        tokens[adapters[name]] = base_tokens.with_adapter(folder, tokenizer)
    learn_turn_end(model, tokenizer)
    return Generator(model, tokenizer, adapters, tokens)


def _check_beside_own(source: str, own: Path, folders: Sequence[str | Path]) -> None:
    """Say that a run's own adapter is not among those that are given, all of which stand on the run's base.

    ValueError where one of them was trained on the run itself.
    """
    for folder in map(Path, folders):
        if (folder / CONFIG).is_file() and other_base(folder, of_model(source), source) is None:
            raise ValueError(
                f"--adapter {folder} was trained on the run {source}, whose own adapter belongs under it: first "
                f"handtune merge {source} OUT, then give OUT as the model"
            )
    if folders and resolved(own) not in map(resolved, folders):
        print(f"{source}: its base with --adapter, and without its own adapter", file=sys.stderr)
