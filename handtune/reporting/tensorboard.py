"""A run in TensorBoard: event files beside metrics.jsonl that hold the same numbers.

Each process that works on a run begins a file of its own. Its first record tells TensorBoard from which step on what
earlier files say counts no longer: a killed run makes some of its steps again, and they are shown once. A row is on the
disk before the checkpoint of its step, so that none is missing either.
"""

import io
import json
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from .._files import append_bytes
from ..engine import Callback

VERSION = "brain.Event:2"  # of the format: TensorBoard looks for restarts in files that begin with it


class TensorBoard(Callback):
    """Writes rows to event files in `folder`, and `config` as text. ValueError where tensorboard is not installed."""

    def __init__(self, folder: str | Path, config: dict[str, Any]):
        try:
            import_module("tensorboard.summary.writer.record_writer")
        except ImportError:
            raise ValueError("log = \"tensorboard\" needs tensorboard: pip install 'handtune[tensorboard]'") from None
        self.folder = Path(folder)
        self.config = config
        self.path: Path | None = None  # of this process's file, which its first row begins

    def on_step(self, row: dict[str, Any]) -> None:
        self._write(row["step"], "train", {key: value for key, value in row.items() if key != "step"})

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self._write(row["step"], "eval", row["eval"])

    def _write(self, step: int, group: str, values: dict[str, Any]) -> None:
        """Add the numbers and texts among the values as group/name."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self.path is None:
            self._begin(step)
        entries = []
        for name, value in values.items():
            if isinstance(value, int | float):
                entries.append(Summary.Value(tag=f"{group}/{name}", simple_value=value))
            elif isinstance(value, str):
                entries.append(_text(f"{group}/{name}", value))
        self._append(step=step, summary=Summary(value=entries))

    def _begin(self, step: int) -> None:
        """Begin a file whose rows come in the place of those that earlier ones have from `step` on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        # TensorBoard reads files in the order of their names.
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(self.folder.glob("events.out.tfevents.*"))
        self.path = self.folder / f"events.out.tfevents.{len(earlier):06d}"
        self._append(file_version=VERSION)
        if earlier:
            self._append(step=step, session_log=SessionLog(status=SessionLog.START))

        text = json.dumps(self.config, indent=2, ensure_ascii=False)
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # a block of code in Markdown
        self._append(step=step, summary=Summary(value=[_text("config", indented)]))

    def _append(self, **fields: Any) -> None:
        """Add a record to the file."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        assert self.path is not None
        append_bytes(self.path, record.getvalue())


def _text(tag: str, text: str) -> Any:
    """A text in a summary, for TensorBoard's tab of texts."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.text.metadata import create_summary_metadata

    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
    return Summary.Value(tag=tag, metadata=create_summary_metadata(tag, ""), tensor=tensor)
