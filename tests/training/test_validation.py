"""Validation while training: scores, the best checkpoint, early stopping, epochs."""

import json
import logging
from pathlib import Path

import datasets
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.config.plain import plain_config
from nodepint_mpi.data.datasets import held_out_rows
from nodepint_mpi.errors import CheckpointError, ConfigError, DataError
from nodepint_mpi.io.directory import BEST, CHECKPOINTS
from nodepint_mpi.io.records import read_records, read_table
from nodepint_mpi.parallel.comms import alone, make_comms
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.training.evaluate import evaluate_run
from nodepint_mpi.training.setup import set_up
from nodepint_mpi.training.train import train
from nodepint_mpi.training.watch import new_watch
from tests.training.small_config import EXACT, small_config

pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]
ONE = pytest.mark.mpi(max_size=1)

FINGERPRINT = "3c9a39ba768d5504"  # as it was before there was validation
N_SLICES, N_FINE = 4, 6
STEPS = (
    f'fine = {{ solver = "tsit5", n_steps = {N_FINE} }}\n'
    'coarse = { solver = "euler", n_steps = 2 }'
)
SERIAL = 'method = "serial"\n'
NOWHERE = Path("x")
ROWS = {"train": 7, "valid": 5, "test": 4}


@pytest.fixture
def source(comms, shared_tmp_path):
    """Damped rotations: 7 rows to train on, 5 to validate on, 4 to test on."""
    if comms.control.rank == 0:
        t, made = np.linspace(0.0, 2.0, 9), {}
        for seed, (split, n_rows) in enumerate(ROWS.items()):
            start = np.random.default_rng(seed).uniform(0.5, 1.5, (n_rows, 2))
            z = (start[:, :1] + 1j * start[:, 1:]) * np.exp((-0.2 + 2.0j) * t)
            rows = {"t": [t.tolist()] * n_rows, "u": np.stack([z.real, z.imag], -1).tolist()}
            made[split] = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict(made).save_to_disk(str(shared_tmp_path / "set"))
    comms.control.Barrier()
    return shared_tmp_path / "set"


def config_of(source, options=EXACT, *, run="", data='valid_split = "valid"', sections=""):
    """A config whose optimizer overshoots, so that scores go up and down."""
    text = small_config(
        source, options, n_slices=N_SLICES, steps=STEPS, run=run, data=data, sections=sections,
        network='name = "mlp"\nwidth = 4',
    )  # fmt: skip
    return parse_config(text.replace("learning_rate = 0.02", "learning_rate = 0.3"))


def column(source, split, name):
    """A column as it is stored."""
    return np.array(datasets.DatasetDict.load_from_disk(str(source))[split][name])


def scores_by_diffrax(model, source, split, rows=None):
    """Loss and metric of a model on rows of a split, by one plain solve for each."""
    t, u = column(source, split, "t")[0], column(source, split, "u")
    u = u if rows is None else u[rows]

    def solve(start):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, u, args: model.processor(t, u, None)), diffrax.Tsit5(),
            t0=0.0, t1=2.0, dt0=None, y0=model.encoder(start), saveat=diffrax.SaveAt(ts=t[1:]),
            stepsize_controller=diffrax.StepTo(jnp.linspace(0.0, 2.0, N_SLICES * N_FINE + 1)),
            max_steps=100,
        ).ys  # fmt: skip

    found = np.asarray(jax.vmap(jax.vmap(model.decoder))(jax.jit(jax.vmap(solve))(u[:, 0])))
    squares = np.mean((found - u[:, 1:]) ** 2)
    return {"loss": squares, "relative_error": np.sqrt(squares / np.mean(u[:, 1:] ** 2))}


def simulate(scores, patience, min_delta=0.0):
    """Where a run stops, by the rule as a reader of the docs would write it; and the best step."""
    reference, since = None, 0
    best = min(scores, key=lambda step: (scores[step], step))
    for step, score in scores.items():
        if reference is None or (score < reference and reference - score >= min_delta):
            reference, since = score, 0
        else:
            since += 1
        if since == patience:
            so_far = {k: v for k, v in scores.items() if k <= step}
            return step, min(so_far, key=lambda k: (so_far[k], k))
    return max(scores), best


