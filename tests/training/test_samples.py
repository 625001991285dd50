"""Samples with times, gaps, inputs and features of their own, against plain diffrax."""

from typing import Any

import datasets
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError, DataError, ProblemError
from nodepint_mpi.parallel.comms import alone, free_comms, make_comms, world
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.evaluate import evaluate
from nodepint_mpi.training.plain import make_plain_loss
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.small_config import EXACT, small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
N_ROWS, LAST = 6, 2.0


def turned(start, t, force=0.0):
    z = (start[0] + 1j * start[1]) * np.exp((-0.2 + 2.0j) * t) + force
    return np.stack([z.real, z.imag], axis=-1)


def make_rows(kind: str) -> dict:
    """Damped rotations, observed in the ways that the tests are about."""
    draw = np.random.default_rng(1)
    starts = draw.uniform(0.5, 1.5, (N_ROWS, 2))
    common = np.linspace(0.0, LAST, 9)
    rows: dict = {"t": [common.tolist() for _ in range(N_ROWS)]}
    if kind == "own times":
        counts = draw.integers(2, 12, N_ROWS)
        inside = [np.sort(draw.uniform(0.0, LAST, n)) for n in counts]
        # One on an edge between slices, one at the very end, and one row that is over early.
        inside[0] = np.append(inside[0][inside[0] < 1.9], LAST)
        inside[1] = np.unique(np.append(inside[1], 4 * LAST / 7))
        inside[2] = inside[2][:2] / 10
        rows["t"] = [[0.0, *times.tolist()] for times in inside]
    rows["u"] = [
        turned(start, np.asarray(t)).tolist() for start, t in zip(starts, rows["t"], strict=True)
    ]
    knots = np.linspace(0.0, 1.5, 6)
    rows["s"] = [(knots + 0.01 * row * (knots > 0)).tolist() for row in range(N_ROWS)]
    rows["c"] = draw.uniform(-1, 1, (N_ROWS, 6, 1)).tolist()
    rows["p"] = draw.uniform(-1, 1, (N_ROWS, 2)).tolist()
    rows["u0"] = (starts + 0.1).tolist()
    rows["m"] = draw.integers(0, 2, (N_ROWS, 9, 2)).astype(bool).tolist()
    for row in rows["m"]:
        row[0] = [True, True]
        row[3] = [True, False]
    rows["w"] = draw.uniform(0.5, 2.0, (N_ROWS, 9)).tolist()
    gaps = np.array(rows["m"]) if kind == "gaps" else None
    if gaps is not None:
        rows["u"] = np.where(gaps, np.array(rows["u"]), np.nan).tolist()
    return rows


def save(comms, folder, rows):
    if comms.control.rank == 0:
        split = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(folder))
    comms.control.Barrier()
    return folder


@pytest.fixture(params=["common", "own times", "gaps"])
def kind(request):
    return request.param


INPUTS = 'inputs = "c"\ninput_times = "s"\n'
ADAPTIVE = 'fine = { solver = "tsit5", rtol = 1e-9, atol = 1e-9 }'
TANGENT = 'method = "tangent"\nbasis = { kind = "jumps", rank = 2, new = 2 }'
CASES = {
    "own times": ("own times", "", ""),
    "own times, adaptive": ("own times", "", ADAPTIVE),
    "own times, tangent": ("own times", "", TANGENT),
    "gaps": ("gaps", 'missing = "nan"', ""),
    "mask and weights": ("common", 'mask = "m"\nweights = "w"', ""),
    "linear inputs": ("common", INPUTS, ""),
    "cubic inputs, static": ("own times", INPUTS + 'interpolation = "cubic"\nstatic = "p"', ""),
    "initial": ("common", 'initial = "u0"', ""),
}
HEAVY = {"own times, adaptive", "own times, tangent", "gaps", "initial"}


def config_of(folder, data: str, options: str) -> str:
    steps = 'coarse = { solver = "euler", n_steps = 2 }'
    if "fine" not in options:
        steps += '\nfine = { solver = "tsit5", n_steps = 8 }'
    exact = EXACT if "adjoint" not in options else ""
    text = small_config(folder, exact + options, steps=steps, data=data)
    own_input = "initial" in data or "input = " in data.replace('initial = "u0"\ninput', "")
    return text.replace('input = "u"\ntarget', "target") if own_input else text


def losses(comms, text: str, n_steps: int) -> np.ndarray:
    experiment = set_up(parse_config(text), comms)
    stepper, state, found = make_stepper(experiment), fresh_state(experiment), []
    for k in range(n_steps):
        taken = stepper.take(state, experiment.batch(k), k)
        state = taken.state
        found.append(float(taken.report.loss))
    return np.array([*found, *evaluate(comms, experiment, state.params).values()])


