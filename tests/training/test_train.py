"""Training steps in one process per rank: rank independence, equal bits, no recompilation."""

import datasets
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.build.noise import build_noise
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.runge_kutta import RK4
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.parallel.comms import Comms, alone, make_comms
from nodepint_mpi.parallel.failure import _log_power as warn_once
from nodepint_mpi.training.batch_model import BatchedField
from nodepint_mpi.training.error_control import Tracker, make_stepper, relative_error
from nodepint_mpi.training.evaluate import evaluate
from nodepint_mpi.training.forward import make_evaluation
from nodepint_mpi.training.info import make_plan
from nodepint_mpi.training.plain import make_plain_loss
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.small_config import EXACT, small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
# Several ranks compile for minutes, and what they do is compared with a rank that is alone.
ALONE, TWO, TWO_OR_THREE = pytest.mark.mpi(1, 1), pytest.mark.mpi(2, 2), pytest.mark.mpi(2, 3)


def train(comms: Comms, text: str, n_steps: int):
    """What the first steps took, and the stepper."""
    experiment = set_up(parse_config(text), comms)
    stepper, state, taken = make_stepper(experiment), fresh_state(experiment), []
    for k in range(n_steps):
        taken.append(stepper.take(state, experiment.batch(k), k))
        state = taken[-1].state
        assert taken[-1].report.finite
    return taken, stepper


def losses_of(taken):
    return np.array([float(step.report.loss) for step in taken])


def sweeps_of(taken):
    return [int(step.report.sweeps) for step in taken]


def emulate(text: str, n_steps: int):
    """Losses and sweeps of a rank that is alone."""
    taken, _ = train(make_comms(alone()), text, n_steps)
    return losses_of(taken), sweeps_of(taken)


TANGENT = 'method = "tangent"\nbasis = { kind = "jumps", rank = 2, new = 1 }\n'


@ALONE
def test_training_does_not_depend_on_where_its_times_begin(comms, source, shared_tmp_path):
    """Dyadic times, so that shifting them by 1e8 does not round."""
    if comms.control.rank == 0:

        def shift(row):
            return {"t": [1e8 + t for t in row["t"]]}

        late = datasets.load_from_disk(str(source)).map(shift)
        late.save_to_disk(str(shared_tmp_path / "late"))
    comms.control.Barrier()
    losses = []
    for t0, folder in ((0.0, source), (1e8, shared_tmp_path / "late")):
        text = small_config(folder, EXACT, n_slices=8)
        text = text.replace("horizon = [0.0, 2.0]", f"horizon = [{t0}, {t0 + 2.0}]")
        experiment = set_up(parse_config(text), comms)
        batch, state = experiment.batch(0), fresh_state(experiment)
        plain = jax.jit(make_plain_loss(experiment))
        losses.append(float(plain(state.params, batch.data)))
        taken, _ = train(comms, text, 2)
        losses.extend(losses_of(taken))
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-12)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@ALONE
@pytest.mark.parametrize("options", ['method = "serial"', "tracking = {}"])
def test_a_continuous_adjoint_that_is_off_is_said_once(comms, source, caplog, options):
    """Euler steps do not lead back to where they began."""
    steps = 'fine = { solver = "euler", n_steps = 2 }\ncoarse = { solver = "euler", n_steps = 1 }'
    text = small_config(source, 'adjoint = { kind = "continuous" }\n' + options, steps=steps)
    text = text.replace("learning_rate = 0.02", "learning_rate = 1e-9")
    warn_once.cache_clear()
    with caplog.at_level("WARNING", logger="nodepint_mpi"):
        train(comms, text, 3)
        jax.effects_barrier()
    said = [record for record in caplog.records if "continuous adjoint" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize(
    "options, n_traces",
    [
        pytest.param('method = "parareal"', 1, id="parareal", marks=ALONE),
        pytest.param("tracking = {}", 1, id="parareal-tracked", marks=TWO_OR_THREE),
        pytest.param(TANGENT + "tracking = {}", 2, id="tangent-tracked", marks=TWO_OR_THREE),
        pytest.param('method = "picard"\ntracking = {}', 2, id="picard-tracked", marks=TWO),
    ],
)
def test_twenty_steps_do_not_depend_on_the_ranks(comms, on_one_rank, source, options, n_traces):
    text = small_config(source, EXACT + options)
    taken, stepper = train(comms, text, 20)
    losses = losses_of(taken)
    if comms.time.size > 1:
        emulated, sweeps = on_one_rank(lambda: emulate(text, 20))
        np.testing.assert_allclose(losses, emulated, rtol=1e-9)
        assert sweeps_of(taken) == sweeps
    assert losses[-1] < 0.8 * losses[0]
    assert stepper.n_compiled() == n_traces
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(taken[-1].state.params)]
    assert comms.control.allgather(bits) == [bits] * comms.control.size


