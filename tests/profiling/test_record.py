"""Counts by hand, phases of made-up profiles, and the record of a short run on any ranks."""

import functools
import json

import jax
import numpy as np
import pytest

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.core.scopes import (
    CELL,
    COARSE,
    FINE_FORWARD,
    GRID,
    LINE,
    RECEIVE,
    REDUCE,
    SEND,
    SWEEP,
    every,
)
from nodepint_mpi.core.scopes import RIGHTWARDS as RIGHT
from nodepint_mpi.parallel.counters import WORD_BYTES, Tally
from nodepint_mpi.profiling import sampling
from nodepint_mpi.profiling.equivalents import work_equivalents
from nodepint_mpi.profiling.record import STEP_PHASES, record_times, reduced, write_times
from nodepint_mpi.profiling.timers import COMPILING, CompileClock, Timers
from nodepint_mpi.profiling.trace import Call, Op, Profile, Span, attribute, read_program
from nodepint_mpi.profiling.waits import WAIT, split_waits
from nodepint_mpi.training.error_control import make_stepper
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.small_config import small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]

N, SAMPLES, STATE_BYTES = 7, 6, 6 * 2 * 8
# Two sweeps forward propagate 7 and 6 slices, and all 7 once more to be linearized; two adjoint
# sweeps pull back three times, the last to judge what they left. Corrections walk likewise.
ANEW = 'stopping = { rule = "sweeps", sweeps = 2 }\nadjoint = { sweeps = 2 }\n'
TRACKED = "tracking = { bound = 1e9, check_every = 0 }\n"
ONE_BY_ONE = "slices_at_once = 1\n"
IDENTITY = 'basis = { kind = "identity" }\n'
SWEPT = Tally(fine=7 + 6 + 7, fine_pulled=3 * 7)
FOLLOWED = Tally(fine=7, fine_pulled=7)
CASES = {
    "picard": (ANEW, SWEPT),
    # The coarse solution and two corrections, each way; forward not up to the front.
    "parareal": (ANEW, SWEPT._replace(coarse=7 + 6 + 5, coarse_pulled=3 * 7)),
    # Two directions a slice, once; the coarse solution to begin with.
    "tangent": (
        ANEW + IDENTITY,
        SWEPT._replace(tangents=2 * 7, tangent_passes=3 * 7, coarse=7, coarse_pulled=7),
    ),
    # Twice the flow from the old states and the walk on the first rank; its derivative.
    "reduced": (
        ANEW + IDENTITY, SWEPT._replace(coarse=7, coarse_pulled=7, reduced=2 * 7 + 7 + 6 + 3 * 7)
    ),
    "picard tracked": (TRACKED, FOLLOWED),
    "parareal tracked": (TRACKED, FOLLOWED._replace(coarse=7, coarse_pulled=7)),
}  # fmt: skip


def take_one(comms, source, name):
    """The first step of a case and its experiment."""
    options, _ = CASES[name]
    text = small_config(source, f'method = "{name.split()[0]}"\n{ONE_BY_ONE}{options}')
    experiment = set_up(parse_config(text), comms)
    taken = make_stepper(experiment).take(fresh_state(experiment), experiment.batch(1), 1)
    return experiment, taken


def sum_over(comms, tally):
    return Tally(*np.sum(comms.control.allgather(tuple(tally)), axis=0).tolist())