def check_step(experiment, step: int) -> None:
    """Loss and gradient of a step are those of plain diffrax, on one rank."""
    state = fresh_state(experiment)
    taken = make_stepper(experiment).take(state, experiment.batch(step), step)
    plain = jax.jit(jax.value_and_grad(make_plain_loss(experiment)))
    loss, gradient = plain(state.params, experiment.whole_batch(step))
    np.testing.assert_allclose(float(taken.report.loss), float(loss), rtol=1e-8)
    ours, wanted = (ravel_pytree(tree)[0] for tree in (taken.gradient, gradient))
    assert jnp.linalg.norm(ours - wanted) < 1e-8 * jnp.linalg.norm(wanted)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.mpi(max_size=2)] if name in HEAVY else [])
        for name in CASES
    ],
)
def test_loss_and_gradient_are_those_of_a_solve_for_each_sample(
    comms, on_one_rank, shared_tmp_path, case
):
    """The first step against plain diffrax with `SaveAt(ts=...)`, all against one rank."""
    kind, data, options = CASES[case]
    text = config_of(save(comms, shared_tmp_path / "set", make_rows(kind)), data, options)
    experiment = set_up(parse_config(text), comms)
    if comms.time.size == 1:
        check_step(experiment, 0)
    found = losses(comms, text, 4)
    assert np.all(np.isfinite(found))
    if comms.time.size > 1:
        alone_ = on_one_rank(lambda: losses(make_comms(alone()), text, 4))
        np.testing.assert_allclose(found, alone_, rtol=1e-10)


def held_oracle(experiment, params, rows) -> float:
    """The loss of piecewise constant inputs: a solve for each piece, by SciPy."""
    model = eqx.combine(params, experiment.train_problem.static)
    layers = [(np.asarray(one.weight), np.asarray(one.bias)) for one in model.processor.mlp.layers]
    total, count = 0.0, 0

    def slope(t, u, held):
        x = np.concatenate([u, held])
        for weight, bias in layers[:-1]:
            x = np.tanh(weight @ x + bias)
        return layers[-1][0] @ x + layers[-1][1]

    for row in rows:
        knots, values = np.array(row["s"]), np.array(row["c"])
        u, wanted = np.array(row["u"][0]), dict(zip(row["t"], row["u"], strict=True))
        stops = np.unique([*knots, *row["t"], LAST])
        for a, b in zip(stops, stops[1:], strict=False):
            held = values[np.searchsorted(knots, a, side="right") - 1]
            u = solve_ivp(slope, (a, b), u, args=(held,), rtol=1e-11, atol=1e-11).y[:, -1]
            if b in wanted:
                total += float(np.sum((u - np.array(wanted[b])) ** 2))
                count += 2
    return total / count


def test_steps_end_where_piecewise_constant_inputs_jump(comms, shared_tmp_path):
    """Fifth order across jumps: twice the steps, a thirtieth of the error."""
    rows = make_rows("common")
    folder = save(comms, shared_tmp_path / "set", rows)
    errors, exact = [], None
    for n_steps in (4, 8):
        options = f'fine = {{ solver = "tsit5", n_steps = {n_steps} }}'
        data = INPUTS + 'interpolation = "constant"'
        text = config_of(folder, data, options)
        experiment = set_up(parse_config(text), comms)
        state = fresh_state(experiment)
        taken = make_stepper(experiment).take(state, experiment.batch(0), 0)
        if exact is None:
            by_row = [{name: rows[name][i] for name in "tusc"} for i in range(N_ROWS)]
            exact = held_oracle(experiment, state.params, by_row)
        errors.append(abs(float(taken.report.loss) - exact) / exact)
    assert errors[0] < 1e-5 and errors[1] < max(errors[0] / 15, 1e-11)


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("relaxed", [False, True])
def test_a_masked_value_has_no_influence(comms, shared_tmp_path, relaxed):
    """Not on the loss, the gradient or the scores: whatever stands in its place."""
    options = "relaxation = { steps = 10, start = 0.5 }" if relaxed else ""
    found = []
    for value in (0.0, 1e6):
        rows = make_rows("common")
        hidden = np.array(rows["m"])
        rows["u"] = np.where(hidden, np.array(rows["u"]), value).tolist()
        folder = save(comms, shared_tmp_path / f"set{value:g}", rows)
        experiment = set_up(parse_config(config_of(folder, 'mask = "m"', options)), comms)
        state = fresh_state(experiment)
        taken = make_stepper(experiment).take(state, experiment.batch(0), 0)
        found.append([taken.report.loss, ravel_pytree(taken.gradient)[0]])
        found[-1] += evaluate(comms, experiment, state.params).values()
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


