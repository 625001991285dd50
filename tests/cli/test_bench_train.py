"""`nodepint bench train`: both train the same, and ratios are those one takes by hand."""

import pytest

from nodepint_mpi.bench.train import Contestant, format_bench_train, judge
from tests.cli.small_case import alone, has_one_message, read_json

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(300)]


def test_bench_train(case, tmp_path):
    done = alone(
        "bench", "train", case.config, "--ranks", "1", "--steps", "10", "--repeats", "1",
        "--set", "time.stopping.tol=1e-12", "--set", "time.adjoint.tol=1e-12",
        "--json", "t.json", "--out", "t.png", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, everywhere, ours = read_json(tmp_path / "t.json")["contestants"]
    assert plain["losses"] == pytest.approx(everywhere["losses"], rel=1e-9)
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-9)  # converged sweeps
    assert ours["worst_gradient_error"] < 1e-9 and ours["sweeps"][0] >= 1
    assert min(row["peak_bytes"] for row in (plain, ours)) > 1e7
    assert ours["scores"]["loss"] == pytest.approx(plain["scores"]["loss"], rel=1e-9)
    assert ours["message_share"] == 0 and 0 < ours["coarse_share"] < 1
    assert "| plain diffrax, one core |" in done.stdout
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_trains_the_same(case, tmp_path):
    pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed")
    done = alone(
        "bench", "train", case.config, "--ranks", "1", "--steps", "10", "--repeats", "1",
        "--set", "time.fine={solver='rk4', n_steps=40}", "--json", "t.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, *_, peer = read_json(tmp_path / "t.json")["contestants"]
    assert peer["name"].startswith("torchdiffeq")
    # Another fourth-order rule (3/8), and observations interpolated between its steps.
    assert peer["losses"] == pytest.approx(plain["losses"], rel=1e-3)


def made(seconds, losses, errors=()):
    return {
        "losses": losses, "seconds": [9.0] * 3 + [seconds] * (len(losses) - 3),
        "sweeps": [1.0, 1.0], "serial_steps": 0, "gradient_errors": list(errors), "peak_bytes": 1,
        "message_share": 0.25, "coarse_share": 0.1,
        "scores": {"accuracy": 0.5, "loss": losses[-1]},
    }  # fmt: skip


def test_ratios_are_to_the_faster_serial_one():
    contestants = [
        Contestant("one core", "plain"),
        Contestant("all cores", "plain", pinned=False),
        Contestant("ours, 1", "ours"),
        Contestant("ours, 2", "ours", 2),
    ]
    falling = [float(x) for x in range(20, 0, -1)]  # ends with 2, 1
    sooner = [*falling[2:], 1.0, 1.0]  # as here the steps of a run cost the same, so does the mean
    runs = {
        "one core": [made(0.4, falling), made(0.5, falling), made(0.6, falling)],
        "all cores": [made(0.4, falling)] * 3,
        "ours, 1": [made(0.3, sooner, [0.1, 0.3, 0.2])] * 3,
        "ours, 2": [made(0.2, [20.0] * 20)] * 3,
    }
    result = judge("by hand", 20, contestants, runs)
    one, every, alone_, two = result["contestants"]
    assert result["target_loss"] == 1.5  # the last tenth
    assert (one["step_s"], one["spread_s"]) == (0.5, [0.4, 0.6])
    assert one["worst_loss_ratio"] == 1.0 and two["worst_loss_ratio"] == 20.0 / 1.5
    assert alone_["worst_loss_ratio"] == 1.0 / 1.5
    assert one["steps_to_target"] == 20 and alone_["steps_to_target"] == 18
    assert every["time_to_target_s"] == pytest.approx(20 * 0.4)
    assert alone_["step_ratio_to_serial"] == pytest.approx(0.3 / 0.4)
    assert alone_["time_ratio_to_serial"] == pytest.approx(18 * 0.3 / (20 * 0.4))
    assert (alone_["gradient_error"], alone_["worst_gradient_error"]) == (0.2, 0.3)
    assert two["scores"] == {"accuracy": 0.5, "loss": 20.0}
    assert "| test accuracy |" in format_bench_train(result)
    assert (alone_["message_share"], alone_["coarse_share"]) == (0.25, pytest.approx(0.1))
    assert two["steps_to_target"] is None and two["time_ratio_to_one_rank"] is None


def test_what_cannot_be_compared_is_refused(case, nodepint, refusals, tmp_path):
    nodepint(2, "bench", "train", case.config, code=2)
    bad = {
        "--ranks 1,x": "expected comma-separated integers",
        "--ranks 999": "cores for this process",
        "--ranks 1 --repeats 1 --timeout 1": "no answer within 1 s",
    }
    start = ["bench", "train", str(case.config)]
    said = refusals(tmp_path, [[*start, *words.split()] for words in bad])
    for one, message in zip(said, bad.values(), strict=True):
        assert has_one_message(one) and message in one, one
