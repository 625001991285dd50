"""Running what the studies lack, one point after the other, each by a command a user could type.

Importing this module loads neither MPI nor JAX.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nodepint_mpi.bench.studies.scaling.points import Point
from nodepint_mpi.bench.studies.scaling.rows import write_rows
from nodepint_mpi.bench.studies.series.launch import Launch, sole_use
from nodepint_mpi.io.directory import config_text, write_text


def do_points(
    points: Sequence[Point],
    launch: Launch,
    out: Path,
    *,
    timeout_s: float,
    report: Callable[[str], None],
) -> int:
    """Do what is to be done of the chosen points; how many failed. Local.

    One that fails does not keep others from being done. An interrupted one is begun anew: times of
    half a run are of no use. Jobs for other numbers of ranks may work in the same folder.

    Args:
        points: All of them.
        launch: How ranks are started.
        out: Their folder.
        timeout_s: How long one run may take.
        report: Told what is done.

    Raises:
        OutputError: if somebody does the same, or something cannot be written.
    """
    n_failed = 0
    chosen = [point for point in points if point.chosen]
    with _alone(out, sorted({point.n_ranks for point in chosen})) as held:
        for point in chosen:
            state = point.kept.state()
            if state == "finished":
                continue
            if state == "stale":
                report(f"{point.label}: stale, its config has changed")
                point.kept.set_aside()
            report(f"{point.label}: runs")
            why = _do(point, launch, held[point.n_ranks], timeout_s)
            report(f"{point.label}: {f'failed: {why}' if why else 'finished'}")
            n_failed += bool(why)
            write_rows(out, points)
    return n_failed


def _do(point: Point, launch: Launch, held: int, timeout_s: float) -> str:
    """Run one point; why it failed, if it did."""
    kept = point.kept
    note = kept.begin(launch.cores)
    config = kept.beside(".toml")
    write_text(config, config_text(point.config))
    words = ["train", str(config), "--out", str(point.folder)]
    ended = launch.run(
        [*words, "--plain"] if point.is_plain else words,
        n_ranks=point.n_ranks, n_cores=point.n_cores, timeout_s=timeout_s, held=held,
    )  # fmt: skip
    if not ended.why and not kept.is_trained():
        raise KeyboardInterrupt  # it was asked to stop, and so are we
    if ended.why:
        return kept.fail(note, ended)
    kept.end(note, launch.cores)
    return ""


@contextlib.contextmanager
def _alone(out: Path, ranks: Sequence[int]) -> Iterator[dict[int, int]]:
    """Sole use of the folder for points on these numbers of ranks; the open file for each."""
    with contextlib.ExitStack() as stack:
        yield {n: stack.enter_context(sole_use(out, f".lock-{n}")) for n in ranks}
