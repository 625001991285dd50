"""`nodepint control`: configs, runs, checkpoints, and the page about them."""

import json

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.build.trained import load_model
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError, DataError, NodepintError
from nodepint_mpi.io.directory import config_text
from nodepint_mpi.optimal_control.run import steer_run
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.training.callbacks import Callback
from nodepint_mpi.training.train import train

pytestmark = pytest.mark.timeout_s(240)
ALONE = pytest.mark.mpi(max_size=1)
EXACT = 70.4432414804
"""The least energy that takes x' = y + c, y' = x from (0.5, 0.5) to (1, -1)."""

TEXT = """
run = { name = "energy", precision = "float64", n_steps = 300 }
problem = { field = "minimum_energy" }
control = { n_nodes = 33, cost = { target = [1.0, -1.0], energy = 2.0, reach = true } }
[time]
horizon = [0.0, 1.0]
n_slices = 4
fine = { solver = "rk4", n_steps = 8 }
coarse = { solver = "heun", n_steps = 1 }
stopping = { tol = 1e-11 }
"""
# Without the constraint, by a few steps of Adam.
ADAM = {
    "control.optim": {"learning_rate": 0.05},
    "control.n_nodes": 5,
    "control.cost": {"target": [1.0, -1.0], "energy": 2.0, "terminal": 100.0},
    "run.n_steps": 12,
    "output.checkpoint_every": 4,
}
LEARNING = """
run = { name = "learned", precision = "float64", n_steps = 6 }
network = { name = "mlp", width = 4, depth = 1 }
problem = { field = "learned", initial = [1.0, 0.5] }
optim = { learning_rate = 0.01 }
control = { kind = "constant", matrix = [[1.0], [0.0]], cost = { terminal = 1.0, energy = 0.1 } }
[time]
horizon = [0.0, 2.0]
n_slices = 4
fine = { solver = "heun", n_steps = 4 }
coarse = { solver = "euler", n_steps = 1 }
"""


class StopAt(Callback):
    """Asks a run to stop when so many iterations are recorded."""

    def __init__(self, step):
        self.step = step

    def on_record(self, numbers):
        return numbers["step"] >= self.step


