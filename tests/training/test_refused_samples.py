"""What does not fit in samples, inputs, gaps and weights is said with row and remedy."""

from typing import Any

import datasets
import numpy as np
import pytest

from nodepint_mpi.config.experiment import parse_config
from nodepint_mpi.errors import ConfigError, DataError, ProblemError
from nodepint_mpi.training.setup import set_up
from tests.training.sample_case import ADAPTIVE, INPUTS, N_ROWS, config_of, make_rows, save

pytestmark = pytest.mark.mpi(max_size=1)


def wrong(rows, column, row, place, value):
    rows[column][row][place] = value


REFUSED: list[tuple[Any, str, str]] = [
    (lambda r: wrong(r, "u", 2, 4, [float("nan"), 1.0]), "", r"row 2 of column 'u' holds nan.*t"),
    (lambda r: wrong(r, "t", 3, 5, 0.1), "", "must increase, but observation 5 .* of row 3"),
    (lambda r: wrong(r, "t", 1, 8, 2.5), "", r"from 0 to 2.5 in row 1, outside the horizon"),
    (lambda r: wrong(r, "u", 4, 2, [float("inf"), 1.0]), 'missing = "nan"', "row 4 .* holds inf"),
    (lambda r: wrong(r, "u", 4, 0, [np.nan, 1.0]), 'missing = "nan"', "in row 4 of column 'u' is"),
    (lambda r: wrong(r, "w", 5, 2, -1.0), 'weights = "w"', "Row 5 of the weights"),
    (lambda r: wrong(r, "s", 0, 0, 0.5), INPUTS, "of row 0 .*begin|must increase"),
    (lambda r: r["c"].__setitem__(2, r["c"][2][:3]), INPUTS, "Row 2 of the inputs 'c' has 3"),
    (lambda r: None, 'mask = "t"', "Row 0 of the mask 't' holds 0.25"),
    (
        lambda r: r["t"].__setitem__(1, [0.0]) or r["u"].__setitem__(1, [[1.0, 1.0]]),
        "",
        "Row 1 of column 'u' has no observation after the beginning",
    ),
    (
        lambda r: r.update(v=[[[np.nan, 1.0]] + row[1:] for row in r["u"]]),
        'missing = "nan"\ninput = "v"',
        "first observation in row 0 of column 'v' is missing",
    ),
    (lambda r: wrong(r, "t", 4, 0, 0.1), "", "Row 4 of 't' begins at t = 0.1"),
    (lambda r: None, 'mask = "c"', "'c' has rows of shape|row 0 has 6 entries"),
    (lambda r: None, 'weights = "s"', "weights 's' must hold one number a row"),
    (lambda r: None, 'weights = "u"', "weights 'u' must hold one number a row"),
    (lambda r: r.update(k=[1.0] * N_ROWS), 'inputs = "k"', "'k' must hold a list in every row"),
    (lambda r: None, 'inputs = "c"\ninput_times = "p"', "Row 0 of the inputs 'c' has 6"),
]


@pytest.mark.parametrize(("change", "data", "said"), REFUSED)
def test_what_is_wrong_is_said_with_row_and_remedy(comms, shared_tmp_path, change, data, said):
    rows = make_rows("common")
    change(rows)
    folder = save(comms, shared_tmp_path / "set", rows)
    with pytest.raises((DataError, ProblemError, ConfigError), match=said):
        set_up(parse_config(config_of(folder, data, "")), comms)


def test_the_test_split_is_looked_at_too(comms, shared_tmp_path):
    folder = shared_tmp_path / "set"
    if comms.control.rank == 0:
        bad = make_rows("common")
        wrong(bad, "u", 4, 0, [np.nan, 1.0])
        parts = {"train": make_rows("common"), "test": bad}
        datasets.DatasetDict(
            {name: datasets.Dataset.from_dict(rows) for name, rows in parts.items()}
        ).save_to_disk(str(folder))
    comms.control.Barrier()
    with pytest.raises(DataError, match="first observation in row 4"):
        set_up(parse_config(config_of(folder, 'missing = "nan"', "")), comms)


@pytest.mark.mpi(max_size=2)
def test_all_that_is_wrong_is_said_at_once(comms, shared_tmp_path):
    rows = make_rows("common")
    wrong(rows, "u", 2, 4, [float("nan"), 1.0])
    wrong(rows, "t", 3, 5, 0.1)
    wrong(rows, "w", 5, 2, -1.0)
    folder = save(comms, shared_tmp_path / "set", rows)
    with pytest.raises(DataError, match="3 things are wrong") as caught:
        set_up(parse_config(config_of(folder, 'weights = "w"', "")), comms)
    for said in ("row 2 of column 'u'", "of row 3", "Row 5 of the weights", 'missing = "nan"'):
        assert said in str(caught.value)


CONSTANT = INPUTS + 'interpolation = "constant"'
FEW_STEPS = "n_slices = 2\nfine = { solver = 'rk4', n_steps = 2 }"


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (CONSTANT, FEW_STEPS, "where no fine step can end"),
        (CONSTANT, ADAPTIVE, "chosen by error control"),
        ('input_times = "s"', "", "are those of `inputs`"),
        (CONSTANT, 'adjoint.kind = "continuous"', "do not end where inputs jump"),
        ('initial = "u0"', "relaxation = { steps = 3 }", "needs `data.input`, not"),
        (INPUTS, 'method = "reduced"\nbasis = { kind = "identity" }', "any method but 'reduced'"),
        ('initial = "u0"\ninput = "u"', "", "needs one of `input`"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(comms, shared_tmp_path, data, options, said):
    folder = save(comms, shared_tmp_path / "set", make_rows("common"))
    with pytest.raises((DataError, ConfigError), match=said):
        text = config_of(folder, data, options)
        if "n_slices = 2" in options:
            text = text.replace("n_slices = 7\n", "", 1)
        set_up(parse_config(text), comms)


def test_a_loss_must_take_the_mask(comms, shared_tmp_path):
    folder = save(comms, shared_tmp_path / "set", make_rows("own times"))
    file = shared_tmp_path / "blind.py"
    if comms.control.rank == 0:
        file.write_text(
            "from nodepint_mpi import Mean\nimport jax.numpy as jnp\n"
            "def loss(a, b):\n    return Mean(jnp.sum((a - b) ** 2), jnp.asarray(1.0 * a.size))\n"
        )
    comms.control.Barrier()
    text = config_of(folder, "", "").replace('"mean_squared_error"', f'"{file}:loss"')
    with pytest.raises(ProblemError, match="The loss does not take `mask`"):
        set_up(parse_config(text), comms)
