"""Runs with a validation set, and their scores by a solve that is written out."""

import datasets
import jax
import numpy as np

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.io.records import read_records
from tests.by_hand import classic_runge_kutta
from tests.training.small_config import EXACT, small_config

N_SLICES, N_FINE = 4, 6
STEPS = (
    f'fine = {{ solver = "rk4", n_steps = {N_FINE} }}\ncoarse = {{ solver = "euler", n_steps = 2 }}'
)
SERIAL = 'method = "serial"\n'
ROWS = {"train": 7, "valid": 5, "test": 4}


def make_source(comms, folder):
    """Damped rotations: 7 rows to train on, 5 to validate on, 4 to test on. Collective."""
    if comms.control.rank == 0:
        t, made = np.linspace(0.0, 2.0, 9), {}
        for seed, (split, n_rows) in enumerate(ROWS.items()):
            start = np.random.default_rng(seed).uniform(0.5, 1.5, (n_rows, 2))
            z = (start[:, :1] + 1j * start[:, 1:]) * np.exp((-0.2 + 2.0j) * t)
            rows = {"t": [t.tolist()] * n_rows, "u": np.stack([z.real, z.imag], -1).tolist()}
            made[split] = datasets.Dataset.from_dict(rows)
        datasets.DatasetDict(made).save_to_disk(str(folder))
    comms.control.Barrier()
    return folder


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


def scores_by_hand(model, source, split, rows=None):
    """Loss and metric of a model on rows of a split; observations fall on steps."""
    u = column(source, split, "u")
    u = u if rows is None else u[rows]
    n_steps, n_observed = N_SLICES * N_FINE, u.shape[1] - 1

    def solve(start):
        first = model.encoder(start)
        return classic_runge_kutta(model.processor, first, 0.0, 2.0, n_steps)

    each = n_steps // n_observed
    states = jax.jit(jax.vmap(solve))(u[:, 0])[:, each - 1 :: each]
    found = np.asarray(jax.vmap(jax.vmap(model.decoder))(states))
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


def records_of(comms, folder):
    """Scores by step, as rank 0 has written them."""
    found = read_records(folder) if comms.control.rank == 0 else None
    records = comms.control.bcast(found)
    assert records is not None
    return {r["step"]: r["valid_loss"] for r in records if "valid_loss" in r}
