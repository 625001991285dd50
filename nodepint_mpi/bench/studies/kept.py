"""A run directory that is one of a series, and the note beside it.

Importing this module loads neither MPI nor JAX.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.core.partition import check_layout, line_length
from nodepint_mpi.data.sources import find_folder
from nodepint_mpi.errors import ConfigError, LayoutError, OutputError
from nodepint_mpi.io.directory import CHECKPOINTS, DONE, commit, write_text
from nodepint_mpi.ranks.child import Ended
from nodepint_mpi.ranks.machine import busy_share, describe_machine

State = Literal["finished", "failed", "begun", "stale", "missing"]
"""What is there of a run. One that failed, was begun or is missing is still to be done."""

Note = dict[str, Any]

QUIET = 0.05
"""The largest share of the cores that others may have kept busy on a quiet machine."""


class KeptRun(NamedTuple):
    """A run directory, and beside it NAME.json with what the run itself does not know.

    `digest` names all that its numbers depend on, but for the code and the machine.
    """

    folder: Path
    digest: str

    def beside(self, suffix: str) -> Path:
        """A file that belongs to it. Local."""
        return self.folder.with_name(self.folder.name + suffix)

    def note(self) -> Note | None:
        """What was noted when it was last begun; None if there is no note that can be read."""
        try:
            found = json.loads(self.beside(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def write_note(self, note: Note) -> None:
        """Replace its note. Local.

        Raises:
            OutputError: if it cannot be written.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot write {self.folder.parent}: {error.strerror}.") from error
        write_text(self.beside(".json"), json.dumps(note, indent=1) + "\n")

    def is_trained(self) -> bool:
        """Whether the training is done. Local."""
        return (self.folder / DONE).is_file()

    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from. Local."""
        return any((self.folder / CHECKPOINTS).glob("step-*.h5"))

    def state(self, *, whole: bool = True) -> State:
        """What is there of it. Local.

        Args:
            whole: Whether a run that is trained lacks nothing else.

        Raises:
            OutputError: if something else is in its place.
        """
        note = self.note()
        if note is None:
            if self.folder.exists():
                raise OutputError(
                    f"{self.folder} is in the way: it has no note of this series beside it. "
                    "Remove it, or choose another folder with `--out`."
                )
            return "missing"
        if note.get("digest") != self.digest:
            return "stale"
        if self.is_trained() and whole:
            return "finished"
        return "failed" if note.get("reason") else "begun"

    def begin(self, cores: Sequence[int], *, goes_on: bool = False) -> Note:
        """Note what is begun, where and when; remove what is there of it unless it goes on. Local.

        Args:
            cores: Of this machine, those that nothing else should keep busy.
            goes_on: Whether it goes on from its last checkpoint.

        Raises:
            OutputError: if its note cannot be written.
        """
        before = (self.note() or {}) if goes_on else {}
        if not goes_on:
            shutil.rmtree(self.folder, ignore_errors=True)
        machine = describe_machine()
        if before.get("machine", machine) != machine:
            machine = f"{before['machine']}, then {machine}"
        note = {
            "digest": self.digest,
            "machine": machine,
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "busy_share": max(before.get("busy_share", 0.0), busy_share(cores)),
            "load_average": os.getloadavg()[0],
            "n_starts": before.get("n_starts", 0) + 1,
            "reason": "",
        }
        self.write_note(note)
        return note

    def end(self, note: Note, cores: Sequence[int]) -> None:
        """Note that it is trained, and what else kept the cores busy. Local."""
        note["busy_share"] = max(note["busy_share"], busy_share(cores))
        self.write_note(note)

    def fail(self, note: Note, ended: Ended) -> str:
        """Note why it failed, and keep all that was said; returns why. Local."""
        note["reason"] = ended.why
        write_text(self.beside(".log"), ended.out + ended.err)
        self.write_note(note)
        return ended.why

    def set_aside(self) -> None:
        """Keep a stale run, in place of an older one. Local."""
        if self.folder.exists():
            aside = self.beside(".stale")
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.rename(aside)


def make_digest(config: Config, n_ranks: int, n_cores: int) -> str:
    """Names all that the numbers of a run depend on, but for the code and the machine. Local."""
    run, metrics = config.run, None if config.loss is None else config.loss.metrics
    parts = [config.fingerprint(), run.n_steps, run.data_ranks, metrics, n_ranks, n_cores]
    if run.basis_ranks > 1:  # else as it was before there were any
        parts.append({"basis_ranks": run.basis_ranks})
    if config.time.basis is not None:
        parts.append(config.time.basis.recurrence)  # the same experiment, in another time
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_run(config: Config, n_ranks: int, source: str) -> None:
    """Refuse, before hours are spent, what would fail at once. Local.

    Args:
        config: What is to be trained.
        n_ranks: On so many ranks.
        source: Names it in messages.

    Raises:
        NodepintError: for ranks that do not fit, and data that are not prepared.
    """
    if config.data is None:
        raise ConfigError(f"{source} has no section `[data]`: there is nothing to train.")
    try:
        check_layout(
            config.time.n_slices,
            line_length(n_ranks, config.run.data_ranks, config.run.basis_ranks),
        )
    except LayoutError as error:
        raise LayoutError(f"{source}: {error}") from error
    size = config.data.batch_size
    if size is not None and size % config.run.data_ranks:
        raise ConfigError(
            f"{source}: {config.run.data_ranks} lines of ranks cannot share {size} samples evenly."
        )
    if not config.data.is_made and not config.data.source.startswith("hub:"):
        find_folder(config.data.source)
