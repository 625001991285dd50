"""Figures are made in every training but not drawn, which takes 0.6 s each."""

from pathlib import Path

import matplotlib.figure
import pytest


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """A figure leaves an empty file; `tests/cli/test_training.py` looks at drawn ones."""

    def leave(figure, path, **options):
        del figure, options
        Path(path).touch()

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", leave)
