"""What is held out for validation, when a score is the best, and what a config may not ask for."""

import logging
import re
from pathlib import Path

import datasets
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.data.datasets import held_out_rows
from nodepint_mpi.errors import ConfigError, DataError
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.training.setup import set_up
from nodepint_mpi.training.train import train
from nodepint_mpi.training.watch import new_watch
from tests.training.small_config import small_config
from tests.training.validation_case import (
    SERIAL,
    column,
    config_of,
    make_source,
    scores_by_hand,
    simulate,
)

pytestmark = [
    pytest.mark.standard_promotion, pytest.mark.timeout_s(300), pytest.mark.mpi(max_size=1)
]  # fmt: skip
FINGERPRINT = "3c9a39ba768d5504"  # as it was before there was validation
NOWHERE = Path("x")


@pytest.fixture
def source(comms, shared_tmp_path):
    return make_source(comms, shared_tmp_path / "set")


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
    wanted = scores_by_hand(nm.load_model(folder), source, "train", held)
    assert result["valid_loss"] == pytest.approx(wanted["loss"], rel=1e-10)
    assert config.fingerprint() != config_of(source, SERIAL, data="").fingerprint()


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
    assert f"everything is in {folder}\nnext: nodepint report {folder}\n" in log
    assert re.search(r"\n[\d,]+ parameters, a state of \d+ numbers, float64; arrays take", log)
    if comms.control.rank == 0:  # said before there is a folder
        assert f"slices of the horizon, 4 a rank\nfolder: {folder}\n" in caplog.text
    longer = config_of(source, SERIAL, run="n_epochs = 3", data=data)
    assert longer.fingerprint() == config.fingerprint()
    assert train(longer, folder, comms, StopFlag(), resume="auto")["step"] == 9
    in_steps = config_of(source, SERIAL, run="n_steps = 10", data=data)
    assert train(in_steps, folder, comms, StopFlag(), resume="auto")["step"] == 10


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


def test_a_validation_split_is_checked_as_the_others(comms, source, tmp_path):
    made = datasets.DatasetDict.load_from_disk(str(source))
    u = column(source, "valid", "u")
    u[2, 3, 1] = np.nan
    rows = {"t": column(source, "valid", "t").tolist(), "u": u.tolist()}
    made["valid"] = datasets.Dataset.from_dict(rows)
    made.save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(DataError, match="row 2 of column 'u' holds nan"):
        set_up(config_of(tmp_path / "bad", SERIAL), comms)


def test_configs_without_validation_are_the_experiments_they_were():
    """Fingerprints and keys that existing runs are resumed by."""
    config = parse_config(small_config(NOWHERE))
    assert config.run.n_steps == 1000 and config.fingerprint() == FINGERPRINT
    assert new_watch(config) is None
