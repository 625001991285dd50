"""From sections to one HTML file that needs no other, with the figures as PNG files beside it."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from nodepint_mpi.errors import OutputError
from nodepint_mpi.io.directory import write_text
from nodepint_mpi.io.errno_text import error_text
from nodepint_mpi.pages.parts import Lines, Picture, Section, Table

DPI = 150
TEMPLATE = "page.html"
_NARROW = 5
"""Columns of a table that fit beside another section."""


def check_page(page: Path) -> None:
    """Refuse, before the work is done, a page that could not be written. Local.

    Raises:
        OutputError: if it could not, or something would be overwritten that is no page.
    """
    folder = page.absolute().parent
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"Cannot write {page}: the name of a page ends in .html.")
    if not folder.is_dir():
        raise OutputError(f"Cannot write {page}: there is no folder {folder}.")
    if page.is_dir() or not os.access(page if page.exists() else folder, os.W_OK):
        raise OutputError(f"Cannot write {page}: it is a folder, or write-protected.")


def figures_folder(page: Path) -> Path:
    """Where the figures of a page lie as files. Local."""
    return page.with_name(page.stem + "_figures")


def write_page(page: Path, sections: Sequence[Section], *, title: str, subtitle: str) -> list[Path]:
    """Write a page and its figures; an older page of that name goes with its figures. Local.

    Returns:
        The PNG files.

    Raises:
        OutputError: if they cannot be written.
    """
    folder, files = figures_folder(page), []
    try:
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.png"):  # of an older page, which may have had others
            path.unlink()
        shown = [_fill(section, folder, files) for section in sections]
    except OSError as error:
        raise OutputError(f"Cannot write the figures in {folder}: {error_text(error)}.") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template(TEMPLATE)
    write_text(page, template.render(title=title, subtitle=subtitle, sections=shown))
    return files


def _fill(section: Section, folder: Path, files: list[Path]) -> dict[str, Any]:
    """A section as the template takes it, its figures drawn and written."""
    parts: list[tuple[str, Any]] = []
    for part in section.parts:
        if isinstance(part, Picture):
            png, path = _draw(part.figure), folder / f"{part.name}.png"
            path.write_bytes(png)
            files.append(path)
            seen = base64.b64encode(png).decode("ascii")
            where = f"{folder.name}/{path.name}"
            shown = {"caption": part.caption, "png": seen, "file": where, "is_plot": part.is_plot}
            parts.append(("Picture", shown))
        else:
            parts.append((type(part).__name__, part))
    is_wide = any(
        isinstance(part, Lines) or (isinstance(part, Table) and len(part.head) > _NARROW)
        for part in section.parts
    )
    return {"title": section.title, "parts": parts, "is_wide": is_wide}


def _draw(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    return image.getvalue()
