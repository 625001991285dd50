"""Clocks against loops and counts, costs by hand, published times, sweeps of a config."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.bench.planning.clocks import COARSE, Clocks
from nodepint_mpi.bench.planning.costs import COMPOSED, for_share, read_costs, with_slices
from nodepint_mpi.bench.planning.lines import Layout
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.recording import StepRecorder
from nodepint_mpi.bench.planning.replay import Costs, simulate_step
from nodepint_mpi.bench.planning.stages import Sweeps
from nodepint_mpi.bench.planning.validation import format_validation, validate
from nodepint_mpi.bench.studies.measures import Curve
from nodepint_mpi.bench.studies.model import make_model
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.partition import own_slices
from nodepint_mpi.core.sweeps import count_unsolved
from nodepint_mpi.errors import DataError
from tests.training.small_config import small_config

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.standard_promotion]

FREE = Network(0.0, math.inf)
TRACKED = "tracking = {}\n"
BASIS = 'basis = { kind = "pod", rank = 2, new = 1 }\n'
N = 7  # slices


@pytest.fixture
def recorder(source):
    """`recorder(method, options)`: of a small config."""

    def made(method, options=TRACKED):
        text = small_config(source, f'method = "{method}"\n{options}')
        return StepRecorder.of(parse_config(text))

    return made


def test_a_walk_is_what_a_loop_over_the_ranks_gives():
    rng, network = np.random.default_rng(0), Network(0.25, 100.0)
    for n_ranks in (1, 2, 7, 40):
        for rightwards in (True, False):
            clocks = Clocks(n_ranks, n_ranks, 1, network)
            clocks.now = rng.uniform(0, 5, n_ranks)
            took, now = rng.uniform(0, 1, n_ranks), clocks.now.copy()
            clocks.walk({COARSE: took}, 50.0, rightwards=rightwards)
            arrival = -math.inf
            for rank in range(n_ranks) if rightwards else reversed(range(n_ranks)):
                now[rank] = max(now[rank], arrival) + took[rank]
                arrival = now[rank] + 0.25 + 50.0 / 100.0
            np.testing.assert_allclose(clocks.now, now, rtol=1e-13)


def test_slices_that_are_propagated_are_those_the_sweep_counts():
    edges = np.linspace(0.0, 1.0, 12)
    for n_ranks in (1, 2, 3):
        for at_once in (None, 1, 2, 3):
            for front in range(12):
                clocks = Clocks(11, n_ranks, 1, FREE)
                counted = [
                    int(
                        count_unsolved(
                            jnp.array(front), own_slices(edges, n_ranks, rank), at_once=at_once
                        )
                    )
                    for rank in range(n_ranks)
                ]
                assert clocks.unsolved(front, at_once).tolist() == counted


SECONDS = {
    "fine_forward": [2.0, 4.0], "fine_adjoint": [6.0, 6.0], "tangents": [0.0, 0.0],
    "coarse": [0.9, 0.9], "other": [0.5, 0.7], "send": [1.0, 1.0],
}  # fmt: skip


def test_costs_are_read_from_the_phases_of_all_ranks(recorder):
    made = recorder("parareal")
    costs = read_costs(SECONDS, made.line(Layout(2)), Sweeps(), made.coarse_in_fine())
    assert costs.fine_s == pytest.approx(6.0 / N) and costs.pulled_s == pytest.approx(12.0 / N)
    # A pull-back counts twice.
    assert costs.coarse_s == pytest.approx(1.8 / (3 * N))
    assert costs.copulled_s == pytest.approx(2 * costs.coarse_s)
    assert costs.other_s == pytest.approx(0.6)
    assert costs.tangent_s == costs.recurrence_s == costs.compose_s == 0
    # Twice the sweeps, each with an update; and the same on two lines of one rank.
    twice = read_costs(SECONDS, made.line(Layout(2)), Sweeps(n_updates=2), None)
    assert twice.fine_s == pytest.approx(3.0 / N) and twice.other_s == pytest.approx(0.3)
    lines = read_costs(SECONDS, made.line(Layout(1, 2)), Sweeps(), None)
    assert lines.fine_s == pytest.approx(3.0 / N) and lines.other_s == pytest.approx(0.6)
    with pytest.raises(DataError, match="no time-parallel fine solves"):
        read_costs(SECONDS | {"fine_forward": [0.0, 0.0]}, made.line(Layout(2)), Sweeps(), None)


def test_costs_of_tangents_are_those_of_a_pass_and_of_a_map(recorder):
    made, spent = recorder("tangent", TRACKED + BASIS), SECONDS | {"tangents": [1.2, 1.2]}
    alone = read_costs(spent, made.line(Layout(1)), Sweeps(), made.coarse_in_fine())
    # A new direction in a sweep, beside the state; two coarse problems forward and one back.
    assert alone.tangent_s == pytest.approx(2.4 / (2 * N))
    assert alone.recurrence_s == pytest.approx(1.8 / (3 * N)) and alone.coarse_s == 0
    assert alone.compose_s == COMPOSED * alone.recurrence_s
    # Where nothing is pushed, what is done with old tangents is taken for fine work.
    kept = recorder("tangent", TRACKED + 'basis = { kind = "identity" }\n')
    costs = read_costs(spent, kept.line(Layout(1)), Sweeps(), None)
    assert costs.tangent_s == 0 and costs.fine_s == pytest.approx((6.0 + 2.4) / N)


def test_costs_beside_solves_belong_to_slices_times_batches_and_turns(recorder):
    """What a rank does once, for its slices, or for the eight times that it observes."""
    made = recorder("tangent", TRACKED + BASIS)
    spent = SECONDS | {
        "tangents": [1.2, 1.2], "sweep": [1.0, 1.8], "snapshots": [0.3, 0.4], "factor": [0.5, 0.5],
        "encoder": [0.25, 0.0], "loss": [0.4, 0.5],
    }  # fmt: skip
    costs = read_costs(spent, made.line(Layout(2)), Sweeps(), None)
    assert costs.sweep_s == pytest.approx(2.8 / (2 * N))  # forward and back
    assert costs.snapshot_s == pytest.approx(0.7 / N) and costs.factor_s == pytest.approx(0.5)
    assert costs.encoder_s == pytest.approx(0.25) and costs.loss_s == pytest.approx(0.9 / 8)
    # A step of these alone: the first rank of two encodes and has 4 slices, the other one 3.
    line = made.line(Layout(2))
    alone = Costs(*[0.0] * len(costs))
    encoded = simulate_step(line, alone._replace(encoder_s=0.25), Sweeps(), FREE)
    assert encoded.step_s == 0.25 and encoded.shares["wait"] == pytest.approx(0.5)
    swept = simulate_step(line, alone._replace(sweep_s=1.0), Sweeps(), FREE)
    assert swept.step_s == 8.0 and swept.shares["wait"] == pytest.approx(1 / 8)
    turned = simulate_step(line, alone._replace(factor_s=0.5), Sweeps(), FREE)
    assert turned.step_s == 0.5 and turned.shares["wait"] == 0


def test_coarse_steps_and_maps_share_the_coarse_phase_by_field_evaluations(recorder):
    once = 'stopping = { rule = "sweeps", sweeps = 1 }\nadjoint = { sweeps = 0 }\n'
    made = recorder("tangent", once + BASIS)
    share = made.coarse_in_fine()
    assert share == 2 / 16  # two steps of Euler, four of RK4
    spent = SECONDS | {"tangents": [1.2, 1.2], "coarse": [10.0, 10.0]}
    costs = read_costs(spent, made.line(Layout(1)), Sweeps(1, 0), share)
    # One sweep propagates all slices, which are then linearized.
    assert costs.fine_s == pytest.approx(6.0 / (2 * N))
    assert costs.coarse_s == pytest.approx(costs.fine_s / 8)
    # The coarse solution and its pull-back; two coarse problems.
    n_coarse = N + 2 * N
    assert costs.recurrence_s == pytest.approx((20.0 - n_coarse * costs.coarse_s) / (2 * N))
    # All of it is theirs where they explain more than there is.
    brief = read_costs(SECONDS | {"coarse": [0.1, 0.1]}, made.line(Layout(1)), Sweeps(1, 0), share)
    assert brief.coarse_s == pytest.approx(0.2 / n_coarse) and brief.recurrence_s == 0


def test_costs_of_a_share_lie_on_the_line_through_two_that_were_measured():
    whole = Costs(4.0, 8.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.5)
    half = Costs(3.0, 4.0, 0.0, 0.6, 1.0, 0.0, 0.0, 0.4)
    quarter = for_share(whole, half, 0.25)
    assert quarter.fine_s == pytest.approx(2.5) and quarter.pulled_s == pytest.approx(2.0)
    assert for_share(whole, half, 1.0) == pytest.approx(whole)
    assert for_share(whole, half, 0.5) == pytest.approx(half)
    finer = with_slices(whole, 12 / 24)
    assert 24 * finer.fine_s == 12 * whole.fine_s and finer.coarse_s == whole.coarse_s


def test_published_speed_ups_are_met_within_a_tenth():
    rows = validate()
    assert len(rows) == 34 and {row["cores"] for row in rows} >= {64, 128, 235, 256, 512}
    for row in rows:
        assert row["ratio"] == pytest.approx(1.0, abs=0.1), row
    # The training of nearest neighbors, and not sweeps, is what makes these slower than serial.
    slow = next(row for row in rows if row["problem"].endswith("1568") and row["sweeps"] == 20)
    assert slow["measured"] < 0.5 and slow["model"] < 0.5
    assert "model over measured: 0.9" in format_validation(rows)


def test_how_a_step_sweeps_is_read_from_the_config(recorder):
    assert recorder("parareal", "").sweeps((2.2, 1.0)) == Sweeps(2, 1, judged=True)
    # After as many sweeps as there are slices nothing is left to judge.
    assert recorder("parareal", "").sweeps((7, 1)) == Sweeps(7, 1, judged=False)
    limited = recorder("parareal", "stopping = { max_sweeps = 2 }\n")
    assert not limited.sweeps((2, 0)).judged and limited.sweeps((1, 0)).judged
    for rule in ('rule = "sweeps", sweeps = 2', 'rule = "freeze_end", tol = 1e-3'):
        assert not recorder("parareal", f"stopping = {{ {rule} }}\n").sweeps((2, 0)).judged
    assert recorder("tangent", TRACKED + BASIS).sweeps((2.0, 2.0)) == Sweeps(n_updates=2)


def test_other_slices_have_the_same_horizon(recorder):
    edges = [0.0, 0.1, 0.5, 0.6, 0.7, 0.8, 1.5, 2.0]
    made = recorder("parareal", f"edges = {edges}\n").with_slices(4)
    assert made.config.time.edges == [0.0, 0.5, 1.0, 1.5, 2.0]
    line = made.line(Layout(4))
    assert line.n_slices == 4 and line is made.line(Layout(4))
    assert made.with_slices(4) is made


def test_a_curve_is_modelled_by_the_costs_of_its_first_point(source, tmp_path):
    text = small_config(source, f'method = "parareal"\n{TRACKED}')
    (tmp_path / "config.toml").write_text(text)
    phases = {name: {"ranks": ranks[:1]} for name, ranks in SECONDS.items()}
    (tmp_path / "phases.json").write_text(json.dumps({"phases_s": phases}))
    first = {
        "run": str(tmp_path), "point": "first", "state": "finished", "oversubscribed": False,
        "step_s": {"max": 9.4}, "n_ranks": 1, "data_ranks": 1, "basis_ranks": 1,
        "n_slices": N, "batch_size": None,
        "phases_s": {}, "profiled": {"sweeps": [1.0, 1.0]},
    }  # fmt: skip
    model = make_model(Curve("study", "strong", "", [first], {}), FREE)
    assert model is not None
    # All that is not a message: 2 s of fine solves, 6 of pull-backs, 0.9 of coarse steps, the rest.
    assert model(first).step_s == pytest.approx(2.0 + 6.0 + 0.9 + 0.5)
    several = model(first | {"n_ranks": N})
    assert several.step_s == pytest.approx(8.0 / N + 0.9 + 0.5)
    assert set(several.shares) == {"fine", "coarse", "messages", "idle", "other"}
    # Twice as many slices of the same length: each rank has as much to do, coarse steps are more.
    longer = model(first | {"n_ranks": 2 * N, "n_slices": 2 * N})
    assert longer.step_s == pytest.approx(8.0 / N + 2 * 0.9 + 0.5)
    # Two lines, each with half of the samples.
    lines = model(first | {"n_ranks": 2 * N, "data_ranks": 2})
    assert lines.step_s == pytest.approx((8.0 / N + 0.9) / 2 + 0.5)
    # Parareal has no tangents to share: pairs of ranks do the same.
    pairs = model(first | {"n_ranks": 2 * N, "basis_ranks": 2})
    assert pairs.step_s == several.step_s
