"""`nodepint sample`: samples of a run, on one and on two ranks."""

import numpy as np
import pytest

from tests.cli.small_case import alone, messages, read_json

pytestmark = [pytest.mark.mpi(max_size=1), pytest.mark.timeout_s(400)]

CODE = '''
import equinox as eqx, jax, jax.numpy as jnp, numpy as np

class Same(eqx.Module):
    def __call__(self, x):
        return x

class Velocity(eqx.Module):
    """Of one Gaussian of deviation 0.1 for each class."""
    centers: jax.Array
    def __call__(self, t, u, args):
        center = self.centers[args.static[0].astype(int)]
        slope = (0.01 * t - (1 - t)) / (0.01 * t**2 + (1 - t) ** 2)
        return center + slope * (u - t * center)

class Model(eqx.Module):
    encoder: Same
    processor: Velocity
    decoder: Same

def make_model(key, *, input_shape, output_size):
    return Model(Same(), Velocity(jnp.array([[2.0, 0.0], [0.0, 2.0]])), Same())

def make_data():
    rows = lambda n: {"u": np.ones((n, 3, 2)), "t": np.tile([0.0, 0.5, 1.0], (n, 1)),
                      "label": np.arange(n) % 2}
    return {"train": rows(4), "test": rows(2)}
'''
CONFIG = """
[run]
name = "velocity"
precision = "float64"
n_steps = 1
[data]
source = "velocity.py:make_data"
input = "u"
target = "u"
times = "t"
static = "label"
[network]
name = "velocity.py:make_model"
[loss]
name = "mean_squared_error"
[optim]
learning_rate = 1e-12
[time]
horizon = [0.0, 1.0]
n_slices = 2
fine = { solver = "euler", n_steps = 4 }
coarse = { solver = "euler", n_steps = 1 }
[output]
log_every = 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("velocity")
    (folder / "velocity.py").write_text(CODE)
    (folder / "velocity.toml").write_text(CONFIG)
    done = alone("train", "velocity.toml", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_samples_have_the_distribution_of_their_class(run, nodepint, tmp_path):
    options = "--n", 40, "--steps", 36, "--classes", "1,0", "--compare", "--trust"
    methods = "--method", "parareal", "--method", "tangent"
    said = nodepint(
        2, "sample", run, *options, *methods, "--json", tmp_path / "s.json", cwd=run.parent
    )
    assert "40 samples, ode, 36 steps: tangent" in said.stdout
    srds, newton = read_json(tmp_path / "s.json")
    assert newton["error_max"] < 1e-9 > srds["error_rms"] * 1e-7
    assert newton["sweeps"] == 1  # the velocity is linear
    drawn = np.load(run / "samples" / "ode-tangent.npz")
    assert drawn["static"][:4, 0].tolist() == [1, 0, 1, 0]
    for digit, center in enumerate([[2.0, 0.0], [0.0, 2.0]]):
        own = drawn["samples"][drawn["static"][:, 0] == digit]
        assert np.all(np.abs(own - center) < 0.6)  # 20 samples of deviation 0.1
        assert 0.03 < np.std(own - center) < 0.3
    assert (run / "pictures" / "samples.png").stat().st_size > 0
    done = alone("report", run, "--no-model", "--json", tmp_path / "r.json", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert {"Samples", "Pictures"} <= set(read_json(tmp_path / "r.json")["sections"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--classes", "0,7", "--trust"), "Class 7 is not one"),
        (("--rank", 3, "--trust"), "choose at most 2"),
    ],
)
def test_what_does_not_fit_is_said_once(run, options, said):
    done = alone("sample", run, "--n", 2, "--steps", 4, *options, cwd=run.parent)
    assert done.returncode == 2
    (message,) = messages(done.stderr)
    assert said in message


def test_a_run_that_is_no_velocity_field(trained, tmp_path):
    done = alone("sample", trained(1), cwd=tmp_path)
    assert done.returncode == 2
    (message,) = messages(done.stderr)
    assert "`time.horizon` is [0, 3.5]; expected [0, 1]" in message
