"""Whatever stands in a config: it is understood, or refused with an explanation."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from nodepint_mpi.config.experiment import Config, parse_config
from nodepint_mpi.errors import ConfigError
from nodepint_mpi.io.directory import config_text

pytestmark = pytest.mark.mpi(max_size=1)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
GOOD = [tomllib.loads(path.read_text()) for path in CONFIGS]
BAD_NUMBERS = st.sampled_from([0, -1, 10**30, 1e308, -0.0, math.nan, math.inf, -math.inf])
SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), BAD_NUMBERS, st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(table: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all keys."""
    found = []
    for key, value in table.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += places(value, (*above, key))
    return found


def understood_or_explained(text: str, overrides: tuple[str, ...] = ()) -> Config | None:
    try:
        config = parse_config(text, overrides)
    except ConfigError as error:
        assert len(str(error)) > 20
        return None
    # What was understood can be written down and means the same when it is read again.
    again = parse_config(config_text(config))
    assert again.fingerprint() == config.fingerprint()
    return config


@settings(max_examples=300)
@given(data=st.data())
def test_keys_that_are_changed_lost_or_added(data):
    table = tomllib.loads(tomli_w.dumps(data.draw(st.sampled_from(GOOD))))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(places(table)))
        inner = table
        for key in path:
            inner = inner[key]
        match data.draw(st.sampled_from(["change", "lose", "add"])):
            case "change":
                inner[last] = data.draw(VALUES)
            case "lose":
                del inner[last]
            case "add":
                inner[data.draw(st.text(max_size=8))] = data.draw(VALUES)
        if not table:
            return
    understood_or_explained(tomli_w.dumps(table))


@settings(max_examples=100)
@given(data=st.data())
def test_text_that_is_damaged(data):
    text = data.draw(st.sampled_from(CONFIGS)).read_text()
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    understood_or_explained(text[:start] + data.draw(st.text(max_size=5)) + text[end:])


@settings(max_examples=100)
@given(st.lists(st.text(max_size=12), max_size=2), VALUES)
def test_overrides(overrides, value):
    text = CONFIGS[0].read_text()
    understood_or_explained(text, tuple(overrides))
    understood_or_explained(text, (f"time.n_slices={value}", *(f"run.{o}" for o in overrides)))
