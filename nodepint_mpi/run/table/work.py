"""Training what the table lacks, one cell after the other, each by commands a user could type.

Importing this module loads neither MPI nor JAX.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nodepint_mpi.errors import ConfigError, OutputError
from nodepint_mpi.run.child import Ended, cores_for, find_mpirun, run_child
from nodepint_mpi.run.directory import commit, write_text
from nodepint_mpi.run.machine import busy_share, describe_machine
from nodepint_mpi.run.table.cells import TRAIN_SCORES, Cell

PLACES = "{ranks}", "{cores}"


class Launch(NamedTuple):
    """How ranks are started: by words of the user's own with `PLACES` in them, or here by mpirun.

    Started here each rank has a core of its own; elsewhere that is the launcher's business.
    `cores` are those of this machine that may be used.
    """

    words: tuple[str, ...]
    cores: tuple[int, ...]

    def run(self, cell: Cell, words: Sequence[str], timeout_s: float, held: int) -> Ended:
        """Start `nodepint` with these words on the ranks of a cell, to its end. Local."""
        command = [sys.executable, "-m", "nodepint_mpi", *words]
        settings = {"OMP_NUM_THREADS": str(cell.n_cores), "OPENBLAS_NUM_THREADS": str(cell.n_cores)}
        cores = None
        if self.words:
            numbers = {"{ranks}": str(cell.n_ranks), "{cores}": str(cell.n_cores)}
            command = [*(_fill(word, numbers) for word in self.words), *command]
        else:
            cores = self.cores[: cell.n_ranks * cell.n_cores]  # ranks divide them among themselves
            if cell.n_ranks > 1:
                command = [find_mpirun(), "-n", str(cell.n_ranks), *command]
                settings["OMPI_MCA_hwloc_base_binding_policy"] = "none"
        return run_child(command, timeout_s, settings=settings, cores=cores, held=[held])


def make_launch(template: str | None, cells: Sequence[Cell]) -> Launch:
    """How the chosen cells are started. Local.

    Args:
        template: The user's launcher, such as `srun -n {ranks} -c {cores}`; None for mpirun here.
        cells: The cells of the table.

    Raises:
        ConfigError: if that cannot be.
    """
    most = max(cell.n_ranks for cell in cells if cell.chosen)
    if template is None:
        if most > 1:
            find_mpirun()
        return Launch((), tuple(cores_for(most)))
    words = tuple(shlex.split(template))
    if not words or any(place not in template for place in PLACES):
        raise ConfigError(
            f"`--launcher '{template}'` must say where the numbers of ranks and of cores for each "
            "go: 'srun -n {ranks} -c {cores}'."
        )
    if shutil.which(words[0]) is None:
        raise ConfigError(f"`--launcher '{template}'`: there is no {words[0]} on the PATH.")
    return Launch(words, tuple(cores_for(1)))


@contextlib.contextmanager
def sole_use(out: Path) -> Iterator[int]:
    """Keep others from working in the same folder; what is started with the file open keeps on.

    Raises:
        OutputError: if somebody works there, if only a job that an earlier command has left.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a")
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"Somebody is at work in {out}, perhaps a job that an earlier command has left: "
                "wait for its end."
            ) from error
        yield file.fileno()


def do_cells(
    cells: Sequence[Cell],
    launch: Launch,
    *,
    held: int,
    timeout_s: float,
    report: Callable[[str], None],
    after_each: Callable[[], None],
) -> int:
    """Do what is to be done of the chosen cells; how many failed. Local.

    One that fails does not keep others from being done. Interrupted it goes on, when it is called
    again, from the last checkpoint of the cell it was at.

    Args:
        cells: All of them.
        launch: How ranks are started.
        held: The open file of `sole_use`.
        timeout_s: How long one training may take.
        report: Told what is done.
        after_each: Called when something of a cell has changed.

    Raises:
        OutputError: if the folder of a cell cannot be written.
    """
    n_failed = 0
    for cell in (cell for cell in cells if cell.chosen):
        state = cell.state()
        if state in ("finished", "left out"):
            continue
        if state == "stale":
            report(f"{cell.label}: stale, its config or its cores have changed")
            _set_aside(cell)
        why = _do(cell, launch, held, timeout_s, report)
        report(f"{cell.label}: {f'failed: {why}' if why else 'finished'}")
        n_failed += bool(why)
        after_each()
    return n_failed


def _do(
    cell: Cell, launch: Launch, held: int, timeout_s: float, report: Callable[[str], None]
) -> str:
    """Train and score one cell; why it failed, if it did."""
    goes_on = not cell.is_trained() and cell.has_checkpoint()
    note = _begin(cell, launch, goes_on)
    if not cell.is_trained():
        report(f"{cell.label}: {'goes on' if goes_on else 'training'}")
        words = ["train", cell.problem.config, "--out", str(cell.folder)]
        words += ["--plain"] if cell.is_plain else []
        words += ["--resume", "auto"] if goes_on else []
        ended = launch.run(cell, words, timeout_s, held)
        if not ended.why and not cell.is_trained():
            raise KeyboardInterrupt  # it was asked to stop, and so are we
        if ended.why:
            return _fail(cell, note, ended)
        note["busy_share"] = max(note["busy_share"], busy_share(launch.cores))
    cell.write_note(note)
    if cell.problem.scored:
        scores = str(cell.folder / TRAIN_SCORES)
        words = ["evaluate", str(cell.folder), "--split", "train", "--json", scores]
        ended = launch.run(cell, words, timeout_s, held)
        if ended.why:
            return _fail(cell, note, ended)
    return ""


def _begin(cell: Cell, launch: Launch, goes_on: bool) -> dict[str, Any]:
    """Note what is begun; remove a run that has no checkpoint to go on from."""
    before = cell.note() or {}
    if cell.is_trained():  # and only lacks its score
        return before | {"reason": ""}
    if not goes_on:
        before = {}
        shutil.rmtree(cell.folder, ignore_errors=True)
    machine = describe_machine()
    if before.get("machine", machine) != machine:
        machine = f"{before['machine']}, then {machine}"
    note = {
        "digest": cell.digest(),
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "busy_share": max(before.get("busy_share", 0.0), busy_share(launch.cores)),
        "load_average": os.getloadavg()[0],
        "n_starts": before.get("n_starts", 0) + 1,
        "reason": "",
    }
    cell.write_note(note)
    return note


def _fail(cell: Cell, note: dict[str, Any], ended: Ended) -> str:
    """Note why, and keep all that was said."""
    note["reason"] = ended.why
    write_text(cell.folder.with_name(f"{cell.method}.log"), ended.out + ended.err)
    cell.write_note(note)
    return ended.why


def _set_aside(cell: Cell) -> None:
    """Keep a stale run, in place of an older one."""
    if cell.folder.exists():
        aside = cell.folder.with_name(f"{cell.method}.stale")
        shutil.rmtree(aside, ignore_errors=True)
        cell.folder.rename(aside)


def _fill(word: str, numbers: dict[str, str]) -> str:
    for place, number in numbers.items():
        word = word.replace(place, number)
    return word
