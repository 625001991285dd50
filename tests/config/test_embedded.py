"""A config inside a Python file: read as text, and its names found in that file."""

import pytest

from nodepint_mpi.config.embedded import code_of
from nodepint_mpi.config.experiment import read_config
from nodepint_mpi.errors import ConfigError

pytestmark = pytest.mark.mpi(max_size=1)  # knows no ranks

FILE = '''
import no_such_package

CONFIG = """
run = { name = "own" }
network = { name = ":make", options = { path = ":kept" } }
loss = { name = ":loss", metrics = [":one", "other.py:two"] }
problem = { field = "lorenz" }
[data]
source = ":data"
input = "u"
target = "u"
[time]
horizon = [0.0, 1.0]
n_slices = 2
fine = { solver = ":Solver", n_steps = 2 }
coarse = { solver = "euler", n_steps = 1 }
"""

raise RuntimeError("it is not run")
'''


@pytest.fixture
def own_file(tmp_path):
    def write(text):
        path = tmp_path / "own.py"
        path.write_text(text)
        return path

    return write


def test_the_file_is_not_run_and_its_functions_are_found_in_it(own_file):
    path = own_file(FILE)
    config = read_config(path, ["time.n_slices=4", "loss.name=:other"])
    assert config.data is not None and config.loss is not None and config.network is not None
    assert config.data.source == f"{path}:data"
    assert config.network.name == f"{path}:make"
    assert config.network.model_dump()["options"] == {"path": ":kept"}
    assert config.loss.name == f"{path}:other"
    assert config.loss.metrics == [f"{path}:one", "other.py:two"]
    assert (config.time.fine.solver, config.time.n_slices) == (f"{path}:Solver", 4)
    assert config.problem is not None and config.problem.field == "lorenz"


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1\n", r'own\.py has no settings: .*`CONFIG = """\.\.\."""`'),
        ("CONFIG = dict(run=1)\n", "must be one plain string"),
        ('CONFIG = ""\nCONFIG += "x"\n', "must be one plain string"),
        ('CONFIG = f"{1}"\n', "must be one plain string"),
        ("CONFIG = (\n", r"own\.py is not valid Python: .*line 1"),
        ('CONFIG = """[run"""\n', r"CONFIG in .*own\.py is not valid TOML"),
        ('CONFIG = """\nrun = { nam = "x" }\n"""\n', r"(?s)CONFIG in .*`run\.nam`; did you mean"),
    ],
)
def test_what_is_no_config_is_told(own_file, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(own_file(text))


def test_settings_comments_and_layout_are_no_code():
    one = 'CONFIG = "a"\ndef make(n):\n    return n + 1\n'
    other = 'def make(n):  # more\n\n    return (n + 1)\n\n\nCONFIG = "b"\n'
    assert code_of(one) == code_of(other)
    assert code_of(one) != code_of(one.replace("1", "2"))


def test_metrics_do_not_name_another_experiment(own_file):
    path = own_file(FILE)
    named = read_config(path).fingerprint()
    assert read_config(path, ["loss.metrics=[]"]).fingerprint() == named
    assert read_config(path, ["data.options={n=1}"]).fingerprint() != named


def test_options_are_for_functions(own_file):
    with pytest.raises(ConfigError, match="`options` are for a `source` that is a function"):
        read_config(own_file(FILE), ["data.source=mnist", "data.options={n=1}"])
