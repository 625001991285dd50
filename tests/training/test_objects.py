"""Experiments without TOML: objects in the place of names, callbacks, and predictions."""

import re
import sys
import types
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nodepint_mpi as nm
from nodepint_mpi.errors import ConfigError, DataError, NodepintError

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
N_STEPS = 3
FAILS = pytest.mark.mpi(max_size=1)


class Field(eqx.Module):
    """A linear field, whose solution is known."""

    matrix: jax.Array

    def __call__(self, t, u, args):
        return self.matrix @ u


def squared(predictions, targets):
    error = (predictions - targets) ** 2
    return nm.Mean(jnp.sum(error), jnp.asarray(error.size, error.dtype))


def largest(predictions, targets):
    error = jnp.max(jnp.abs(predictions - targets), axis=tuple(range(2, targets.ndim)))
    return nm.Mean(jnp.sum(error), jnp.asarray(error.size, error.dtype))


def small_weights(model):
    return jnp.sum(model.processor.matrix**2)


def columns(n_rows: int = 4):
    t = np.linspace(0.0, 2.0, 9)
    start = np.random.default_rng(0).uniform(0.5, 1.5, (n_rows, 2))
    z = (start[:, :1] + 1j * start[:, 1:]) * np.exp((-0.2 + 2.0j) * t)
    return {"t": np.broadcast_to(t, (n_rows, 9)), "u": np.stack([z.real, z.imag], axis=-1)}


def config(n_steps: int = N_STEPS, **sections):
    steps = nm.StepsSection(solver="rk4", n_steps=4)
    return nm.Config(
        run=nm.RunSection(name="objects", precision="float64", n_steps=n_steps),
        time=nm.TimeSection(
            horizon=[0.0, 2.0],
            n_slices=5,
            fine=steps,
            coarse=nm.StepsSection(solver="euler", n_steps=2),
            stopping=nm.StoppingSection(tol=1e-12),
            adjoint=nm.AdjointSection(tol=1e-12),
        ),
        data=nm.DataSection(input="u", target="u", times="t"),
        output=nm.OutputSection(log_every=1, **sections),
    )


def experiment(**changes):
    objects = {
        "model": Field(jnp.array([[-0.1, -1.0], [1.0, -0.1]])),
        "data": {"train": columns(), "test": columns()},
        "loss": squared,
        "metrics": [largest],
        "terms": [nm.Term(small_weights, 0.01)],
        "optimizer": optax.sgd(0.05, momentum=0.9),
    }
    return {name: one for name, one in (objects | changes).items() if one is not None}


@pytest.fixture
def here(shared_tmp_path, monkeypatch):
    monkeypatch.chdir(shared_tmp_path)
    return shared_tmp_path


def by_hand(n_steps: int):
    """The same training by diffrax and optax alone: the last loss, and the matrix."""
    data = columns()
    edges = np.linspace(0.0, 2.0, 6)
    grid = np.unique(np.linspace(edges[:-1], edges[1:], 5))

    def solve(matrix, start):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, u, args: matrix @ u), nm.RK4(), 0.0, 2.0, None, start,
            stepsize_controller=diffrax.StepTo(jnp.asarray(grid)), max_steps=len(grid),
            saveat=diffrax.SaveAt(ts=jnp.asarray(data["t"][0, 1:])),
        ).ys  # fmt: skip

    def loss(matrix):
        found = jax.vmap(lambda start: solve(matrix, start))(jnp.asarray(data["u"][:, 0]))
        return jnp.mean((jnp.asarray(found) - data["u"][:, 1:]) ** 2) + 0.01 * jnp.sum(matrix**2)

    optimizer, matrix = optax.sgd(0.05, momentum=0.9), experiment()["model"].matrix
    state, step = optimizer.init(matrix), jax.jit(jax.value_and_grad(loss))
    value = np.nan
    for _ in range(n_steps):
        value, gradient = step(matrix)
        updates, state = optimizer.update(gradient, state)
        matrix = optax.apply_updates(matrix, updates)
    return float(value), np.asarray(matrix)


