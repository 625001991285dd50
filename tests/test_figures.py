"""The figures of README and docs/ are those that their script draws."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

pytestmark = pytest.mark.mpi(max_size=1)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "figures"


def load_script():
    """The module `tools/draw_figures.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location("draw_figures", ROOT / "tools/draw_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


@pytest.mark.parametrize("name", SCRIPT.FIGURES)
def test_a_committed_figure_is_what_the_script_draws(name):
    assert (FOLDER / name).read_text() == SCRIPT.FIGURES[name]()


@pytest.mark.parametrize("name", SCRIPT.FIGURES)
def test_a_figure_is_valid_and_fits_its_frame(name):
    root = ElementTree.fromstring((FOLDER / name).read_text())
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    texts = [shape for shape in root.iter() if shape.tag.endswith("}text")]
    assert texts
    for text in texts:
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        shown = 6.5 * len(text.text or "")
        left = {"start": x, "middle": x - shown / 2, "end": x - shown}[text.attrib["text-anchor"]]
        assert left >= 0 and left + shown <= width and 0 < y < height, text.text


def test_every_figure_is_shown():
    shown = (ROOT / "README.md").read_text()
    assert [
        path.name for path in FOLDER.iterdir() if f"docs/figures/{path.name}" not in shown
    ] == []


def test_the_picture_of_the_quickstart_is_small():
    path = FOLDER / "quickstart.png"
    assert path.stat().st_size < 150_000
    with Image.open(path) as picture:
        assert picture.width >= 700


def test_the_readme_is_short_and_has_both_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert {"    tools/quickstart.sh", "    tools/test.sh"} <= set(lines)