LEVELS = "levels = { coarsening = 3 }\n"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("", marks=ALONE),
        pytest.param(LEVELS, marks=ALONE),
        pytest.param(TANGENT, marks=TWO),
    ],
)
def test_tracked_gradients_keep_to_their_bound(comms, on_one_rank, source, options):
    """Against the plain diffrax gradient, where tracking does not look at one itself."""
    tracking = "tracking = { bound = 1e-2, check_every = 10 }"
    text = small_config(source, EXACT + options + tracking)
    experiment = set_up(parse_config(text), comms)
    stepper, state = make_stepper(experiment), fresh_state(experiment)
    exact = jax.jit(jax.grad(make_plain_loss(experiment)))
    errors, sweeps = [], []
    for k in range(40):
        batch, params = experiment.batch(k), state.params
        wanted = on_one_rank(lambda params=params, batch=batch: exact(params, batch.data))
        taken = stepper.take(state, batch, k)
        state = taken.state
        assert taken.serial == (taken.error is not None)
        assert (k % 10 > 0) or taken.serial
        if not taken.serial:
            assert taken.estimate is not None and taken.estimate <= 1e-2
            errors.append(relative_error(experiment.update.whole_params(taken.gradient), wanted))
            sweeps.append(int(taken.report.sweeps))
        else:
            assert relative_error(experiment.update.whole_params(taken.gradient), wanted) < 1e-10
    assert len(errors) >= 25
    assert np.median(errors) <= 1e-2 and max(errors) <= 3e-2
    assert np.mean(sweeps) < (3.5 if options else 2.5)  # solved anew it takes 7


@ALONE
def test_mini_batches_in_two_levels_keep_four_states_a_slice(comms, source):
    half = 4 * 7 * 3 * 16 / 1e6  # as much as half of the samples take
    tracking = f"tracking = {{ check_every = 0, store_mb = {half} }}"
    text = small_config(source, EXACT + LEVELS + tracking, data="batch_size = 3")
    _, stepper = train(comms, text, 2)
    _, rows = stepper.kept()
    assert set(rows) == {"defects", "codefects", "group_defects", "group_lefts"}
    assert {block.shape for block in rows.values()} == {(7, 3, 2)}
    begins = np.any(rows["group_defects"], axis=(1, 2))
    assert np.flatnonzero(begins).tolist() == [3, 6]
    plan = make_plan(parse_config(text), 1)
    assert plan["tracks_bytes_per_rank"] == sum(block.nbytes for block in rows.values())
    assert plan["levels"].startswith("2: 3 groups of 3 slices")
    assert make_plan(parse_config(text, ["time.levels.number=1"]), 1)["levels"] == "1"
    assert "levels" not in make_plan(parse_config(text, ["time.method=picard"]), 1)


@ALONE
def test_levels_and_noise_are_refused(source):
    noise = '[noise]\nkind = "diagonal"\ncalculus = "ito"\n'
    config = parse_config(small_config(source, "levels = { number = 2 }", sections=noise))
    with pytest.raises(ConfigError, match=r"remove `\[time.levels\]`"):
        build_noise(config)