TWO = pytest.mark.mpi(2, 2)  # the others compile for a minute


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=TWO if name != "picard" else pytest.mark.mpi(max_size=3))
        for name in CASES
    ],
)
def test_slices_are_counted_as_by_hand_on_any_ranks(comms, source, name):
    experiment, taken = take_one(comms, source, name)
    total = sum_over(comms, taken.tally)
    assert total._replace(messages=0, words=0) == CASES[name][1]
    n_ranks, n_sent = comms.time.size, comms.control.allgather(taken.tally.messages)
    if n_ranks == 1:
        assert total[-2:] == (0, 0)
        return
    assert all(n_sent)
    n_numbers = sum(leaf.size for leaf in jax.tree.leaves(fresh_state(experiment).params))
    # On the first rank: the sum of gradient, loss, divisor and four misfits; back go parameters,
    # loss, these sums and the gradient's norm.
    update_bytes = 8 * ((n_ranks - 1) * (n_numbers + 6) + n_numbers + 8)
    if name == "parareal tracked":
        # A state from rank to rank each way; then the update.
        assert total.messages == 2 * (n_ranks - 1) + n_ranks
        words = 2 * (n_ranks - 1) * STATE_BYTES + update_bytes
        assert total.words * WORD_BYTES == words
    if name == "parareal":
        # States: three each way. Of all: slices guarded at first; three and five numbers a sweep;
        # the last jump; four numbers of each pull-back; the count. Then the update.
        assert total.messages == 6 * (n_ranks - 1) + n_ranks * (1 + 2 * 2 + 1 + 3 + 2)
        n_reduced = 1 + 2 * (3 + 5) + 1 + 3 * 4 + 1
        words = 6 * (n_ranks - 1) * STATE_BYTES + n_ranks * 8 * n_reduced + update_bytes
        assert total.words * WORD_BYTES == words


@pytest.mark.mpi(max_size=2)
def test_work_is_weighed_by_field_evaluations(comms, source):
    _, counted = CASES["parareal tracked"]
    text = small_config(source, 'method = "parareal"\n' + ONE_BY_ONE + TRACKED)
    solver = set_up(parse_config(text), comms).train_problem.solver
    # Two steps of Euler in place of four of RK4: an eighth.
    assert work_equivalents(solver, counted) == (7 + 7 / 8, 7 + 7 / 8)


def spans(*rows):
    return [Span(start, end, Op(phase, channel, box)) for start, end, phase, channel, box in rows]


@pytest.mark.mpi(max_size=1)
def test_a_moment_belongs_to_what_computes_then_to_messages_then_to_loops():
    profile = attribute(spans(
        (0.0, 10.0, COARSE, None, True),  # a loop
        (1.0, 3.0, FINE_FORWARD, None, False),
        (2.0, 6.0, RECEIVE, RIGHT, False),  # for one second beside the fine solve
        (7.0, 8.0, None, None, False),  # nameless, in the loop
        (9.0, 9.0, FINE_FORWARD, None, False),  # too short for the clock
        (12.0, 13.0, None, None, False),  # nameless, and in none
    ))  # fmt: skip
    assert profile.phases == {COARSE: 1 + 4, FINE_FORWARD: 2, RECEIVE: 3, "other": 1}
    assert profile.calls == [Call(RECEIVE, RIGHT, 4.0, 3.0)]


@pytest.mark.mpi(max_size=1)
def test_waiting_is_what_goes_beyond_the_briefest_rank():
    sent, received = Call(SEND, RIGHT, 1.0, 1.0), Call(RECEIVE, RIGHT, 5.0, 2.5)
    first = Profile({SEND: 1.0, REDUCE: 6.0}, [sent, Call(REDUCE, GRID, 6.0, 6.0)])
    second = Profile({RECEIVE: 2.5, REDUCE: 2.0}, [received, Call(REDUCE, GRID, 2.0, 2.0)])
    assert split_waits([first, second]) == [
        {SEND: 1.0, REDUCE: 2.0, WAIT: 4.0}, {RECEIVE: 0.5, REDUCE: 2.0, WAIT: 2.0}
    ]  # fmt: skip
    # Each a line of its own: the reduction joins all, but nobody receives from another line.
    apart = split_waits([first, second], n_groups=2)
    assert apart == [{SEND: 1.0, REDUCE: 2.0, WAIT: 4.0}, {RECEIVE: 2.5, REDUCE: 2.0}]
    # Two that share tangents, each a line of its own; and two such pairs along time.
    joined = [Profile({REDUCE: s}, [Call(REDUCE, CELL, s, s)]) for s in (6.0, 2.0, 3.0, 4.0)]
    assert split_waits(joined[:2], n_basis=2) == [{REDUCE: 2.0, WAIT: 4.0}, {REDUCE: 2.0}]
    assert split_waits(joined, n_basis=2)[2:] == [{REDUCE: 3.0}, {REDUCE: 3.0, WAIT: 1.0}]
    moved = [Profile({c.phase: c.exposed_s}, [c]) for c in (sent, sent, received, received)]
    assert split_waits(moved, n_basis=2)[2:] == [{RECEIVE: 0.5, WAIT: 2.0}] * 2
    assert split_waits(moved[::2] + moved[1::2], 2, 1)[1::2] == [{RECEIVE: 0.5, WAIT: 2.0}] * 2
    # A message that is missing leaves the others of its kind as they are.
    lacking = second._replace(calls=second.calls[1:])
    assert split_waits([first, lacking])[1] == {RECEIVE: 2.5, REDUCE: 2.0}


