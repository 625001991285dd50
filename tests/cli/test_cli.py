"""Every command does what its help says, and writes its result as JSON."""

import subprocess
import sys

import pytest

import nodepint_mpi
from tests.cli.small_case import QUICK, alone, has_one_message, read_json, sets

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(300)]

HELP = """
import sys
import nodepint_mpi
import nodepint_mpi.cli.main
loaded = lambda: [name for name in ("mpi4py", "jax", "numpy", "datasets") if name in sys.modules]
print(nodepint_mpi.__version__, loaded())
for arguments in (["--help"], ["train", "--help"], ["data", "prepare", "--help"], ["--version"]):
    sys.argv = ["nodepint", *arguments]
    try:
        nodepint_mpi.cli.main.main()
    except SystemExit as leaving:
        print("left with", leaving.code, loaded())
"""


def test_help_loads_neither_mpi_nor_jax(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    said = done.stdout
    assert f"{nodepint_mpi.__version__} []" in said
    assert said.count("left with 0 []") == 4
    assert f"nodepint, version {nodepint_mpi.__version__}" in said
    for name in (
        "train",
        "evaluate",
        "solve",
        "info",
        "doctor",
        "data",
        "bench",
        "report",
        "compare",
        "--resume",
    ):
        assert name in said


def test_the_module_and_the_script_are_the_same_command(tmp_path):
    script = alone("train", "--help", cwd=tmp_path)
    module = subprocess.run(
        [sys.executable, "-m", "nodepint_mpi", "train", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert script.returncode == module.returncode == 0
    assert script.stdout.split()[2:] == module.stdout.split()[-len(script.stdout.split()[2:]) :]


def test_data_prepare(case):
    assert case.prepared["rows"] == {"train": 4, "test": 2}
    assert case.prepared["options"]["n_obs"] == 15
    assert {"t", "u"} == set(case.prepared["columns"]["train"])


def test_solve_says_how_far_it_is_from_the_serial_solution(case, nodepint, tmp_path):
    coarse = sets(time__coarse__solver="rk4")
    said = nodepint(2, "solve", case.config, *coarse, "--error", "--json", "s.json").stdout
    result = read_json(tmp_path / "s.json")
    assert result["n_ranks"] == 2
    assert result["status"] == "converged"
    assert 0 < result["sweeps"] <= 7
    assert len(result["updates"]) == len(result["fronts"]) == result["sweeps"]
    assert result["jumps"][-1] < 1e-8  # the default tolerance in double precision
    assert result["error"] < 1e-7
    assert f"largest distance from the serial solution: {result['error']:.3e}" in said


def test_a_solve_that_does_not_converge_is_a_result_with_a_reason(case, nodepint, tmp_path):
    words = sets(time__stopping__max_sweeps=3)
    said = nodepint(1, "solve", case.config, *words, "--json", "s.json").stdout
    result = read_json(tmp_path / "s.json")
    assert result["status"] == "max_sweeps"
    assert result["meaning"] in said
    # Two Euler steps a slice are so coarse that the first correction overshoots to infinity.
    first, overshot, second = result["jumps"]  # the last iterate is not evaluated
    assert overshot is None
    assert first > second > 1e-8


def test_info_plans_without_running(case, tmp_path):
    done = alone("info", case.config, "--ranks", 3, "--json", "i.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = read_json(tmp_path / "i.json")
    assert sorted(plan["slices_per_rank"]) == [2, 2, 3]
    assert plan["n_parameters"] == (2 * 8 + 8) + (8 * 2 + 2)
    assert plan["message_bytes"] == 4 * 2 * 8  # samples, components, bytes of a double
    assert plan["checkpoint_bytes"] > 3 * 8 * plan["n_parameters"]  # Adam keeps two of each
    assert {path.name for path in tmp_path.iterdir()} == {"i.json"}


def test_doctor_finds_this_machine_healthy(tmp_path):
    done = alone("doctor", "--json", "d.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = read_json(tmp_path / "d.json")
    assert all(check["ok"] for check in checks)
    assert {"python", "packages", "MPI", "parallel HDF5"} <= {check["name"] for check in checks}


def test_doctor_shows_all_ranks_of_a_job(nodepint, tmp_path):
    said = nodepint(2, "doctor", "--mpi", "--json", "d.json").stdout
    result = read_json(tmp_path / "d.json")
    assert all(check["ok"] for check in result["checks"])
    assert {"placement", "same everywhere", "ranks"} <= {c["name"] for c in result["checks"]}
    assert [rank["place"]["local"] for rank in result["ranks"]] == ["0", "1"]
    head, *rows = said.splitlines()[:3]
    assert head.split()[:5] == ["rank", "host", "local", "cores", "GPU"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert "!" not in "".join(rows)
    versions = result["ranks"][0]["same"]
    for name in ("python", "jax", "mpi4jax", "h5py", "HDF5"):
        assert name in head and versions[name] in rows[1]


def test_doctor_flags_what_differs_between_ranks(mpirun, tmp_path):
    mine = 'test "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" = 1 && export XLA_FLAGS=--xla_dump_to='
    other = f'unset XLA_FLAGS; {mine}; "$@"'
    command = ["sh", "-c", other, "sh", sys.executable, "-m", "nodepint_mpi", "doctor", "--mpi"]
    done = mpirun(2, *command, cwd=tmp_path, env=QUICK, timeout_s=120)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    said = " ".join(line.split())
    assert "same XLA_FLAGS --xla_dump_to= on rank 1 on" in said and "not set on rank 0 on" in said


def test_doctor_of_ranks_outside_a_job_says_how_to_start_it(tmp_path):
    done = alone("doctor", "--mpi", cwd=tmp_path)
    assert done.returncode == 2
    assert "mpirun -n 2 nodepint doctor --mpi" in done.stderr


def test_bench_checkpoint_writes_and_reads_in_three_ways(nodepint, tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    quick = ("--megabytes", "0.5", "--repeats", "1", "--dir", folder)
    said = nodepint(2, "bench", "checkpoint", *quick, "--json", tmp_path / "c.json").stdout
    result = read_json(tmp_path / "c.json")
    assert (result["n_ranks"], len(result["ways"])) == (2, 3)
    assert result["megabytes"] == pytest.approx(0.5, rel=1e-3)
    for name, way in result["ways"].items():
        assert name in said
        assert way["write_mb_s"] == pytest.approx(result["megabytes"] / way["write_s"])
    assert not any(folder.iterdir())
    done = nodepint(1, "bench", "checkpoint", "--dir", tmp_path / "nowhere", code=2)
    assert has_one_message(done.stderr) and "No such file or directory" in done.stderr


def test_bench_repeats_the_published_counts(nodepint, tmp_path):
    nodepint(1, "bench", "published", "fitzhugh_nagumo", "--json", "b.json")
    (row,) = read_json(tmp_path / "b.json")
    assert (row["name"], row["sweeps"], row["published"]) == ("fitzhugh_nagumo", 11, 11)


def test_bench_of_an_unknown_problem_suggests_a_known_one(nodepint):
    done = nodepint(1, "bench", "published", "lorentz", code=2)
    assert "'lorentz'; did you mean 'lorenz'" in done.stderr


def test_set_takes_toml_and_plain_words(case, tmp_path):
    words = sets(time__n_slices=14, run__name="other") + ["--set", "time.fine.solver=tsit5"]
    done = alone("info", case.config, *words, "--json", "i.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = read_json(tmp_path / "i.json")
    assert (plan["name"], plan["n_slices"]) == ("other", 14)