@pytest.mark.mpi(2, 2)
def test_objects_train_as_diffrax_and_optax_do_and_come_home(here, on_one_rank):
    result = nm.train(config(), out=here / "run", **experiment())
    loss, matrix = on_one_rank(lambda: by_hand(N_STEPS))
    assert result["train_loss"] == pytest.approx(loss, rel=1e-8)
    assert {"test_loss", "test_largest"} <= set(result)
    model = nm.load_model(here / "run", model=experiment()["model"])
    np.testing.assert_allclose(model.processor.matrix, matrix, rtol=1e-8)
    found = nm.predict(
        here / "run", {"t": columns()["t"], "u": columns()["u"][:, :1]}, model=model.processor
    )
    wanted = np.stack(
        [columns()["u"][:, 0] @ jax.scipy.linalg.expm(t * matrix).T for t in found.times], 1
    )
    np.testing.assert_allclose(found.values, wanted, atol=2e-4)  # of four steps a slice
    np.testing.assert_array_equal(found.values[:, 0], columns()["u"][:, 0])
    error = np.mean(np.max(np.abs(found.values - columns()["u"])[:, 1:], axis=-1))
    assert error == pytest.approx(result["test_largest"], rel=1e-10)


@pytest.mark.mpi(max_size=1)
def test_a_resumed_run_equals_one_that_was_not_stopped(here):
    whole = nm.train(config(2 * N_STEPS), out=here / "whole", **experiment())
    nm.train(config(), out=here / "halves", **experiment())
    halves = nm.train(config(2 * N_STEPS), out=here / "halves", resume="auto", **experiment())
    assert halves["train_loss"] == whole["train_loss"]
    assert halves["test_loss"] == whole["test_loss"]
    with pytest.raises(ConfigError, match="pass it again"):
        nm.train(here / "whole" / "config.toml", out=here / "whole", resume="auto")


class Log(nm.Callback):
    """Keeps what it is told, and stops the run after a step."""

    def __init__(self, stop_at=None):
        self.heard, self.stop_at = [], stop_at

    def on_start(self, config, run_directory, resumed):
        self.heard.append(("start", config.run.name, resumed))

    def on_record(self, numbers):
        self.heard.append((numbers["step"], numbers["loss"]))
        return numbers["step"] == self.stop_at

    def on_end(self, result):
        self.heard.append(("end", None if result is None else result["status"]))


@pytest.mark.mpi(2, 2)
def test_callbacks_hear_of_all_on_the_first_rank_and_may_stop(here, comms):
    log = Log()
    result = nm.train(config(), out=here / "run", callbacks=[log], **experiment())
    if comms.control.rank > 0:
        assert log.heard == []
    else:
        assert log.heard[0] == ("start", "objects", False)
        assert [step for step, _ in log.heard[1:-1]] == [1, 2, 3]
        assert log.heard[-2][1] == result["train_loss"]
        assert log.heard[-1] == ("end", "finished")
    log = Log(stop_at=1)
    result = nm.train(config(50), out=here / "other", callbacks=[log], **experiment())
    assert (result["status"], result["step"]) == ("stopped", 2)
    again = Log()
    result = nm.train(
        config(3), out=here / "other", resume="auto", callbacks=[again], **experiment()
    )
    assert (result["status"], result["step"]) == ("finished", 3)
    if comms.control.rank == 0:
        assert again.heard[0] == ("start", "objects", True)
        assert [step for step, _ in again.heard[1:-1]] == [3]


@FAILS
def test_a_callback_that_fails_ends_the_run_in_words(here):
    class Broken(Log):
        def on_record(self, numbers):
            raise ValueError("no room")

    broken = Broken()
    with pytest.raises(NodepintError, match=r"Broken\.on_record failed: ValueError: no room"):
        nm.train(config(), out=here / "run", callbacks=[broken], **experiment())
    assert broken.heard[-1] == ("end", None)


