"""The points of scaling studies: a config on some ranks, with some values of its keys.

A point is a run directory, OUT/STUDY/POINT, with its resolved config, POINT.toml, and a note,
POINT.json, beside it. Importing this module loads neither MPI nor JAX.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from nodepint_mpi.bench.studies.kept import check_run, make_digest
from nodepint_mpi.bench.studies.rows import read_times
from nodepint_mpi.bench.studies.runs import Run, Series
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.config.plain import plain_config
from nodepint_mpi.config.scaling import GridPoint, Scaling, StudySection
from nodepint_mpi.errors import ConfigError, NodepintError
from nodepint_mpi.names import hint

NEVER = 10**9
"""Steps between checkpoints: only the last one is saved."""


SCALING = Series(
    results="points.jsonl",
    lock=".lock-{ranks}",
    rows_lock=".lock-points",
    resumes=False,  # times of half a run are of no use
    begins="runs",
    changed="its config has changed",
    numbers=read_times,
    noted=("machine", "date", "commit", "busy_share", "load_average"),
)


def plan_points(
    scaling: Scaling,
    source: str,
    out: Path,
    *,
    only: Sequence[str] = (),
    only_ranks: Sequence[int] = (),
) -> list[Run]:
    """All points, study after study; those to be done are `chosen`. Local; writes nothing.

    Args:
        scaling: The studies.
        source: Their file, for messages.
        out: Where the points are.
        only: Names of the studies to do; all if there are none.
        only_ranks: Numbers of ranks to do; all if there are none.

    Raises:
        NodepintError: for names and numbers of ranks that are not there, configs that cannot be,
            and data that are not prepared.
    """
    names = [study.name for study in scaling.study]
    for name in only:
        if name not in names:
            raise ConfigError(f"`--only {name}`: unknown study in {source}{hint(name, names)}")
    points = []
    for study in scaling.study:
        try:
            points += _points_of(study, scaling, out / study.name)
        except NodepintError as error:
            raise type(error)(f"{source}, study {study.name!r}: {error}") from error
    there = sorted({point.n_ranks for point in points})
    for n_ranks in only_ranks:
        if n_ranks not in there:
            raise ConfigError(
                f"`--only-ranks {n_ranks}`: {source} has points of {', '.join(map(str, there))} "
                "ranks."
            )
    chosen = [
        (not only or point.facts["study"] in only)
        and (not only_ranks or point.n_ranks in only_ranks)
        for point in points
    ]
    if not any(chosen):
        raise ConfigError(f"{source} has no point that is both of `--only` and of `--only-ranks`.")
    return [
        point._replace(chosen=is_chosen) for point, is_chosen in zip(points, chosen, strict=True)
    ]


def _points_of(study: StudySection, scaling: Scaling, folder: Path) -> Iterator[Run]:
    """The points of one study, in the order of values and ranks; serial ones where first needed."""
    plain: dict[str, Run] = {}
    grid = study.grid()
    for values in itertools.product(*study.over.values()):
        over = dict(zip(study.over, values, strict=True))
        place = folder / _folder_name(over) if over else folder
        base = {"run.n_steps": scaling.n_steps, "output.log_every": 1, "output.keep": 1}
        base |= {"output.checkpoint_every": NEVER, "output.tensorboard": False}
        settings = base | study.set | over
        for point in grid:
            n_ranks, data_ranks, basis_ranks = point
            grown = _grow(study.grows, scaling.config, settings, point, grid[0])
            dealt = {"run.data_ranks": data_ranks, "run.basis_ranks": basis_ranks}
            config = read_config(scaling.config, settings | grown | dealt)
            check_run(config, n_ranks, f"{scaling.config} for {n_ranks} ranks")
            make = functools.partial(
                _make_point, study, over, study.set | over | grown, scaling.cores, place
            )
            serial = None
            if study.serial:
                alone = _without_sweeps(config)
                digest = make_digest(alone, 1, scaling.cores)
                if digest not in plain:
                    name = "serial" if study.kind == "strong" else f"serial-{n_ranks}"
                    plain[digest] = make(name, alone, 1, is_plain=True)
                    yield plain[digest]
                serial = plain[digest].label
            name = f"ranks-{n_ranks}" + (f"-data-{data_ranks}" if data_ranks > 1 else "")
            name += f"-basis-{basis_ranks}" if basis_ranks > 1 else ""
            yield make(name, config, n_ranks, serial=serial)


def _make_point(
    study: StudySection,
    over: dict[str, Any],
    settings: dict[str, Any],
    n_cores: int,
    place: Path,
    name: str,
    config: Config,
    n_ranks: int,
    *,
    is_plain: bool = False,
    serial: str | None = None,
) -> Run:
    """One point: of a study, with some values of the keys it goes over, on some ranks.

    `settings` are all keys that differ from the studies' config, `over` those that tell curves
    apart. `serial` is the point that takes the same steps by plain diffrax, if there is one; it is
    `is_plain`, has none itself, and may be that of several curves.
    """
    assert config.data is not None  # points without data are refused before
    label, folder = ", ".join([study.name, *describe(over), name]), place / name
    facts = {
        "study": study.name,
        "kind": study.kind,
        "over": over,
        "settings": settings,
        "point": label,
        "is_plain": is_plain,
        "serial": serial,
        "n_ranks": n_ranks,
        "data_ranks": config.run.data_ranks,
        "basis_ranks": config.run.basis_ranks,
        "n_cores": n_cores,
        "n_slices": config.time.n_slices,
        "batch_size": config.data.batch_size,
        "method": config.time.method,
        "run": str(folder),
    }
    return Run(label, folder, config, n_ranks, n_cores, facts, is_plain)


def _without_sweeps(config: Config) -> Config:
    """The plain config, with nothing in it that only sweeps read: many points have the same."""
    plain = plain_config(config)
    unread = {"basis": None, "coarse": None, "tangents": None}
    return plain.model_copy(update={"time": plain.time.model_copy(update=unread)})


def _grow(
    keys: Sequence[str],
    config_file: str,
    settings: Mapping[str, Any],
    now: GridPoint,
    first: GridPoint,
) -> dict[str, Any]:
    """The keys that grow, with their values on the ranks `now`, where `first` has them as they
    are."""
    if not keys:
        return {}
    dumped = read_config(config_file, settings).model_dump()
    grown = {}
    for key in keys:
        value: Any = dumped
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if key.startswith("data."):
            times = Fraction(now.data, first.data)
        else:
            times = Fraction(now.along_time, first.along_time)
        match value:
            case [float() as start, float() as end]:
                grown[key] = [start, start + (end - start) * float(times)]
            case bool() | None | str() | dict() | list():
                raise ConfigError(f"`grows`: `{key}` is {value!r}, which cannot grow.")
            case int() if (value * times).denominator > 1:
                raise ConfigError(
                    f"`grows`: `{key}` = {value} cannot be {times} times as large on {now.ranks} "
                    "ranks: choose numbers of ranks that are multiples of the first."
                )
            case int():
                grown[key] = int(value * times)
            case _:
                grown[key] = value * float(times)
    return grown


def describe(settings: Mapping[str, Any]) -> list[str]:
    """`key = value` for each. Local."""
    return [f"{key} = {json.dumps(value)}" for key, value in settings.items()]


def _folder_name(over: Mapping[str, Any]) -> str:
    text = ",".join(f"{key}={json.dumps(value)}" for key, value in over.items())
    return re.sub(r"[^A-Za-z0-9.,_=+-]+", "_", text)
