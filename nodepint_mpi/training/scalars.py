"""The metrics of a run for TensorBoard: a copy of `metrics.jsonl`, record by record.

    pip install tensorboard && tensorboard --logdir runs

Written by `tensorboardX`, and by its synchronous writer: the usual one writes from a thread, where
a full disk would go unnoticed.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nodepint_mpi.errors import ConfigError, OutputError
from nodepint_mpi.io.errno_text import error_text

FOLDER = "tensorboard"


def require_tensorboard() -> None:
    """Check, before a run starts, that its scalars can be written. Local.

    Raises:
        ConfigError: if the package is missing.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "`output.tensorboard` needs the package tensorboardX, which is not installed "
            f"({error}): run `pip install tensorboardX`, or leave the key out."
        ) from error


class Scalars:
    """Scalars of a run, open for more. Local: made and used on one rank alone.

    Raises:
        OutputError: if they cannot be written.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None):
        """Start a file in the run directory; a resumed run has TensorBoard drop later steps."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._folder = folder / FOLDER
        try:
            self._folder.mkdir(exist_ok=True)
            suffix = f".{resume_step or 0}"  # names else differ only by the second they were made
            self._writer = EventsWriter(str(self._folder / "events"), suffix)
        except OSError as error:
            raise self._failure(error) from error
        if resume_step is not None:
            kind = self._event.SessionLog
            start = kind(status=kind.START)
            self._write(step=resume_step + 1, session_log=start)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of one record at its step; what is no number is passed over."""
        values = [
            self._summary.Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        ]
        self._write(step=record["step"], summary=self._summary.Summary(value=values))

    def __enter__(self) -> "Scalars":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._writer.close()
        except OSError as failure:
            raise self._failure(failure) from failure

    def _write(self, **parts: Any) -> None:
        try:
            self._writer.write_event(self._event.Event(wall_time=time.time(), **parts))
            self._writer.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write scalars in {self._folder}: {error_text(error)}")
