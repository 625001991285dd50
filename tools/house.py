"""Numbers that say how a package is kept: lines, wide functions, records, names in many files.

    python tools/house.py [PACKAGE] [NAME...]

For the package at a path (default: nodepint_mpi) it prints lines and files, the function with most
arguments, how many `assert ... is not None` there are and how many NamedTuples and dataclasses, and
for every NAME (default: the methods, as a class and as a string) the files that name it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

METHODS = ("Serial", "Picard", "Parareal", "Tangent", "Reduced")


def functions(tree: ast.AST) -> Iterator[tuple[int, str, int]]:
    """Number of arguments, name and line of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            n_more = sum(part is not None for part in (node.args.vararg, node.args.kwarg))
            yield len(own) + n_more, node.name, node.lineno


def is_not_none(node: ast.AST) -> bool:
    """Whether a node asserts, perhaps among other things, that something is not None."""
    if not isinstance(node, ast.Assert):
        return False
    compared = [part for part in ast.walk(node.test) if isinstance(part, ast.Compare)]
    return any(
        isinstance(operator, ast.IsNot) and isinstance(value, ast.Constant) and value.value is None
        for part in compared
        for operator, value in zip(part.ops, part.comparators, strict=True)
    )


def is_record(node: ast.AST) -> bool:
    """Whether a node is the class of a NamedTuple or a dataclass."""
    if not isinstance(node, ast.ClassDef):
        return False
    decorators = [part.func if isinstance(part, ast.Call) else part for part in node.decorator_list]
    return any(ast.unparse(part).split(".")[-1] == "dataclass" for part in decorators) or any(
        ast.unparse(base).split(".")[-1] == "NamedTuple" for base in node.bases
    )


def names_in(tree: ast.AST) -> set[str]:
    """All names and strings of a file."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.name for node in nodes if isinstance(node, ast.alias | ast.ClassDef)}
    return names | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


def main(arguments: list[str]) -> int:
    """Print the numbers of a package."""
    package = Path(arguments[0] if arguments else "nodepint_mpi")
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    n_lines = sum(len(text.splitlines()) for text in texts.values())
    wide = [(*found, path) for path, tree in trees.items() for found in functions(tree)]
    n_arguments, function, line, where = max(wide)
    print(f"{n_lines} lines in {len(texts)} files")
    print(f"widest function: {function} with {n_arguments} arguments, {where}:{line}")
    print(f"{sum(map(is_not_none, nodes))} times `assert ... is not None`")
    print(f"{sum(map(is_record, nodes))} NamedTuples and dataclasses")
    for name in arguments[1:] or [name for pair in METHODS for name in (pair, pair.lower())]:
        files = [str(path) for path, tree in trees.items() if name in names_in(tree)]
        print(f"{name} in {len(files)} files: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
