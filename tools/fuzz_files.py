"""Read crafted files: checkpoints and reduced models with a valid seal, metrics, JSON lines.

    tools/fuzz_files.py [--number 500] [--seed 0] [--kinds checkpoint,rom,metrics,lines,table]

Each file is a good one with one change out of `tools/fuzz_crafts.py`, sealed again. Reading it has
to end in one sentence (a NodepintError of one line) or in the right values. No file may run code
(a module `evil_marker` is there to be imported), bring in bytes of another file, take more than
1 GB more than a good one, or more than 10 s. Each kind is read in a process of its own, which the
system ends when it goes beyond that. Prints what became of them; exit status 1 if one misbehaved.
"""

import argparse
import collections
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fuzz_crafts import FOREIGN, PLANTED, craft

KINDS = "checkpoint", "rom", "metrics", "lines", "table"
LIMIT_BYTES, LIMIT_S = 2**30, 10
FINGERPRINT = "0123456789abcdef"
CONFIG = """[run]
name = "fuzz"
precision = "float64"
[data]
source = "set"
input = "u"
target = "u"
times = "t"
[network]
name = "mlp"
width = 4
depth = 2
[loss]
name = "mean_squared_error"
[time]
horizon = [0.0, 1.0]
n_slices = 4
fine = { solver = "rk4", n_steps = 2 }
coarse = { solver = "euler", n_steps = 1 }
"""
Values = dict[str, np.ndarray]


class Subject(NamedTuple):
    """A kind of file: a good one, how it is changed, sealed again and read."""

    good: Path
    change: Callable[[Path, np.random.Generator], str]
    seal: Callable[[Path], None]
    read: Callable[[Path], Values]


def make_checkpoint(folder: Path, foreign: Path) -> Subject:
    from nodepint_mpi.io.checkpoint import load_checkpoint, require_finite, save_checkpoint
    from nodepint_mpi.io.leaves import take_leaves
    from nodepint_mpi.io.seal import Seal, digest_file, write_seal
    from nodepint_mpi.parallel.comms import alone

    tree = {
        "params": {"w": np.arange(12.0).reshape(3, 4), "b": np.ones(4), "c": np.zeros(4)},
        "opt_state": [np.zeros(4, np.float32), 3],
    }
    rows = {"starts": np.arange(14.0).reshape(7, 2)}
    meta = {"fingerprint": FINGERPRINT, "config": CONFIG}
    good = save_checkpoint(
        alone(),
        folder,
        step=5,
        replicated=tree,
        rows=rows,
        row_start=0,
        n_rows=7,
        meta=meta,
        keep=1,
    )

    def read(path: Path) -> Values:
        found = load_checkpoint(
            alone(), path, like_at=lambda step: tree, row_start=0, n_owned_rows=7,
            fingerprint=FINGERPRINT, config=CONFIG,
        )  # fmt: skip
        require_finite(found)
        return take_leaves(found.replicated) | found.rows

    def seal(path: Path) -> None:
        _renew_checksums(path)
        n_bytes = path.stat().st_size
        write_seal(path, Seal(n_bytes, (), digest_file(alone(), path, n_bytes)[0]))

    return Subject(good, lambda path, rng: craft(path, foreign, rng), seal, read)


def _renew_checksums(path: Path) -> None:
    """Checksums of what is there now, as whoever crafted it would write them."""
    from nodepint_mpi.io.leaves import checksum

    def renew(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and "xxh3" in item.attrs and item.size:
            if item.dtype.kind in "biuf" and item.size < 10**6 and not item.external:
                item.attrs["xxh3"] = np.uint64(checksum(np.asarray(item[()]), name))

    with h5py.File(path, "r+", locking=False) as file:
        try:
            if isinstance(file.get("replicated"), h5py.Group):
                file["replicated"].visititems(renew)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError):
            pass  # links to nowhere, values that HDF5 itself cannot read


