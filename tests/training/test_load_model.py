"""The trained model taken home: loaded without MPI, solved by plain diffrax."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import nodepint_mpi as nm
from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import NodepintError
from nodepint_mpi.io.directory import CHECKPOINTS
from nodepint_mpi.ranks.signals import StopFlag
from nodepint_mpi.training.evaluate import evaluate_run
from nodepint_mpi.training.train import train
from tests.training.small_config import EXACT, small_config

pytestmark = [
    pytest.mark.standard_promotion, pytest.mark.timeout_s(300), pytest.mark.mpi(max_size=1)
]  # fmt: skip

AT_HOME = """
    import sys, jax
    jax.config.update("jax_enable_x64", True)
    import datasets, diffrax, jax.numpy as jnp, numpy as np
    import nodepint_mpi as nm
    model = nm.load_model({run!r})
    assert not any(name.split(".")[0] in ("mpi4py", "mpi4jax") for name in sys.modules)
    rows = datasets.load_from_disk({data!r})["test"].to_dict()
    t, u = np.array(rows["t"])[0], np.array(rows["u"])
    def solve(start):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, u, args: model.processor(t, u, None)), nm.RK4(),
            t0=0.0, t1=2.0, dt0=None, y0=model.encoder(start), saveat=diffrax.SaveAt(ts=t[1:]),
            stepsize_controller=diffrax.StepTo(jnp.linspace(0.0, 2.0, 57)), max_steps=100,
        ).ys
    found = jax.vmap(jax.vmap(model.decoder))(jax.vmap(solve)(u[:, 0]))
    print(float(jnp.mean((found - u[:, 1:]) ** 2)))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the first test that needs the run leaves it."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(comms, source, trained, tmp_path):
    """A copy of one run of three steps."""
    if not trained.exists():
        steps = 'fine = { solver = "rk4", n_steps = 8 }\ncoarse = { solver = "euler", n_steps = 2 }'
        text = small_config(source, EXACT, steps=steps, run="n_steps = 3")
        train(parse_config(text), trained, comms, StopFlag())
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_plain_diffrax_finds_the_score_without_mpi(comms, run, source, tmp_path):
    own = ("OMPI_", "PMIX_", "PMI_")
    clean = {name: v for name, v in os.environ.items() if not name.startswith(own)}
    code = textwrap.dedent(AT_HOME).format(run=str(run), data=str(source))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=clean
    )
    assert done.returncode == 0, done.stderr
    wanted = evaluate_run(run, comms)["loss"]
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-12)


def test_what_cannot_be_loaded_is_said(run, tmp_path):
    (file,) = (run / CHECKPOINTS).glob("*.h5")
    content = bytearray(file.read_bytes())
    with pytest.raises(NodepintError, match="does not exist"):
        nm.load_model(run, checkpoint=tmp_path / "step-000009.h5")
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(NodepintError, match="no good checkpoint"):
        nm.load_model(run)
    (run / "config.toml").write_text(
        (run / "config.toml").read_text().replace('name = "mlp"', 'name = "evil.py:make"')
    )
    with pytest.raises(NodepintError, match=r"names code.*trust|width"):
        nm.load_model(run)


def test_it_is_the_module_that_was_trained(comms, run):
    model = nm.load_model(run)
    assert isinstance(model, nm.EncodeProcessDecode)
    assert np.all(np.isfinite(model.processor(jnp.zeros(()), jnp.ones(2), None)))
