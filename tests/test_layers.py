"""The import layers hold, and the checker would notice if they did not."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.mpi(max_size=1)  # knows no ranks

ROOT = Path(__file__).resolve().parent.parent


def load_layers() -> ModuleType:
    """tools/layers.py as a module; tools is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location("nodepint_layers", ROOT / "tools" / "layers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


layers = load_layers()


def violations_of(root: Path, file: str, source: str) -> list[str]:
    """Messages for a package that holds nothing but one file."""
    path = root / "nodepint_mpi" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    return [violation.message for violation in layers.check_tree(root)]


def test_the_package_keeps_its_layers() -> None:
    assert [str(violation) for violation in layers.check_tree(ROOT)] == []


FORBIDDEN = [
    ("core/a.py", "import mpi4py"),
    ("core/a.py", "from mpi4py import MPI"),
    ("core/a.py", "import mpi4jax"),
    ("core/a.py", "import h5py as h5"),
    ("core/a.py", "from datasets import load_dataset"),
    ("core/a.py", "from nodepint_mpi.config.experiment import Config"),
    ("core/a.py", "from nodepint_mpi import config"),
    ("core/a.py", "from .. import config"),
    ("core/a.py", "from ..parallel.comms import world"),
    ("core/deep/a.py", "from ...parallel import comms"),
    ("core/deep/__init__.py", "from ...io import hdf5"),
    ("core/a.py", "def f():\n    import mpi4py.MPI"),
    ("core/a.py", "if True:\n    from ..training import train"),
    ("parallel/a.py", "import h5py"),
    ("parallel/a.py", "import datasets"),
    ("parallel/a.py", "import nodepint_mpi.config.experiment"),
    ("parallel/a.py", "from nodepint_mpi.training import train"),
    ("parallel/a.py", "from nodepint_mpi.io.hdf5 import write_rows"),
    ("io/a.py", "import mpi4jax"),
    ("io/a.py", "from nodepint_mpi.training.train import train"),
    ("io/a.py", "from nodepint_mpi.training import *"),
    ("parallel/a.py", "from nodepint_mpi.ranks import guard"),
    ("training/a.py", "from nodepint_mpi import cli"),
    ("training/a.py", "import click"),
    ("training/a.py", "from nodepint_mpi.bench import cases"),
    ("rom/a.py", "from nodepint_mpi.report import sections"),
    ("bench/a.py", "from nodepint_mpi.report.facts import Facts"),
    ("bench/a.py", "from nodepint_mpi.doctor import probe"),
    ("config/a.py", "import jax"),
    ("config/a.py", "from nodepint_mpi.core import types"),
    ("errors.py", "import jax"),
    ("errors.py", "from .core import types"),
    ("cli/a.py", "from tools import layers"),
    ("training/a.py", "import tools.layers"),
    ("__init__.py", "import jax"),
    ("__init__.py", "from .cli import main"),
    ("utils.py", "import os"),
    ("training/a.py", "from mpi4py import MPI\ncomm = MPI.COMM_WORLD"),
    ("io/a.py", "from mpi4py.MPI import COMM_WORLD"),
    ("parallel/solve.py", "comm = COMM_WORLD"),
]


@pytest.mark.parametrize(("file", "source"), FORBIDDEN)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, source: str) -> None:
    assert violations_of(tmp_path, file, source)


ALLOWED = [
    ("core/a.py", "import jax\nimport math\nfrom nodepint_mpi.core import types\nfrom . import b"),
    ("core/a.py", "from nodepint_mpi.errors import NodepintError"),
    ("core/a.py", '"""Not COMM_WORLD."""'),
    ("parallel/a.py", "import mpi4jax\nfrom mpi4py import MPI\nfrom ..core.types import State"),
    ("parallel/comms.py", "from mpi4py import MPI\nworld = MPI.COMM_WORLD"),
    ("io/a.py", "import h5py\nfrom mpi4py import MPI\nfrom ..ranks import guard"),
    ("training/a.py", "from nodepint_mpi.parallel.solve import solve\nfrom ..io import hdf5"),
    ("config/a.py", "import tomllib\nimport pydantic"),
    ("cli/a.py", "import click\ndef f():\n    from nodepint_mpi.bench import train"),
]


@pytest.mark.parametrize(("file", "source"), ALLOWED)
def test_an_allowed_import_is_not_reported(tmp_path: Path, file: str, source: str) -> None:
    assert violations_of(tmp_path, file, source) == []


def test_the_script_exits_with_1_and_names_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nodepint_mpi" / "core" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("import jax\nimport mpi4py\n")
    assert layers.main([str(tmp_path)]) == 1
    assert f"{path}:2: core must not import mpi4py" in capsys.readouterr().out


def test_a_wrong_root_is_not_called_clean(tmp_path: Path) -> None:
    assert layers.check_tree(tmp_path)
