"""What README and docs tell the reader to type exists, and pages show what they include."""

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from nodepint_mpi.cli.main import cli
from nodepint_mpi.config.experiment import Config, read_config
from nodepint_mpi.errors import ConfigError

pytestmark = pytest.mark.mpi(max_size=1)

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "jobs/README.md")),
    ROOT / "jobs" / "interactive.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "data").glob("*/README.md")),
    *sorted((ROOT / "configs").glob("*.toml")),
    *sorted((ROOT / "docs" / "examples").glob("*.py")),
]
NAMES = "|".join(cli.commands)
COMMAND = re.compile(rf"(?<![\w/-])nodepint (?P<words>(?:{NAMES})\b[^`;&#\n]*)")
FILE = re.compile(r"(?<![\w/.-])(?:configs|tools|jobs|docs|tests)/[\w/.-]*\w")
MADE = {"jobs/site.sh"}
"""Files that the reader makes."""
INCLUDED = re.compile(r'^--8<-- "(?P<file>[^":]+)(?::\d+)?"$', re.MULTILINE)
INCLUDES = [
    (page, match["file"])
    for page in sorted((ROOT / "docs").glob("*.md"))
    for match in INCLUDED.finditer(page.read_text())
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, as `tools/docs.sh` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q"]
    built = subprocess.run(
        [*command, "-f", ROOT / "tools" / "mkdocs.yml", "-d", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def shown(site: Path, page: Path) -> str:
    """The text of a built page, without its tags."""
    text = (site / page.with_suffix(".html").name).read_text()
    return html.unescape(re.sub(r"<[^>]*>", "", text))


def commands(page: Path) -> list[str]:
    """What is typed after `nodepint`, with continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    text = re.sub(r"(`[^`\n]*)\n *([^`\n]*`)", r"\1 \2", text)  # a command broken by the margin
    found = [match["words"] for match in COMMAND.finditer(text)]
    return [re.sub(r"\s{2,}\(.*| \.\.\..*", "", words).strip() for words in found]


ALL = [(page, words) for page in PAGES for words in commands(page)]


def parse(words: list[str]) -> tuple[click.Command, dict]:
    """The command and its parameters as typed; click's error where there is no such thing."""
    command: click.Command = cli
    while isinstance(command, click.Group):
        name = words.pop(0)
        command = command.commands[name]
    context = click.Context(command)
    typed, left, _ = command.make_parser(context).parse_args(args=list(words))
    assert not left, f"{left} is too much"
    return command, {name: value for name, value in typed.items() if isinstance(value, str | list)}


def test_many_commands_are_found():
    assert len(ALL) > 60
    pages = {page.name for page, _ in ALL}
    assert {"README.md", "laptop.md", "own-problem.md", "burgers.toml", "interactive.md"} <= pages


@pytest.mark.parametrize(
    "page, words", ALL, ids=[f"{page.relative_to(ROOT)}: {words}" for page, words in ALL]
)
def test_a_command_exists_with_its_options_and_keys(page, words):
    if "|" in words or words.split()[0].isupper():
        return
    command, typed = parse(shlex.split(words))
    for parameter in command.params:
        if isinstance(parameter, click.Argument) and parameter.required and typed:
            assert parameter.name in typed, f"{parameter.name} is missing"
    config = typed.get("config_file")
    if config is not None and config != "CONFIG":
        read_config(ROOT / config, typed.get("overrides") or ())
    if command.name == "prepare" and "/" not in typed["name"] and typed["name"] != "NAME":
        assert (ROOT / "data" / typed["name"] / "prepare.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_it_names_exist(page):
    names = set(FILE.findall(page.read_text())) - MADE
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_keys_in_inline_toml_exist():
    known = "|".join(Config.model_fields)
    span = re.compile(rf"`((?:{known})\.[\w.]+ = [^`]+)`")
    found = [text for p in PAGES if p.suffix == ".md" for text in span.findall(p.read_text())]
    assert len(found) > 8
    for text in found:
        key, _, value = " ".join(text.split()).partition(" = ")
        try:
            read_config(ROOT / "configs" / "lotka_volterra.toml", [f"{key}={value}"])
        except ConfigError as error:  # it may need other keys as well
            assert not re.search(rf"unknown key `{key}|`{key}\S* is .*; it ", str(error)), error


def test_every_example_is_included_in_a_page():
    examples = (ROOT / "docs" / "examples").glob("*.py")
    names = {f"docs/examples/{path.name}" for path in examples}
    assert names <= {file for _, file in INCLUDES}


@pytest.mark.parametrize("page, file", INCLUDES, ids=[f"{p.name}: {f}" for p, f in INCLUDES])
def test_a_built_page_shows_the_file_that_it_includes(site, page, file):
    source = (ROOT / file).read_text()
    if file.endswith(".md"):  # shown as a page, so only the code in it is left as it is written
        wanted = [span for span in re.findall(r"`([^`\n]+)`", source) if "<" not in span]
    else:
        wanted = [source.strip()]
    assert wanted
    assert [text for text in wanted if text not in shown(site, page)] == []


def test_no_built_page_shows_a_marker_of_an_include(site):
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert [p.name for p in pages if re.search(r"--8\s*<", shown(site, p))] == []


def test_the_picture_of_a_step_is_drawn(site):
    text = (site / "architecture.html").read_text()
    assert '<svg class="flow"' in text and ">training/warm_starts.py</text>" in text
    assert "-&gt; training/step.py" not in text


def test_every_config_is_in_the_list_of_problems():
    listed = (ROOT / "docs" / "problems.md").read_text()
    assert [p.name for p in (ROOT / "configs").glob("*.toml") if f"`{p.name}`" not in listed] == []


def test_a_problem_of_ones_own_fits_in_sixty_lines():
    assert len((ROOT / "docs" / "examples" / "chain.py").read_text().splitlines()) <= 60


def test_an_option_that_does_not_exist_is_noticed():
    with pytest.raises(click.NoSuchOption):
        parse(["train", "configs/mnist.toml", "--resumee", "auto"])