def steer(comms, folder, changes=None, *, text=TEXT, stop_at=None, resume=None):
    callbacks = () if stop_at is None else (StopAt(stop_at),)
    config = parse_config(text, changes or {})
    return steer_run(config, folder, comms, StopFlag(), resume=resume, callbacks=callbacks)


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read(folder):
    with np.load(folder / "trajectory.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.mpi(max_size=2)
@pytest.mark.standard_promotion
def test_a_run_finds_the_least_energy_and_leaves_it_in_files(comms, shared_tmp_path):
    result = steer(comms, shared_tmp_path / "run")
    assert result["cost"] == pytest.approx(EXACT, rel=1e-4)  # 33 nodes, linear in between
    assert result["gap"] < 1e-6
    assert result["status"] == "finished"
    run = read(shared_tmp_path / "run")
    assert run["states"].shape == (33, 2) and run["controls"].shape == (33, 1)
    np.testing.assert_allclose(run["states"][-1], [1.0, -1.0], atol=1e-6)
    # Of the closed form, c = -a cosh(1 - t) - b sinh(1 - t): c'' = c.
    c, step = run["controls"][:, 0], 1 / 32
    curvature = (c[2:] - 2 * c[1:-1] + c[:-2]) / step**2
    assert np.max(np.abs(curvature - c[1:-1])[1:-1]) < 0.1 * np.max(np.abs(c))
    rows = records(shared_tmp_path / "run")
    assert rows[-1]["cost"] == pytest.approx(result["cost"], rel=1e-6)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert json.loads((shared_tmp_path / "run" / "DONE").read_text())["step"] == len(rows)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("tracked", [pytest.param(False, marks=ALONE), True])
def test_a_stopped_run_goes_on_to_the_same_bits(comms, shared_tmp_path, tracked):
    changes = ADAM | ({"time.tracking": {}} if tracked else {})
    whole = steer(comms, shared_tmp_path / "whole", changes)
    stopped = steer(comms, shared_tmp_path / "run", changes, stop_at=6)
    assert stopped["status"] == "stopped"
    assert 6 <= stopped["step"] < 12
    assert not (shared_tmp_path / "run" / "DONE").exists()
    result = steer(comms, shared_tmp_path / "run", changes, resume="auto")
    assert (result["cost"], result["step"]) == (whole["cost"], 12)
    same, other = records(shared_tmp_path / "whole"), records(shared_tmp_path / "run")
    assert [row["cost"] for row in same] == [row["cost"] for row in other]
    assert np.array_equal(
        read(shared_tmp_path / "whole")["controls"], read(shared_tmp_path / "run")["controls"]
    )


@ALONE
@pytest.mark.parametrize("stop_at", [10, 60])
def test_lbfgs_goes_on_in_the_round_of_the_constraint_where_it_stopped(comms, tmp_path, stop_at):
    stopped = steer(comms, tmp_path, stop_at=stop_at)
    assert stopped["status"] == "stopped"
    result = steer(comms, tmp_path, resume="auto")
    assert result["cost"] == pytest.approx(EXACT, rel=1e-4)
    assert result["gap"] < 1e-6
    costs = [row["cost"] for row in records(tmp_path)]
    # It does not begin anew: the first cost after the stop is near the last one before.
    assert abs(costs[stop_at + 1] - costs[stop_at]) < 0.5 * abs(costs[stop_at] - costs[1])
    again = steer(comms, tmp_path, resume="auto")  # there is nothing left to do
    assert again["cost"] == pytest.approx(result["cost"], rel=1e-6)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param("alternating", marks=pytest.mark.mpi(max_size=2)),
        pytest.param("joint", marks=ALONE),
    ],
)
def test_a_field_is_learned_and_steered_and_goes_on_after_a_stop(
    comms, source, shared_tmp_path, schedule
):
    learning = {"schedule": schedule}
    if schedule == "alternating":
        learning |= {"n_steps": 6, "rounds": 2}
    data = {"source": str(source), "input": "u", "target": "u", "times": "t"}
    changes = {"control.learning": learning, "data": data}
    changes["control.optim"] = {"learning_rate": 0.1}
    whole = steer(comms, shared_tmp_path / "whole", changes, text=LEARNING)
    rows = records(shared_tmp_path / "whole")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert whole["cost"] < whole["first_cost"]
    assert sum("cost" in row for row in rows) >= 5
    steer(comms, shared_tmp_path / "run", changes, text=LEARNING, stop_at=4)
    result = steer(comms, shared_tmp_path / "run", changes, text=LEARNING, resume="auto")
    assert result["cost"] == pytest.approx(whole["cost"], rel=1e-9)


@ALONE
@pytest.mark.standard_promotion
def test_the_field_that_a_run_has_learned_is_steered(comms, source, tmp_path):
    """The same as with that field given by hand."""
    lines = LEARNING.splitlines()
    training = [line for line in lines if not line.startswith(("control", "problem"))]
    data = {"source": str(source), "input": "u", "target": "u", "times": "t"}
    changes = {"data": data, "loss": {"name": "mean_squared_error"}}
    train(parse_config("\n".join(training), changes), tmp_path / "trained", comms, StopFlag())
    steering = [line for line in lines if not line.startswith(("network", "optim"))]
    changes = {"problem.field": f"run:{tmp_path / 'trained'}", "run.n_steps": 20}
    result = steer(comms, tmp_path / "run", changes, text="\n".join(steering))
    model = load_model(tmp_path / "trained")
    found = nm.control(
        lambda t, u, c, model: model(t, u, None) + jnp.concatenate([c, jnp.zeros(1)]),
        jnp.array([1.0, 0.5]), np.linspace(0, 2, 5),
        control=nm.PiecewiseConstant([0.0, 0.5, 1.0, 1.5], jnp.zeros((4, 1))),
        cost=nm.quadratic_cost(terminal=1.0, energy=0.1), args=model.processor,
        fine=nm.FixedSteps(diffrax.Heun(), 4), method="serial", steps=20, comm=comms.time,
    )  # fmt: skip
    assert result["cost"] == pytest.approx(found.cost, rel=1e-6)


