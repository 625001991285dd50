"""`nodepint plan` and `train --auto`: advice from made-up trials, and advice that is followed."""

import math

import pytest

from nodepint_mpi.bench.planning import advice as planning
from nodepint_mpi.bench.planning.advice import advice_as_data, advise, format_advice, settings_of
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.trials import Trial, Trials, variants
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.training.info import make_plan
from tests.cli.small_case import alone, has_one_message, messages, read_json, sets

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(300)]

N_SLICES, N_SAMPLES = 7, 4  # of the tiny case
FREE = Network(0.0, math.inf)


def trial(name, seconds, settings=(), n_ranks=1, *, fine=0.45, other=0.01, counts=1, network=None):
    """A trial of ours whose steps are fine solves, their pull-backs, and what all ranks do."""
    rest = 1 - 2 * fine - other
    share = {"fine_forward": fine, "fine_adjoint": fine, "coarse": rest, "other": other}
    share |= {"tangents": 0.0, "send": 0.0, "receive": 0.0, "reduce": 0.0, "wait": 0.0}
    per_rank = counts * N_SLICES / n_ranks
    done = {name: per_rank for name in ("fine", "fine_pulled", "coarse", "coarse_pulled")}
    return Trial(
        name, tuple(settings), seconds, 0.01, (1.0, 1.0), 0, [share] * n_ranks,
        {name: {"ranks": [value] * n_ranks} for name, value in done.items()}, 500_000_000,
        network,
    )  # fmt: skip


def plain(seconds):
    made = trial("plain diffrax, one core", seconds)
    return made._replace(shares=None, counts=None)


@pytest.fixture
def advised(case, monkeypatch):
    """`advised(trials, ...)`: what is advised on the tiny case if these are the trials."""

    def made(trials, **options):
        monkeypatch.setattr(planning, "make_trials", lambda *a, **k: trials)
        config = read_config(case.config, ["time.tracking={}"])
        return advise(config, **options)

    return made


def test_ranks_are_taken_where_a_step_is_then_faster(advised):
    found = advised(Trials((plain(1.0),), (trial("ours", 0.9),)), ranks=[1, 7], network=FREE)
    best = found.choices[7]
    assert found.taken is best and best.layout == (7, 1, 1) and not best.measured
    # Of 0.9 s fine solves take 0.81, a slice for each rank; coarse steps and the rest remain.
    assert best.step_s == pytest.approx(0.9 * (0.9 / 7 + 0.09 + 0.01))
    assert found.choices[1].step_s == 0.9 and found.choices[1].measured
    assert settings_of(found) == (7, ["run.data_ranks=1", "run.basis_ranks=1"])
    data, said = advice_as_data(found), format_advice(found)
    assert data["n_ranks"] == 7 and not data["serial"] and data["network"]["from"] == "given"
    assert data["choices"][1]["efficiency"] == pytest.approx(0.9 / (7 * best.step_s))
    assert found.reason.startswith("Use 7 ranks (7 along time x 1 along samples), 7 slices by par")
    assert "the walk from slice to slice by coarse steps: 1.65 times as fast without" in said


def test_plain_diffrax_is_taken_where_it_is_faster_and_the_reason_is_told(advised):
    slow = trial("ours", 2.0, fine=0.2, other=0.5)
    found = advised(Trials((plain(1.0),), (slow,)), ranks=[1, 2], network=FREE)
    assert found.taken is None and settings_of(found) == (0, [])
    assert advice_as_data(found)["serial"]
    assert found.reason.startswith(
        "Train serially, by plain diffrax, one core: the best parallel run"
    )
    assert "of a step goes into what all ranks do alike" in found.reason
    sweeping = trial("ours", 4.0, fine=0.49, counts=3)._replace(sweeps=(3.0, 3.0))
    found = advised(Trials((plain(1.0),), (sweeping,)), ranks=[2], network=FREE)
    assert "a step does 3.0 times the fine solves of a serial one" in found.reason
    near = advised(Trials((plain(1.0),), (trial("ours", 1.02),)), ranks=[1], network=FREE)
    assert near.taken is None and "too close to call" in near.reason


def test_the_error_is_the_largest_of_what_is_known(advised):
    pair = trial("two", 0.36, n_ranks=2, network=(1e-6, 1e9))
    found = advised(Trials((plain(1.0),), (trial("ours", 0.7),), pair), ranks=[2])
    # The first rank has 4 of 7 slices, and is never held up by the other: 4/7 of a third of the
    # coarse steps, of the fine solves, of the rest of the coarse steps, of the pull-backs.
    model_s = 0.7 * (4 / 7 * (0.09 + 0.9) + 0.01)
    assert found.model_errors == {(2, 1, 1): pytest.approx(model_s / 0.36 - 1, abs=1e-3)}
    assert found.error == found.model_errors[2, 1, 1] and found.network_from == "measured here"
    best = found.choices[2]
    assert best.measured and best.step_s == 0.36
    assert "The model's error on what was measured: +11.9% on 2 x 1." in format_advice(found)


def test_samples_are_shared_where_that_is_faster(advised):
    # Each of two ranks has all slices with half of the samples, each of four with a quarter.
    half = trial("half", 0.5, n_ranks=2, fine=0.2, counts=2)
    trials = Trials((plain(2.0),), (trial("ours", 1.0, fine=0.2),), None, half)
    found = advised(trials, ranks=[2, 4])
    assert found.choices[2].layout == (1, 2, 1) and found.choices[4].layout == (1, 4, 1)
    assert found.choices[2].measured and found.choices[2].step_s == 0.5
    assert found.choices[4].step_s == pytest.approx(0.25, rel=1e-3)
    assert settings_of(found) == (4, ["run.data_ranks=4", "run.basis_ranks=1"])


