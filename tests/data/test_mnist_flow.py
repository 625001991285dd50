"""Lines from noise to digits, and back to pictures: recipe, field and judge."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.build.imports import import_file
from nodepint_mpi.core.batch import SampleBatch
from nodepint_mpi.data.datasets import open_split
from nodepint_mpi.data.prepare import prepare_dataset
from nodepint_mpi.errors import DataError

REPOSITORY = Path(__file__).parents[2]
SMALL = {"n_modes": 11, "n_edges": 5, "n_noises": 2, "n_train": 12, "n_test": 6}
pytestmark = pytest.mark.mpi(max_size=1)


@pytest.fixture
def images(root):
    """Random images in the place of MNIST; the test images are training images too."""
    draw = np.random.default_rng(3)
    train = draw.integers(0, 256, (12, 7, 7), dtype=np.uint8)
    labels = draw.integers(0, 10, 12)
    features = datasets.Features(
        image=datasets.Array2D((7, 7), "uint8"), label=datasets.Value("int64")
    )
    splits: dict[str | datasets.NamedSplit, datasets.Dataset] = {
        name: datasets.Dataset.from_dict({"image": train[:n], "label": labels[:n]}, features)
        for name, n in (("train", 12), ("test", 6))
    }
    datasets.DatasetDict(splits).save_to_disk(root / "mnist" / "prepared")
    return train, labels


def test_lines_are_straight_and_lead_from_fresh_noise_to_images(root, images):
    place = prepare_dataset("mnist_flow", root=root, options=SMALL)
    train = open_split(place, "train", ["t", "u"])
    u = train.take("u", range(24))
    assert u.shape == (24, 5, 21)
    np.testing.assert_array_equal(train.take("t", [23])[0], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(np.diff(u, n=2, axis=1), 0, atol=1e-5)
    classes = np.repeat(np.eye(10)[np.tile(images[1], 2)][:, None], 5, axis=1)
    np.testing.assert_array_equal(u[:, :, 11:], classes)
    np.testing.assert_allclose(u[:12, -1], u[12:, -1], atol=1e-6)  # other noise, same image
    assert np.abs(u[:12, 0] - u[12:, 0])[:, :11].max(axis=1).min() > 0.1
    np.testing.assert_allclose(u[:12, -1, :11].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(u[:12, -1, :11].var(axis=0), 1, atol=1e-3)


def test_a_flow_that_ends_where_the_lines_do_gives_the_images_back(root, images, monkeypatch):
    """Twelve images have eleven directions about their mean, so nothing is lost."""
    judge = import_file(REPOSITORY / "tools" / "judge_digits.py", "the test")
    place = prepare_dataset("mnist_flow", root=root, options=SMALL)
    lines = open_split(place, "test", ["u"]).take("u", range(6))
    samples = SimpleNamespace(
        section=SimpleNamespace(source=str(place)),
        n_rows=6,
        take=lambda rows: SampleBatch(lines[:, 0], lines),
    )
    run = SimpleNamespace(experiment=SimpleNamespace(test=samples))
    monkeypatch.setattr(judge, "predict", lambda run, start: lines[:, -1])
    made, classes = judge.generate(run)
    np.testing.assert_allclose(made, images[0][:6], atol=0.05)
    np.testing.assert_array_equal(classes, images[1][:6])
    lines = lines[:, :, 1:]
    with pytest.raises(DataError, match="11 directions"):
        judge.generate(run)


def test_the_field_begins_at_rest_and_never_moves_the_class():
    make = import_file(REPOSITORY / "data" / "mnist_flow" / "field.py", "the test").make_field
    field = make(jax.random.key(0), input_shape=(14,), output_size=14, width=5, depth=1)
    u = jnp.arange(14.0)
    np.testing.assert_array_equal(field(jnp.array(0.5), u, None), np.zeros(14))
    moved = jax.tree.map(lambda x: x + 1 if isinstance(x, jax.Array) else x, field)
    slope = np.asarray(moved(jnp.array(0.5), u, None))
    assert np.all(slope[:4] != 0) and np.all(slope[4:] == 0)


def test_more_directions_than_images_are_refused(root, images):
    with pytest.raises(DataError, match="n_modes 1 to n_train - 1"):
        prepare_dataset("mnist_flow", root=root, options=SMALL | {"n_modes": 12})
    assert not (root / "mnist_flow" / "prepared").exists()
