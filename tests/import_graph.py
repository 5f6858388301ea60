"""Who imports whom in this repository, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOMS = ("server", "engine", "kernels", "bench")
PACKAGE = "tokenmill"

When = Literal["import", "call", "typing"]
"""When an import statement runs: with its module, inside a function, or for type checkers only."""


@dataclass(frozen=True)
class Edge:
    """`source` imports `target`: a module of ours by its dotted name, or an outside one by its full name."""

    source: str
    target: str
    when: When
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


@dataclass(frozen=True)
class Graph:
    """All modules of the rooms under one root, and every import statement in them."""

    modules: dict[str, Path]
    edges: tuple[Edge, ...]

    def imports_of(self, module: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.source == module]


def read_graph(root: Path) -> Graph:
    """The graph of `root`'s rooms. Rooms that don't exist are empty."""
    modules = {
        _module_name(root, path): path for room in ROOMS for path in sorted((root / room).rglob("*.py"))
    }
    edges: list[Edge] = []
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, when in _statements(tree, "import"):
            edges += [Edge(name, target, when, line) for target, line in _targets(node, package, modules)]
    return Graph(modules, tuple(edges))


def belongs(target: str, package: str) -> bool:
    """Whether the dotted name is `package` or lies in it."""
    return target == package or target.startswith(package + ".")


def room_of(module: str) -> str | None:
    """`engine` for `tokenmill.engine.scheduler`; None for what isn't ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def with_parents(module: str) -> list[str]:
    """A module and the packages whose `__init__` runs before it."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules that need each other while they are being imported (Tarjan, 1972)."""
    arrows: dict[str, set[str]] = {name: set() for name in graph.modules}
    for edge in graph.edges:
        if edge.when == "import" and edge.target in graph.modules and edge.target != edge.source:
            arrows[edge.source].add(edge.target)

    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for after in sorted(arrows[node]):
            if after not in order:
                visit(after)
            if after in stack:
                low[node] = min(low[node], low[after])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in order:
            visit(name)
    return found


def _module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _statements(node: ast.AST, when: When) -> Iterator[tuple[ast.AST, When]]:
    """Everything below `node`, with when it would run if it were an import."""
    for child in ast.iter_child_nodes(node):
        yield child, when
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _statements(ast.Module(child.body, []), "typing")
            yield from _statements(ast.Module(child.orelse, []), when)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(child, "call" if when == "import" else when)
        else:
            yield from _statements(child, when)


def _targets(node: ast.AST, package: str, modules: dict[str, Path]) -> list[tuple[str, int]]:
    """The modules that one statement imports, with its line; nothing for what isn't an import."""
    if isinstance(node, ast.Import):
        return [(alias.name, node.lineno) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
        names = {f"{base}.{alias.name}" for alias in node.names}
        # `from package import name` reaches the module of that name where there is one, else an attribute of
        # the package. The bare `tokenmill` holds nothing but packages.
        targets = {name if name in modules or base == PACKAGE else base for name in names}
        return [(target, node.lineno) for target in sorted(targets)]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        # import_module("literal") and __import__("literal")
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [(node.args[0].value, node.lineno)]
    return []
