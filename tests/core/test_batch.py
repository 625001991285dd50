"""Where samples with times of their own are read, and what a slice sees of a signal."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepint_mpi.core.batch import count_reads, observe_at_edges, place_reads
from nodepint_mpi.core.exogenous import count_knots, cut_signal, path_of
from nodepint_mpi.core.partition import owned_range, snap_times

EDGES = np.array([0.0, 0.5, 1.25, 2.0, 4.0])
TIMES = st.lists(
    st.floats(0.0, 4.0).map(lambda t: round(t, 3)) | st.sampled_from(EDGES.tolist()),
    min_size=1, max_size=9, unique=True,
).map(sorted)  # fmt: skip


def padded(rows):
    out = np.zeros((len(rows), max(map(len, rows))))
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out, np.array([len(row) for row in rows])


@given(st.lists(TIMES, min_size=1, max_size=5), st.integers(1, 4))
def test_every_observation_is_read_once_by_one_rank(rows, n_ranks):
    times, lengths = padded(rows)
    times = snap_times(times, EDGES)
    seen = []
    for rank in range(n_ranks):
        owned = owned_range(4, n_ranks, rank)
        sizes = count_reads(times, lengths, EDGES, owned)
        reads = place_reads(times, lengths, EDGES, owned, sizes)
        assert reads.times.shape == (len(owned), len(rows), sizes.inside)
        # Increasing, inside the slice, whether they are read or only fill up.
        lengths_of = np.diff(EDGES)[owned.start : owned.stop, None, None]
        assert np.all(np.diff(reads.times, axis=2) > 0)
        assert np.all((reads.times > 0) & (reads.times < lengths_of))
        for r, b in zip(*np.nonzero(reads.valid), strict=True):
            n, slot = reads.slices[r, b], reads.slots[r, b]
            at_end = slot == sizes.inside
            t = EDGES[owned.start + n + 1] if at_end else None
            if t is None:
                t = EDGES[owned.start + n] + reads.times[n, b, slot]
            assert abs(t - times[b, reads.columns[r, b]]) < 1e-12
            seen.append((b, reads.columns[r, b]))
    wanted = [(b, i) for b, row in enumerate(rows) for i, t in enumerate(row) if t > 0]
    assert sorted(seen) == wanted


@settings(max_examples=25)  # every shape is compiled
@given(st.lists(TIMES, min_size=1, max_size=3), st.sampled_from(["constant", "linear"]))
def test_a_slice_sees_the_signal_that_is_given(rows, kind):
    rows = [[0.0, *(t for t in row if t > 0)] for row in rows]
    times, lengths = padded(rows)
    values = np.cos(3 * times)[..., None]
    n_knots = count_knots(times, lengths, EDGES, kind)
    signal = cut_signal(times, values, lengths, EDGES, kind, n_knots, float)
    assert np.all(np.diff(signal.knots, axis=2) > 0)
    for n in range(4):
        for b, row in enumerate(rows):
            path = path_of(kind, jnp.asarray(signal.knots[n, b]), jnp.asarray(signal.values[n, b]))
            for since in np.linspace(0.01, 0.99, 7) * (EDGES[n + 1] - EDGES[n]):
                t = EDGES[n] + since
                if np.min(np.abs(np.array(row) - t)) < 1e-9:
                    continue  # a jump
                own = np.cos(3 * np.array(row))
                place = np.searchsorted(row, t, side="right") - 1
                wanted = np.interp(t, row, own) if kind == "linear" else own[place]
                found = path.evaluate(jnp.asarray(min(since, signal.until[n, b])))[0]
                assert abs(float(found) - wanted) < 1e-12


def test_edges_between_observations_are_interpolated_and_others_unknown():
    times = np.array([[0.25, 1.0, 3.0]])
    targets = np.array([[[1.0], [2.0], [4.0]]])
    found, known = observe_at_edges(times, targets, None, EDGES)
    np.testing.assert_allclose(known[:, 0], [0, 1, 1, 1, 0])
    np.testing.assert_allclose(found[1:4, 0, 0], [1 + 1 / 3, 2.25, 3.0])
    mask = np.array([[[True], [False], [True]]])
    found, known = observe_at_edges(times, targets, mask, EDGES)
    np.testing.assert_allclose(found[1:4, 0, 0], 1 + 3 * (EDGES[1:4] - 0.25) / 2.75)
    assert known[:, 0].tolist() == [0, 1, 1, 1, 0]
