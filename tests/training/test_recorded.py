"""Solves and training compute what they computed when tests/recorded was written.

The rest of what is recorded is compared by `tools/record_numbers.py --compare`; here are a solve by
parareal, one by tangents, and a tracked training. Counts, fronts and statuses must be equal. Other
numbers may be off by 1e-13 of the largest of their kind: the same program on the same machine gives
equal bits, but another processor, or the same sums in another order, rounds in other places.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [pytest.mark.standard_promotion, pytest.mark.timeout_s(300)]


def load_tool() -> ModuleType:
    """tools/record_numbers.py as a module; tools is a folder of scripts, not a package."""
    path = ROOT / "tools" / "record_numbers.py"
    spec = importlib.util.spec_from_file_location("nodepint_record_numbers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def recorded_on(n_ranks: int):
    return tool.load(ROOT / "tests" / "recorded" / f"ranks-{n_ranks}.npz")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("solve/parareal/sweeps2", marks=pytest.mark.mpi(max_size=3)),
        pytest.param("solve/tangent/sweeps2", marks=pytest.mark.mpi(2, 2)),
        pytest.param("train/parareal/tracked", marks=pytest.mark.mpi(max_size=1)),
    ],
)
def test_numbers_are_the_recorded_ones(comms, shared_tmp_path, name):
    size = comms.control.size
    wanted = recorded_on(size)[name]
    case = tool.all_cases(size)[name]
    ((_, found),) = tool.compute({name: case}, shared_tmp_path)
    far = tool.differences(found, wanted)
    assert max(far.values()) <= tool.RTOL, far


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_every_case_is_recorded_and_a_change_by_1e_12_of_any_number_is_found(n_ranks):
    recorded = recorded_on(n_ranks)
    assert set(recorded) == set(tool.all_cases(n_ranks))
    for case, numbers in recorded.items():
        assert max(tool.differences(numbers, numbers).values()) == 0
        for name, array in numbers.items():
            if array.size == 0 or not np.any(np.isfinite(array)):
                continue
            changed = array.copy().ravel()
            largest = np.nanargmax(np.where(np.isfinite(changed), np.abs(changed), np.nan))
            scale = np.abs(changed[largest])
            if name in tool.OF_STATES:
                scale = np.nanmax(np.abs(numbers["interface"]))
            elif name in tool.OF_ONE:
                scale = 1.0
            if scale > 0:
                is_whole = array.dtype.kind != "f"
                changed[largest] += 1 if is_whole else 1e-12 * scale
                far = tool.differences(numbers | {name: changed.reshape(array.shape)}, numbers)
                assert far[name] > tool.RTOL, (case, name)
