"""What a wheel takes along besides the package: the configs and recipes of the repository.

They are put into `nodepint_mpi/shipped`, where `nodepint_mpi/data/shipped.py` finds them.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PATTERNS = ("configs/**/*.toml", "data/*/*.py", "data/*/README.md", "tools/sph.py")


class CustomBuildHook(BuildHookInterface):
    """Adds them, one by one, so that prepared data beside the recipes stay out."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is built; an editable one finds the repository."""
        if version == "editable":
            return
        root = Path(self.root)
        for pattern in PATTERNS:
            for path in sorted(root.glob(pattern)):
                inside = f"nodepint_mpi/shipped/{path.relative_to(root).as_posix()}"
                build_data["force_include"][str(path)] = inside
