"""Validation while training: scores, the best checkpoint, early stopping, growth."""

import json
import logging

import jax
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.config.plain import plain_config
from nodepint_mpi.errors import CheckpointError
from nodepint_mpi.io.directory import BEST, CHECKPOINTS
from nodepint_mpi.io.records import read_records, read_table
from nodepint_mpi.parallel.comms import alone, make_comms
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.training.evaluate import evaluate_run
from nodepint_mpi.training.train import train
from tests.training.small_config import small_config
from tests.training.validation_case import (
    N_SLICES,
    SERIAL,
    STEPS,
    config_of,
    make_source,
    records_of,
    scores_by_hand,
    simulate,
)

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
ONE = pytest.mark.mpi(max_size=1)


@pytest.fixture
def source(comms, shared_tmp_path):
    return make_source(comms, shared_tmp_path / "set")


class Interrupted(StopFlag):
    """A flag that is raised after some steps."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def requested_anywhere(self, control):
        self.left -= 1
        return self.left <= 0


def names(folder):
    return sorted(path.name for path in folder.glob("*.h5"))


@pytest.mark.mpi(2, 2)
def test_scores_are_those_of_a_plain_solve_on_any_number_of_ranks(
    comms, source, shared_tmp_path, caplog
):
    caplog.set_level(logging.INFO, "nodepint_mpi")
    folder = shared_tmp_path / "run"
    config = config_of(source, run="n_steps = 5\nvalidate_every = 2")
    result = train(config, folder, comms, StopFlag())
    wanted = scores_by_hand(nm.load_model(folder), source, "valid")
    assert result["valid_loss"] == pytest.approx(wanted["loss"], rel=1e-10)
    assert result["valid_relative_error"] == pytest.approx(wanted["relative_error"], rel=1e-10)
    assert "test_of_step" not in result  # of the last parameters, as none are kept apart
    scores = records_of(comms, folder)
    assert list(scores) == [2, 4, 5]  # and after the last step
    if comms.control.rank == 0:
        table = read_table(folder)
        assert np.isfinite(table["valid_relative_error"]).all()
        assert "validating on 5 rows of the split 'valid'" in (folder / "log.txt").read_text()
        assert json.loads((folder / "DONE").read_text())["valid_loss"] == result["valid_loss"]
        lonely = folder.with_name("lonely")
        train(config, lonely, make_comms(alone()), StopFlag())
        one = [r["valid_loss"] for r in read_records(lonely) if "valid_loss" in r]
        np.testing.assert_allclose(list(scores.values()), one, rtol=1e-10)
    comms.control.Barrier()


@pytest.mark.mpi(max_size=1)
def test_it_stops_where_the_rule_says_and_goes_on_as_if_never_interrupted(
    comms, source, shared_tmp_path, caplog
):
    patience = 2
    keys = "n_steps = 24\nvalidate_every = 2"
    best = '[output]\nbest = "valid_loss"\nkeep = 1\ncheckpoint_every = 5'
    config = config_of(source, SERIAL, run=f"{keys}\npatience = {patience}", sections=best)
    early = shared_tmp_path / "early"
    result = train(config, early, comms, StopFlag())
    stop, best_step, scores = result["step"], result["best_step"], records_of(comms, early)
    assert result["status"] == "finished"
    assert f"of valid_loss in {patience} validations" in result["reason"]
    assert names(early / CHECKPOINTS) == [f"step-{stop:06d}.h5"]
    assert names(early / BEST) == [f"step-{best_step:06d}.h5"]

    # Test scores are of the best parameters, which `load_model` takes too.
    assert result["test_of_step"] == best_step
    model = nm.load_model(early)
    wanted = scores_by_hand(model, source, "test")["loss"]
    assert result["test_loss"] == pytest.approx(wanted, rel=1e-10)
    assert result["best_valid_loss"] == scores[best_step]
    for which in ("best", best_step, early / BEST / f"step-{best_step:06d}.h5"):
        other = nm.load_model(early, checkpoint=which)
        assert all(map(np.array_equal, jax.tree.leaves(model), jax.tree.leaves(other)))
    last = scores_by_hand(nm.load_model(early, checkpoint="last"), source, "valid")["loss"]
    assert last == pytest.approx(scores[stop], rel=1e-10)
    assert evaluate_run(early, comms)["step"] == best_step
    found = evaluate_run(early, comms, checkpoint="last", split="valid")
    assert (found["step"], found["loss"]) == (stop, pytest.approx(scores[stop], rel=1e-10))
    with pytest.raises(CheckpointError, match="no checkpoint of step 1; there are step-0"):
        nm.load_model(early, checkpoint=1)

    # Interrupted between two validations, with patience half spent.
    parts = shared_tmp_path / "parts"
    assert train(config, parts, comms, Interrupted(stop - 1))["status"] == "stopped"
    again = train(config, parts, comms, StopFlag(), resume="auto")
    kept = ("status", "step", "reason", "best_step", "best_valid_loss", "test_loss", "valid_loss")
    assert {key: again[key] for key in kept} == {key: result[key] for key in kept}
    assert records_of(comms, parts) == scores
    assert names(parts / BEST) == names(early / BEST)

    # It is finished, and says so; more patience lets it go on, and shows what it would have seen.
    with caplog.at_level(logging.INFO, "nodepint_mpi"):
        finished = train(config, early, comms, StopFlag(), resume="auto")
    assert finished["step"] == stop and finished["reason"] == result["reason"]
    if comms.control.rank == 0:
        assert f"stopped early at step {stop}: no improvement of valid_loss" in caplog.text
        assert f"test scores are of the best checkpoint, of step {best_step}" in caplog.text
    longer = config_of(source, SERIAL, run=f"{keys}\npatience = 99", sections=best)
    assert longer.fingerprint() == config.fingerprint()
    assert train(longer, early, comms, StopFlag(), resume="auto")["step"] == 24
    seen = records_of(comms, early)
    assert best_step < stop < 24  # else the case shows nothing
    assert simulate(seen, patience) == (stop, best_step)
    assert scores == {k: v for k, v in seen.items() if k <= stop}


@pytest.mark.mpi(2, 2)
def test_plain_diffrax_has_the_same_losses_and_stops_with_the_same_best_checkpoint(
    comms, on_one_rank, source, shared_tmp_path
):
    config = config_of(
        source,
        run="n_steps = 24\nvalidate_every = 2\npatience = 2",
        sections='[output]\nbest = "valid_loss"\nlog_every = 1',
    )
    ours, plain = shared_tmp_path / "ours", shared_tmp_path / "plain"
    result = train(config, ours, comms, StopFlag())

    def by_diffrax():
        serial, lonely = plain_config(config), make_comms(alone())
        return train(serial, plain, lonely, StopFlag(), plain=True), read_records(plain)

    wanted, records = on_one_rank(by_diffrax)
    assert 2 < result["step"] < 24 and result["best_step"] < result["step"]  # else it shows nothing
    for key in ("status", "step", "best_step", "test_of_step"):
        assert result[key] == wanted[key]
    assert result["reason"].split(";")[0] == wanted["reason"].split(";")[0]
    for key in ("best_valid_loss", "valid_loss", "valid_relative_error", "test_loss"):
        assert result[key] == pytest.approx(wanted[key], rel=1e-8)
    assert records_of(comms, ours) == pytest.approx(
        {r["step"]: r["valid_loss"] for r in records if "valid_loss" in r}, rel=1e-8
    )
    losses = nm.read_history(ours)["loss"]
    np.testing.assert_allclose(losses, nm.read_history(plain)["loss"], rtol=1e-8)
    np.testing.assert_allclose(losses, [r["loss"] for r in records], rtol=1e-8)
    assert names(ours / BEST) == names(plain / BEST)
    found, kept = (jax.tree.leaves(nm.load_model(run)) for run in (ours, plain))
    for one, other in zip(found, kept, strict=True):
        if isinstance(one, jax.Array):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


@ONE
def test_a_network_that_grows_is_validated_as_it_is(comms, source, shared_tmp_path):
    folder = shared_tmp_path / "run"
    text = small_config(
        source, SERIAL, n_slices=N_SLICES, steps=STEPS, data='valid_split = "valid"',
        run="n_steps = 3\nvalidate_every = 1", network='name = "mlp"\nwidth = 4\nlatent = 1',
        sections='[growth]\nsteps = [2]\nsizes = [2]\n[output]\nbest = "valid_loss"',
    )  # fmt: skip
    result = train(parse_config(text), folder, comms, StopFlag())
    scores = records_of(comms, folder)
    wanted = scores_by_hand(nm.load_model(folder, checkpoint="last"), source, "valid")["loss"]
    assert scores[3] == pytest.approx(wanted, rel=1e-10)
    assert result["best_step"] == min(scores, key=lambda step: scores[step])
    best = scores_by_hand(nm.load_model(folder), source, "test")["loss"]
    assert result["test_loss"] == pytest.approx(best, rel=1e-10)