@TWO
def test_samples_are_tracked_in_mini_batches(comms, on_one_rank, source):
    tracking = "tracking = { bound = 1e-2, check_every = 0, store_mb = %s, max_sweeps = 5 }"
    text = small_config(source, EXACT + tracking % 1.0, data="batch_size = 3")
    taken, stepper = train(comms, text, 30)
    emulated, _ = on_one_rank(lambda: emulate(text, 30))
    np.testing.assert_allclose(losses_of(taken), emulated, rtol=1e-9)
    _, rows = stepper.kept()
    assert rows["defects"].shape[1:] == (6, 2) and np.all(np.any(rows["defects"], axis=(0, 2)))
    # As much as half of the samples take; the others start from the coarse solution.
    half = 2 * 7 * 3 * 16 / 1e6
    short, stepper = train(comms, text.replace("store_mb = 1.0", f"store_mb = {half}"), 30)
    assert stepper.kept()[1]["defects"].shape[1:] == (3, 2)

    def n_sweeps(steps):
        return sum(int(step.report.sweeps) for step in steps[2:])  # the first epoch knows nothing

    assert n_sweeps(taken) < n_sweeps(short)
    with pytest.raises(ConfigError, match="of mini-batches needs"):
        train(comms, text.replace("[time]", '[time]\nmethod = "picard"'), 1)


@TWO
def test_what_cannot_be_tracked_is_trained_serially_and_says_so(comms, source, caplog):
    options = "tracking = { bound = 1e-13, max_sweeps = 1, check_every = 0 }"
    text = small_config(source, EXACT + options)
    with caplog.at_level("INFO", logger="nodepint_mpi"):
        taken, _ = train(comms, text, 13)
    plain, _ = train(comms, text.replace(options, 'method = "serial"'), 13)
    np.testing.assert_allclose(losses_of(taken), losses_of(plain), rtol=1e-12)
    assert [step.estimate is None for step in taken] == [False] * 10 + [True] * 3
    assert all(step.serial for step in taken)
    said = [record.message for record in caplog.records]
    assert any("after 1 sweeps: serial gradient" in line for line in said)
    assert sum("the next 100 steps are serial" in line for line in said) == 1


@TWO
def test_a_field_that_blows_up_off_the_solution_is_solved_serially(comms, source):
    """A track so wrong that F is not finite: the step is serial, and the next ones track again."""
    text = small_config(source, EXACT + "tracking = { check_every = 0 }")
    experiment = set_up(parse_config(text), comms)
    stepper, state = make_stepper(experiment), fresh_state(experiment)
    batch = experiment.batch(0)
    assert isinstance(stepper, Tracker)
    _, kept = stepper.kept()
    stepper._store.restore({}, kept | {"defects": np.full_like(kept["defects"], np.nan)})
    broken = stepper.take(state, batch, 0)
    assert broken.serial and broken.report.finite
    after = stepper.take(broken.state, batch, 1)
    assert after.report.finite and not after.serial
    assert after.estimate is not None and after.estimate <= 1e-2


@ALONE
def test_rows_of_older_checkpoints_have_their_names_of_today(comms, source):
    experiment = set_up(parse_config(small_config(source, EXACT + "tracking = {}")), comms)
    stepper, state = make_stepper(experiment), fresh_state(experiment)
    stepper.take(state, experiment.batch(0), 0)
    replicated, rows = stepper.kept()
    other = make_stepper(experiment)
    other.restore(replicated, {"tracks": rows["defects"], "cotracks": rows["codefects"]})
    jax.tree.map(np.testing.assert_array_equal, other.kept(), (replicated, rows))