def test_tangents_are_shared_where_that_is_faster(case, monkeypatch):
    """Two directions: a state's pass and theirs are 3 of tangents on one rank, 2 each on two."""
    share = {name: 0.0 for name in ("coarse", "send", "receive", "reduce", "wait")}
    share |= {"fine_forward": 0.2, "fine_adjoint": 0.2, "tangents": 0.6, "other": 0.0}
    tried = trial("ours", 1.0)._replace(shares=[share])
    monkeypatch.setattr(planning, "make_trials", lambda *a, **k: Trials((plain(9.0),), (tried,)))
    basis = 'time.basis={kind="identity",recycle=false}'
    edges = f"time.edges={[n / 2 for n in range(N_SLICES + 1)]}"  # which stay as they are
    settings = 'time.method="tangent"', basis, edges, "run.basis_ranks=2"
    config = read_config(case.config, settings)
    found = advise(config, ranks=[2, 7, 14], basis_ranks=[1, 2, 3], network=FREE)
    assert found.choices[7].layout == (7, 1, 1)
    best = found.choices[14]
    assert best.layout == (7, 1, 2) and found.taken is best
    assert best.step_s == pytest.approx((0.4 + 0.6 * 2 / 3) / 7)
    assert settings_of(found) == (14, ["run.data_ranks=1", "run.basis_ranks=2"])
    assert "14 ranks (7 along time x 1 along samples x 2 along the basis)" in found.reason
    assert "| 7 x 1 x 2 |" in format_advice(found)
    assert advice_as_data(found)["choices"][2]["n_basis"] == 2


def test_more_ranks_than_slices_get_slices_of_their_own(advised):
    found = advised(
        Trials((plain(1.0),), (trial("ours", 0.9, fine=0.49),)), ranks=[14],
        network=FREE,
    )  # fmt: skip
    best = found.choices[14]
    assert best.way.n_slices == 14 and not best.way.slices_tried
    assert settings_of(found)[1][:2] == ["time.n_slices=14", "time.fine.n_steps=2"]
    assert "14 (not tried)" in format_advice(found)
    with pytest.raises(ConfigError, match="No way was found to put 7 slices on 29 ranks"):
        advised(Trials((), (trial("ours", 0.9),)), ranks=[29], network=FREE)


def test_a_config_whose_paths_are_fresh_is_told_what_that_costs(monkeypatch):
    config = read_config("docs/examples/latent_sde.py")  # 10 slices of 10 fine and 2 coarse steps
    assert variants(config) == [("5 slices", ["time.n_slices=5", "time.fine.n_steps=20"])]
    ours = trial("ours", 2.5)._replace(sweeps=(3.0, 1.0))
    monkeypatch.setattr(planning, "make_trials", lambda *a, **k: Trials((plain(1.0),), (ours,)))
    found = advise(config, ranks=[2, 16], network=FREE)
    # 20 slices would have 5 fine steps, whose increments do not make two coarse ones.
    assert settings_of(found._replace(taken=found.choices[16]))[1][:2] == [
        "time.n_slices=25", "time.fine.n_steps=4",
    ]  # fmt: skip
    assert found.choices[2].step_s > 1.0
    assert "every step is solved anew: 3 + 1 sweeps" in found.reason
    assert "(here 2) serial training" in make_plan(config, 2)["fresh_paths"]
    assert "fresh_paths" not in make_plan(read_config("docs/examples/ornstein_uhlenbeck.py"), 2)


def test_variants_have_as_many_fine_steps(case):
    config = read_config(case.config, ["time.fine.n_steps=6"])
    assert variants(config) == [
        ("3 slices", ["time.n_slices=3", "time.fine.n_steps=14"]),
        ("14 slices", ["time.n_slices=14", "time.fine.n_steps=3"]),
    ]
    basis = 'time.basis={kind="jumps", rank=2, new=1}'
    config = read_config(case.config, ["time.fine.n_steps=5", basis])
    assert variants(config) == [("tangent", ['time.method="tangent"'])]


def test_auto_follows_the_plan(case, tmp_path):
    done = alone(
        "train", case.config, "--auto", "--out", "run", "--json", "r.json",
        *sets(time__tracking={}, time__fine__n_steps=5, output__tensorboard=False), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "r.json")
    assert result["status"] == "finished" and result["step"] == 20
    serially = "Train serially" in done.stdout
    assert serially or "Use " in done.stdout
    assert ("--plain" in done.stderr) == serially
    taken = 1 if serially else int(done.stdout.split("Use ")[1].split()[0])
    assert result["n_ranks"] == taken
    assert "| nodepint_mpi, 1 rank |" in done.stdout
    # On one core there are no two ranks to try.
    assert ("The model's error on" in done.stdout) == ("2 cores |" in done.stdout)


def test_what_cannot_be_planned_is_refused(case, nodepint, refusals, tmp_path):
    nodepint(2, "plan", case.config, code=2)
    plan = ["plan", str(case.config)]
    bad = [
        ([*plan, *sets(time__method="serial")], "there is nothing to plan"),
        ([*plan, "--network", "1,x"], "expected latency in seconds and bandwidth"),
        ([*plan, "--ranks", "0"], "expected comma-separated integers such as 1,2, got '0'"),
        (["train", str(case.config), "--auto", "--plain"], "`--auto` chooses how to start"),
    ]
    said = refusals(tmp_path, [words for words, _ in bad])
    for one, (_, message) in zip(said, bad, strict=True):
        assert has_one_message(one) and message in messages(one)[0], one
