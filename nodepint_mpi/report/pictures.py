"""The section on pictures that other programs have put into the run directory."""

from matplotlib.figure import Figure
from matplotlib.image import imread

from nodepint_mpi.pages.parts import Lines, Picture, Section, Table
from nodepint_mpi.report.facts import Facts

FOLDER = "pictures"
DPI = 120


def own_pictures(facts: Facts) -> Section | None:
    """Every PNG file in `pictures/`, by name; in its place a line on one that cannot be read."""
    shown: list[Table | Picture | Lines | str] = []
    for file in sorted((facts.folder / FOLDER).glob("*.png")):
        try:
            pixels = imread(file)
        except (OSError, SyntaxError) as error:  # Pillow's for what is no PNG, and a damaged one
            shown.append(f"{FOLDER}/{file.name} cannot be read: {error}")
            continue
        figure = Figure(figsize=(pixels.shape[1] / DPI, pixels.shape[0] / DPI))
        panel = figure.add_axes((0, 0, 1, 1))
        panel.imshow(pixels, interpolation="none", cmap="gray")
        panel.set_axis_off()
        shown.append(Picture(f"picture_{file.stem}", figure, f"{FOLDER}/{file.name}", False))
    return Section("Pictures", shown) if shown else None
