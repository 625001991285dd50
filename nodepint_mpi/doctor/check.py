"""One finding of `nodepint doctor`, and how findings are printed."""

from collections.abc import Callable
from dataclasses import dataclass

REBUILD = "run 'tools/setup.sh --again' with the modules loaded that you will run with"


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it is good, what was found, what to do if not."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that itself breaks is a finding, too. Local or collective, as it."""
    try:
        return check()
    except Exception as error:  # a doctor that crashes helps nobody
        label = name.removeprefix("_check_").replace("_", " ")
        found = f"the check itself failed: {type(error).__name__}: {error}"
        return Check(label, False, found, "please report this with the output above")


def format_checks(checks: list[Check]) -> str:
    """The findings as lines of text, each bad one with its remedy below it. Local."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.found}")
        if not check.ok and check.remedy:
            lines.append(f"{'':{width + 6}}  fix: {check.remedy}")
    bad = sum(not check.ok for check in checks)
    lines.append("all good" if bad == 0 else f"{bad} of {len(checks)} checks failed")
    return "\n".join(lines)
