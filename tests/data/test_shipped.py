"""Configs and recipes that come with the package, in a wheel and in the repository."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from nodepint_mpi.data.shipped import config_names, copy_config, find_config
from nodepint_mpi.errors import ConfigError, OutputError

pytestmark = pytest.mark.mpi(max_size=1)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel made here would install."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_all_configs_and_recipes_and_says_that_it_is_typed(site):
    shipped = site / "nodepint_mpi" / "shipped"
    for pattern in ("configs/**/*.toml", "data/*/prepare.py", "data/*/field.py"):
        wanted = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        assert {path.relative_to(shipped) for path in shipped.glob(pattern)} == wanted != set()
    assert not list(shipped.rglob("prepared*"))
    assert (site / "nodepint_mpi" / "py.typed").is_file()


def test_a_wheel_gives_a_config_and_its_data_in_an_empty_folder(site, tmp_path):
    def nodepint(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "nodepint_mpi", *words],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"},
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "quickstart" in nodepint("config").split()
    assert tomllib.loads(nodepint("config", "mnist")) == tomllib.loads(
        (ROOT / "configs" / "mnist.toml").read_text()
    )
    before = {path for path in site.rglob("*") if "__pycache__" not in path.parts}
    written = nodepint("config", "duffing", "--copy").split()
    assert {"configs/duffing.toml", "data/duffing/field.py", "data/duffing/prepare.py"} <= {
        *written
    }
    nodepint("data", "prepare", "lotka_volterra", "--set", "n_train=4", "--set", "n_test=2")
    assert (tmp_path / "data" / "lotka_volterra" / "prepared" / "provenance.json").is_file()
    assert {path for path in site.rglob("*") if "__pycache__" not in path.parts} == before


def test_every_config_is_copied_with_the_code_that_it_names(tmp_path):
    assert "control/heat" in config_names()
    for name in config_names():
        folder = tmp_path / name.replace("/", "-")
        written = {path.relative_to(folder).as_posix() for path in copy_config(name, folder)}
        assert f"configs/{name}.toml" in written
        text = find_config(name).read_text()
        named = [word for word in text.split('"') if word.startswith("data/") and ".py:" in word]
        assert {word.partition(":")[0] for word in named} <= written
    assert (tmp_path / "sph" / "tools" / "sph.py").is_file()


def test_a_copy_replaces_nothing_and_a_wrong_name_is_answered(tmp_path):
    copy_config("heat", tmp_path)
    with pytest.raises(OutputError, match=r"heat.toml: it exists"):
        copy_config("heat", tmp_path)
    with pytest.raises(ConfigError, match="unknown config 'quikstart'; did you mean 'quickstart'"):
        find_config("quikstart")
