"""Running what a study lacks, one run after the other, each by commands a user could type.

Importing this module loads neither MPI nor JAX.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nodepint_mpi.bench.studies.launch import Launch, sole_use
from nodepint_mpi.bench.studies.rows import write_rows
from nodepint_mpi.bench.studies.runs import NOTHING_TO_DO, TRAIN_SCORES, Run, Series
from nodepint_mpi.io.directory import config_text, write_text
from nodepint_mpi.ranks.child import Ended

Held = Mapping[int, int]
"""The open file of the lock for runs on each number of ranks."""


@contextlib.contextmanager
def at_work(series: Series, out: Path, runs: Sequence[Run]) -> Iterator[Held]:
    """Keep others from the chosen runs, though not from those on other ranks if the study may.

    Raises:
        OutputError: if somebody does the same.
    """
    names = {run.n_ranks: series.lock.format(ranks=run.n_ranks) for run in runs if run.chosen}
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(sole_use(out, name)) for name in dict.fromkeys(names.values())
        }
        yield {n_ranks: files[name] for n_ranks, name in names.items()}


def do_runs(
    series: Series,
    runs: Sequence[Run],
    launch: Launch,
    out: Path,
    *,
    held: Held,
    timeout_s: float,
    report: Callable[[str], None],
) -> int:
    """Do what is to be done of the chosen runs; how many failed. Local.

    One that fails does not keep others from being done. The rows are written after each.

    Args:
        series: What they have in common.
        runs: All of them.
        launch: How ranks are started.
        out: Their folder.
        held: What `at_work` gives.
        timeout_s: How long one command may take.
        report: Told what is done.

    Raises:
        OutputError: if something cannot be written.
    """
    n_failed = 0
    for run in (run for run in runs if run.chosen):
        state = run.state()
        if state in NOTHING_TO_DO:
            continue
        if state == "stale":
            report(f"{run.label}: stale, {series.changed}")
            run.kept.set_aside()

        def start(*words: str, run: Run = run) -> Ended:
            return launch.run(
                words, n_ranks=run.n_ranks, n_cores=run.n_cores, timeout_s=timeout_s,
                held=held[run.n_ranks],
            )  # fmt: skip

        why = _do(series, run, launch.cores, start, report)
        report(f"{run.label}: {f'failed: {why}' if why else 'finished'}")
        n_failed += bool(why)
        write_rows(series, out, runs)
    return n_failed


def _do(
    series: Series,
    run: Run,
    cores: Sequence[int],
    start: Callable[..., Ended],
    report: Callable[[str], None],
) -> str:
    """Train one run, and score it where it is to be; why it failed, if it did."""
    kept = run.kept
    if kept.is_trained():  # and only lacks its score
        note = (kept.note() or {}) | {"reason": ""}
        kept.write_note(note)
    else:
        goes_on = series.resumes and kept.has_checkpoint()
        report(f"{run.label}: {'goes on' if goes_on else series.begins}")
        note = kept.begin(cores, goes_on=goes_on)
        more = ["--plain"] if run.is_plain else []
        more += ["--resume", "auto"] if goes_on else []
        ended = start("train", _config_file(run), "--out", str(run.folder), *more)
        if not ended.why and not kept.is_trained():
            raise KeyboardInterrupt  # it was asked to stop, and so are we
        if ended.why:
            return kept.fail(note, ended)
        kept.end(note, cores)
    if run.scored:
        scores = str(run.folder / TRAIN_SCORES)
        # It was trained here, by the config that the list names, with whatever code that names.
        ended = start("evaluate", str(run.folder), "--split", "train", "--json", scores, "--trust")
        if ended.why:
            return kept.fail(note, ended)
    return ""


def _config_file(run: Run) -> str:
    """The config that is trained, which is written beside the run unless it is a file."""
    if run.config_file is not None:
        return run.config_file
    assert run.config is not None  # one that is left out is not done
    file = run.kept.beside(".toml")
    write_text(file, config_text(run.config))
    return str(file)