@pytest.mark.mpi(max_size=1)
def test_shifts_over_a_distance_are_compared_along_their_chains():
    far = every(2)
    sent, passed = Call(SEND, far, 1.0, 1.0), Call(SEND, far, 3.0, 3.0)
    received, other = Call(RECEIVE, far, 4.0, 4.0), Call(RECEIVE, far, 2.0, 2.0)
    # Of five ranks the first, third and fifth have to do with each other, and the other two.
    calls = [sent, sent, passed, other, received]
    profiles = [Profile({call.phase: call.seconds}, [call]) for call in calls]
    assert split_waits(profiles) == [
        {SEND: 1.0}, {SEND: 1.0}, {SEND: 1.0, WAIT: 2.0}, {RECEIVE: 1.0, WAIT: 1.0},
        {RECEIVE: 1.0, WAIT: 3.0},
    ]  # fmt: skip
    # Of three ranks the second neither sends nor receives.
    assert split_waits([profiles[0], Profile({}, []), profiles[4]]) == [
        {SEND: 1.0}, {}, {RECEIVE: 1.0, WAIT: 3.0}
    ]  # fmt: skip


@pytest.mark.mpi(max_size=1)
def test_a_program_tells_phases_channels_and_loops():
    program = read_program("""
  %fusion.1 = f64[2]{0} fusion(%a), metadata={op_name="jit(step)/phase.fine_adjoint/transpose(jvp(phase.fine_forward))/mul"}
  ROOT %while.2 = (s64[], f64[2]{0}) while(%b), metadata={op_name="jit(step)/phase.coarse/while"}
  %recv.3 = f64[2]{0} custom-call(%c), metadata={op_name="jit(step)/phase.reduce/channel.line/while(x)"}
  %add.4 = f64[2]{0} add(%c, %c)
  %send.5 = f64[2]{0} custom-call(%c), metadata={op_name="jit(step)/phase.send/channel.every_16/send"}
  %copy.6 = f64[2]{0} fusion(%send.5), metadata={op_name="jit(step)/phase.send/channel.every_16/send"}
  %sub.7 = f64[2]{0} subtract(%c, %c), metadata={op_name="jit(step)/phase.sweep/while/sub"}
  %mul.8 = f64[2]{0} multiply(%c, %c), metadata={op_name="jit(step)/phase.sweep/while/phase.coarse/phase.sweep/mul"}
""")  # noqa: E501
    assert program == {
        "fusion.1": Op("fine_adjoint", None, False),
        "while.2": Op(COARSE, None, True),
        "recv.3": Op(REDUCE, LINE, False),
        "add.4": Op(None, None, False),
        "send.5": Op(SEND, every(16), False),
        "copy.6": Op(SEND, None, False),
        "sub.7": Op(SWEEP, None, False),
        "mul.8": Op(COARSE, None, False),
    }


