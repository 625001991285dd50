"""The section on samples that `nodepint sample` has drawn."""

import json

from nodepint_mpi.pages.parts import Section, Table, number
from nodepint_mpi.report.facts import Facts

FOLDER = "samples"
SHOWN = {
    "name": "sampler and method",
    "step": "optimizer step",
    "n_samples": "samples",
    "n_steps": "steps",
    "n_slices": "slices",
    "sweeps": "sweeps",
    "evaluations": "evaluations",
    "equivalents": "serial solutions of work",
    "serial_steps": "evaluations in sequence",
    "error_rms": "rms difference from the serial sampler",
    "status": "status",
    "seconds": "seconds",
}


def drawn_samples(facts: Facts) -> Section | None:
    """What every drawing cost, by name; the picture is among those of the run."""
    rows, damaged = [], []
    for file in sorted((facts.folder / FOLDER).glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            rows.append(tuple(number(found.get(key)) for key in SHOWN))
        except (OSError, ValueError, AttributeError) as error:
            damaged.append(f"{FOLDER}/{file.name} cannot be read: {error}")
    if not rows and not damaged:
        return None
    parts: list = [Table(tuple(SHOWN.values()), rows)] if rows else []
    return Section("Samples", parts + damaged)
