"""Recorded steps: their counts against those of real ranks, their clocks against sums by hand."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from nodepint_mpi.bench.planning.clocks import COARSE, FINE, MESSAGES, OTHER, PARTS, WAIT, Clocks
from nodepint_mpi.bench.planning.lines import Layout, Run, imagined_line, record_line, traced
from nodepint_mpi.bench.planning.network import Network
from nodepint_mpi.bench.planning.recording import StepRecorder
from nodepint_mpi.bench.planning.replay import Costs, replay, simulate_step
from nodepint_mpi.bench.planning.stages import Sweeps, align, count_work
from nodepint_mpi.bench.planning.validation import parareal_line
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.scopes import COARSE as COARSE_PHASE
from nodepint_mpi.core.scopes import FINE_FORWARD, TANGENTS
from nodepint_mpi.errors import DataError, LayoutError
from nodepint_mpi.parallel.comms import free_comms, make_comms, world
from nodepint_mpi.parallel.counters import Tally
from nodepint_mpi.parallel.exchange import max_over_ranks, recv_left, send_right, shift_right
from nodepint_mpi.parallel.levels import Levels
from nodepint_mpi.parallel.operations import Call
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.small_config import small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

N = 7  # slices
FREE = Network(0.0, math.inf)
NOTHING = Costs(*[0.0] * 8)

TWICE = 'stopping = { rule = "sweeps", sweeps = 2 }\nadjoint = { sweeps = 1 }\n'
TRACKED = "tracking = { bound = 1e9, check_every = 0 }\n"
SHARED = 'basis = { kind = "pod", rank = 2, new = 1%s }\n'
OWN = Path(__file__).parents[2] / "docs" / "examples" / "relaxed_parareal.py"
METHODS = {
    "serial": "serial",
    "picard": "picard",
    "parareal": "parareal",
    "parareal, one by one": "parareal",
    "parareal, two levels": "parareal",
    "tangent": "tangent",
    "tangent, by blocks": "tangent",
    "tangent, by scan": "tangent",
    "tangent, all directions": "tangent",
    "tangent, completed": "tangent",
    "reduced": "reduced",
    "reduced, completed": "reduced",
    "one's own": f"{OWN}:make_method",
}
OPTIONS = {
    "parareal, one by one": "slices_at_once = 1\n",
    "parareal, two levels": "levels = { coarsening = 3 }\n",
    "tangent": SHARED % "",
    "tangent, by blocks": SHARED % ', recurrence = "blocks"',
    "tangent, by scan": SHARED % ', recurrence = "scan"',
    "tangent, all directions": 'basis = { kind = "identity", recycle = false }\n',
    "tangent, completed": 'basis = { kind = "pod", rank = 1, new = 1, complement = true }\n',
    "reduced": SHARED % "",
    "reduced, completed": 'basis = { kind = "pod", rank = 1, new = 1, complement = true }\n',
}
TWO = pytest.mark.mpi(2, 2)  # one has no messages to count, more of them compile for a minute


def config_of(source, name, options=TWICE):
    text = f'method = "{METHODS[name]}"\n{OPTIONS.get(name, "")}{options}'
    return parse_config(small_config(source, text))


def counted_on(comms, config, n_steps=1):
    """What every rank of the line counts in the last of a few steps, and its report."""
    experiment = set_up(config, comms)
    stepper, state = make_stepper(experiment), fresh_state(experiment)
    taken = stepper.take(state, experiment.batch(0), 0)
    for step in range(1, n_steps):
        taken = stepper.take(taken.state, experiment.batch(step), step)
    sweeps = int(taken.report.sweeps), int(taken.report.adjoint_sweeps)
    return comms.time.mpi.allgather(tuple(taken.tally)), sweeps


def recorded_counts(line, sweeps):
    """The same of every rank as recorded; it may have repeated the step."""
    work = count_work(line, sweeps)
    return [
        tuple(
            round(sum(float(of_ranks[rank]) for (_, n), of_ranks in work.items() if n == name))
            for name in Tally._fields
        )
        for rank in range(line.layout.n_time)
    ]


def check_recorded(comms, config, layout, counted, sweeps):
    """On the first rank: the others know the same counts, and need not trace the step too."""
    if comms.control.rank == 0:
        recorder = StepRecorder.of(config)
        line = recorder.line(layout)
        assert recorded_counts(line, recorder.sweeps(sweeps)) == counted


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=TWO if name != "tangent, by scan" else pytest.mark.mpi(2, 3))
        for name in METHODS
    ],
)
def test_what_imagined_ranks_do_is_what_real_ranks_count(comms, source, name):
    config = config_of(source, name)
    counted, sweeps = counted_on(comms, config)
    check_recorded(comms, config, Layout(comms.time.size), counted, sweeps)


# Each method that can track, with its simplest options: the others are counted above.
@TWO
@pytest.mark.parametrize(
    "name",
    [
        "picard", "parareal", "parareal, two levels", "tangent", "tangent, all directions",
        "reduced", "one's own",
    ],
)  # fmt: skip
def test_tracked_steps_do_what_real_ranks_count(comms, source, name):
    config = config_of(source, name, TRACKED)
    counted, sweeps = counted_on(comms, config, n_steps=2)  # the first knows no basis yet
    assert sweeps == (1, 1)
    check_recorded(comms, config, Layout(comms.time.size), counted, sweeps)


@TWO
@pytest.mark.parametrize(
    ("rule", "n_sweeps"), [('rule = "jump", tol = 1e9', 0), ('rule = "freeze_end", tol = 1e9', 1)]
)
def test_a_solve_that_is_judged_at_last_does_what_real_ranks_count(comms, source, rule, n_sweeps):
    options = f"stopping = {{ {rule} }}\nadjoint = {{ sweeps = 0 }}\n"
    config = config_of(source, "picard", options)
    counted, sweeps = counted_on(comms, config)
    assert sweeps == (n_sweeps, 0)
    check_recorded(comms, config, Layout(comms.time.size), counted, sweeps)


@pytest.mark.mpi(sizes=(2, 4))
def test_lines_that_share_the_samples_do_what_real_ranks_count(source):
    n_lines = world().size if world().size == 3 else 2
    comms = make_comms(world(), n_groups=n_lines)
    try:
        config = config_of(source, "parareal")
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"data_ranks": n_lines})}
        )
        counted, sweeps = counted_on(comms, config)
        check_recorded(comms, config, Layout(comms.time.size, n_lines), counted, sweeps)
    finally:
        jax.effects_barrier()
        free_comms(comms)


@TWO
@pytest.mark.parametrize(
    ("name", "options", "n_steps"), [("tangent", TWICE, 1), ("tangent, all directions", TRACKED, 2)]
)
def test_ranks_that_share_tangents_do_what_the_first_of_them_counts(source, name, options, n_steps):
    comms = make_comms(world(), n_basis=2)
    try:
        config = config_of(source, name, options)
        counted, sweeps = counted_on(comms, config, n_steps)
        check_recorded(comms, config, Layout(1, 1, 2), counted, sweeps)
    finally:
        jax.effects_barrier()
        free_comms(comms)


ALONE = pytest.mark.mpi(max_size=1)


@pytest.fixture
def recorder(source):
    """`recorder(name, options)`: of one of the methods."""
    return lambda name, options=TRACKED: StepRecorder.of(config_of(source, name, options))


@ALONE
def test_a_solve_takes_the_seconds_found_by_hand():
    """Parareal on three slices and ranks, two sweeps; F takes 1 s, G 0.25 s, a message 0.5 s."""
    line, clocks = parareal_line(3), Clocks(3, 3, 1, Network(0.5, math.inf))
    replay(clocks, line, NOTHING._replace(fine_s=1.0, coarse_s=0.25), Sweeps(2, back=0))
    # G: 0.25 | 1 | 1.75. Slices guarded: a tree of two levels, down and up, 2 s: 3.75.
    # F at once: 4.75. Jumps: 6.75. The correction starts with the second slice, whose left
    # neighbor sends what F gave: 6.75 | 7.25 + 0.25 = 7.5 | 8 + 0.25 = 8.25. Updates: 10.25.
    # F of the last two: 11.25. Jumps: 13.25. Now only the third is corrected: 13.25 | 13.75
    # | 14.25 + 0.25 = 14.5. Updates: 16.5.
    assert clocks.now.tolist() == [16.5] * 3
    spent = {part: of_ranks.tolist() for part, of_ranks in clocks.spent.items()}
    assert spent[FINE] == [1.0, 2.0, 2.0]
    assert spent[COARSE] == [0.25, 0.25 + 0.25, 0.25 + 0.25 + 0.25]
    assert all(sum(spent[part][rank] for part in PARTS) == 16.5 for rank in range(3))


@ALONE
def test_a_walk_in_two_levels_takes_the_seconds_found_by_hand():
    """Seven slices in groups of three on as many ranks; G and H take 1 s, a message 10 s."""
    line, clocks = parareal_line(7, Levels(3)), Clocks(7, 7, 1, Network(10.0, math.inf))
    replay(clocks, line, NOTHING._replace(coarse_s=1.0), Sweeps(0, back=0))
    # H over two groups, on ranks 0 and 3: 1 | 12 | and to rank 6: 22.
    # Within the groups from ranks 0, 3, 6: 2, 13, 24 | 13, 24, 35 | 23.
    # Starts go to the left neighbor, all at once: who waits for whom, and what that takes.
    within = np.array([2.0, 13.0, 24.0, 13.0, 24.0, 35.0, 23.0])
    before_tree = np.array(
        [max(within[r], within[min(r + 1, 6)]) + 10.0 for r in range(6)] + [within[6] + 10.0]
    )
    assert clocks.now.max() == max(before_tree) + 2 * 3 * 10.0  # slices guarded, by a tree


@ALONE
def test_deep_lines_take_the_depth_of_two_levels():
    """A rank for every slice, messages that cost nothing: groups, and slices of a group."""
    n, m = 4096, 64
    clocks = Clocks(n, n, 1, FREE)
    replay(clocks, parareal_line(n, Levels(m)), NOTHING._replace(coarse_s=1.0), Sweeps(1, back=0))
    # Iteration 0: 63 groups passed by H, 64 slices. The sweep: 63 slices of the first group, whose
    # first slice is solved; 62 groups, since the first has not changed; 64 slices.
    assert clocks.now.max() == (n // m - 1) + m + (m - 1) + (n // m - 2) + m


@ALONE
@pytest.mark.parametrize("rightwards", [True, False])
@pytest.mark.parametrize(("n_slices", "n_time", "m"), [(7, 2, 3), (7, 3, 5), (11, 4, 2), (9, 9, 4)])
def test_clocks_within_groups_are_those_of_ranks_one_after_the_other(
    n_slices, n_time, m, rightwards
):
    clocks = Clocks(n_slices, n_time, 1, Network(0.5, math.inf))
    clocks.now = np.random.default_rng(0).uniform(size=n_time)
    first, owned, ready = clocks.first, clocks.owned, clocks.now.copy()
    blocks = [range(a, a + b) for a, b in zip(first, owned, strict=True)]
    order = range(n_time) if rightwards else range(n_time - 1, -1, -1)
    sent, wanted = np.zeros(n_time), np.zeros(n_time)
    for rank in order:  # one slice takes a second
        block = blocks[rank] if rightwards else blocks[rank][::-1]
        opens = [n % m == 0 if rightwards else n % m == m - 1 or n == n_slices - 1 for n in block]
        late = opens.index(True) if True in opens else len(block)
        wanted[rank] = sent[rank] = ready[rank] + len(block) - late
        if late:
            neighbor = rank - 1 if rightwards else rank + 1
            wanted[rank] = max(wanted[rank], sent[neighbor] + 0.5) + late
        if late == len(block):
            sent[rank] = wanted[rank]
    clocks.walk_within({COARSE: owned.astype(float)}, 8, m, rightwards=rightwards)
    np.testing.assert_allclose(clocks.now, wanted, rtol=1e-14)
    passed = sum(clocks.spent[part] for part in PARTS)
    np.testing.assert_allclose(passed, wanted - ready, rtol=1e-12)


@ALONE
@pytest.mark.parametrize(
    ("n_slices", "n_sweeps", "ratio"), [(10, 1, 0.1), (64, 6, 0.03), (128, 13, 0.002), (9, 9, 0.5)]
)
def test_a_solve_takes_what_the_cost_model_of_parareal_says(n_slices, n_sweeps, ratio):
    clocks = Clocks(n_slices, n_slices, 1, FREE)
    costs = NOTHING._replace(fine_s=1.0, coarse_s=ratio)
    replay(clocks, parareal_line(n_slices), costs, Sweeps(n_sweeps, back=0))
    # S = [K/N + (K + 1)(1 - K/2N) T_C/T_F]^-1 with a rank for every slice. The walk of the last
    # sweep but N finds nothing left of it to do.
    k, n = n_sweeps, n_slices
    speed_up = 1 / (k / n + (k + 1) * (1 - k / (2 * n)) * ratio)
    assert n_slices / clocks.now.max() == pytest.approx(speed_up, rel=1e-12)


@ALONE
def test_a_hundred_thousand_ranks_are_no_trouble():
    n = 100_000
    line, clocks = parareal_line(n), Clocks(n, n, 1, Network(1e-6, math.inf))
    replay(clocks, line, NOTHING._replace(fine_s=1.0, coarse_s=1e-6), Sweeps(1, back=0))
    # Two walks, of which the second skips the first slice; messages from rank to rank; fine
    # solves; and three sums along trees of 17 levels.
    walked = (2 * n - 1) * 1e-6 + 2 * (n - 1) * 1e-6
    assert clocks.now.max() == pytest.approx(1.0 + walked + 3 * 2 * 17e-6, rel=1e-9)


@ALONE
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [TRACKED, TWICE], ids=["tracked", "anew"])
def test_what_ranks_spend_adds_up_to_the_time_that_passes(recorder, name, options):
    costs = Costs(1.0, 2.0, 0.5, 0.1, 0.2, 0.01, 0.02, 0.3)
    made = recorder(name, options)
    for layout in (Layout(1), Layout(3), Layout(7)):
        found = simulate_step(made.line(layout), costs, made.sweeps((2, 1)), Network(1e-3, 1e6))
        assert min(found.shares.values()) >= 0
        assert sum(found.shares.values()) == pytest.approx(1.0)
        if layout.n_ranks == 1:
            assert found.shares[MESSAGES] + found.shares[WAIT] < 1e-12


@ALONE
def test_with_a_free_network_and_coarse_propagator_ranks_divide_the_work(recorder):
    costs, made = NOTHING._replace(fine_s=1.0, pulled_s=2.0), recorder("parareal")
    for n_time, widest in ((1, 7), (3, 3), (5, 2), (7, 1)):
        found = simulate_step(made.line(Layout(n_time)), costs, Sweeps(), FREE)
        assert found.step_s == pytest.approx(widest * 3.0)
    with pytest.raises(LayoutError, match="8 ranks cannot share 7 time slices"):
        made.line(Layout(8))


@ALONE
def test_tracked_steps_that_sweep_twice_take_twice_as_long_and_one_rank_sends_nothing(recorder):
    costs, made = Costs(1.0, 2.0, 0.0, 0.1, 0.2, 0.0, 0.0, 0.7), recorder("parareal")
    line, network = made.line(Layout(4)), Network(1e-2, 1e3)
    once = simulate_step(line, costs, made.sweeps((1, 1)), network)
    twice = simulate_step(line, costs, made.sweeps((2.2, 2.2)), network)
    assert twice.step_s == pytest.approx(2 * once.step_s, rel=1e-3)
    alone = simulate_step(made.line(Layout(1)), costs, Sweeps(), Network(100.0, 1.0))
    assert alone.step_s == pytest.approx(7 * (1.0 + 2.0 + 0.1 + 0.2) + 0.7)
    assert alone.shares[OTHER] == pytest.approx(0.7 / alone.step_s)


@ALONE
@pytest.mark.parametrize(
    ("name", "n_time", "n_data", "messages"),
    [
        # A state from rank to rank and a cotangent back; a sum to one rank and from it.
        ("parareal", 2, 1, 1 + 1 + 2),
        ("parareal", 4, 1, 3 + 3 + 2 * 2),
        ("parareal", 4, 2, 3 + 3 + 2 * 3),
        # Neighbors at once: states and cotangents that the last step has left.
        ("picard", 4, 1, 2 + 2 * 2),
    ],
)
def test_messages_on_the_longest_path_are_those_counted_by_hand(
    recorder, name, n_time, n_data, messages
):
    line = recorder(name).line(Layout(n_time, n_data), n_samples=2)
    found = simulate_step(line, NOTHING, Sweeps(), Network(1.0, math.inf))
    assert found.step_s == pytest.approx(messages)


@ALONE
def test_ways_of_the_coarse_problem_differ_by_the_messages_counted_by_hand(recorder):
    found = {
        way: simulate_step(
            recorder(name).line(Layout(4)), NOTHING, Sweeps(), Network(1.0, math.inf)
        ).step_s
        for way, name in (
            ("slices", "tangent"), ("blocks", "tangent, by blocks"), ("scan", "tangent, by scan")
        )
    }  # fmt: skip
    # A coarse problem each way at once, and one forward by new tangents. Gathered and dealt out
    # along trees of two levels; besides, all agree on whether a correction was too long, by such a
    # tree there and back; or two rounds and a shift to the neighbor, for each way, in place of
    # gathering and dealing.
    assert found["blocks"] - found["slices"] == pytest.approx(2 * 2 * 2)
    assert found["scan"] - found["blocks"] == pytest.approx((3 - 4) + (2 * 3 - 4))


@ALONE
def test_ways_of_the_coarse_problem_walk_and_compose_so_many_maps(recorder):
    costs = NOTHING._replace(recurrence_s=1.0, compose_s=10.0)
    for name, forward, at_once in (
        ("tangent", 7.0, 2 * 7.0),  # all on the first rank
        # Two slices a rank, then four blocks on the first rank, then two slices. Both ways at once
        # the two slices are composed once, and walked through once more for the vector back.
        ("tangent, by blocks", 10.0 + 4.0 + 2.0, 10.0 + 2.0 + 2 * 4.0 + 2 * 2.0),
        # A map of the rank before, a vector of the second before, then two slices.
        ("tangent, by scan", 10.0 + 11.0 + 2.0, 10.0 + 2.0 + 2 * 11.0 + 2 * 2.0),
    ):
        made = recorder(name)
        found = simulate_step(made.line(Layout(4)), costs, Sweeps(), FREE)
        assert found.step_s == forward + at_once
        assert simulate_step(made.line(Layout(1)), costs, Sweeps(), FREE).step_s == 3 * 7.0


@ALONE
def test_tangents_are_recorded_by_direction(recorder):
    """One new direction a sweep takes two passes, one of them for the state."""
    tracked = count_work(recorder("tangent").line(Layout(3)), Sweeps())
    assert tracked[TANGENTS, "tangents"].tolist() == [3, 2, 2]
    assert tracked[TANGENTS, "tangent_passes"].tolist() == [6, 4, 4]
    anew = count_work(recorder("tangent", TWICE).line(Layout(1)), Sweeps(2, 1))
    # Both directions of the first basis, then a new one in each of two sweeps.
    assert anew[TANGENTS, "tangents"].tolist() == [7 * (2 + 2 * 1)]
    assert anew[COARSE_PHASE, "walked"].tolist() == [7 * (2 * 2 + 1)]
    assert anew[FINE_FORWARD, "fine"].tolist() == [7 + 7 + 7]


@ALONE
def test_ranks_that_do_not_call_together_are_found():
    def mismatched(comm, value):
        return shift_right(comm, value, value) if comm.rank == 0 else max_over_ranks(comm, value)

    def stuck(comm, value):
        value = recv_left(comm, value)
        return max_over_ranks(comm, value)

    def walked(comm, value):
        send_right(comm, recv_left(comm, value))

    def recorded(step):
        layout = Layout(2)
        return record_line(
            2, layout,
            lambda rank: traced(lambda v: step(imagined_line(layout, rank), v), np.zeros(2)),
        )  # fmt: skip

    with pytest.raises(DataError, match="do not make the same calls"):
        align(recorded(mismatched).runs)
    for step, message in ((stuck, "where it should end"), (None, "without having received")):
        line = recorded(walked)
        if step is not None:
            line = recorded(step)
        else:
            line = line._replace(runs=(Run(0, 2, (Call("send_right", 16),)),))
        with pytest.raises(DataError, match=message):
            replay(Clocks(2, 2, 1, FREE), line, NOTHING, Sweeps())
    clocks = Clocks(2, 2, 1, Network(1.0, math.inf))
    replay(clocks, recorded(walked), NOTHING, Sweeps())
    assert clocks.now.tolist() == [0.0, 1.0]
