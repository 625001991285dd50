"""`nodepint bench basis`: what is counted, by hand; grids that make no sense."""

import pytest

from nodepint_mpi.bench.basis import (
    compare_grids,
    count_sweeps,
    format_basis,
    parse_grid,
    time_sweeps,
)
from nodepint_mpi.errors import ConfigError, LayoutError

pytestmark = pytest.mark.mpi(max_size=1)


def test_a_sweep_is_as_much_shorter_as_promised():
    """One fine solve and r / B of 16 directions; their groups take a pass of the state each."""
    rows = count_sweeps([2, 3, 8])
    assert [row["basis_ranks"] for row in rows] == [1, 2, 3, 8]
    assert [row["fine"] for row in rows] == [1.0] * 4
    assert [row["tangents"] for row in rows] == [16, 8, 6, 2]
    assert [row["counted"] for row in rows] == pytest.approx([1, 9 / 17, 7 / 17, 3 / 17])
    assert [row["passes"] for row in rows] == pytest.approx([1, 10 / 19, 8 / 19, 4 / 19])
    for row in (rows[1], rows[3]):
        assert row["counted"] == pytest.approx(row["promised"], rel=0.02)
    assert "| 8 | 1 | 2 | 0.1765 | 0.1765 | 0.2105 |" in format_basis(rows, [])
    with pytest.raises(ConfigError, match="17 ranks cannot share 16 directions"):
        count_sweeps([17])


def test_grids_that_make_no_sense_are_refused():
    assert parse_grid("2x1x4") == (2, 1, 4)
    for text in ("2x2", "2x2x0", "axbxc"):
        with pytest.raises(ConfigError, match="such as 2x2x2, got"):
            parse_grid(text)
    with pytest.raises(LayoutError, match="1 ranks do not form 2 x 1 x 1: start 2"):
        compare_grids(["2x1x1"])
    with pytest.raises(ConfigError, match="cores"):
        time_sweeps([4096], 1)
