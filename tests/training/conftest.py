"""Data that several tests of training share."""

import datasets
import numpy as np
import pytest


@pytest.fixture
def source(comms, shared_tmp_path):
    """A few damped rotations, observed at times on and between the slice boundaries."""
    if comms.control.rank == 0:
        t = np.linspace(0.0, 2.0, 9)
        start = np.random.default_rng(0).uniform(0.5, 1.5, (6, 2))
        turn = np.exp((-0.2 + 2.0j) * t)
        z = (start[:, :1] + 1j * start[:, 1:]) * turn
        rows = {"t": [t.tolist()] * 6, "u": np.stack([z.real, z.imag], axis=-1).tolist()}
        split = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(
            str(shared_tmp_path / "set")
        )
    comms.control.Barrier()
    return shared_tmp_path / "set"
