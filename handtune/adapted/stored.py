"""What lies in a folder that is given as a model: a checkpoint, a run's model, or a run's adapter for its base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..inputs.fingerprints import BASE, is_run
from ..prepare import load_model, run_base
from ..saved_runs import config_of, require_finished, stored_folder


def stored_model(source: str) -> tuple[str, RunConfig | None]:
    """Where the whole model lies: at `source`, a folder or hub id, or in the run there; of such a run no configuration.

    A run that has stored only an adapter comes with its configuration, which names the base. ValueError where the run
    has not finished.
    """
    run = Path(source)
    if not is_run(run):
        return source, None
    require_finished(run)
    if stored_folder(run).name == "model":
        return str(run / "model"), None
    return source, config_of(run, BASE)


def load_base(config: RunConfig, dtype: str, *, head_follows: bool) -> tuple[Any, Any]:
    """The model that a run's adapter stands on, with changes of its own such as added tokens, and its tokenizer.

    What the run began with lies in its adapter.

    dtype: "auto" is that of the configuration. head_follows: as in `prepare`.
    """
    options = replace(config.model, adapter=None)
    if dtype != "auto":
        options = replace(options, dtype=dtype)
    base = run_base(config)
    labels = tuple(options.labels or ())
    return load_model(
        options, base.checkpoint, base.objective.task, labels, seed=config.train.seed, head_follows=head_follows
    )
