"""Export of a reduced model on any number of ranks, its file, and what is wrong with bad ones."""

import subprocess
import sys
import textwrap
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi import load_rom
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError, NodepintError, ReducedModelError
from nodepint_mpi.io.checkpoint import save_checkpoint
from nodepint_mpi.io.directory import CHECKPOINTS, CONFIG, config_text
from nodepint_mpi.rom.evaluate import evaluate_rom, format_comparison
from nodepint_mpi.rom.export import export_rom
from nodepint_mpi.training.evaluate import open_run
from nodepint_mpi.training.forward import make_prediction
from nodepint_mpi.training.setup import fresh_state, set_up
from tests.training.small_config import MLP, small_config

pytestmark = [pytest.mark.timeout_s(300)]

SIZE = 6
OWN_PATH = "own_field.py:make"
OWN = """
import jax, jax.numpy as jnp, equinox as eqx

class Damping(eqx.Module):
    rates: jax.Array

    def __call__(self, t, u, args):
        return -self.rates * u + 0.1 * jnp.sin(u)

def make(key, *, input_shape, output_size):
    return Damping(jnp.linspace(0.5, 1.5, output_size))
"""


@pytest.fixture
def make_run(comms, shared_tmp_path):
    """A run directory with one checkpoint, as training leaves it."""

    def make(network: str = MLP, name: str = "run"):
        folder = shared_tmp_path / name
        source = shared_tmp_path / "set"
        text = small_config(source, 'method = "serial"', n_slices=5, network=network)
        if comms.control.rank == 0:
            t = np.linspace(0.0, 2.0, 9)
            start = np.random.default_rng(0).normal(size=(8, 1, SIZE))
            states = start * np.exp(-np.linspace(0.5, 1.5, SIZE) * t[:, None])
            rows = {"t": [t.tolist()] * 8, "u": states.tolist()}
            split = datasets.Dataset.from_dict(rows)
            datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(source))
            (folder / CHECKPOINTS).mkdir(parents=True)
            (folder / CONFIG).write_text(config_text(parse_config(text)))
        comms.control.Barrier()
        experiment = set_up(parse_config(text), comms)
        whole, dealt = experiment.update.held.kept(fresh_state(experiment))
        save_checkpoint(
            comms.control,
            folder / CHECKPOINTS,
            step=3,
            replicated=whole,
            rows={},
            row_start=0,
            n_rows=0,
            meta={"fingerprint": experiment.config.fingerprint()},
            keep=1,
            dealt=dealt,
        )
        return folder, experiment

    return make


@pytest.mark.mpi(max_size=2)
def test_all_directions_give_the_run_s_own_predictions(comms, make_run):
    folder, experiment = make_run()
    file = folder / "rom.h5"
    made = export_rom(folder, file, comms, rank=SIZE)
    assert (made["rank"], made["projected_field"], made["optimizer_step"]) == (SIZE, True, 3)
    assert made["n_snapshots"] == 8 * (1 + 5 + 7)  # start, ends, and times between
    rom = load_rom(file)
    params = open_run(folder, comms).params
    batch = experiment.test.take(np.arange(8))
    inputs = np.asarray(batch.initial)
    wanted = make_prediction(experiment.test_problem)(params, batch)
    times = jnp.asarray(experiment.test.times[experiment.test_problem.observations.indices])
    if times.size:
        found = jax.vmap(rom.solve, in_axes=(0, None))(jnp.asarray(inputs), times)
        np.testing.assert_allclose(np.moveaxis(found, 0, 1), wanted, rtol=1e-10, atol=1e-12)
    result = evaluate_rom(file, folder, comms)
    assert result["reduced_vs_full"] < 1e-12
    assert result["full_vs_data"] == pytest.approx(result["reduced_vs_data"], rel=1e-9)
    assert comms.control.allgather(result) == [result] * comms.control.size
    assert "reduced against full model" in format_comparison(result)
    assert (folder / "rom.png").stat().st_size > 1000


