"""Run `nodepint` many times in one job and note what came of each: saves the imports.

    mpirun -n 2 python run_cases.py CASES.json FOLDER

CASES has the arguments by name. For each and every rank, FOLDER gets `NAME.RANK.json` with the
exit code, all that was printed, and the files in the working directory before and after.
"""

import json
import os
import sys
from pathlib import Path

from nodepint_mpi.cli.main import main as run_command
from nodepint_mpi.parallel.comms import world
from tests.cli.small_case import listing


def main() -> None:
    """Collective over the world."""
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, arguments in cases.items():
        noted = folder / f"{name}.{world().Get_rank()}"
        world().Barrier()
        before = listing(Path.cwd())
        world().Barrier()
        code = run(arguments, noted.with_name(noted.name + ".txt"))
        world().Barrier()
        result = {
            "code": code,
            "said": noted.with_name(noted.name + ".txt").read_text(),
            "before": before,
            "after": listing(Path.cwd()),
        }
        noted.with_name(noted.name + ".json").write_text(json.dumps(result))


def run(arguments: list[str], output: Path) -> object:
    """The command's exit code; what it prints goes to a file."""
    sys.argv = ["nodepint", *arguments]
    kept = os.dup(1), os.dup(2)
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        run_command()
    except SystemExit as leaving:
        return leaving.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, real in zip((1, 2), kept, strict=True):
            os.dup2(real, stream)
            os.close(real)
    return None


if __name__ == "__main__":
    main()