def make_rom(folder: Path, foreign: Path) -> Subject:
    import jax.numpy as jnp

    from nodepint_mpi.build.model import build_model
    from nodepint_mpi.config.experiment import parse_config
    from nodepint_mpi.io.leaves import take_leaves
    from nodepint_mpi.rom.file import HEAD_BYTES, PARTS, RomFile, make_head
    from nodepint_mpi.rom.load import load_rom, origin_of, stepper_of
    from nodepint_mpi.rom.model import reduce_model
    from nodepint_mpi.rom.save import save_rom

    config = parse_config(CONFIG)
    meta = {
        "config": CONFIG, "fingerprint": config.fingerprint(), "step": 3, "input_shape": [3],
        "output_size": 3, "times": [0.5, 1.0], "energy": 1.0, "versions": {"jax": "0"},
    }  # fmt: skip
    basis, energies = np.eye(3)[:2], np.array([2.0, 1.0])
    model = build_model(config, input_shape=(3,), output_size=3)
    stepper, origin = stepper_of(config), origin_of(config, meta)
    rom = reduce_model(
        model, jnp.asarray(basis), jnp.asarray(energies), stepper=stepper, origin=origin
    )
    leaves = take_leaves({name: getattr(rom, name) for name in PARTS})
    good = folder / "rom.h5"
    save_rom(good, RomFile(basis, energies, leaves, meta))

    def read(path: Path) -> Values:
        found = load_rom(path)
        parts = {name: getattr(found, name) for name in PARTS}
        return take_leaves(parts) | {
            "basis": np.asarray(found.basis), "energies": np.asarray(found.energies)
        }  # fmt: skip

    def seal(path: Path) -> None:
        content = path.read_bytes()[HEAD_BYTES:]
        path.write_bytes(make_head(content) + content)

    return Subject(good, lambda path, rng: craft(path, foreign, rng), seal, read)


def make_metrics(folder: Path, foreign: Path) -> Subject:
    from nodepint_mpi.io.records import TABLE, Records, read_table

    with Records(folder) as records:
        for step in range(1, 6):
            records.append(step, loss=1.0 / step, jump=0.25)
        records.write_table(fingerprint=FINGERPRINT, config=CONFIG)

    def read(path: Path) -> Values:
        shutil.copy(path, folder / "read" / TABLE)
        return read_table(folder / "read")

    (folder / "read").mkdir()
    return Subject(
        folder / TABLE, lambda path, rng: craft(path, foreign, rng), lambda path: None, read
    )


_LINES = [
    b"[]", b"null", b"{", b"[" * 100_000, b'{"step": 1e999, "loss": 1}', b'{"step": {}}', b"\xff",
    b'{"step": 1' + b"0" * 4000 + b"}", b'{"step": "9223372036854775808"}', b'{"step": NaN}',
    b'{"step": 2, "loss": "text"}', b'{"step": 2, "loss": [1]}', b'{"step": 2, "loss": {}}', b"5",
    b'{"step": 2, "loss": null}', b'{"step": 2, "loss": 1' + b"0" * 400 + b"}", b"",
]  # fmt: skip


def _change_lines(path: Path, rng: np.random.Generator) -> str:
    lines = path.read_bytes().split(b"\n")
    place, line = int(rng.integers(len(lines))), _LINES[rng.integers(len(_LINES))]
    lines[place : place + int(rng.integers(2))] = [line]
    path.write_bytes(b"\n".join(lines))
    return f"line {place}: {line[:40]!r}"


def make_lines(folder: Path, foreign: Path) -> Subject:
    from nodepint_mpi.io.records import JSON_LINES, Records, read_records
    from nodepint_mpi.report.facts import as_columns

    with Records(folder) as records:
        for step in range(1, 6):
            records.append(step, loss=1.0 / step, jump=0.25)
    (folder / "read").mkdir()

    def read(path: Path) -> Values:
        shutil.copy(path, folder / "read" / JSON_LINES)
        return as_columns(read_records(folder / "read"), path)

    return Subject(folder / JSON_LINES, _change_lines, lambda path: None, read)


