"""What a run has made, as a model to start from: its model, or its adapter merged into its base.

`model.path` may name a run's folder. A model that the run stored is a checkpoint like any other. An adapter is merged
into the run's base, to the bits that `handtune merge RUN OUT` writes: no file is written, but each tensor of the merged
checkpoint is computed when loading asks for it, and goes into the place of any other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..engine.adapters.rounding import Rounding
from ..inputs.fingerprints import base_of, is_run
from ..models.checkpoint.info import CheckpointInfo, checkpoint_info
from ..models.checkpoint.saving import save_around
from ..saved_runs import require_finished, stored_folder
from .merging import empty_folder, merge, merged_model, report
from .starting import check_on_run


def model_info(path: str | Path, weights: bool = True) -> CheckpointInfo:
    """What the model at `path` is: a checkpoint's folder or hub id, or a run's folder.

    Of a run with an adapter it is what its base is, and `opened_model` merges the two. Raises as `checkpoint_info`, and
    ValueError where the run has not finished, or its base has changed.
    """
    run = Path(path).expanduser()
    if not is_run(run):
        return checkpoint_info(path, weights)
    require_finished(run)
    if stored_folder(run).name == "model":
        return checkpoint_info(run / "model", weights)
    return model_info(base_of(run), weights)._replace(source=str(path))


@contextmanager
def opened_model(info: CheckpointInfo) -> Iterator[CheckpointInfo]:
    """Inside, a checkpoint that can be loaded: that of `model_info`, or what the run there has made.

    How much of the adapter's change survives in the base's dtype is printed afterwards, as `merge` does.
    """
    run = Path(info.source).expanduser()
    if not is_run(run):
        yield info
        return

    rounding = Rounding()
    with opened_model(model_info(base_of(run))) as base, TemporaryDirectory() as folder:
        merged = merged_model(base, run / "adapter", rounding)
        save_around(merged.model, merged.tokenizer, Path(folder), merged.dtype)
        yield checkpoint_info(folder)._replace(source=info.source, tensors=merged.tensors)
    report(rounding, merged.dtype)


def merge_run(run: Path, out: Path, dtype: str | None = None) -> None:
    """Write what a run has made to the folder `out`, as a plain checkpoint. Raises as `merge` and `model_info`."""
    with empty_folder(out) as folder:
        if not is_run(run):
            raise ValueError(
                f"{run} is no run, whose adapter could be merged; give MODEL ADAPTER OUT, or a run's folder"
            )
        require_finished(run)
        if stored_folder(run).name == "model":
            merge(checkpoint_info(run / "model"), None, folder, dtype)
        else:
            _merge(base_of(run), run / "adapter", folder, dtype)


def merge_model(base: str, adapter: Path, out: Path, dtype: str | None = None) -> None:
    """Write a base, a checkpoint or a run, merged with an adapter, its own folder or its run's, to the folder `out`."""
    with empty_folder(out) as folder:
        if is_run(adapter):
            require_finished(adapter)
            if stored_folder(adapter).name == "model":
                raise ValueError(f"{adapter} has stored a whole model and no adapter: handtune merge {adapter} OUT")
            adapter = adapter / "adapter"
        check_on_run(adapter, base)
        _merge(base, adapter, folder, dtype)


def _merge(base: str, adapter: Path, folder: Path, dtype: str | None) -> None:
    with opened_model(model_info(base)) as info:
        merge(info, adapter, folder, dtype)
