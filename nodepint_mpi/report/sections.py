"""`nodepint report`: the list of sections, and the page made of them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nodepint_mpi.errors import NodepintError
from nodepint_mpi.io.directory import Which
from nodepint_mpi.pages.page import check_page, write_page
from nodepint_mpi.pages.parts import Section
from nodepint_mpi.parallel.comms import Comms
from nodepint_mpi.report import (
    classification,
    control,
    energy,
    measures,
    paths,
    pictures,
    rom,
    samples,
    spread,
    tables,
    times,
)
from nodepint_mpi.report.facts import Facts, final_numbers, read_facts
from nodepint_mpi.report.trained import Model, look_at_model

PAGE = "report.html"

# To add a section, write a function that returns it, or None where a run has nothing for it.
FROM_RECORDS: tuple[Callable[[Facts], Section | None], ...] = (
    tables.summary,
    control.cost,
    control.trajectory,
    measures.loss,
    measures.sweeps,
    measures.jumps,
    measures.gradient_errors,
    measures.step_times,
    times.phases,
)
FROM_MODEL: tuple[Callable[[Model], Section | None], ...] = (
    paths.trajectories,
    spread.path_energy,
    classification.labels,
    energy.basis_energy,
    rom.reduced_model,
)
AT_THE_END: tuple[Callable[[Facts], Section | None], ...] = (
    samples.drawn_samples,
    pictures.own_pictures,
    tables.starts,
    tables.resolved_config,
    tables.checkpoints,
    tables.log,
)


def make_report(
    folder: Path,
    comms: Comms | None,
    *,
    page: Path | None = None,
    rom_file: Path | None = None,
    checkpoint: Which = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Write the page of a run. Local.

    Args:
        folder: The run directory.
        comms: Of one rank, to run the model on; None leaves it out, and with it the need for data.
        page: The HTML file; `report.html` in the run directory if None.
        rom_file: A reduced model of this run.
        checkpoint: The model to look at, as of `open_run`.
        trust: Import the code that the run's config names.

    Returns:
        What `--json` writes.

    Raises:
        NodepintError: if something cannot be read or written.
    """
    page = folder / PAGE if page is None else page
    facts = read_facts(folder)
    check_page(page)
    sections = [make(facts) for make in FROM_RECORDS]
    scores = {}
    if comms is not None and facts.config.control is None:
        with _without_model():
            model = look_at_model(folder, comms, rom_file, checkpoint=checkpoint, trust=trust)
        scores = model.scores
        sections.append(tables.checkpoint_used(facts, model.trained.step))
        sections += [make(model) for make in FROM_MODEL]
    sections += [make(facts) for make in AT_THE_END]
    shown = [section for section in sections if section is not None]
    files = write_page(page, shown, title=f"Run {facts.config.run.name}", subtitle=_subtitle(facts))
    return {
        "page": str(page),
        "figures": [str(file) for file in files],
        "sections": [section.title for section in shown],
        "final": final_numbers(facts),
        "test_scores": scores,
    }


@contextlib.contextmanager
def _without_model() -> Iterator[None]:
    """Say of an error how a report is made all the same."""
    try:
        yield
    except NodepintError as error:
        raise type(error)(
            f"{str(error).rstrip('.')}. `--no-model` makes the report without predictions."
        ) from error


def _subtitle(facts: Facts) -> str:
    time = facts.config.time
    return (
        f"{facts.folder}: {time.method} on {time.n_slices} slices, t from {time.horizon[0]:g} to "
        f"{time.horizon[1]:g}, {facts.config.run.precision}"
    )