@pytest.mark.mpi(max_size=2)
def test_paraopt_in_a_config_is_that_of_the_library(comms, shared_tmp_path):
    changes = {
        "problem": {
            "field": "lotka_volterra", "initial": [20.0, 15.0],
            "args": {"alpha": 10.0, "beta": 0.2, "gamma": 10.0, "delta": 0.2},
        },
        "control": {
            "kind": "constant", "matrix": [[1.0, 0.0], [0.0, 1.0]], "method": "paraopt",
            "paraopt": {"ratio": 0.5, "n_steps": 64},
            "cost": {"target": [1.0, 1.0], "terminal": 1.0, "energy": 0.5},
        },
        "time.n_slices": 8,
    }  # fmt: skip
    result = steer(comms, shared_tmp_path / "run", changes)
    assert result["cost"] == pytest.approx(1547.87825, rel=1e-9)  # Gander, Kwok, Salomon (2020)
    rows = records(shared_tmp_path / "run")
    assert sum("update" in row for row in rows) == 8
    run = read(shared_tmp_path / "run")
    assert run["controls"].shape == (512, 2)
    assert run["multipliers"].shape == run["states"].shape == (9, 2)


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem.field": "minimum_energie"}, "did you mean 'minimum_energy'"),
        ({"problem.field": "heat"}, r"'heat'` takes no control: give `control\.matrix`"),
        ({"control.n_controls": 2}, r"`control\.n_controls` is 2, .* takes 1"),
        ({"control.initial": [1.0, 2.0]}, r"`control\.initial` has shape \(2,\)"),
        ({"control.initial": "none.py:start"}, r"`control\.initial`: there is no file none\.py"),
        ({"control": {"kind": "none.py:make", "cost": {"energy": 1.0}}}, r"no file none\.py"),
        ({"control.low": 1.0, "control.high": 0.0}, r"`control\.low` and `control\.high`: .*low <"),
        ({"control.matrix": [[1.0]], "problem.field": "lotka_volterra"}, "1 rows, .* 2 numbers"),
        ({"problem.initial": [1.0]}, "returned 2 numbers for a state of 1"),
        ({"problem.initial": [float("inf"), 0.0]}, "holds inf; expected finite"),
        ({"control.cost.target": [1.0, 2.0, 3.0]}, "`target` of a cost has 3 numbers"),
        ({"control.cost.name": "quadratc"}, "did you mean 'quadratic'"),
        ({"time.n_slices": 1}, "more ranks than slices|slices"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    comms, shared_tmp_path, changes, message
):
    if changes == {"time.n_slices": 1} and comms.control.size == 1:
        pytest.skip("one rank always has a slice")
    with pytest.raises(NodepintError, match=message):
        steer(comms, shared_tmp_path / "run", changes)
    assert not (shared_tmp_path / "run").exists()


