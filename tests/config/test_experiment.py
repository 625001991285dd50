"""Configs: what is accepted, what is refused, and in which words."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from nodepint_mpi.config.experiment import Config, parse_config, read_config
from nodepint_mpi.config.run import RunSection
from nodepint_mpi.config.time import (
    BasisSection,
    PararealSection,
    PlainSection,
    ReducedSection,
    RelaxationSection,
    StepsSection,
    TangentSection,
    TimeSection,
)
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.io.directory import config_text

pytestmark = pytest.mark.mpi(max_size=1)  # knows no ranks

IDENTITY = BasisSection(kind="identity")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
TEXT = """
[run]
name = "a"
[network]
name = "mlp"
[time]
horizon = [0, 1]
n_slices = 4
fine = { solver = "rk4", n_steps = 4 }
coarse = { solver = "euler", n_steps = 1 }
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_the_repository_survives_being_written_out(path):
    config = read_config(path)
    again = parse_config(config_text(config))
    assert again == config and again.fingerprint() == config.fingerprint()
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize(
    "override, message",
    [
        ("time.n_slice=3", r"unknown key `time.n_slice`; did you mean `time.n_slices`\?"),
        ("tme.x=1", r"unknown key `tme`; did you mean `time`\?"),
        ("network.widht=3", r"did you mean `network.width`\?"),
        ("time.learning_rate=1", r"did you mean `optim.learning_rate`\?"),
        ("run.seed=99999999999999999999", "`run.seed` is the integer 99999999999999999999"),
        ("time.n_slices=four", '`time.n_slices` is the string "four"; it should be'),
        ("time.n_slices=2.5", "is the number 2.5"),
        ("run.seed=true", "is the boolean true"),
        ("time=3", r"must be a section `\[time\]`"),
        ("time.method=paraeal", "unknown `time.method` 'paraeal'; did you mean 'parareal'"),
        ("time.method=euler", "known names are 'parareal', 'tangent', 'reduced', 'picard', 'ser"),
        ("time.method=3", "`time.method` is the integer 3; it should be a valid string"),
        ("time.method=tangent", r"`method = 'tangent'` needs a section `\[time.basis\]`"),
        ("time={method='serial', fine=3}", "`time.n_slices` is missing"),
        ("time.coarse={n_steps=1}", r"`\[time.coarse\]` needs either `solver` or `tableau`"),
        (
            "time.coarse.n_step=1",
            "unknown key `time.coarse.n_step`; did you mean `time.coarse.n_st",
        ),
        ("time.stopping.rule=sweeps", "takes `sweeps` and nothing else"),
        ("time.fine.rtol=1e-3", "either `n_steps`, or both"),
        ("time.fine.tableau={a=[], b=[1], order=1}", "either `solver` or `tableau`"),
        ("time.fine.n_stages=4", "`n_stages` with `solver = 'chebyshev'`"),
        ("time.coarse.solver=chebyshev", "`n_stages` with `solver = 'chebyshev'`"),
        ("time.horizon=[1, 0]", "must run forward"),
        ("time.edges=[0, 1]", "n_slices \\+ 1 times"),
        ("run.n_steps=0", "greater than 0"),
        ("time.tracking.bound=0", "greater than 0"),
        ("time.tracking.max_sweep=2", "did you mean `time.tracking.max_sweeps`"),
        ("time.warm_start=true", "unknown key `time.warm_start`"),
        (
            "time.basis={kind='jumps', rank=2, recurrence='tree'}",
            "'auto', 'slices', 'blocks' or 'scan'",
        ),
        ("run.basis_ranks=2", r"shares tangents, and `time.method = 'parareal'` has none"),
        ("time.levels={coarsning=4}", "did you mean `time.levels.coarsening`"),
        ("time.levels={coarsening=1}", "greater than or equal to 2"),
        ("time.levels={number=3}", "1, 2 or 'auto'"),
        ("time.relaxation={steps=3}", "it needs `data.times`"),
        ("time.relaxation={steps=3, start=1.0}", "less than 1"),
        ("time.relaxation={steps=3, end=1.5}", "less than or equal to 1"),
        ("network={name='conv', layers=3}", "horizon. must run from 0 to it"),
        ("optim.learning_rate=nan", "finite"),
        ("optim.schedule=cosine", "needs `decay_steps`"),
        ("run.name=a/b", "run.name"),
        ("run", "not of the form"),
        ("run.name.x=1", "is a value, not a section"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_key(override, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(TEXT, [override])


@pytest.mark.parametrize(
    "options, weights",
    [({}, [0.0, 0.25, 1.0, 1.0]), ({"start": 0.5, "end": 0.0}, [0.5, 0.375, 0, 0])],
)
def test_the_weight_of_continuity_goes_from_start_to_end_and_stays(options, weights):
    section = RelaxationSection(steps=4, **options)
    assert [section.weight_at(step) for step in (0, 1, 4, 1000)] == weights


def test_the_section_of_a_method_has_what_the_method_needs():
    time = parse_config(TEXT).time
    assert isinstance(time, PararealSection) and time.coarse.solver == "euler"
    reduced = ["time.method='reduced'", "time.basis={kind='pod', rank=2}"]
    time = parse_config(TEXT, reduced).time
    assert isinstance(time, ReducedSection) and time.basis.rank == 2
    with pytest.raises(ConfigError, match="holds states"):
        parse_config(TEXT, [reduced[0], "time.basis={kind='jumps', rank=2}"])
    serial = parse_config(TEXT, ["time.method='serial'"]).time
    assert isinstance(serial, PlainSection) and serial.coarse is not None  # passed over
    own = parse_config(TEXT, ["time.method='mine.py:make'"]).time
    assert type(own) is TimeSection


def test_a_config_takes_a_general_section_as_that_of_its_method():
    steps = StepsSection(solver="rk4", n_steps=2)
    given = {"horizon": [0.0, 1.0], "n_slices": 2, "fine": steps}
    run = RunSection(name="a")
    config = Config(run=run, time=TimeSection(**given, method="tangent", basis=IDENTITY))
    assert config.time == TangentSection(**given, basis=IDENTITY)
    with pytest.raises(ValidationError, match="coarse\n.*Field required"):
        Config(run=run, time=TimeSection(**given))


def test_a_key_set_twice_is_refused():
    with pytest.raises(ConfigError, match="given twice"):
        parse_config(TEXT, ["run.seed=1", "run.seed=2"])


def test_a_file_that_is_no_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read"):
        read_config(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_config(tmp_path / "bad.toml")


@pytest.mark.parametrize("override", ["run.n_steps=7", "output.keep=9", "run.name=b"])
def test_length_and_output_do_not_make_another_experiment(override):
    assert parse_config(TEXT, [override]).fingerprint() == parse_config(TEXT).fingerprint()


def test_ranks_that_share_tangents_are_not_part_of_the_experiment():
    tangent = "time.method=tangent", "time.basis={kind='pod', rank=2}"
    alone, shared = (parse_config(TEXT, [*tangent, f"run.basis_ranks={n}"]) for n in (1, 2))
    assert alone.fingerprint() == shared.fingerprint()
    with pytest.raises(ConfigError, match="`run.basis_ranks = 3` are more than the 2 directions"):
        parse_config(TEXT, [*tangent, "run.basis_ranks=3"])


def test_how_the_coarse_problem_is_solved_may_change_between_starts():
    ways = ["{kind='jumps', rank=2}", "{kind='jumps', rank=2, recurrence='scan'}"]
    slices, scan = (parse_config(TEXT, [f"time.basis={way}"]) for way in ways)
    assert slices != scan and slices.fingerprint() == scan.fingerprint()


@pytest.mark.parametrize(
    "override",
    ["run.seed=7", "network.width=9", "time.n_slices=5", "time.levels={number=2}"],
)
def test_numbers_that_matter_make_another_experiment(override):
    assert parse_config(TEXT, [override]).fingerprint() != parse_config(TEXT).fingerprint()


def test_a_length_that_is_set_replaces_the_one_of_the_file():
    text = 'run = { name = "a", n_epochs = 3 }\ntime = { horizon = [0.0, 1.0], n_slices = 2, '
    text += 'fine = { solver = "rk4", n_steps = 1 }, method = "serial" }'
    assert parse_config(text).run.n_steps is None
    run = parse_config(text, ["run.n_steps=7"]).run
    assert (run.n_steps, run.n_epochs) == (7, None)
    with pytest.raises(ConfigError, match="not both"):
        parse_config(text, ["run.n_steps=7", "run.n_epochs=2"])
