"""Training of stochastic equations, against hand-drawn paths and plain diffrax."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.path_losses import energy_score, euler_likelihood, moment_error
from nodepint_mpi.errors import ConfigError, ProblemError
from nodepint_mpi.parallel.comms import alone, free_comms, make_comms, world
from nodepint_mpi.training.forward import make_prediction
from nodepint_mpi.training.initial_value import solve_problem
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.sample_case import check_step, losses, make
from tests.training.small_config import EXACT, small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

MODEL = """
import equinox as eqx
import jax
import jax.numpy as jnp
from nodepint_mpi import EncodeProcessDecode


class Drifting(eqx.Module):
    pull: jax.Array
    spread: jax.Array
    kind: str = eqx.field(static=True)

    def __call__(self, t, u, args):
        return -9 * u**3 if self.kind == "stiff" else -self.pull * jnp.sin(u)

    def diffusion(self, t, u, args):
        g = self.spread * jnp.sqrt(1 + u**2)
        return jnp.stack([g, jnp.roll(g, 1), 0.1 * g], axis=1) if self.kind == "general" else g


class Process:
    def __call__(self, t, u, args):
        return -jnp.array([0.7, 1.3]) * jnp.sin(u)

    def diffusion(self, t, u, args):
        return jnp.array([0.3, 0.2]) * jnp.sqrt(1 + u**2)


process = Process()


def make(key, input_shape, output_size, kind="diagonal"):
    field = Drifting(jnp.array([0.7, 1.3]), jnp.array([0.3, 0.2]), kind)
    return EncodeProcessDecode(eqx.nn.Identity(), field, eqx.nn.Identity())