OWN = """
import jax.numpy as jnp
import equinox as eqx
import jax
from nodepint_mpi import EncodeProcessDecode, Mean, mean_squared_error

def loss(predictions, targets, mask, weights, times, batch):
    assert predictions.shape == targets.shape == mask.shape
    late = jnp.where(times > 1.0, 2.0, 1.0)
    return mean_squared_error(predictions, targets, mask=mask, weights=late)

def penalty(model):
    return sum(jnp.sum(x ** 2) for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))

def drawn(model, key, batch):
    if key is None:
        return jnp.zeros(())
    return jax.vmap(lambda k: jax.random.normal(k))(key)

class Reader(eqx.Module):
    cell: eqx.nn.GRUCell

    def __call__(self, values, *, times, mask, key=None):
        seen = jnp.concatenate([values, mask, times[:, None]], axis=1)

        def step(hidden, row):
            new = self.cell(row, hidden)
            return jnp.where(row[2:4].any(), new, hidden), None

        hidden, _ = jax.lax.scan(step, jnp.zeros(self.cell.hidden_size), seen, reverse=True)
        mean, spread = hidden[:2], 0.1 * hidden[2:4]
        return mean if key is None else mean + spread * jax.random.normal(key, (2,))

def latent(key, *, input_shape, output_size):
    keys = jax.random.split(key, 3)
    field = eqx.nn.MLP(2, 2, 8, 1, activation=jnp.tanh, key=keys[1])
    decoder = eqx.nn.MLP(2, 2, 8, 1, key=keys[2])
    reader = Reader(eqx.nn.GRUCell(5, 6, key=keys[0]))
    return EncodeProcessDecode(reader, lambda t, u, args: field(u), decoder)
"""

DROPPING = """
import equinox as eqx, jax, jax.numpy as jnp
from nodepint_mpi.models.networks import EncodeProcessDecode, Identity

class Dropping(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, t, u, args, *, key=None):
        hidden = jnp.tanh(self.first(u))
        if key is not None:
            hidden = jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), 2 * hidden, 0.0)
        return self.last(hidden)

def make(key, *, input_shape, output_size):
    a, b = jax.random.split(key)
    field = Dropping(eqx.nn.Linear(2, 8, key=a), eqx.nn.Linear(8, 2, key=b))
    return EncodeProcessDecode(Identity(), field, Identity())
"""


def test_losses_terms_and_encoders_get_what_they_ask_for(comms, on_one_rank, shared_tmp_path):
    """A variational latent ODE on series with times and numbers of observations of their own."""
    folder = save(comms, shared_tmp_path / "set", make_rows("own times"))
    file = shared_tmp_path / "own_latent.py"
    if comms.control.rank == 0:
        text = OWN.replace("lambda t, u, args: field(u)", "Flow(field)").replace(
            "def latent", "class Flow(eqx.Module):\n    mlp: eqx.nn.MLP\n\n"
            "    def __call__(self, t, u, args):\n        return self.mlp(u)\n\ndef latent"
        )  # fmt: skip
        file.write_text(text)
    comms.control.Barrier()
    terms = f'[{{ name = "{file}:penalty", weight = 0.01 }}, {{ name = "{file}:drawn" }}]'
    text = config_of(folder, "", "").replace("\nwidth = 8", "").replace('"mlp"', f'"{file}:latent"')
    text = text.replace('name = "mean_squared_error"', f'name = "{file}:loss"\nterms = {terms}')
    experiment = set_up(parse_config(text), comms)
    if comms.time.size == 1:
        check_step(experiment, 3)
    else:
        found = losses(comms, text, 3)
        np.testing.assert_allclose(
            found, on_one_rank(lambda: losses(make_comms(alone()), text, 3)), rtol=1e-10
        )


