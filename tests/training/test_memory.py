"""The planned bytes of a run against those of its arrays."""

import math

import jax
import jax.numpy as jnp
import pytest

from nodepint_mpi.bench.planning.forecast import forecast_memory
from nodepint_mpi.bench.planning.lines import Layout
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.training import memory
from nodepint_mpi.training.info import make_plan
from nodepint_mpi.training.setup import needed_memory, set_up
from tests.training.small_config import small_config
from tests.training.test_samples import INPUTS, config_of, make_rows, save

CASES = {
    "common times": ("common", "", ""),
    "mask and weights": ("common", 'mask = "m"\nweights = "w"', ""),
    "batches, inputs": ("common", INPUTS + "batch_size = 3", ""),
    "own times, cubic inputs, features": (
        "own times",
        INPUTS + 'interpolation = "cubic"\nstatic = "p"',
        "",
    ),
    "relaxed gaps": ("gaps", 'missing = "nan"', "relaxation = { steps = 10, start = 0.5 }"),
}


@pytest.mark.mpi(2, 2)
@pytest.mark.parametrize(
    ("case", "precision"),
    [
        (name, precision)
        for name in CASES
        for precision in ("float64", "float32")
        if "own times" in name or precision == "float64"
    ],
)
def test_planned_bytes_of_samples_are_those_of_a_batch(comms, shared_tmp_path, case, precision):
    kind, data, options = CASES[case]
    text = config_of(save(comms, shared_tmp_path / "set", make_rows(kind)), data, options)
    x64 = precision == "float64"
    with jax.enable_x64(x64):
        config = parse_config(text.replace("float64", precision))
        experiment = set_up(config, comms)
        batch = jax.tree.map(jnp.asarray, experiment.batch(0).data._replace(step=None))
        planned = needed_memory(experiment)
    around = sum(leaf.nbytes for leaf in jax.tree.leaves((batch.signal, batch.reads)))
    rest = sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) - around
    assert planned["the samples of a step"] == rest
    assert planned["inputs and reading times in its slices"] == around
    assert (around > 0) == ("inputs" in case)
    if comms.time.rank == 0:  # `nodepint info` says what the rank with the most slices takes
        with jax.enable_x64(x64):
            plan = make_plan(config, comms.time.size)
        assert (plan["samples_bytes_per_rank"], plan["inputs_bytes_per_rank"]) == (rest, around)


@pytest.mark.mpi(max_size=1)
def test_inputs_that_cannot_fit_are_refused(comms, tmp_path, monkeypatch):
    folder = save(comms, tmp_path / "set", make_rows("common"))
    experiment = set_up(parse_config(config_of(folder, INPUTS, "")), comms)
    needed = needed_memory(experiment)
    monkeypatch.setattr(memory, "machine_bytes", lambda: sum(needed.values()) - 1)
    with pytest.raises(ConfigError, match="for inputs and reading times in its slices"):
        memory.require_memory(needed, 1)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("layout", [Layout(1), Layout(4), Layout(1, 2), Layout(2, 3, 2)])
def test_memory_on_more_ranks_is_forecast_from_one(comms, tmp_path, layout):
    """What belongs to slices is divided by all ranks, what all ranks of a line have is not."""
    data = INPUTS + 'mask = "m"'
    folder = save(comms, tmp_path / "set", make_rows("common"))
    basis = 'method = "tangent"\nbasis = { kind = "identity" }'
    text = small_config(folder, basis, n_slices=8, data=data)

    def planned(n_time: int, n_data: int, n_basis: int) -> dict:
        grid = {"run.data_ranks": n_data, "run.basis_ranks": n_basis}
        return make_plan(parse_config(text, grid), n_time * n_data * n_basis)

    def total(plan) -> int:
        kinds = ("interface", "adjoint", "samples", "inputs")
        return sum(plan[f"{kind}_bytes_per_rank"] for kind in kinds)

    one, there = planned(1, 1, 1), planned(*layout)
    found = forecast_memory(one, total(one), layout)
    assert math.isclose(found, total(there), rel_tol=1e-12)