@pytest.mark.mpi(max_size=2)
def test_energy_chooses_the_rank_and_any_ranks_find_the_same_basis(comms, make_run):
    from nodepint_mpi.parallel.comms import alone, make_comms

    folder, _ = make_run()
    made = export_rom(folder, folder / "a.h5", comms, energy=0.8)
    assert 1 <= made["rank"] < SIZE
    assert made["energy"] >= 0.8
    rom = load_rom(folder / "a.h5")
    gram = rom.project(rom.basis)
    np.testing.assert_allclose(gram, np.eye(made["rank"]), atol=1e-12)
    own = folder / f"alone-{comms.control.rank}.h5"
    assert export_rom(folder, own, make_comms(alone()), energy=0.8)["rank"] == made["rank"]
    serial = load_rom(own)
    np.testing.assert_allclose(rom.energies, serial.energies, rtol=1e-8)
    overlap = np.linalg.svd(np.asarray(rom.project(serial.basis)), compute_uv=False)
    np.testing.assert_allclose(overlap, 1.0, atol=1e-8)  # the same span


@pytest.mark.mpi(max_size=1)
def test_a_network_of_one_s_own_comes_along_by_its_import_path(
    comms, make_run, monkeypatch, tmp_path, shared_tmp_path
):
    if comms.control.rank == 0:
        (shared_tmp_path / "own_field.py").write_text(OWN)
    comms.control.Barrier()
    monkeypatch.chdir(shared_tmp_path)
    folder, _ = make_run('name = "own_field.py:make"')
    made = export_rom(folder, folder / "rom.h5", comms, rank=SIZE, trust=True)
    assert not made["projected_field"]
    rom = load_rom(folder / "rom.h5", allow=[OWN_PATH])
    np.testing.assert_allclose(rom.processor.rates, np.linspace(0.5, 1.5, SIZE))
    found = evaluate_rom(folder / "rom.h5", folder, comms, trust=True)
    assert found["reduced_vs_full"] < 1e-12
    names: dict[str, Any] = {}
    exec(OWN, names)
    given = load_rom(folder / "rom.h5", network=names["make"])
    np.testing.assert_array_equal(given.processor.rates, rom.processor.rates)
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(ReducedModelError, match="the user's own: `own_field.py:make` must be"):
        load_rom(folder / "rom.h5", allow=[OWN_PATH])


@pytest.mark.mpi(max_size=1)
def test_nothing_is_imported_because_a_file_names_it(comms, make_run, monkeypatch, shared_tmp_path):
    marker = shared_tmp_path / "imported"
    if comms.control.rank == 0:
        (shared_tmp_path / "own_field.py").write_text(OWN)
    comms.control.Barrier()
    monkeypatch.chdir(shared_tmp_path)
    folder, _ = make_run(f'name = "{OWN_PATH}"')
    file = folder / "rom.h5"
    export_rom(folder, file, comms, rank=2, trust=True)
    text = f"from pathlib import Path; Path({str(marker)!r}).touch()" + OWN
    comms.control.Barrier()
    if comms.control.rank == 0:
        (shared_tmp_path / "other_field.py").write_text(text)
        config = (folder / CONFIG).read_text().replace("own_field", "other_field")
        (folder / CONFIG).write_text(config)
    comms.control.Barrier()
    for allow in ([], ["other.py:make"]):
        with pytest.raises(ReducedModelError, match='asks to import `network.name = "own_field'):
            load_rom(file, allow=allow)
    asked = [
        lambda **trust: open_run(folder, comms, **trust),
        lambda **trust: export_rom(folder, file, comms, **trust),
        lambda **trust: evaluate_rom(file, folder, comms, **trust),
    ]
    for ask in asked:
        with pytest.raises(ConfigError, match='`network.name = "other_field.py:make"`.*--trust'):
            ask()
        with pytest.raises(NodepintError, match="fingerprint"):  # not the config of this run
            ask(trust=True)
    comms.control.Barrier()
    assert not marker.exists()


