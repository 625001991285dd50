"""What a message says after an unknown name."""

import pytest

from nodepint_mpi.names import hint

pytestmark = pytest.mark.mpi(max_size=1)  # knows no ranks


@pytest.mark.parametrize(
    "name, known, wanted",
    [
        ("lorentz", ["lorenz", "heat"], "; did you mean 'lorenz'?"),
        ("adma", ["adam", "adamax", "sgd"], "; did you mean 'adamax' or 'adam'?"),
        (
            "trian",
            ["train", "trains", "trail", "x"],
            "; did you mean 'train', 'trains' or 'trail'?",
        ),
        ("z", ["heat", "lorenz"], "; known names are 'heat', 'lorenz'."),
        ("z", [], "; there are none."),
    ],
)
def test_an_unknown_name_gets_a_suggestion_or_all_known_names(name, known, wanted):
    assert hint(name, known) == wanted
