"""Samples with times, gaps and inputs of their own, against plain diffrax and SciPy."""

import equinox as eqx
import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

from nodepint_mpi.parallel.comms import alone, free_comms, make_comms, world
from nodepint_mpi.training.evaluate import evaluate
from nodepint_mpi.training.setup import fresh_state
from tests.training.sample_case import (
    ADAPTIVE,
    INPUTS,
    LAST,
    N_ROWS,
    check_step,
    config_of,
    losses,
    make,
    make_rows,
    save,
)

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

TANGENT = 'method = "tangent"\nbasis = { kind = "jumps", rank = 2, new = 2 }'
CASES = {
    "own times, adaptive": ("own times", "", ADAPTIVE),
    "own times, tangent": ("own times", "", TANGENT),
    "own times, cubic inputs, static": (
        "own times",
        INPUTS + 'interpolation = "cubic"\nstatic = "p"',
        "",
    ),
    "gaps, initial": ("gaps", 'missing = "nan"\ninitial = "u0"', ""),
    "mask, weights, linear inputs": ("common", 'mask = "m"\nweights = "w"\n' + INPUTS, ""),
}
# With times of their own on two ranks, with masks on three; all where samples are dealt.
SIZES = {"own times, tangent": (1, 2), "mask, weights, linear inputs": (1, 3)}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.mpi(sizes=SIZES.get(name, (1,)))) for name in CASES],
)
def test_loss_and_gradient_are_those_of_a_solve_for_each_sample(
    comms, on_one_rank, shared_tmp_path, case
):
    """The first step against plain diffrax with `SaveAt(ts=...)`, all against one rank."""
    kind, data, options = CASES[case]
    text = config_of(save(comms, shared_tmp_path / "set", make_rows(kind)), data, options)
    made = make(text, comms)
    if comms.time.size == 1:
        check_step(made, 0)
    found = losses(made, 4)
    assert np.all(np.isfinite(found))
    if comms.time.size > 1:
        alone_ = on_one_rank(lambda: losses(make(text, make_comms(alone())), 4))
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


@pytest.mark.mpi(max_size=1)
def test_steps_end_where_piecewise_constant_inputs_jump(comms, shared_tmp_path):
    """Fourth order across jumps: twice the steps, a sixteenth of the error."""
    rows = make_rows("common")
    folder = save(comms, shared_tmp_path / "set", rows)
    errors, exact = [], None
    for n_steps in (2, 4):
        options = f'fine = {{ solver = "rk4", n_steps = {n_steps} }}'
        data = INPUTS + 'interpolation = "constant"'
        experiment, stepper = make(config_of(folder, data, options), comms)
        state = fresh_state(experiment)
        taken = stepper.take(state, experiment.batch(0), 0)
        if exact is None:
            by_row = [{name: rows[name][i] for name in "tusc"} for i in range(N_ROWS)]
            exact = held_oracle(experiment, state.params, by_row)
        errors.append(abs(float(taken.report.loss) - exact) / exact)
    print("ERR", errors)
    assert errors[0] < 1e-5 and errors[1] < max(errors[0] / 10, 1e-14)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("relaxed", [False, True])
def test_a_masked_value_has_no_influence(comms, shared_tmp_path, relaxed):
    """Not on the loss, the gradient or the scores: whatever stands in its place."""
    options = "relaxation = { steps = 10, start = 0.5 }" if relaxed else ""
    found, stepper = [], None
    for value in (0.0, 1e6):
        rows = make_rows("common")
        hidden = np.array(rows["m"])
        rows["u"] = np.where(hidden, np.array(rows["u"]), value).tolist()
        folder = save(comms, shared_tmp_path / f"set{value:g}", rows)
        experiment, own = make(config_of(folder, 'mask = "m"', options), comms)
        stepper = stepper or own  # the data are in the batch
        state = fresh_state(experiment)
        taken = stepper.take(state, experiment.batch(0), 0)
        found.append(
            [taken.report.loss, ravel_pytree(experiment.update.whole_params(taken.gradient))[0]]
        )
        found[-1] += evaluate(comms, experiment, state.params).values()
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.mpi(sizes=(2, 4))
def test_samples_are_dealt_to_lines_of_ranks(comms, on_one_rank, shared_tmp_path):
    """A line of one rank for each part of the samples, with inputs and times of their own."""
    size = comms.control.size
    n_groups = size if N_ROWS % size == 0 else 2
    _, data, options = CASES["own times, cubic inputs, static"]
    text = config_of(
        save(comms, shared_tmp_path / "set", make_rows("own times")), data, options
    ).replace('precision = "float64"', f'precision = "float64"\ndata_ranks = {n_groups}')
    grid = make_comms(world(), n_groups=n_groups)
    found = losses(make(text, grid), 3)
    wanted = on_one_rank(lambda: losses(make(text, make_comms(alone())), 3))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    jax.effects_barrier()
    free_comms(grid)