@pytest.mark.parametrize("kind", ["common", "own times"])
def test_dropout_inside_the_field(comms, on_one_rank, shared_tmp_path, kind):
    """One key a sample and step: plain diffrax has the same gradient, any ranks the same losses."""
    folder = save(comms, shared_tmp_path / "set", make_rows(kind))
    file = shared_tmp_path / "dropping.py"
    if comms.control.rank == 0:
        file.write_text(DROPPING)
    comms.control.Barrier()
    text = config_of(folder, "", "").replace("\nwidth = 8", "").replace('"mlp"', f'"{file}:make"')
    found = losses(comms, text, 4)
    if comms.time.size > 1:
        alone_ = on_one_rank(lambda: losses(make_comms(alone()), text, 4))
        np.testing.assert_allclose(found, alone_, rtol=1e-10)
        return
    experiment = set_up(parse_config(text), comms)
    check_step(experiment, 3)
    stepper, state = make_stepper(experiment), fresh_state(experiment)
    first, other = (stepper.take(state, experiment.batch(step), step) for step in (0, 1))
    assert abs(float(first.report.loss - other.report.loss)) > 1e-3  # other units are dropped
    # What is dropped, drawn by hand from seed, step and row.
    model: Any = eqx.combine(state.params, experiment.train_problem.static)
    batch = experiment.whole_batch(0)
    total = 0.0
    for row, times, wanted in zip(batch.rows, batch.times, batch.targets, strict=True):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), row)
        kept = 2.0 * np.asarray(jax.random.bernoulli(key, 0.5, (8,)))
        a, b = model.processor.first, model.processor.last

        def slope(t, u, a=a, b=b, kept=kept):
            return b.weight @ (kept * np.tanh(a.weight @ u + a.bias)) + b.bias

        if kind == "common":
            solved = solve_ivp(slope, (0, LAST), wanted[0], t_eval=times, rtol=1e-9, atol=1e-9)
            total += float(np.mean((solved.y.T[1:] - wanted[1:]) ** 2)) / N_ROWS
    if kind == "common":
        np.testing.assert_allclose(float(first.report.loss), total, rtol=1e-5)


def test_a_field_works_without_its_key(comms, shared_tmp_path):
    file = shared_tmp_path / "keyed.py"
    folder = save(comms, shared_tmp_path / "set", make_rows("common"))
    if comms.control.rank == 0:
        file.write_text(DROPPING.replace("key=None", "key"))
    comms.control.Barrier()
    text = config_of(folder, "", "").replace("\nwidth = 8", "").replace('"mlp"', f'"{file}:make"')
    with pytest.raises(ProblemError, match="write `key=None`"):
        set_up(parse_config(text), comms)


@pytest.mark.mpi(min_size=2)
def test_samples_are_dealt_to_lines_of_ranks(comms, on_one_rank, shared_tmp_path):
    """A line of one rank for each part of the samples, with inputs and times of their own."""
    size = comms.control.size
    n_groups = size if N_ROWS % size == 0 else 2
    _, data, options = CASES["cubic inputs, static"]
    text = config_of(
        save(comms, shared_tmp_path / "set", make_rows("own times")), data, options
    ).replace('precision = "float64"', f'precision = "float64"\ndata_ranks = {n_groups}')
    grid = make_comms(world(), n_groups=n_groups)
    found = losses(grid, text, 3)
    wanted = on_one_rank(lambda: losses(make_comms(alone()), text, 3))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    jax.effects_barrier()
    free_comms(grid)


def wrong(rows, column, row, place, value):
    rows[column][row][place] = value


REFUSED: list[tuple[Any, str, str]] = [
    (lambda r: wrong(r, "u", 2, 4, [float("nan"), 1.0]), "", r"row 2 of column 'u' holds nan.*t"),
    (lambda r: wrong(r, "t", 3, 5, 0.1), "", "must increase, but observation 5 .* of row 3"),
    (lambda r: wrong(r, "t", 1, 8, 2.5), "", r"from 0 to 2.5 in row 1, outside the horizon"),
    (lambda r: wrong(r, "u", 4, 2, [float("inf"), 1.0]), 'missing = "nan"', "row 4 .* holds inf"),
    (lambda r: wrong(r, "u", 4, 0, [np.nan, 1.0]), 'missing = "nan"', "in row 4 of column 'u' is"),
    (lambda r: wrong(r, "w", 5, 2, -1.0), 'weights = "w"', "Row 5 of the weights"),
    (lambda r: wrong(r, "s", 0, 0, 0.5), INPUTS, "of row 0 .*begin|must increase"),
    (lambda r: r["c"].__setitem__(2, r["c"][2][:3]), INPUTS, "Row 2 of the inputs 'c' has 3"),
    (lambda r: None, 'mask = "t"', "Row 0 of the mask 't' holds 0.25"),
    (
        lambda r: r["t"].__setitem__(1, [0.0]) or r["u"].__setitem__(1, [[1.0, 1.0]]),
        "",
        "Row 1 of column 'u' has no observation after the beginning",
    ),
    (
        lambda r: r.update(v=[[[np.nan, 1.0]] + row[1:] for row in r["u"]]),
        'missing = "nan"\ninput = "v"',
        "first observation in row 0 of column 'v' is missing",
    ),
    (lambda r: wrong(r, "t", 4, 0, 0.1), "", "Row 4 of 't' begins at t = 0.1"),
    (lambda r: None, 'mask = "c"', "'c' has rows of shape|row 0 has 6 entries"),
    (lambda r: None, 'weights = "s"', "weights 's' must hold one number a row"),
    (lambda r: None, 'weights = "u"', "weights 'u' must hold one number a row"),
    (lambda r: r.update(k=[1.0] * N_ROWS), 'inputs = "k"', "'k' must hold a list in every row"),
    (lambda r: None, 'inputs = "c"\ninput_times = "p"', "Row 0 of the inputs 'c' has 6"),
]


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(("change", "data", "said"), REFUSED)
def test_what_is_wrong_is_said_with_row_and_remedy(comms, shared_tmp_path, change, data, said):
    rows = make_rows("common")
    change(rows)
    folder = save(comms, shared_tmp_path / "set", rows)
    with pytest.raises((DataError, ProblemError, ConfigError), match=said):
        set_up(parse_config(config_of(folder, data, "")), comms)