@pytest.mark.mpi(max_size=2)
def test_fewer_independent_directions_than_asked_for_are_said(comms, make_run, caplog):
    linear = 'name = "mlp"\nwidth = 1\nlatent = 4'  # a state of four coordinates
    folder, _ = make_run(linear)
    made = export_rom(folder, folder / "rom.h5", comms, rank=4)
    assert made["rank"] == made["state_size"] == 4
    with pytest.raises(ConfigError, match="--rank 5` is more than the state's 4 entries"):
        export_rom(folder, folder / "rom.h5", comms, rank=5)


LOAD = """
import sys
for name in ("mpi4py", "mpi4jax", "datasets", "pyarrow"):
    sys.modules[name] = None
import jax
jax.config.update("jax_enable_x64", {x64})
import numpy as np
import nodepint_mpi
rom = nodepint_mpi.load_rom({file!r})
found = rom.solve(np.ones({size}), np.array([0.5, 2.0]))
print(rom)
np.save({out!r}, found)
"""


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("x64", [True, False])
def test_loading_needs_no_mpi(comms, make_run, tmp_path, x64):
    folder, _ = make_run()
    export_rom(folder, folder / "rom.h5", comms, rank=3)
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "found.npy"
    code = LOAD.format(file=str(folder / "rom.h5"), size=SIZE, out=str(out), x64=x64)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "ReducedModel('test', 3 of 6 directions" in done.stdout
    wanted = load_rom(folder / "rom.h5").solve(jnp.ones(SIZE), jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(np.load(out), wanted, rtol=1e-12 if x64 else 1e-4, atol=1e-6)


@pytest.mark.mpi(max_size=2)
def test_bad_files_and_runs_are_refused_in_words(comms, make_run, shared_tmp_path):
    folder, _ = make_run()
    good = folder / "rom.h5"
    export_rom(folder, good, comms, rank=2)
    bad = shared_tmp_path / f"bad-{comms.control.rank}.h5"
    with pytest.raises(ReducedModelError, match="No such file"):
        load_rom(bad)
    bad.write_text("something else")
    with pytest.raises(ReducedModelError, match="is not a reduced model; `nodepint rom export"):
        load_rom(bad)
    content = good.read_bytes()
    for damaged in (content[:-1], content[:700], content + b"x", flip(content, len(content) // 2)):
        bad.write_bytes(damaged)
        with pytest.raises(ReducedModelError, match="is damaged"):
            load_rom(bad)
    bad.write_bytes(content.replace(b"format 2\n", b"format 9\n", 1))
    with pytest.raises(ReducedModelError, match="has format 9"):
        load_rom(bad)
    with pytest.raises(NodepintError, match="exists and is not a reduced model"):
        export_rom(folder, folder / CONFIG, comms, rank=2)
    with pytest.raises(NodepintError, match="there is no folder"):
        export_rom(folder, folder / "no" / "rom.h5", comms, rank=2)
    comms.control.Barrier()
    if comms.control.rank == 0:
        for path in (folder / CHECKPOINTS).iterdir():
            path.unlink()
    comms.control.Barrier()
    with pytest.raises(NodepintError, match="no good checkpoint"):
        export_rom(folder, good, comms, rank=2)
    assert good.read_bytes() == content


@pytest.mark.mpi(max_size=2)
def test_a_file_of_another_run_is_refused(comms, make_run):
    folder, _ = make_run()
    other, _ = make_run('name = "mlp"\nwidth = 9', "other")
    export_rom(folder, folder / "rom.h5", comms, rank=2)
    with pytest.raises(ReducedModelError, match="from another run"):
        evaluate_rom(folder / "rom.h5", other, comms)


def flip(content: bytes, place: int) -> bytes:
    """One byte changed."""
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