"""
N_SLICES, N_FINE, LAST = 7, 4, 2.0
STEPS = {
    "ito": 'fine = { solver = "euler", n_steps = 4 }\ncoarse = { solver = "euler", n_steps = 1 }',
    "stratonovich": (
        'fine = { solver = "stratonovich_milstein", n_steps = 4 }\n'
        'coarse = { solver = "euler_heun", n_steps = 2 }'
    ),
    "levy": (
        'fine = { solver = "slow_rk", n_steps = 4 }\n'
        'coarse = { solver = "euler_heun", n_steps = 1 }'
    ),
}


@pytest.fixture
def model_file(shared_tmp_path, comms):
    file = shared_tmp_path / "drifting.py"
    if comms.control.rank == 0:
        file.write_text(MODEL)
    comms.control.Barrier()
    return file


@pytest.fixture
def text(source, model_file):
    """The text of a config, by options of `[noise]` and more."""
    file = model_file

    def config_text(
        noise: str, steps: str = "ito", options: str = "", loss: str = "mean_squared_error",
        kind: str = "diagonal",
    ) -> str:  # fmt: skip
        kind = "general" if "general" in noise else kind
        network = f'name = "{file}:make"\noptions = {{ kind = "{kind}" }}'
        made = small_config(
            source, EXACT + options, steps=STEPS[steps], network=network,
            sections=f"[noise]\n{noise}",
        )  # fmt: skip
        return made.replace('"mean_squared_error"', f'"{loss}"')

    return config_text


def by_hand(experiment, step: int | None, n_paths: int | None) -> np.ndarray:
    """Euler-Maruyama in NumPy with noise drawn from seed, row, path and fine step by JAX alone."""
    batch = experiment.train.take(np.arange(experiment.train.n_rows), 0)
    model: Any = eqx.combine(fresh_state(experiment).params, experiment.train_problem.static)
    pull, spread = np.asarray(model.processor.pull), np.asarray(model.processor.spread)
    h = LAST / N_SLICES / N_FINE
    ends = []
    for row in np.asarray(batch.rows):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0x4E6F6973), row)
        key = key if step is None else jax.random.fold_in(key, step)
        paths = [key] if n_paths is None else [jax.random.fold_in(key, m) for m in range(n_paths)]
        of_paths = []
        for path in paths:
            u = np.asarray(batch.initial[row], float)
            for number in range(N_SLICES * N_FINE):
                own = jax.random.fold_in(jax.random.fold_in(path, number), 0)
                w = np.sqrt(h) * np.asarray(jax.random.normal(own, (2,), float))
                u = u - h * pull * np.sin(u) + spread * np.sqrt(1 + u**2) * w
            of_paths.append(u)
        ends.append(of_paths[0] if n_paths is None else of_paths)
    return np.array(ends)


CASES = {
    "scalar, fresh": ('kind = "scalar"\npaths = "fresh"', "ito", ""),
    "general, paths": ('kind = "general"\nn_dims = 3\nn_paths = 3', "ito", ""),
    "stratonovich": ('calculus = "stratonovich"', "stratonovich", ""),
    "levy, tracked": (
        'calculus = "stratonovich"', "levy", "tracking = { bound = 1e-9, max_sweeps = 9 }"
    ),
    "tangent": (
        'calculus = "ito"', "ito", 'method = "tangent"\nbasis = { kind = "identity" }'
    ),
}  # fmt: skip
MOST_RANKS = {"general, paths": 3}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.mpi(max_size=MOST_RANKS.get(name, 1))) for name in CASES],
)
def test_losses_are_those_of_one_rank_and_of_plain_diffrax(comms, on_one_rank, text, case):
    noise, steps, options = CASES[case]
    loss = "energy_score" if "n_paths" in noise else "mean_squared_error"
    config = text(noise, steps, options, loss=loss)
    made = make(config, comms)
    found = losses(made, 4)
    assert np.all(np.isfinite(found))
    if comms.time.size > 1:
        alone_ = on_one_rank(lambda: losses(make(config, make_comms(alone())), 4))
        np.testing.assert_allclose(found, alone_, rtol=1e-10)
    else:
        check_step(made, 0, loss_rtol=1e-9)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "noise, n_paths",
    [("seed = 5", None), ('seed = 5\npaths = "fresh"', None), ("seed = 5\nn_paths = 2", 2)],
)
def test_the_paths_of_a_step_can_be_drawn_by_hand(comms, text, noise, n_paths):
    loss = "mean_squared_error" if n_paths is None else "moment_error"
    experiment = set_up(parse_config(text(noise, loss=loss)), comms)
    params, batch = fresh_state(experiment).params, experiment.whole_batch(3)
    wanted = by_hand(experiment, 3 if "fresh" in noise else None, n_paths)
    states = make_prediction(experiment.train_problem)(params, batch)[-1]
    np.testing.assert_allclose(states, wanted, rtol=1e-10)
    # What is only looked at has other paths, the same at any time.
    looked = batch._replace(step=None)
    twice = [make_prediction(experiment.test_problem)(params, looked)[-1] for _ in range(2)]
    np.testing.assert_array_equal(*twice)
    assert np.min(np.abs(twice[0] - states)) > 1e-6


@pytest.mark.mpi(max_size=1)
def test_coarse_steps_that_leave_the_numbers_are_stepped_around(comms, text):
    made = make(text("seed = 2", kind="stiff"), comms)
    taken = made.stepper.take(fresh_state(made.experiment), made.experiment.batch(0), 0)
    assert taken.report.guarded > 0 and bool(taken.report.finite)
    check_step(made, 0)


@pytest.mark.mpi(sizes=(2, 4))  # lines of one rank, and of two
def test_samples_keep_their_paths_on_any_line_of_ranks(comms, on_one_rank, text):
    made = text("n_paths = 2", loss="energy_score")
    size = comms.control.size
    n_groups = size if 6 % size == 0 else 2
    dealt = made.replace('precision = "float64"', f'precision = "float64"\ndata_ranks = {n_groups}')
    grid = make_comms(world(), n_groups=n_groups)
    found = losses(make(dealt, grid), 3)
    wanted = on_one_rank(lambda: losses(make(dealt, make_comms(alone())), 3))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    jax.effects_barrier()
    free_comms(grid)


SOLVE = """
run = {{ name = "solve", precision = "float64" }}
problem = {{ field = "{file}:{field}", initial = [1.0, -0.5] }}
{noise}
[time]
horizon = [0.0, 2.0]
n_slices = 7
stopping = {{ tol = 1e-10 }}
{steps}
"""


@pytest.mark.mpi(max_size=1)
def test_a_problem_with_noise_is_solved_and_forecast(comms, model_file):
    made = SOLVE.format(
        file=model_file, field="process", steps=STEPS["ito"],
        noise="noise = { seed = 5, n_paths = 3 }",
    )  # fmt: skip
    result = solve_problem(parse_config(made), comms, with_error=True, with_forecast=True)
    assert result["status"] == "converged" and result["error"] < 1e-9
    assert result["n_paths"] == 3 and result["path_sweeps"]["largest"] == result["sweeps"]
    forecast = result["forecast"]
    assert forecast["n_samples"] == 3 and abs(forecast["sweeps"] - result["sweeps"]) <= 1
    h, last = LAST / N_SLICES / N_FINE, []
    for path in range(3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0x4E6F6973), path)
        u = np.array([1.0, -0.5])
        for number in range(N_SLICES * N_FINE):
            own = jax.random.fold_in(jax.random.fold_in(key, number), 0)
            w = np.sqrt(h) * np.asarray(jax.random.normal(own, (2,), float))
            noise = np.array([0.3, 0.2]) * np.sqrt(1 + u**2) * w
            u = u - h * np.array([0.7, 1.3]) * np.sin(u) + noise
        last.append(u)
    np.testing.assert_allclose(result["end_state_norm"], np.max(np.abs(last)), rtol=1e-9)


@pytest.mark.mpi(max_size=1)
def test_a_problem_and_its_noise_belong_together(comms, model_file):
    def solved(field, noise):
        made = SOLVE.format(file=model_file, field=field, noise=noise, steps=STEPS["ito"])
        solve_problem(parse_config(made), comms, with_error=False, with_forecast=False)

    with pytest.raises(ConfigError, match="no section `\\[noise\\]`"):
        solved("process", "")
    with pytest.raises(ConfigError, match="with a method `diffusion"):
        solved("make", "noise = {}")
    with pytest.raises(ConfigError, match="a solve has no steps"):
        solved("process", 'noise = { paths = "fresh" }')
    with pytest.raises(ConfigError, match="Euler converges .* Ito"):
        solved("process", 'noise = { calculus = "stratonovich" }')


@pytest.mark.mpi(max_size=1)
def test_scores_have_the_expectation_they_should_have():
    """Of normal paths and a normal observation, in closed form."""
    mean, spread, y = 0.3, 0.5, 1.1
    draws = jax.random.normal(jax.random.key(0), (2000, 1, 8, 1))
    x, target = mean + spread * draws, jnp.full((2000, 1, 1), y)
    moments = moment_error(x, target).value()
    exact = (mean - y) ** 2 + (mean**2 + spread**2 - y**2) ** 2
    assert abs(moments - exact) < 0.03 * exact
    score = energy_score(x, target).value()
    z = (y - mean) / spread
    exact = spread * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert abs(score - exact) < 0.02 * exact


@pytest.mark.mpi(max_size=1)
def test_the_likelihood_of_transitions(comms, text):
    experiment = set_up(parse_config(text("seed = 0")), comms)
    model: Any = eqx.combine(fresh_state(experiment).params, experiment.train_problem.static)
    batch = experiment.whole_batch(0)
    found = euler_likelihood(model, batch=batch)
    u, h = np.asarray(batch.targets[2]), LAST / 8
    drift = -np.array([0.7, 1.3]) * np.sin(u[:-1])
    spread = np.array([0.3, 0.2]) * np.sqrt(1 + u[:-1] ** 2) * np.sqrt(h)
    wanted = -norm.logpdf(u[1:], u[:-1] + h * drift, spread).mean()
    np.testing.assert_allclose(found[2], wanted, rtol=1e-10)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    "noise, steps, options, message",
    [
        ('kind = "general"', "ito", "", "takes `n_dims` with"),
        ("n_paths = 1", "ito", "", "greater than or equal to 2"),
        ('calculus = "stratonovich"', "ito", "", "Euler converges .* Ito"),
        ("", "stratonovich", "", "in the sense of Stratonovich"),
        ('paths = "fresh"', "ito", "tracking = {}", "draws other paths in each step"),
        ("n_paths = 2", "ito", "", "belongs to losses of several paths: energy_score or mom"),
    ],
)
def test_noise_that_does_not_fit_is_refused(comms, text, noise, steps, options, message):
    with pytest.raises((ConfigError, ProblemError), match=message):
        set_up(parse_config(text(noise, steps, options)), comms)


@pytest.mark.mpi(max_size=1)
def test_a_diffusion_and_the_section_belong_together(comms, text):
    made = text("seed = 1")
    with pytest.raises(ProblemError, match="no section `\\[noise\\]`"):
        set_up(parse_config(made.replace("[noise]\nseed = 1", "")), comms)
    general = made.replace('kind = "diagonal" }', 'kind = "general" }')
    with pytest.raises(ProblemError, match="diagonal noise needs one array of shape \\(2,\\)"):
        set_up(parse_config(general), comms)
    without = without_diffusion(made)
    with pytest.raises(ProblemError, match="needs a vector field with a method `diffusion"):
        set_up(parse_config(without), comms)


def without_diffusion(made: str) -> str:
    start, _, rest = made.partition("[network]\n")
    return start + '[network]\nname = "mlp"\nwidth = 4\n[loss]' + rest.partition("[loss]")[2]
