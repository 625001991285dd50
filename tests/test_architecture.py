"""The map of the code in docs/architecture.md and CONTRIBUTING.md is that of the code."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.mpi(max_size=1)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nodepint_mpi"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FILE = re.compile(r"[\w/.-]+\.(?:py|sh|md|toml)\b")
FOLDERS = sorted(
    {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {"."}
)


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module; tools is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location(f"nodepint_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


layers, docs_flow = load_tool("layers"), load_tool("docs_flow")


def flow_of_a_step():
    """The picture of a training step, as the page describes it."""
    found = re.search(r"^```flow\n(.*?)^```$", ARCHITECTURE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return docs_flow.parse(found[1])


FLOW = flow_of_a_step()


def missing_files(text: str) -> list[str]:
    """The files that a text names and that are neither in the package nor in the repository."""
    names = sorted(set(FILE.findall(text)))
    return [n for n in names if not ((PACKAGE / n).is_file() or (ROOT / n).is_file())]


def imports(importer: str, imported: str) -> bool:
    """Whether a file of the package imports another one, or a name from it."""
    path = PACKAGE / importer
    module = importer.removesuffix(".py").replace("/", ".")
    wanted = f"{layers.PACKAGE}.{imported.removesuffix('.py').replace('/', '.')}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(
        layers.is_within(name, wanted) for _, name in layers.imported_names(tree, module, False)
    )


def table_after(heading: str, text: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    _, _, below = text.partition(heading)
    found = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert found is not None
    rows = found[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("text", [ARCHITECTURE, CONTRIBUTING], ids=["architecture", "contributing"])
def test_every_file_that_a_page_names_exists(text):
    assert len(FILE.findall(text)) > 10
    assert missing_files(text) == []


def test_a_file_that_does_not_exist_is_noticed():
    text = "Not `training/stepp.py`, but `training/step.py` and `tools/layers.py`."
    assert missing_files(text) == ["training/stepp.py"]


def test_every_folder_of_the_package_is_named():
    named = set(re.findall(r"`([\w/]+?)/?`", ARCHITECTURE))
    assert [folder for folder in FOLDERS if folder not in named] == []


def test_the_table_of_layers_has_their_order_and_a_sentence_each():
    rows = table_after("## Folders", ARCHITECTURE)
    assert [row[0].strip("`") for row in rows] == list(layers.ORDER)
    assert [row[0] for row in rows if not re.search(r"\w.*[.?]$", row[1])] == []


def test_the_exceptions_to_the_order_are_those_of_the_checker():
    assert layers.PURE == {"config": {"errors", "names"}}
    assert layers.INSTRUMENTS == {"bench", "report", "doctor"}


@pytest.mark.parametrize("arrow", FLOW.arrows, ids=[f"{a.start}-{a.end}" for a in FLOW.arrows])
def test_an_arrow_of_the_picture_is_an_import(arrow):
    assert imports(arrow.start, arrow.end) or imports(arrow.end, arrow.start)


def test_an_arrow_without_an_import_is_noticed():
    assert not imports("core/sweeps.py", "parallel/exchange.py")
    assert not imports("training/step.py", "io/checkpoint.py")


def test_every_file_of_the_picture_is_joined_to_another():
    joined = {file for arrow in FLOW.arrows for file in (arrow.start, arrow.end)}
    assert joined == set(FLOW.boxes)


def test_the_picture_shows_every_file_and_every_label():
    picture = docs_flow.draw(FLOW)
    labels = [word for arrow in FLOW.arrows for word in arrow.label.split(" / ")]
    assert [text for text in [*FLOW.boxes, *labels] if f">{text}</" not in picture] == []


@pytest.mark.parametrize(
    "line", ["a.py -> b.py", "a.py (one) | b.py", "a.py (one) | .\na.py -> c.py: it"]
)
def test_a_line_that_cannot_be_drawn_is_an_error(line):
    with pytest.raises(ValueError):
        docs_flow.parse(line)


def test_contributing_answers_its_questions_by_files_and_names_every_folder():
    questions = table_after("## Where is", CONTRIBUTING)
    assert len(questions) >= 10
    assert [row[0] for row in questions if not FILE.search(row[1])] == []
    folders = [row[0].strip("`").rstrip("/") for row in table_after("## Map", CONTRIBUTING)]
    assert folders == [folder for folder in layers.ORDER if (PACKAGE / folder).is_dir()]
