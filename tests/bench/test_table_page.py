"""The benchmark table in Markdown, exactly, and its place in a page."""

from pathlib import Path

import pytest

from nodepint_mpi.bench.studies.table import format_table, read_page, write_page
from nodepint_mpi.config.table import read_table_list
from nodepint_mpi.errors import ConfigError, OutputError

pytestmark = pytest.mark.mpi(max_size=1)

ROOT = Path(__file__).parents[2]

FINISHED = {
    "problem": "a", "dataset": "A | B", "config": "configs/a.toml", "method": "ranks-2",
    "n_ranks": 2, "cores_of_a_rank": 1, "differs": "", "note": "", "state": "finished",
    "reason": "", "question": "", "why": "", "training_s": 12.34, "n_parameters": 12345,
    "peak_bytes": [512_000_000, 600_000_000],
    "scores": {
        "train": {"loss": 0.1, "accuracy": 0.98765}, "test": {"loss": 0.2, "accuracy": 0.9}
    },
    "machine": "AMD EPYC, 2 cores", "date": "2026-01-02", "busy_share": 0.01, "n_starts": 1,
}  # fmt: skip
SERIAL = FINISHED | {
    "method": "serial", "n_ranks": 1, "cores_of_a_rank": 2, "differs": "without relaxation",
    "peak_bytes": [700_000_000], "busy_share": 0.456, "n_starts": 3, "date": "2026-01-05",
    "note": "so many are enough",
    "scores": {"train": {"relative_error": 0.0123}, "test": {"relative_error": 4.2e-6}},
}  # fmt: skip
EMPTY = FINISHED | {"method": "ranks-1", "n_ranks": 1, "state": "begun"}
UNSCORED = FINISHED | {"scores": {}, "machine": "Other, 1 core"}
A = "[a.toml](../configs/a.toml)"
TABLE = [
    "dataset | method | training, s | score | train | test | peak memory of a rank, MB | "
    "parameters | config | machine",
    r"A \| B | plain diffrax, 2 cores, without relaxation | 12.3 | relative error | 0.012 | "
    f"4.2e-6 | 700 | 12,345 | {A} | 46 % busy; 3 starts",
    rf"A \| B | nodepint_mpi, 1 rank | not measured | - | - | - | - | - | {A} | -",
    r"A \| B | nodepint_mpi, 2 ranks | 12.3 | accuracy | 98.77 % | 90.00 % | 600 | 12,345 | "
    f"{A} | quiet",
    rf"A \| B | nodepint_mpi, 2 ranks | 12.3 | - | - | - | 600 | 12,345 | {A} | quiet",
]
BELOW = [
    "",
    "- A | B: plain diffrax is faster: nodepint_mpi on 2 ranks takes 1.0 times its time.",
    "",
    "Machine: AMD EPYC, 2 cores, 2026-01-02 to 2026-01-05; Other, 1 core, 2026-01-02.",
    "A | B: so many are enough.",
]


def test_the_table_in_markdown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [SERIAL, EMPTY, FINISHED, UNSCORED]
    head, *lines = (f"| {line} |" for line in TABLE)
    wanted = [head, "|---|---|---|---|---|---|---|---|---|---|", *lines, *BELOW]
    assert format_table(rows, tmp_path / "docs").splitlines() == wanted
    nothing = format_table([EMPTY], tmp_path).splitlines()
    assert nothing[-1] == "Nothing has been measured yet."


def test_a_part_of_the_table_says_who_is_faster_and_why(tmp_path):
    fast = FINISHED | {"question": "Images?", "why": "Batches are large.", "training_s": 10.0}
    slow = fast | {"method": "serial", "n_ranks": 1, "cores_of_a_rank": 2, "training_s": 40.0}
    other = {"dataset": "C", "question": "Rest"}
    missed = slow | other | {"state": "left out", "reason": "no such loss"}
    alone = fast | {"n_ranks": 1, "training_s": 1.0}  # on half of the cores: not compared
    rows = [slow, alone, fast, missed, fast | other]
    lines = format_table(rows, tmp_path).splitlines()
    assert [line for line in lines if line.startswith("### ")] == ["### Images?", "### Rest"]
    share = "nodepint_mpi on 2 ranks takes 0.25 of the time of plain diffrax"
    assert [line for line in lines if line.startswith("- ")] == [
        f"- A | B: {share}; test accuracy 90.00 % against 90.00 %.",
        "- C: no serial training to compare with.",
    ]
    assert lines.count("Batches are large.") == 2
    quick = slow | {"training_s": 4.0, "scores": {}}
    (said,) = (s for s in format_table([quick, fast | {"scores": {}}], tmp_path).splitlines()
               if s.startswith("- "))  # fmt: skip
    assert (
        said
        == "- A | B: plain diffrax is faster: nodepint_mpi on 2 ranks takes 2.5 times its time."
    )


def test_a_question_that_is_not_in_the_list_is_refused(tmp_path):
    text = '[[question]]\nname = "long"\ntitle = "Long"\n[[problem]]\nconfig = "a.toml"\n'
    (tmp_path / "list.toml").write_text(text + 'dataset = "A"\nquestion = "lnog"\n')
    with pytest.raises(ConfigError, match="unknown question; did you mean 'long'"):
        read_table_list(tmp_path / "list.toml")


def test_the_table_takes_the_place_of_the_one_that_is_there(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("above\n\n<!-- table -->\nold\n<!-- /table -->\n\nbelow\n")
    for _ in range(2):
        write_page(page, "| new |")
        assert page.read_text() == ("above\n\n<!-- table -->\n| new |\n<!-- /table -->\n\nbelow\n")


@pytest.mark.parametrize(
    "text",
    ["", "<!-- table -->", "<!-- /table -->\n<!-- table -->", "<!-- table --><!-- /table -->" * 2],
)
def test_a_page_without_its_marks_is_refused(tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(OutputError, match="no place for the table: it must have `<!-- table -->`"):
        read_page(page)


def test_the_list_in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    table = read_table_list("configs/table/problems.toml")
    assert len(table.problem) >= 10
    before, _ = read_page(ROOT / "docs" / "benchmarks.md")
    assert before