def make_table(folder: Path, foreign: Path) -> Subject:
    """A list of problems for the benchmark table, and the note beside a run of it."""
    from nodepint_mpi.bench.studies.kept import KeptRun
    from nodepint_mpi.config.table import read_table_list

    good = folder / "list.toml"
    good.write_text('[[problem]]\nconfig = "a.toml"\ndataset = "A"\nranks = [1, 2]\n')
    edits = [
        ("a.toml", "../.."), ("a.toml", ""), ("a.toml", "..toml/..."), ("[1, 2]", "[0]"),
        ("[1, 2]", "[]"), ("[1, 2]", '["x"]'), ("[1, 2]", "1e9"), 
        ('"A"', "[[[]]]"), ("ranks", "rank"),
        ("[[problem]]", "[problem]"), ('"A"', '"\\u0000"'), 
        ("dataset", "config"), ("a.toml", "\x00"),
    ]  # fmt: skip

    def change(path: Path, rng: np.random.Generator) -> str:
        old, new = edits[rng.integers(len(edits))]
        path.write_text(path.read_text().replace(old, new))
        line = _LINES[rng.integers(len(_LINES))]
        (folder / "run.json").write_bytes(line)
        return f"{old!r} becomes {new!r}; note {line[:30]!r}"

    def read(path: Path) -> Values:
        KeptRun(folder / "run", "").note()
        found = read_table_list(path)
        return {problem.name: np.asarray(problem.ranks) for problem in found.problem}

    return Subject(good, change, lambda path: None, read)


def judge(found: Values, good: Values, *, exact: bool) -> str:
    """Nothing, or how what was read is not right."""
    wrong = []
    for name, array in found.items():
        plain = np.asarray(array)
        if plain.dtype.kind == "f" and np.any(plain == FOREIGN):
            return f"{name} holds bytes of another file"
        if name not in good:
            continue  # an additional column of metrics
        same = plain.shape == good[name].shape and np.array_equal(plain, good[name], equal_nan=True)
        if not same and plain.dtype.kind == "f" and plain.shape == good[name].shape:
            same = bool(np.all((plain == good[name]) | (plain == PLANTED) | ~np.isfinite(plain)))
        if not same:
            wrong.append(name)
    return f"other values in {', '.join(wrong)}" if wrong and exact else ""


def run_kind(kind: str, number: int, seed: int, folder: Path) -> int:
    """Read crafted files of one kind, in this process. The last line printed names the file."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    (folder / "evil_marker.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\nmake = None\n"
    )
    foreign = folder / "foreign"
    np.full(10_000, FOREIGN).tofile(foreign)
    with h5py.File(foreign.with_suffix(".h5"), "w") as file:
        file["x"] = np.full(10_000, FOREIGN)
    import jax

    from nodepint_mpi.errors import NodepintError

    logging.getLogger("nodepint_mpi").setLevel(logging.CRITICAL)
    jax.config.update("jax_enable_x64", True)
    home = folder / kind
    home.mkdir()
    subject = globals()[f"make_{kind}"](home, foreign)
    good = subject.read(subject.good)
    content, work = subject.good.read_bytes(), home / "work" / subject.good.name
    work.parent.mkdir()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, size + LIMIT_BYTES))
    ends: collections.Counter[str] = collections.Counter()
    grown = 0
    for case in range(number):
        rng = np.random.default_rng([seed, KINDS.index(kind), case])
        work.write_bytes(content)
        try:
            done = subject.change(work, rng)
            subject.seal(work)
        except Exception as error:  # HDF5 itself refuses to make it: no file, no case
            ends[f"could not be made ({type(error).__name__})"] += 1
            continue
        print(json.dumps([case, done]), flush=True)
        signal.alarm(LIMIT_S)
        wrong = ""
        try:
            wrong = judge(
                subject.read(work),
                good,
                exact=kind in ("checkpoint", "rom") and not done.startswith(("swap", "type")),
            )
            ends["loaded"] += 1
        except NodepintError as error:
            wrong = "" if len(str(error).splitlines()) == 1 else f"more than one line: {error}"
            ends["refused"] += 1
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        if (folder / "executed").exists():
            wrong = "it ran code"
        if wrong or grown * 1024 > LIMIT_BYTES:
            print(json.dumps([case, done, wrong or f"{grown} KiB"]), flush=True)
            return 1
    print(json.dumps({"ends": ends, "grown_MiB": grown // 1024}), flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Read crafted files.")
    parser.add_argument("--number", type=int, default=500, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return run_kind(options.kinds, options.number, options.seed, options.child)
    status = 0
    for kind in options.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--child", folder, "--kinds", kind]
            command += ["--number", str(options.number), "--seed", str(options.seed)]
            ran = subprocess.run(command, capture_output=True, text=True)
        last = (ran.stdout.splitlines() or ["nothing"])[-1]
        print(f"{kind}: {last}" if ran.returncode == 0 else f"{kind}: FAILED at {last}")
        if ran.returncode:
            print(f"exit status {ran.returncode}\n{ran.stderr[-2000:]}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
