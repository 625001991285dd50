"""Stopped by a signal, killed, resumed: the run that goes on is the run there would have been."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cli.small_case import (
    assert_equal,
    checkpoints,
    damage,
    messages,
    read_arrays,
    read_json,
    read_metrics,
    sets,
    wait_for,
)
from tests.training.test_scalars import read_events

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(580)]

HANGS_S = 120.0  # 20 s, as promised, on an idle machine
FOR_EVER = sets(run__n_steps=10**6)


@pytest.fixture
def interrupted(nodepint, tmp_path):
    """Train on 2 ranks in `run`, and send one rank a signal after 12 steps."""

    def run(config, *arguments, rank, number, code):
        folder = tmp_path / "run"
        with ThreadPoolExecutor(1) as pool:
            words = "train", config, "--out", folder, *FOR_EVER, *arguments
            job = pool.submit(nodepint, 2, *words, code=code)
            wait_for(lambda: job.done() or len(read_metrics(folder)) >= 12)
            assert not job.done(), job.result()
            os.kill(int((tmp_path / f"rank-{rank}.pid").read_text()), number)
            sent = time.monotonic()
            done = job.result()
        assert time.monotonic() - sent < HANGS_S
        return folder, done

    return run


def test_a_signal_to_one_rank_stops_all_at_the_same_step(case, nodepint, interrupted, tmp_path):
    result = "--json", tmp_path / "r.json"
    run, done = interrupted(case.config, *result, rank=1, number=signal.SIGUSR1, code=0)
    stopped = read_json(tmp_path / "r.json")
    step = stopped["step"]
    assert stopped["status"] == "stopped"
    assert read_metrics(run)[-1]["step"] == step >= 12
    assert checkpoints(run)[-1].name == f"step-{step:06d}.h5"
    assert not (run / "DONE").exists()
    assert "resume" in done.stdout + done.stderr
    assert messages(done.stdout + done.stderr) == []

    until = sets(run__n_steps=step + 5)
    done = nodepint(2, "train", case.config, "--out", run, "--resume", "auto", *until, *result)
    assert f"at step {step}" in done.stderr
    assert read_json(tmp_path / "r.json")["status"] == "finished"
    assert [record["step"] for record in read_metrics(run)] == list(range(1, step + 6))
    assert checkpoints(run)[-1].name == f"step-{step + 5:06d}.h5"
    assert (run / "DONE").exists()
    assert len(read_json(run / "provenance.json")["starts"]) == 2


def test_five_steps_and_five_more_are_ten(case, nodepint, trained, tmp_path):
    run, whole = tmp_path / "run", trained(2)
    shutil.copytree(whole, run)  # as if it had ended after 5 of its 20 steps
    (run / "DONE").unlink()
    for later in checkpoints(run)[1:]:
        later.unlink()
    on = "--resume", "auto", *sets(run__n_steps=10)
    nodepint(2, "train", case.config, "--out", run, *on)
    last = checkpoints(run)[-1]
    assert last.name == "step-000010.h5"
    assert_equal(last, whole / "ckpt" / last.name)
    losses = [[record["loss"] for record in read_metrics(folder)] for folder in (run, whole)]
    assert losses[0] == losses[1][:10]
    records = read_metrics(run)  # every step is reported, and time goes on where it stopped
    assert records[-1]["training_s"] == pytest.approx(sum(one["step_s"] for one in records))
    starts = [event.step for event in read_events(run) if event.HasField("session_log")]
    assert starts == [6]  # from which on TensorBoard forgets the first run


def test_after_a_kill_the_run_goes_on_from_the_newest_good_checkpoint(
    case, nodepint, interrupted, tmp_path
):
    # With tracking, so that states, cotangents, basis and tangents have to come back as well.
    basis = dict(time__basis__kind="jumps", time__basis__rank=2, time__basis__new=1)
    warm = sets(time__tracking={}, time__method="tangent", output__log_every=2, **basis)
    run, done = interrupted(case.config, *warm, rank=1, number=signal.SIGKILL, code=None)
    assert done.returncode != 0
    assert len(messages(done.stdout + done.stderr)) <= 1  # mpirun may be quicker than we
    assert not (run / "DONE").exists()
    first = read_metrics(run)[0]  # not one of every second step, but its gradient was checked
    assert first["step"] == 1 and first["gradient_error"] >= 0
    *_, before, last = checkpoints(run)
    step = int(last.stem.removeprefix("step-"))
    kept = {"rows/ends", "rows/lefts", "rows/tangents", "replicated/tracking/basis"}
    assert kept < read_arrays(last).keys()
    uninterrupted = tmp_path / "uninterrupted.h5"
    shutil.copy(last, uninterrupted)
    shutil.copytree(run, tmp_path / "alone")
    damage(last)

    until = *warm, *sets(run__n_steps=step)
    done = nodepint(2, "train", case.config, "--out", run, "--resume", "auto", *until)
    assert "skipped a damaged checkpoint" in done.stderr
    assert f"resumed from {before} at step {step - 5}" in done.stderr
    assert_equal(last, uninterrupted)
    assert read_metrics(run)[-1]["step"] == step
    assert (run / "DONE").exists()

    copy = tmp_path / "alone" / "ckpt" / before.name
    nodepint(1, "train", case.config, "--out", tmp_path / "alone", "--resume", copy, *until)
    # Directions of the smallest jumps, and so the basis, are known to fewer digits than the rest.
    assert_equal(checkpoints(tmp_path / "alone")[-1], uninterrupted, rtol=1e-6)