@ALONE
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control.kind": "quadratic"}, "choose 'constant', 'linear', 'network'"),
        ({"control.kind": "network"}, "with `kind = 'network'` takes no `n_nodes`"),
        ({"control.width": 8}, "with `kind = 'linear'` takes no `width`"),
        ({"control.low": 0.0}, "needs both bounds"),
        ({"control.matrix": [[1.0], [1.0, 2.0]]}, "all of one length"),
        ({"control.paraopt": {"ratio": 0.5}}, r"takes `\[control\.paraopt\]` with"),
        ({"control.method": "paraopt"}, "needs `kind = 'constant'`"),
        ({"control.cost": {"target": 1.0}}, "needs a weight above zero"),
        ({"control.cost": {"name": "a.py:b", "energy": 1.0}}, "takes `options` and nothing else"),
        ({"control.cost": {"name": "synchrony", "target": 1.0}}, "no target"),
        ({"time.tracking": {}}, r"add `\[control\.optim\]`"),
        ({"time.method": "reduced", "time.basis": {"kind": "pod", "rank": 1}}, "takes `time.met"),
        ({"run.n_epochs": 3}, "takes `run.n_steps`"),
        ({"run.data_ranks": 2}, "needs `run.data_ranks = 1`"),
        (
            {"run.basis_ranks": 2, "time.method": "tangent", "time.basis": {"kind": "identity"}},
            "needs `run.basis_ranks = 1`",
        ),
        ({"optim.learning_rate": 1.0}, r"the optimizer of the control is `\[control\.optim\]`"),
        ({"control.learning": {}}, r"`\[data\]` is what `\[control\.learning\]`"),
        ({"control.optimm": {}}, "did you mean"),
        ({"time.adjoint.sweeps": 3}, "takes `time.adjoint.tol`"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(TEXT, changes)


NOISY = """
import jax.numpy as jnp

class Drift:
    def __call__(self, t, u, c, args):
        return -u + c

    def diffusion(self, t, u, args):
        return args["sigma"] * jnp.ones_like(u)

field = Drift()
"""


@pytest.mark.mpi(max_size=2)
def test_the_mean_cost_of_paths_is_that_of_the_closed_form(comms, shared_tmp_path):
    """The noise is additive: its share of E[x^2] does not depend on an open-loop control."""
    if comms.control.rank == 0:
        (shared_tmp_path / "noisy.py").write_text(NOISY)
    comms.control.Barrier()
    noise = {"n_paths": 64, "additive": True}
    changes = {
        "problem": {
            "field": f"{shared_tmp_path}/noisy.py:field", "initial": [1.0], "args": {"sigma": 0.5},
        },
        "control": {"n_controls": 1, "n_nodes": 5, "cost": {"terminal": 1.0, "energy": 0.5}},
        "noise": noise, "time.fine": {"solver": "euler", "n_steps": 16},
        "time.coarse": {"solver": "euler", "n_steps": 1}, "run.n_steps": 30,
    }  # fmt: skip
    result = steer(comms, shared_tmp_path / "run", changes)
    run = read(shared_tmp_path / "run")
    assert run["states"].shape[1:] == (64, 1)
    # Each path as it would be without noise, apart: the control changes the mean alone.
    ends = run["states"][-1, :, 0]
    still = steer(
        comms, shared_tmp_path / "still",
        changes | {"problem.args": {"sigma": 0.0}, "noise": {"n_paths": 2, "additive": True}},
    )  # fmt: skip
    quiet = read(shared_tmp_path / "still")["states"][-1, 0, 0]
    away = ends - quiet
    assert 0.1 < np.std(away) < 0.6  # sigma sqrt((1 - exp(-2)) / 2) = 0.33
    # With the mean m of the noise at the end, min (a + m)^2 / 2 + energy is (1 + m / x0)^2 of that
    # without: it is linear-quadratic, and x(1) = exp(-1) x0 without a control.
    spread = 0.5 * np.mean((away - np.mean(away)) ** 2)
    lowest = still["cost"] * ((np.exp(-1) + _mean_of_noise(ends, run)) / np.exp(-1)) ** 2
    assert result["cost"] == pytest.approx(lowest + spread, rel=0.05)


def _mean_of_noise(ends, run):
    """The mean end of the paths less what the control makes of 1 by x' = -x + c."""
    times, controls = run["control_times"], run["controls"][:, 0, 0]
    made = np.exp(-1) + np.trapezoid(np.exp(times - 1) * controls, times)
    return np.mean(ends) - made


@ALONE
def test_the_resolved_config_reads_back_as_the_same_experiment():
    for text, changes in ((TEXT, {}), (TEXT, ADAM), (TEXT, {"control.kind": "constant"})):
        config = parse_config(text, changes)
        again = parse_config(config_text(config))
        assert again == config
        assert again.fingerprint() == config.fingerprint()
    other = parse_config(TEXT, {"problem.initial": [0.5, 0.6]})
    assert other.fingerprint() != parse_config(TEXT).fingerprint()


@ALONE
@pytest.mark.standard_promotion
def test_the_page_shows_cost_states_controls_and_multipliers(comms, tmp_path):
    from nodepint_mpi.report.sections import make_report

    steer(comms, tmp_path, ADAM)
    found = make_report(tmp_path, None)
    assert "Cost of every iteration" in found["sections"]
    names = {file.rpartition("/")[2] for file in found["figures"]}
    assert {"cost.png", "states.png", "controls.png", "multipliers.png"} <= names
    path = tmp_path / "trajectory.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        make_report(tmp_path, None)


@ALONE
@pytest.mark.standard_promotion
def test_an_iteration_that_explodes_ends_the_run_with_the_last_good_control(comms, tmp_path):
    changes = ADAM | {"control.optim": {"name": "sgd", "learning_rate": 1e200}}
    with pytest.raises(NodepintError, match=r"not finite.*newest checkpoint"):
        steer(comms, tmp_path, changes)
    assert list((tmp_path / "ckpt").iterdir())
    assert not (tmp_path / "DONE").exists()
