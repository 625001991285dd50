"""A rank that raises, is killed or hangs under a real srun ends the job, which is not requeued."""

import re
import time

import pytest

from tests.cli.failing import failing_program
from tests.jobs.real_slurm import ENDED, Repository

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(200)]

HANGS_S = 120.0  # the promise of 20 s is for an idle machine: tests/ranks/test_watchdog.py

FAILURES = {
    "raises": 'raise ValueError("the reason")',
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "hangs": "time.sleep(1000)",
}


@pytest.fixture(scope="module")
def ends(slurm, tmp_path_factory):
    """All failures at once; for each what SLURM says, the log, and the seconds it took."""
    jobs, places, ends = {}, {}, {}
    for name, failure in FAILURES.items():
        program = failing_program(
            f"""
        if rank == guilty:
            failing()
            {failure}
        step(watchdog, 5)
        """
        ).replace("int(sys.argv[1])", "1")  # the template gives it nodepint's arguments
        folder = tmp_path_factory.mktemp("job") / "repository"
        places[name] = Repository(slurm, folder, nodepint=program)
        jobs[name] = places[name].submit("--ntasks=2", "jobs/train.sbatch", "x.toml", "run")
    deadline = time.monotonic() + 150
    while len(ends) < len(jobs):
        assert time.monotonic() < deadline, [
            place.log(jobs[name]) for name, place in places.items()
        ]
        for name in jobs.keys() - ends.keys():
            if (shown := slurm.show(jobs[name]))["JobState"] in ENDED:
                log = places[name].log(jobs[name])
                failed = re.search(r"FAILS ([\d.]+)", log)
                assert failed, log
                ends[name] = shown, log, time.time() - float(failed[1])
                print(f"a rank that {name}: {ends[name][-1]:.1f} s to the end of the job")
        time.sleep(0.1)
    return ends


@pytest.mark.parametrize(
    ("name", "because"),
    [
        ("raises", "ValueError: the reason"),
        ("is killed", None),  # srun may be quicker than we
        ("is stopped", "not responded"),
        ("hangs", "has been in code outside any named phase after"),
    ],
)
def test_a_failed_rank_ends_the_job_in_time_and_for_good(ends, name, because):
    shown, log, seconds = ends[name]
    assert seconds < HANGS_S
    assert shown["JobState"] == "FAILED"
    assert shown["ExitCode"] != "0:0"
    assert shown["Restarts"] == "0"
    messages = re.findall(r"^nodepint: rank .*$", log, re.MULTILINE)
    if because is None:
        assert re.search(r"task 1: Killed|rank 1 .*is gone", log), log
    else:
        assert len(messages) == 1, log
        assert re.match(rf"nodepint: rank 1 on n\d: .*{because}", messages[0])
