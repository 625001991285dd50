"""In the place of a launcher and of the ranks it would start: makes a run at once, or does not.

    python stand_in.py FOLDER RANKS CORES python -m nodepint_mpi train CONFIG --out RUN ...

notes its words in FOLDER/calls. FOLDER/orders, JSON, says by RUN's last two parts what it is to do:
"fail", or "wait" until FOLDER/go is there. The machine it pretends to be has four cores.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def made_times(n_ranks: int, *, plain: bool) -> dict[str, Any]:
    """What `phases.json` holds: of a step 0.1 s that is not shared, and 0.4 s that is."""

    def alike(x: float) -> dict[str, Any]:
        return {"min": x, "mean": x, "max": x, "ranks": [x] * n_ranks, "sum": x * n_ranks}

    shared, walked = 0.4 / n_ranks, 0.04 / n_ranks
    phases = {
        "fine_forward": shared / 4, "fine_adjoint": shared * 3 / 4, "tangents": 0.0,
        "coarse": walked, "send": 0.004, "receive": 0.003, "reduce": 0.003, "wait": 0.04 - walked,
        "other": 0.05,
    }  # fmt: skip
    n_slices = 0 if plain else 80 // n_ranks  # in ten steps
    counts = {"fine": n_slices, "fine_pulled": n_slices, "tangents": 0, "tangent_passes": 0}
    counts |= {"coarse": n_slices, "coarse_pulled": n_slices, "messages": 20, "bytes": 4000}
    return {
        "n_ranks": n_ranks,
        "n_steps": 10,
        "n_warm_steps": 6,
        "step_s": alike(0.3 if plain else 0.1 + shared),
        "phases_s": None if plain else {name: alike(value) for name, value in phases.items()},
        "host_s": {"compile": alike(5.0)},
        "counts": {name: alike(value) for name, value in counts.items()} | {"reduced": None},
        "profiles": {
            "steps": [10],
            "counts": None if plain else {n: alike(value / 10) for n, value in counts.items()},
            "cost_s": 0.1,
            "missing": "no reason" if plain else None,
        },
    }


def main(folder: Path, n_ranks: int, n_cores: int, words: list[str]) -> None:
    with (folder / "calls").open("a") as file:
        print(n_ranks, n_cores, *words, file=file)
    options = dict(zip(words, words[1:], strict=False))
    if words[0] == "evaluate":
        scores = {"step": 4, "loss": 0.5, "relative_error": 0.0123}
        Path(options["--json"]).write_text(json.dumps(scores))
        return
    run = Path(options["--out"])
    (run / "ckpt").mkdir(parents=True, exist_ok=True)
    order = json.loads((folder / "orders").read_text()).get("/".join(run.parts[-2:]))
    if order == "fail":
        print("step 1 of 4: all is well\nnodepint: the reason", file=sys.stderr)
        sys.exit(2)
    if order == "wait":
        (run / "ckpt" / "step-000002.h5").touch()
        deadline = time.monotonic() + 60
        while not (folder / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    record = {"step": 11, "training_s": 12.34, "sweeps": 2, "adjoint_sweeps": 1}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    start = {"hosts": ["here"], "n_cores": min(4, n_ranks)}
    (run / "provenance.json").write_text(json.dumps({"starts": [start]}))
    times = made_times(n_ranks, plain="--plain" in words)
    (run / "phases.json").write_text(json.dumps(times))
    done = {
        "step": 11,
        "n_parameters": 1234,
        "peak_bytes": [500_000_000] * n_ranks,
        "train_loss": 0.75,
    }
    done |= {"test_loss": 0.5, "test_relative_error": 4.2e-6}
    time.sleep(0.01)  # so that a run made again is told by its times
    (run / "DONE").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[7:])
