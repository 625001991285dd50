"""What a user wants to be told while a run trains: callbacks, Weights & Biases, MLflow.

    pip install wandb && nodepint train CONFIG --set 'output.callbacks=["wandb"]'

Callbacks are called on rank 0 alone, with numbers that all ranks hold.
"""

import importlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nodepint_mpi.build.imports import import_object, is_import_path
from nodepint_mpi.config.experiment import Config
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.io.directory import write_text
from nodepint_mpi.names import hint
from nodepint_mpi.ranks.signals import StopFlag

KEY = "output.callbacks"

_log = logging.getLogger(__name__)


class Callback:
    """Told how a run goes on; override what is of interest. Local: called on rank 0 alone.

    A callback must not communicate, and the other ranks wait while it works. An exception that it
    raises ends the run.
    """

    def on_start(self, config: Config, run_directory: Path, resumed: bool) -> None:
        """A run begins, or goes on from a checkpoint."""

    def on_record(self, numbers: Mapping[str, Any]) -> bool | None:
        """A record was added to the metrics: `step`, `loss` and all that `metrics.jsonl` holds.

        Returns:
            True to stop the run: one step later, with a checkpoint to resume from.
        """

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        """The run ends: with what `nodepint_mpi.train` returns, or None if an error ended it."""


class Wandb(Callback):
    """Record a run with Weights & Biases. `options` go to `wandb.init`; needs the package wandb.

    A resumed run goes on with its own record. A failure to record is a warning: the run goes on.
    """

    _FILE = "wandb.json"

    def __init__(self, **options: Any):
        self._wandb = _import_package("wandb")
        self._options = options
        self._run: Any = None

    def on_start(self, config: Config, run_directory: Path, resumed: bool) -> None:
        own: dict[str, Any] = {"name": config.run.name, "dir": str(run_directory)}
        known = _read_id(run_directory / self._FILE) if resumed else None
        if known is not None:
            own |= {"id": known, "resume": "allow"}
        self._run = self._wandb.init(
            **own | {"config": config.model_dump(mode="json")} | self._options
        )
        _write_id(run_directory / self._FILE, self._run.id)

    def on_record(self, numbers: Mapping[str, Any]) -> None:
        self._run.log(_finite(numbers), step=numbers["step"])

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        if self._run is None:
            return
        if result is not None:
            self._run.summary.update(_finite(result))
        self._run.finish(exit_code=0 if result is not None else 1)


class Mlflow(Callback):
    """Record a run with MLflow, in the experiment `experiment`; needs mlflow or mlflow-skinny.

    Where records go says MLflow's variable MLFLOW_TRACKING_URI. A resumed run goes on with its own
    record. A failure to record is a warning: the run goes on.
    """

    _FILE = "mlflow.json"
    _LONGEST = 500  # characters of a parameter that every store of MLflow takes

    def __init__(self, experiment: str | None = None):
        self._mlflow = _import_package("mlflow")
        self._experiment = experiment
        self._run_id: str | None = None

    def on_start(self, config: Config, run_directory: Path, resumed: bool) -> None:
        known = _read_id(run_directory / self._FILE) if resumed else None
        if known is None and self._experiment is not None:
            self._mlflow.set_experiment(self._experiment)
        names = {"run_name": config.run.name} if known is None else {"run_id": known}
        self._run_id = self._mlflow.start_run(**names).info.run_id
        _write_id(run_directory / self._FILE, self._run_id)
        if known is None:
            values = _flat(config.model_dump(mode="json", exclude_none=True))
            self._mlflow.log_params({k: str(v)[: self._LONGEST] for k, v in values.items()})

    def on_record(self, numbers: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in _finite(numbers).items()}
        self._mlflow.log_metrics(values, step=numbers["step"], run_id=self._run_id)

    def on_end(self, result: Mapping[str, Any] | None) -> None:
        if self._run_id is None:
            return
        if result is not None:
            values = {f"final_{name}": float(v) for name, v in _finite(result).items()}
            self._mlflow.log_metrics(values, run_id=self._run_id)
        self._mlflow.end_run("FINISHED" if result is not None else "FAILED")


