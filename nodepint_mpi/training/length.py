"""How long a run is, in words: what its log begins with."""

from nodepint_mpi.training.setup import Experiment


def describe_length(experiment: Experiment) -> list[str]:
    """Rows, batches, epochs and steps, and how often the run is validated. Local."""
    train, config, n_steps = experiment.train, experiment.config, experiment.n_steps
    n_rows, size = train.n_rows, train.section.batch_size or train.n_rows
    batches = "all of them in every step"
    if size < n_rows:
        batches = (
            f"{_count(train.epoch_steps, 'batch', 'batches')} of {size} in an epoch, which leaves "
            f"out {_count(train.n_left_out, 'row')}"
        )
    epochs = f"{n_steps / train.epoch_steps:.4g} epochs"
    lines = [f"training on {_count(n_rows, 'row')}: {batches}; {_count(n_steps, 'step')}, {epochs}"]
    if experiment.valid is not None:
        every = config.run.validate_every or config.output.log_every
        where = "held out of the training split"
        if train.section.valid_split is not None:
            where = f"of the split {train.section.valid_split!r}"
        rows = _count(experiment.valid.n_rows, "row")
        lines.append(f"validating on {rows} {where}, every {_count(every, 'step')}")
    return lines


def _count(number: int, one: str, many: str | None = None) -> str:
    """Such as "1 row" and "2 rows"."""
    return f"{number} {one}" if number == 1 else f"{number} {many or f'{one}s'}"
