"""Who counts as stuck, and what the ranks tell each other about it."""

import inspect
import socket
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from nodepint_mpi.ranks import watchdog
from nodepint_mpi.ranks.activity import UNNAMED, WARM_UP, Phase, PhaseClock, Report, find_stuck
from nodepint_mpi.ranks.busy import Sampler
from nodepint_mpi.ranks.heartbeat import connect
from nodepint_mpi.ranks.watchdog import Watchdog

PATIENCE_S = 900.0
PROMISED_S = 20.0  # to the user: from a failure to the end of the job


def waits(seconds, limit_s=15.0, phase="training step"):
    return Report(phase, True, 3, seconds, limit_s, 10.0)


def works(seconds, limit_s=15.0, phase="reading batch"):
    return Report(phase, False, 3, seconds, limit_s, 10.0)


@pytest.mark.parametrize(
    "reports",
    [
        [waits(14.0), works(14.0)],
        [waits(1.0), works(100.0)],  # the other one has been as slow
        [waits(100.0), works(1.0)],
        [waits(100.0), works(100.0, limit_s=600.0)],
        [waits(100.0), waits(100.0, limit_s=900.0)],  # this one compiles
        [works(100.0), works(100.0)],  # nobody waits
        [works(1000.0), works(100.0)],
        [],
    ],
)
def test_nobody_is_stuck(reports):
    assert find_stuck(dict(enumerate(reports)), PATIENCE_S) is None


@pytest.mark.parametrize(
    ("reports", "rank", "reason"),
    [
        ([waits(16.0), works(16.0), works(15.5)], 1, "'reading batch' (step 3) for 16 s while 1"),
        ([works(16.0), waits(16.0), waits(2.0)], 0, "2 rank(s) wait for it in 'training step'"),
        ([waits(16.0), waits(15.5)], 0, "no rank returned from 'training step' (step 3) within 15"),
        ([waits(16.0), waits(16.0, 15.0, "saving")], 0, "'saving' (step 3) or 'training step'"),
        ([works(901.0), works(902.0)], 0, "for 901 s"),
        ([works(901.0)], 0, "for 901 s"),
        ([waits(16.0)], 0, "within 15 s"),
    ],
)
def test_somebody_is_stuck(reports, rank, reason):
    finding = find_stuck(dict(enumerate(reports)), PATIENCE_S)
    assert finding is not None
    assert finding.rank == rank
    assert reason in finding.reason


@pytest.mark.mpi(max_size=1)
def test_the_limits_add_up_to_less_than_was_promised():
    """In sum: a job in tests/cli/test_failures.py takes as long as a busy machine lets it."""
    limits = inspect.signature(Watchdog).parameters
    silent_s = max(limits["limit_s"].default, limits["quiet_s"].default, watchdog.GONE_S)
    noticed_s = silent_s + watchdog.BEAT_S + watchdog.POLL_S
    assert noticed_s + watchdog.TURN_S + watchdog.DUMP_S < PROMISED_S
    assert watchdog.DUMP_S + watchdog.TURN_S < watchdog.LAST_S  # no rank leaves before that


def test_a_starved_watchdog_is_not_taken_for_a_rank_that_waits(comm):
    watchdog = Watchdog(comm)  # not entered: nobody hears it
    with watchdog.phase("training step", collective=True, limit_s=5.0):
        watchdog._clock.now.start -= 100.0
        now = time.monotonic()
        watchdog._reports = {1: (now - 9.0, waits(2.5, 5.0))}  # silent for 9 s, and had computed
        assert watchdog._judge(now) is None
        watchdog._reports = {1: (now - 1.0, waits(4.5, 5.0))}
        finding = watchdog._judge(now)
        assert finding is not None and "no rank returned from 'training step'" in finding.reason


def test_the_limit_of_a_collective_phase_follows_what_was_seen():
    clock = PhaseClock(1.0, 50.0, quiet_s=10.0)
    for _ in range(WARM_UP):
        with Phase(clock, "step", True):
            assert clock.report().limit_s == 50.0
    with Phase(clock, "step", True):
        assert clock.report().limit_s == 1.0
    clock.note("step", 0.3)
    with Phase(clock, "step", True):
        assert clock.report().limit_s == pytest.approx(6.0)
    with Phase(clock, "new", True, None, 3.0):
        assert clock.report().limit_s == 3.0
        assert clock.report().quiet_s == 10.0
    with Phase(clock, "local", False, None, 30.0):
        assert clock.report().limit_s == 30.0
        assert clock.report().quiet_s == 30.0