@pytest.mark.mpi(max_size=1)
def test_compiling_within_compiling_counts_once():
    clock = CompileClock()
    clock.hear(COMPILING + "inner", 1e-6)
    clock.hear("/other", 100.0)
    clock.hear(COMPILING + "outer", 50.0)
    assert clock.seconds == pytest.approx(50.0)


def train_some(comms, source, n_steps):
    """A short tracked run's record."""
    text = small_config(source, 'method = "parareal"\n' + ONE_BY_ONE + TRACKED)
    experiment = set_up(parse_config(text), comms)
    stepper, state = make_stepper(experiment), fresh_state(experiment)
    with CompileClock() as compiling:
        timers = Timers(comms, compiling)
        for step in range(n_steps):
            work = functools.partial(stepper.take, state, experiment.batch(step), step)
            state = timers.take(work, step).state
        spent = {"reading a batch": 0.5 + comms.control.rank}
        solver = experiment.train_problem.solver
        times = record_times(comms, timers, spent, solver)
    assert (times is None) == (comms.control.rank > 0)
    return comms.control.bcast(times)


@pytest.mark.mpi(max_size=2)
def test_the_record_has_all_ranks_and_phases_that_add_up_to_the_step(
    comms, source, shared_tmp_path, monkeypatch
):
    monkeypatch.setattr(sampling, "FIRST", 3)
    times = train_some(comms, source, 8)
    size = comms.control.size
    if comms.control.rank == 0:
        write_times(shared_tmp_path, times)
        assert json.loads((shared_tmp_path / "phases.json").read_text()) == times
    assert times["host_s"]["data"] == reduced([0.5 + rank for rank in range(size)])
    assert times["host_s"]["compile"]["min"] > 0
    assert times["counts"]["fine"]["sum"] == 8 * N
    assert times["counts"]["messages"]["sum"] == (0 if size == 1 else 8 * (3 * size - 2))
    assert times["profiles"]["steps"][0] == 3 and times["profiles"]["missing"] is None
    profiled = times["profiles"]["counts"]  # of a step
    assert sum(profiled["fine"]["ranks"]) == sum(profiled["coarse_pulled"]["ranks"]) == N
    assert times["n_warm_steps"] <= 8 - 1 - len(times["profiles"]["steps"])
    phases = times["phases_s"]
    assert tuple(phases) == STEP_PHASES
    for rank in range(size):
        found = {name: phases[name]["ranks"][rank] for name in STEP_PHASES}
        assert min(found.values()) >= 0
        assert sum(found.values()) == pytest.approx(times["step_s"]["ranks"][rank])
        assert min(found[name] for name in ("fine_forward", "fine_adjoint", "coarse")) > 0
        assert (found["reduce"] > 0) == (size > 1)
        assert found["loss"] > 0 and found["sweep"] > 0


@pytest.mark.mpi(max_size=2)
def test_a_profile_that_fails_does_not_end_the_run(comms, source, monkeypatch):
    def fail(*arguments):
        raise OSError("no such profile")

    monkeypatch.setattr(sampling, "FIRST", 3)
    monkeypatch.setattr(sampling, "read_spans", fail)
    times = train_some(comms, source, 5)
    assert times["phases_s"] is None
    assert times["profiles"]["missing"] == "OSError: no such profile"
    assert times["counts"]["fine"]["sum"] == 5 * N


@pytest.mark.mpi(max_size=2)
def test_a_profiler_that_is_taken_costs_only_the_profile(comms, source, tmp_path):
    _, taken = take_one(comms, source, "picard tracked")
    jax.profiler.start_trace(str(tmp_path))
    sampler = sampling.Sampler(comms.control)
    try:
        assert sampler.profiled(lambda: taken, 0) is taken
    finally:
        jax.profiler.stop_trace()
    assert sampler.samples == [] and "RuntimeError" in sampler.why