class Interrupted(StopFlag):
    """A flag that is raised after some steps."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def requested_anywhere(self, control):
        self.left -= 1
        return self.left <= 0


def records_of(comms, folder):
    """Scores by step, as rank 0 has written them."""
    found = read_records(folder) if comms.control.rank == 0 else None
    records = comms.control.bcast(found)
    assert records is not None
    return {r["step"]: r["valid_loss"] for r in records if "valid_loss" in r}


def names(folder):
    return sorted(path.name for path in folder.glob("*.h5"))


def test_scores_are_those_of_plain_diffrax_on_any_number_of_ranks(
    comms, source, shared_tmp_path, caplog
):
    caplog.set_level(logging.INFO, "nodepint_mpi")
    folder = shared_tmp_path / "run"
    config = config_of(source, run="n_steps = 5\nvalidate_every = 2")
    result = train(config, folder, comms, StopFlag())
    wanted = scores_by_diffrax(nm.load_model(folder), source, "valid")
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
        if comms.control.size > 1:
            lonely = folder.with_name("lonely")
            train(config, lonely, make_comms(alone()), StopFlag())
            one = [r["valid_loss"] for r in read_records(lonely) if "valid_loss" in r]
            np.testing.assert_allclose(list(scores.values()), one, rtol=1e-10)
    comms.control.Barrier()


@pytest.mark.mpi(max_size=2)
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
    wanted = scores_by_diffrax(model, source, "test")["loss"]
    assert result["test_loss"] == pytest.approx(wanted, rel=1e-10)
    assert result["best_valid_loss"] == scores[best_step]
    for which in ("best", best_step, early / BEST / f"step-{best_step:06d}.h5"):
        other = nm.load_model(early, checkpoint=which)
        assert all(map(np.array_equal, jax.tree.leaves(model), jax.tree.leaves(other)))
    last = scores_by_diffrax(nm.load_model(early, checkpoint="last"), source, "valid")["loss"]
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


@pytest.mark.mpi(max_size=2)
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
def test_min_delta_and_the_larger_score():
    config = parse_config(
        small_config(NOWHERE, run="patience = 2\nmin_delta = 0.1", data="valid_fraction = 0.5")
    )
    watch = new_watch(config)
    assert watch is not None
    scores = {10: 1.0, 20: 0.95, 30: np.nan, 40: 0.8, 50: 0.71, 60: 0.705, 70: 0.5}
    stop, best = simulate({k: v for k, v in scores.items() if v == v}, 2, 0.1)
    assert (stop, best) == (60, 60)
    over = []
    for step, score in scores.items():
        watch = watch.note(step, {"valid_loss": score}, 0.1)
        over.append(watch.is_over(2))
        if step == 60:
            assert watch.best_step == 60 and watch.reference == 0.8
    # NaN is no improvement, and counts: 0.95 and NaN are two in a row.
    assert over == [False, False, True, False, False, True, False]
    largest = parse_config(
        small_config(
            NOWHERE, data="valid_fraction = 0.5", sections='[output]\nbest = "valid_accuracy"'
        )
    )
    watch = new_watch(largest)
    assert watch is not None
    for step, score in {1: 0.5, 2: 0.75, 3: 0.25}.items():
        watch = watch.note(step, {"valid_accuracy": score}, 0.0)
    assert (watch.best, watch.best_step, watch.n_since) == (0.75, 2, 1)


@ONE
def test_a_fraction_is_held_out_by_the_seed_alone(comms, source, shared_tmp_path):
    experiment = set_up(config_of(source, SERIAL, data="valid_fraction = 0.3"), comms)
    kept, held = held_out_rows(0, 0.3, 7)
    assert len(held) == 2 and sorted([*kept, *held]) == list(range(7))
    seeds = [tuple(held_out_rows(seed, 0.3, 7)[1]) for seed in range(8)]
    assert len(set(seeds)) > 3
    table = column(source, "train", "u")
    valid = experiment.valid
    assert valid is not None and experiment.train.n_rows == 5
    np.testing.assert_array_equal(experiment.train.take(np.arange(5)).targets, table[kept])
    np.testing.assert_array_equal(valid.take(np.arange(2)).targets, table[held])
    folder = shared_tmp_path / "run"
    config = config_of(source, SERIAL, data="valid_fraction = 0.3", run="n_steps = 2")
    result = train(config, folder, comms, StopFlag())
    wanted = scores_by_diffrax(nm.load_model(folder), source, "train", held)
    assert result["valid_loss"] == pytest.approx(wanted["loss"], rel=1e-10)
    assert config.fingerprint() != config_of(source, SERIAL, data="").fingerprint()


@ONE
def test_held_out_rows_of_all_lengths_are_the_rows_they_were(comms, tmp_path):
    lengths = [9, 4, 7, 9, 5, 3, 8]
    t = np.linspace(0.0, 2.0, 9)
    rows = {
        "t": [t[:n].tolist() for n in lengths],
        "u": [np.full((n, 2), float(i)).tolist() for i, n in enumerate(lengths)],
    }
    split = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "set"))
    experiment = set_up(config_of(tmp_path / "set", SERIAL, data="valid_fraction = 0.3"), comms)
    for part, numbers in zip(
        (experiment.train, experiment.valid), held_out_rows(0, 0.3, 7), strict=True
    ):
        assert part is not None
        batch = part.take(np.arange(part.n_rows))
        assert batch.mask is not None
        there = np.asarray(batch.mask)[..., 0]
        assert there.sum(axis=1).tolist() == [lengths[i] for i in numbers]
        assert [float(row[0, 0]) for row in batch.targets] == [float(i) for i in numbers]


@ONE
def test_epochs_are_counted_in_whole_batches(comms, source, shared_tmp_path, caplog):
    caplog.set_level(logging.INFO, "nodepint_mpi")
    folder = shared_tmp_path / "run"
    data = 'valid_split = "valid"\nbatch_size = 2'
    config = config_of(source, SERIAL, run="n_epochs = 2", data=data)
    result = train(config, folder, comms, StopFlag())
    assert result["step"] == 2 * (7 // 2) and result["status"] == "finished"
    log = (folder / "log.txt").read_text()
    assert "7 rows: 3 batches of 2 in an epoch, which leaves out 1 row; 6 steps, 2 epochs" in log
    assert "step 6 of 6" in log and "valid loss" in log
    longer = config_of(source, SERIAL, run="n_epochs = 3", data=data)
    assert longer.fingerprint() == config.fingerprint()
    assert train(longer, folder, comms, StopFlag(), resume="auto")["step"] == 9
    in_steps = config_of(source, SERIAL, run="n_steps = 10", data=data)
    assert train(in_steps, folder, comms, StopFlag(), resume="auto")["step"] == 10


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
    wanted = scores_by_diffrax(nm.load_model(folder, checkpoint="last"), source, "valid")["loss"]
    assert scores[3] == pytest.approx(wanted, rel=1e-10)
    assert result["best_step"] == min(scores, key=lambda step: scores[step])
    best = scores_by_diffrax(nm.load_model(folder), source, "test")["loss"]
    assert result["test_loss"] == pytest.approx(best, rel=1e-10)


@ONE
@pytest.mark.parametrize(
    "keys, message",
    [
        ({"data": 'valid_split = "a"\nvalid_fraction = 0.1'}, "`valid_split` or `valid_fraction`,"),
        ({"data": 'valid_split = "train"'}, "is the split that is trained on"),
        ({"data": "valid_fraction = 1.0"}, "valid_fraction. is the number 1.0; it should be less"),
        ({"run": "validate_every = 5"}, "`run.validate_every` needs a validation set"),
        ({"run": "patience = 5"}, "`run.patience` needs a validation set"),
        ({"sections": '[output]\nbest = "valid_loss"'}, "`output.best` needs a validation set"),
        ({"sections": '[output]\nbest_mode = "max"'}, "`best_mode` is the direction"),
        ({"run": "min_delta = 0.1"}, "give `patience` too"),
        ({"run": "n_steps = 5\nn_epochs = 1"}, "`n_steps` or `n_epochs`, not both"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(small_config(NOWHERE, **keys))


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(
    "data, sections, message",
    [
        ("valid_fraction = 0.01", "", r"of 7 training rows leaves none for validation: choose a"),
        ("valid_fraction = 0.99", "", "leaves none to train on"),
        ('valid_split = "vaild"', "", "no split 'vaild'.*did you mean 'valid'"),
        ("valid_fraction = 0.3\nbatch_size = 6", "", "has 5 samples left by `data.valid_fraction`"),
        (
            'valid_split = "valid"', '[output]\nbest = "valid_relative_eror"',
            "unknown score 'valid_relative_eror' in `output.best`; did you mean "
            "'valid_relative_error'",
        ),
    ],
)  # fmt: skip
def test_what_the_data_cannot_do_is_said_before_the_run(comms, source, data, sections, message):
    with pytest.raises((ConfigError, DataError), match=message):
        set_up(config_of(source, SERIAL, data=data, sections=sections), comms)


@ONE
def test_a_validation_split_is_checked_as_the_others(comms, source, tmp_path):
    made = datasets.DatasetDict.load_from_disk(str(source))
    u = column(source, "valid", "u")
    u[2, 3, 1] = np.nan
    rows = {"t": column(source, "valid", "t").tolist(), "u": u.tolist()}
    made["valid"] = datasets.Dataset.from_dict(rows)
    made.save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(DataError, match="row 2 of column 'u' holds nan"):
        set_up(config_of(tmp_path / "bad", SERIAL), comms)


@ONE
def test_configs_without_validation_are_the_experiments_they_were():
    """Fingerprints and keys that existing runs are resumed by."""
    config = parse_config(small_config(NOWHERE))
    assert config.run.n_steps == 1000 and config.fingerprint() == FINGERPRINT
    assert new_watch(config) is None