def test_what_computes_does_not_wait():
    clock = PhaseClock(0.4, 0.4, quiet_s=10.0)
    with Phase(clock, "step", True):
        assert not clock.may_wait()
        time.sleep(0.2)
        assert clock.may_wait()
        clock.note_work()
        assert clock.report().seconds < 0.1 and clock.may_wait()
    with Phase(clock, "local"):
        time.sleep(0.2)
        assert not clock.may_wait()
        clock.note_work()
        assert clock.report().seconds > 0.1  # others may wait for it, whatever it does
    unseen = PhaseClock(0.4, 50.0, quiet_s=10.0, sees_work=False)
    for _ in range(WARM_UP + 1):
        with Phase(unseen, "step", True):
            assert unseen.report().limit_s == 50.0


def test_a_process_is_seen_to_compute_and_to_wait(comm):
    """Rank 0 computes while the others wait for it in MPI; then all sleep."""
    sampler, found = Sampler(), []
    assert sampler.works  # Linux with glibc
    spin = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, y: jnp.sin(y + 1.0), x))
    spin(jnp.ones(8), 1).block_until_ready()
    thread = threading.Thread(target=lambda: found.append(sampler.computes(0.4)))
    comm.Barrier()
    thread.start()
    if comm.rank == 0:
        while thread.is_alive():
            spin(jnp.ones(8), 100_000).block_until_ready()
    comm.Barrier()
    thread.join()
    assert found == [comm.rank == 0]
    assert sampler.computes(0.1) is False


def test_phases_nest_and_the_outer_one_starts_anew():
    clock = PhaseClock(1.0, 50.0, quiet_s=10.0)
    with Phase(clock, "outer", False, 7):
        time.sleep(0.2)
        with Phase(clock, "inner"):
            assert clock.report().describe() == "'inner'"
        assert clock.report().describe() == "'outer' (step 7)"
        assert clock.report().seconds < 0.2
    assert clock.report().describe() == "code outside any named phase after 'outer' (step 7)"
    assert PhaseClock(1.0, 50.0, quiet_s=10.0).report().describe() == UNNAMED


def test_a_stack_that_changes_while_it_is_read_ends_no_watch(monkeypatch):
    clock = PhaseClock(15.0, 300.0, quiet_s=10.0)
    torn = (lambda: None).__code__  # what CPython gave in the place of a frame
    monkeypatch.setattr("sys._current_frames", lambda: {threading.get_ident(): torn})
    assert clock.report().limit_s == 15.0


def test_messages_go_both_ways_between_rank_0_and_the_others(comm):
    peers = connect(comm, [socket.gethostname()] * comm.size)
    assert peers is not None
    assert sorted(peers.ranks) == (list(range(1, comm.size)) if comm.rank == 0 else [0])
    peers.send(["hello", comm.rank, 0.5, None])
    heard = []
    while len(heard) < len(peers.ranks):
        heard += peers.receive(0.1)
    assert sorted(heard) == [(rank, ["hello", rank, 0.5, None]) for rank in sorted(peers.ranks)]
    comm.Barrier()
    if comm.rank == comm.size - 1:
        peers.close()
    elif comm.rank == 0:
        assert peers.receive(10.0) == [(comm.size - 1, None)]
    comm.Barrier()
    peers.close()


def test_a_run_without_trouble_ends_quietly(comm, capfd):
    with Watchdog(comm, limit_s=5.0) as watchdog:
        for step in range(3):
            with watchdog.phase("sum", collective=True, step=step):
                assert comm.allreduce(1) == comm.size
        with watchdog.phase("reading", limit_s=20.0):
            time.sleep(0.3 * comm.rank)
    comm.Barrier()
    assert capfd.readouterr().err == ""


def test_an_error_passes_through_and_another_watch_can_follow(comm):
    with pytest.raises(ValueError, match="mine"), Watchdog(comm):
        raise ValueError("mine")
    with Watchdog(comm):
        pass
    deadline = time.monotonic() + 20.0
    while "watchdog" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < deadline, "still watching though all ranks have left"
        time.sleep(0.1)