@FAILS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "`data.source` is missing"),
        ({"loss": "mse"}, "expected a function"),
        ({"optimizer": "adam"}, "optax"),
        ({"metrics": [largest, largest]}, "different names"),
        ({"terms": [small_weights]}, "Term"),
        ({"model": 3}, "expected a function"),
        ({"optimiser": optax.adam(0.1)}, "did you mean 'optimizer'"),
        ({"data": {"train": {"u": columns()["u"]}, "test": columns()}}, "unknown column 't'|'t'"),
        ({"data": {"train": 3}}, "dict of arrays"),
    ],
)
def test_what_does_not_fit_is_said(here, changes, message):
    with pytest.raises(NodepintError, match=message):
        nm.train(config(), out=here / "run", **experiment(**changes))
    assert not (here / "run").exists()


@FAILS
def test_nothing_is_given_twice(here):
    both = config().model_copy(update={"optim": nm.OptimSection(learning_rate=0.1)})
    with pytest.raises(ConfigError, match=r"`optimizer` is given, and so is `\[optim\]`"):
        nm.train(both, out=here / "run", **experiment())
    with pytest.raises(ConfigError, match="unknown|Unknown"):
        nm.train(config(callbacks=["wandbb"]), out=here / "run", **experiment())


@FAILS
def test_predictions_of_columns_that_do_not_fit(here):
    nm.train(config(), out=here / "run", **experiment())
    model, good = experiment()["model"], columns()
    for given, message in (
        ({"u": good["u"]}, "lack 't'"),
        (good | {"v": good["u"]}, "unknown column 'v'"),
        (good | {"u": good["u"][:2]}, "rows"),
        (good | {"t": good["t"] + 5.0}, "horizon|outside"),
    ):
        with pytest.raises(DataError, match=message):
            nm.predict(here / "run", given, model=model)
    with pytest.raises(NodepintError, match="pass it again"):
        nm.predict(here / "run", good)


class Service(types.ModuleType):
    """Stands in for wandb and mlflow: keeps what is called."""

    def __init__(self, name, broken=False):
        super().__init__(name)
        self.calls, self.broken = [], broken
        self.info = types.SimpleNamespace(run_id="7")
        self.id, self.summary = "7", self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            if self.broken and name in ("log", "log_metrics"):
                raise OSError("no network")
            return self

        return call

    def named(self, name):
        return [(a, o) for called, a, o in self.calls if called == name]


@FAILS
def test_runs_are_recorded_elsewhere(here, monkeypatch, caplog):
    services = {name: Service(name) for name in ("wandb", "mlflow")}
    for name, service in services.items():
        monkeypatch.setitem(sys.modules, name, service)
    told = config(callbacks=list(services))
    nm.train(told, out=here / "run", **experiment())
    for name, service in services.items():
        logged = service.named("log" if name == "wandb" else "log_metrics")
        steps = [options["step"] for _, options in logged if "step" in options]
        assert steps == [1, 2, 3]
        assert all(np.isfinite(arguments[0]["loss"]) for arguments, o in logged if "step" in o)
        assert (Path("run") / f"{name}.json").is_file()
    longer = told.model_copy(update={"run": config(4).run})
    nm.train(longer, out=here / "run", resume="auto", **experiment())
    for name, service in services.items():
        (_, first), (_, second) = service.named("init" if name == "wandb" else "start_run")
        assert "7" in second.values() and "7" not in first.values()
        service.broken = True
    result = nm.train(told, out=here / "other", **experiment())
    assert result["status"] == "finished"  # what records a run cannot end it
    assert caplog.text.count("no network") >= 2  # of both


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("model", "differs between ranks: object.model:Field has"),
        ("loss", "different options: `object.loss` is object.loss:halved on rank 1"),
        ("optimizer", "different options: `object.optimizer` is nothing on rank 1"),
    ],
)
def test_ranks_that_give_other_objects_are_told(here, comms, part, said):
    def halved(predictions, targets):
        error = squared(predictions, targets)
        return nm.Mean(error.sum / 2, error.count)

    other = {"model": Field(jnp.ones((2, 2))), "loss": halved, "optimizer": None}[part]
    changes = {part: other} if comms.control.rank == 1 else {}
    with pytest.raises(NodepintError, match=re.escape(said)):
        nm.train(config(), out=here / "run", **experiment(**changes))
    assert not (here / "run").exists()