def relaxed_loss(experiment):
    """Slices one after the other by plain diffrax, each from its relaxed start."""
    problem, edges = experiment.train_problem, np.linspace(0.0, 2.0, 8)
    times, static = experiment.train.times, problem.static
    field = BatchedField(static.processor)
    slices = []
    for left, right in zip(edges, edges[1:], strict=False):
        seen = [i for i, t in enumerate(times) if left + 1e-9 < t <= right + 1e-9]
        here = np.minimum(times[seen], right)
        observed = np.eye(len(times))[seen].sum(axis=0)  # 1 where a target is in this slice
        # As many times in every slice, so that one program steps them all: the end, repeated.
        slices.append((left, right, np.append(here, [right] * (3 - len(seen))), observed))
    slices = [jnp.asarray(column) for column in zip(*slices, strict=True)]

    def loss(params, batch, weight):
        inputs, targets = batch.initial, batch.targets

        def step(u, a_slice):
            left, right, where, observed = a_slice
            data = jax.vmap(jax.vmap(lambda column: jnp.interp(left, times, column), 1))(targets)
            u = jnp.where(left > 0, weight * u + (1 - weight) * data, u)
            states = diffrax.diffeqsolve(
                diffrax.ODETerm(field), RK4(), left, right, None, u, params.processor,
                saveat=diffrax.SaveAt(ts=where),
                stepsize_controller=diffrax.StepTo(jnp.linspace(left, right, 5)),
            ).ys  # fmt: skip
            assert states is not None
            nth = jnp.clip(jnp.cumsum(observed) - 1, 0, 2).astype(int)
            errors = jnp.sum((states[nth] - jnp.moveaxis(targets, 1, 0)) ** 2, axis=(1, 2))
            return states[-1], jnp.sum(observed * errors)

        _, sums = jax.lax.scan(step, jnp.asarray(inputs), tuple(slices))
        return jnp.sum(sums) / (8 * 6 * 2)

    return loss


@pytest.mark.parametrize(
    "tracking",
    [pytest.param("", marks=TWO_OR_THREE), pytest.param("tracking = {}", marks=ALONE)],
)
def test_relaxed_slices_start_between_the_last_end_and_the_data(
    comms, on_one_rank, source, tracking
):
    """Loss and gradient of the definition, whatever the weight; then training goes on whole."""
    options = "relaxation = { steps = 4, start = 0.2 }\n" + tracking
    experiment = set_up(parse_config(small_config(source, EXACT + options)), comms)
    stepper, state = make_stepper(experiment), fresh_state(experiment)
    batch = experiment.batch(0)
    exact = jax.jit(jax.value_and_grad(relaxed_loss(experiment)))
    for step, weight in ((0, 0.2), (2, 0.6), (4, 1.0), (9, 1.0)):
        taken = stepper.take(state, batch, step)
        loss, gradient = on_one_rank(lambda weight=weight: exact(state.params, batch.data, weight))
        bound = 1e-2 if tracking else 1e-9
        assert float(taken.report.loss) == pytest.approx(float(loss), rel=bound)
        assert relative_error(experiment.update.whole_params(taken.gradient), gradient) < bound
    assert stepper.n_compiled() == 1


@TWO
def test_the_relative_error_counts_every_rank_once(comms, source):
    """Also those in whose slices nothing is observed."""
    text = small_config(source, 'method = "serial"', horizon=6.0)  # seen until 2
    experiment = set_up(parse_config(text), comms)
    params = fresh_state(experiment).params
    scores = evaluate(comms, experiment, params)
    batch = experiment.test.take(np.arange(6))
    targets = np.asarray(batch.targets)
    run = make_evaluation(experiment.test_problem, predicts=True)
    means, states = run(params, batch, True)
    assert means["loss"].value() == pytest.approx(scores["loss"], rel=1e-12)
    parts = comms.control.allgather((experiment.test_problem.observations.indices, states))
    squares = sum(
        np.sum((np.asarray(part) - np.moveaxis(targets[:, indices], 1, 0)) ** 2)
        for indices, part in parts
    )
    wanted = np.sqrt(squares / np.sum(targets[:, 1:] ** 2))
    assert scores["relative_error"] == pytest.approx(wanted, rel=1e-12)
    assert scores["loss"] == pytest.approx(squares / targets[:, 1:].size, rel=1e-12)
    assert len(parts[-1][0]) == 0


@TWO
def test_the_training_split_is_scored_without_relaxation(comms, on_one_rank, source):
    text = small_config(source, EXACT + "relaxation = { steps = 4 }")
    experiment = set_up(parse_config(text), comms)
    params = fresh_state(experiment).params
    untested = experiment._replace(test=None, test_problem=None)  # only the other split is read
    scores = evaluate(comms, untested, params, split="train")
    samples = experiment.train.take(np.arange(experiment.train.n_rows))
    serial = on_one_rank(lambda: float(jax.jit(make_plain_loss(experiment))(params, samples)))
    assert scores["loss"] == pytest.approx(serial, rel=1e-9)
