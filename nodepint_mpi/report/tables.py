"""Sections of text: the run's final numbers, starts, versions, config, checkpoints and log."""

from typing import Any

from nodepint_mpi.config.experiment import Config
from nodepint_mpi.pages.parts import Lines, Section, Table, number
from nodepint_mpi.pages.units import show_bytes, show_quantity
from nodepint_mpi.report.facts import Facts, final_numbers, format_ranks, rank_counts

N_LOG_LINES = 60


def summary(facts: Facts) -> Section:
    """The final numbers, or how far the run has come."""
    numbers = final_numbers(facts)
    rows = [show_quantity(name, value) for name, value in numbers.items() if value is not None]
    rows.append(("ranks of every start", rank_counts(facts)))
    parts: list = [Table(("quantity", "value"), rows)]
    if facts.done is None:
        run = facts.config.run
        of = f"of {run.n_steps}" if run.n_epochs is None else f"of a run of {run.n_epochs} epochs"
        parts.insert(
            0,
            f"This run is not finished: step {facts.steps[-1]} {of} is the last that is "
            "recorded. The page shows what there is.",
        )
    if facts.n_damaged > 0:
        parts.append(f"{facts.n_damaged} of the lines in the metrics are damaged and were skipped.")
    return Section("Final numbers" if facts.done is not None else "So far", parts)


def checkpoint_used(facts: Facts, step: int) -> Section | None:
    """Which step the predictions are of, where it is not the last one."""
    last = int(facts.steps[-1])
    if step == last:
        return None
    return Section(
        "Which checkpoint",
        [
            f"The checkpoint looked at is of step {step}, the last record of step {last}: what "
            "follows about the model is of that earlier step."
            if step < last
            else f"The checkpoint looked at is of step {step}, later than the last record, of "
            f"step {last}."
        ],
    )


def starts(facts: Facts) -> Section | None:
    """When, where and by which program the run was started, each time."""
    if not facts.starts:
        return None
    head = "time", "ranks", "hosts", "commit", "command"
    rows = [
        (
            str(start.get("time", "")),
            format_ranks(start),
            " ".join(start.get("hosts", [])),
            str(start.get("commit") or ""),
            " ".join(start.get("command", [])),
        )
        for start in facts.starts
    ]
    versions = [start.get("versions", {}) for start in facts.starts]
    names = {name: None for one in versions for name in one}
    numbered = [f"start {i + 1}" for i in range(len(versions))]
    table = [(name, *(one.get(name, "") for one in versions)) for name in names]
    return Section(
        "Starts and versions",
        [Table(head, rows), Table(("package", *numbered), table, "Versions of every start.")],
    )


def resolved_config(facts: Facts) -> Section:
    """Every key, defaults included."""
    rows = [(key, number(value)) for key, value in flatten(facts.config).items()]
    return Section(
        "Resolved config",
        [f"Fingerprint {facts.config.fingerprint()}.", Table(("key", "value"), rows)],
    )


def checkpoints(facts: Facts) -> Section | None:
    """Those that are kept."""
    if not facts.checkpoints:
        return None
    rows = [(name, show_bytes(size)) for name, size in facts.checkpoints]
    return Section("Checkpoints", [Table(("file", "size"), rows)])


def log(facts: Facts) -> Section | None:
    """The end of what rank 0 said."""
    if not facts.log:
        return None
    shown = facts.log[-N_LOG_LINES:]
    left_out = len(facts.log) - len(shown)
    said = f"The last {len(shown)} lines of log.txt; {left_out} come before." if left_out else ""
    return Section("Log", [*([said] if said else []), Lines(shown)])


def flatten(config: Config) -> dict[str, Any]:
    """The resolved config by dotted key, sections left out that are not there. Local."""
    flat: dict[str, Any] = {}

    def add(prefix: str, table: dict[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict) and value:
                add(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = value

    add("", config.model_dump(mode="json", exclude_none=True))
    return flat
