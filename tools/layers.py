"""Who may import whom: the layers of nodepint_mpi, checked by reading every file's syntax tree.

python tools/layers.py [ROOT] prints one line for each forbidden import and exits 1 if there is
any. Nothing is imported, so the check needs no MPI and takes no time.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "nodepint_mpi"


@dataclass(frozen=True)
class Layer:
    """What the modules of one layer may import, besides the standard library and their own layer.

    `ours` holds dotted names inside the package, each with all that is below it; `outside` holds
    top-level names. Imports inside functions count as well.
    """

    ours: frozenset[str]
    outside: frozenset[str]


NUMERICS = "jax jaxlib jaxtyping numpy scipy equinox diffrax optax lineax optimistix"

# From the bottom to the top, with what each may import from outside besides the standard library.
# A layer may import those before it in this list, and itself.
ORDER = {
    "errors": "",
    "names": "",
    "core": NUMERICS,
    "models": NUMERICS,
    "parallel": f"{NUMERICS} mpi4py mpi4jax xxhash",
    "ranks": f"{NUMERICS} mpi4py",
    "config": "pydantic",
    "io": f"{NUMERICS} mpi4py h5py xxhash tomli_w",
    "build": f"{NUMERICS} pydantic xxhash",
    "pages": f"{NUMERICS} matplotlib jinja2",
    "data": f"{NUMERICS} mpi4py datasets pyarrow xxhash",
    "profiling": f"{NUMERICS} mpi4py",
    "training": f"{NUMERICS} mpi4py tqdm tensorboardX",
    "optimal_control": f"{NUMERICS} mpi4py",
    "rom": f"{NUMERICS} mpi4py h5py xxhash matplotlib",
    "api": NUMERICS,
    "report": f"{NUMERICS} matplotlib",
    "doctor": f"{NUMERICS} mpi4py mpi4jax h5py",
    "bench": f"{NUMERICS} mpi4py h5py matplotlib",
    "cli": f"{NUMERICS} mpi4py click",
    "__main__": "click",
}
PURE = {"config": {"errors", "names"}}
"""Layers that may import no more of ours than these."""
INSTRUMENTS = {"bench", "report", "doctor"}
"""What looks at the product; nothing but the command line imports it."""


def _layers() -> dict[str, Layer]:
    """What each layer may import, from the order."""
    layers, below = {}, set()
    for name, outside in ORDER.items():
        ours = PURE.get(name, below if name == "cli" else below - INSTRUMENTS)
        layers[name] = Layer(frozenset(ours), frozenset(outside.split()))
        below = below | {name}
    # The package itself only hands names on, lazily.
    layers["__init__"] = Layer(frozenset(), frozenset())
    return layers


LAYERS = _layers()

WORLD = "COMM_WORLD"
WORLD_FILE = "parallel/comms.py"


@dataclass(frozen=True)
class Violation:
    """One forbidden import or name."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def is_within(name: str, prefix: str) -> bool:
    """Whether a dotted name is a prefix's or below it."""
    return name == prefix or name.startswith(prefix + ".")


def layer_of(module: str) -> str | None:
    """The layer a dotted name inside the package belongs to (the longest that matches)."""
    matches = [name for name in LAYERS if is_within(module, name)]
    return max(matches, key=len, default=None)


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every name a module imports, absolute and dotted, with its line.

    `from a import b` gives `a.b`: whether `b` is a module or a name in one cannot be told from
    here, and for layers it makes no difference.
    """
    parts = [PACKAGE, *module.split(".")] if module != "__init__" else [PACKAGE, "__init__"]
    here = parts if is_package and module != "__init__" else parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, stem if alias.name == "*" else f"{stem}.{alias.name}"


def world_lines(tree: ast.AST) -> Iterator[int]:
    """Lines that name the world communicator, as a name, an attribute or an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == WORLD:
            yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr == WORLD:
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and any(a.name == WORLD for a in node.names):
            yield node.lineno


def why_forbidden(name: str, own_layer: str) -> str | None:
    """Why a module of this layer may not import that name, or nothing if it may."""
    layer = LAYERS[own_layer]
    top = name.partition(".")[0]
    if top == "tools":
        return "nothing imports tools"
    if top == PACKAGE:
        inner = name.partition(".")[2]
        if inner in ("", "__version__", "__init__") or is_within(inner, own_layer):
            return None
        if any(is_within(inner, allowed) for allowed in layer.ours):
            return None
        return f"{own_layer} must not import {PACKAGE}.{inner}"
    if top in sys.stdlib_module_names or top in layer.outside:
        return None
    return f"{own_layer} must not import {top}"


def check_file(path: Path, package: Path) -> list[Violation]:
    """The violations of one file of the package."""
    relative = path.relative_to(package)
    is_package = relative.name == "__init__.py"
    parts = relative.with_suffix("").parts
    module = ".".join(parts[:-1] if is_package and len(parts) > 1 else parts)
    own_layer = layer_of(module)
    if own_layer is None:
        return [Violation(path, 1, f"{module} belongs to no layer: add it to tools/layers.py")]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found = [
        Violation(path, line, reason)
        for line, name in imported_names(tree, module, is_package)
        if (reason := why_forbidden(name, own_layer)) is not None
    ]
    if relative.as_posix() != WORLD_FILE:
        found += [
            Violation(path, line, f"{WORLD} may only be named in {PACKAGE}/{WORLD_FILE}")
            for line in world_lines(tree)
        ]
    return sorted(found, key=lambda violation: violation.line)


def check_tree(root: Path) -> list[Violation]:
    """The violations of the whole package below a repository root."""
    package = root / PACKAGE
    files = sorted(package.rglob("*.py"))
    if not files:
        return [Violation(package, 1, "no Python files here")]
    return [violation for path in files for violation in check_file(path, package)]


def main(arguments: list[str]) -> int:
    """Print the violations below a root (default: this repository); 1 if there is any."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    violations = check_tree(root)
    for violation in violations:
        print(violation)
    if not violations:
        print("import layers: clean")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
