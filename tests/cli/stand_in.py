"""In the place of a launcher and of the ranks it would start: makes a run at once, or does not.

    python stand_in.py FOLDER RANKS CORES python -m nodepint_mpi train CONFIG --out RUN ...

notes its words in FOLDER/calls. FOLDER/orders, JSON, says by RUN's last two parts what it is to do:
"fail", or "wait" until FOLDER/go is there.
"""

import json
import sys
import time
from pathlib import Path


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
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "training_s": 12.34}) + "\n")
    done = {"n_parameters": 1234, "peak_bytes": [500_000_000] * n_ranks}
    done |= {"test_loss": 0.5, "test_relative_error": 4.2e-6}
    time.sleep(0.01)  # so that a run made again is told by its times
    (run / "DONE").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[7:])