@pytest.mark.mpi(max_size=2)
def test_the_test_split_is_looked_at_too(comms, shared_tmp_path):
    folder = shared_tmp_path / "set"
    if comms.control.rank == 0:
        bad = make_rows("common")
        wrong(bad, "u", 4, 0, [np.nan, 1.0])
        parts = {"train": make_rows("common"), "test": bad}
        datasets.DatasetDict(
            {name: datasets.Dataset.from_dict(rows) for name, rows in parts.items()}
        ).save_to_disk(str(folder))
    comms.control.Barrier()
    with pytest.raises(DataError, match="first observation in row 4"):
        set_up(parse_config(config_of(folder, 'missing = "nan"', "")), comms)


@pytest.mark.mpi(max_size=2)
def test_all_that_is_wrong_is_said_at_once(comms, shared_tmp_path):
    rows = make_rows("common")
    wrong(rows, "u", 2, 4, [float("nan"), 1.0])
    wrong(rows, "t", 3, 5, 0.1)
    wrong(rows, "w", 5, 2, -1.0)
    folder = save(comms, shared_tmp_path / "set", rows)
    with pytest.raises(DataError, match="3 things are wrong") as caught:
        set_up(parse_config(config_of(folder, 'weights = "w"', "")), comms)
    for said in ("row 2 of column 'u'", "of row 3", "Row 5 of the weights", 'missing = "nan"'):
        assert said in str(caught.value)


CONSTANT = INPUTS + 'interpolation = "constant"'
FEW_STEPS = "n_slices = 2\nfine = { solver = 'rk4', n_steps = 2 }"


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (CONSTANT, FEW_STEPS, "where no fine step can end"),
        (CONSTANT, ADAPTIVE, "chosen by error control"),
        ('input_times = "s"', "", "are those of `inputs`"),
        (CONSTANT, 'adjoint.kind = "continuous"', "do not end where inputs jump"),
        ('initial = "u0"', "relaxation = { steps = 3 }", "needs `data.input`, not"),
        (INPUTS, 'method = "reduced"\nbasis = { kind = "identity" }', "any method but 'reduced'"),
        ('initial = "u0"\ninput = "u"', "", "needs one of `input`"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(comms, shared_tmp_path, data, options, said):
    folder = save(comms, shared_tmp_path / "set", make_rows("common"))
    with pytest.raises((DataError, ConfigError), match=said):
        text = config_of(folder, data, options)
        if "n_slices = 2" in options:
            text = text.replace("n_slices = 7\n", "", 1)
        set_up(parse_config(text), comms)


@pytest.mark.mpi(max_size=2)
def test_a_loss_must_take_the_mask(comms, shared_tmp_path):
    folder = save(comms, shared_tmp_path / "set", make_rows("own times"))
    file = shared_tmp_path / "blind.py"
    if comms.control.rank == 0:
        file.write_text(
            "from nodepint_mpi import Mean\nimport jax.numpy as jnp\n"
            "def loss(a, b):\n    return Mean(jnp.sum((a - b) ** 2), jnp.asarray(1.0 * a.size))\n"
        )
    comms.control.Barrier()
    text = config_of(folder, "", "").replace('"mean_squared_error"', f'"{file}:loss"')
    with pytest.raises(ProblemError, match="The loss does not take `mask`"):
        set_up(parse_config(text), comms)