TRACKERS: dict[str, Callable[[], Callback]] = {"wandb": Wandb, "mlflow": Mlflow}
"""Callbacks that `output.callbacks` knows by name."""


def make_callbacks(config: Config, given: Sequence[Callback]) -> list[Callback]:
    """The callbacks that a config names and those that a program gives. Local.

    Raises:
        ConfigError: for an unknown name, or an object that is not a `Callback`.
    """
    found = [_make(name) for name in config.output.callbacks] + list(given)
    for one in found:
        if not isinstance(one, Callback):
            raise ConfigError(
                f"a callback is of type {type(one).__name__}; expected a `nodepint_mpi.Callback`."
            )
    return found


def _make(name: str) -> Any:
    if not is_import_path(name):
        if name not in TRACKERS:
            raise ConfigError(f"Unknown `{KEY}` {name!r}{hint(name, TRACKERS)}")
        return TRACKERS[name]()
    make = import_object(name, KEY)
    try:
        return make()
    except Exception as error:  # anything that the user's code can raise
        raise ConfigError(
            f'`{KEY}` holds "{name}", which was called without arguments and failed: '
            f"{type(error).__name__}: {error}"
        ) from error


class Listeners:
    """The callbacks of a run under way; used in a `with` block. Local: on rank 0 alone.

    Raises:
        ProblemError: from all of it, if a callback fails; those of this package only warn.
    """

    def __init__(self, callbacks: Sequence[Callback], flag: StopFlag):
        """Callbacks, and the flag by which they stop the run."""
        self._callbacks = list(callbacks)
        self._flag = flag
        self._result: Mapping[str, Any] | None = None

    def start(self, config: Config, folder: Path, *, resumed: bool) -> None:
        """Tell that the run begins."""
        for one in self._callbacks:
            self._call(one, "on_start", config, folder, resumed)

    def append(self, record: Mapping[str, Any]) -> None:
        """Tell of a record."""
        stops = [self._call(one, "on_record", dict(record)) for one in list(self._callbacks)]
        if any(stop is True for stop in stops):
            self._flag.ask()

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run has ended well, and the callbacks shall hear of it last."""
        self._result = dict(result)

    def __enter__(self) -> "Listeners":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one in self._callbacks:
            try:
                self._call(one, "on_end", self._result)
            except ProblemError as failure:
                if error is None:
                    raise
                _log.warning("%s", failure)  # what ended the run is of more interest

    def _call(self, callback: Callback, name: str, *arguments: Any) -> Any:
        try:
            return getattr(callback, name)(*arguments)
        except Exception as error:  # anything that the user's code can raise
            kind = type(callback).__name__
            reason = f"{kind}.{name} failed: {type(error).__name__}: {error}"
            if not isinstance(callback, Wandb | Mlflow):
                raise ProblemError(f"The callback {reason}") from error
            _log.warning("%s; this run is not recorded by it any more", reason)
            if name != "on_end":
                self._callbacks.remove(callback)
            return None


def _import_package(name: str) -> Any:
    """An optional package.

    Raises:
        ConfigError: if it is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"`{KEY}` holds {name!r}, but that package is not installed ({error}): run "
            f"`pip install 'nodepint_mpi[{name}]'`, or leave it out."
        ) from error


def _finite(numbers: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers among the values that are finite."""
    return {
        name: value
        for name, value in numbers.items()
        if isinstance(value, int | float) and name != "step" and math.isfinite(value)
    }


def _flat(section: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Nested sections as one, with dotted keys."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{key}{name}.") if inner else {f"{key}{name}": value}
    return found


def _read_id(path: Path) -> str | None:
    """Under which a run is recorded elsewhere, if it is."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_id(path: Path, run_id: Any) -> None:
    write_text(path, json.dumps({"id": str(run_id)}) + "\n")
