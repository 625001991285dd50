"""Training what the table lacks, one cell after the other, each by commands a user could type.

Importing this module loads neither MPI nor JAX.
"""

from collections.abc import Callable, Sequence

from nodepint_mpi.bench.studies.series.launch import Launch
from nodepint_mpi.bench.studies.table.cells import TRAIN_SCORES, Cell
from nodepint_mpi.ranks.child import Ended


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
            cell.kept.set_aside()
        why = _do(cell, launch, held, timeout_s, report)
        report(f"{cell.label}: {f'failed: {why}' if why else 'finished'}")
        n_failed += bool(why)
        after_each()
    return n_failed


def _do(
    cell: Cell, launch: Launch, held: int, timeout_s: float, report: Callable[[str], None]
) -> str:
    """Train and score one cell; why it failed, if it did."""

    def run(*words: str) -> Ended:
        return launch.run(
            words, n_ranks=cell.n_ranks, n_cores=cell.n_cores, timeout_s=timeout_s, held=held
        )

    kept = cell.kept
    if kept.is_trained():  # and only lacks its score
        note = (kept.note() or {}) | {"reason": ""}
        kept.write_note(note)
    else:
        goes_on = kept.has_checkpoint()
        note = kept.begin(launch.cores, goes_on=goes_on)
        report(f"{cell.label}: {'goes on' if goes_on else 'training'}")
        more = ["--plain"] if cell.is_plain else []
        more += ["--resume", "auto"] if goes_on else []
        ended = run("train", cell.problem.config, "--out", str(cell.folder), *more)
        if not ended.why and not kept.is_trained():
            raise KeyboardInterrupt  # it was asked to stop, and so are we
        if ended.why:
            return kept.fail(note, ended)
        kept.end(note, launch.cores)
    if cell.problem.scored:
        scores = str(cell.folder / TRAIN_SCORES)
        # It was trained here, by the config that the list names, with whatever code that names.
        words = "--split", "train", "--json", scores, "--trust"
        ended = run("evaluate", str(cell.folder), *words)
        if ended.why:
            return kept.fail(note, ended)
    return ""
