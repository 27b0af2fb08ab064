"""The layers of the package, and what its imports do against them.

The import graph is read off the source, without importing anything: imports inside functions and
those for type checkers count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

PACKAGE = Path(__file__).parents[2] / "enorm_fx"

# Folders and modules at the top of the package, each layer on those before it. A module may import
# from its own layer and from earlier ones.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors"),
    ("nested",),
    ("tracing",),
    ("symmetry",),
    ("rules",),
    ("plan",),
    ("report",),
    ("step",),
    ("checkpoints",),
    ("calibration",),
    ("optim",),
    ("model_plan",),
    ("analysis",),
    ("balancing", "counting", "enorm", "smoothing", "verifying"),
    ("agreement", "canonical", "comparing", "fingerprinting", "folding", "imbalances"),
    ("__init__",),  # the names that users import
    ("integrations",),
    ("demo",),
    ("cli",),
    ("__main__",),
)


@dataclass(frozen=True, slots=True)
class Import:
    """One import of a module of the package by another.

    name: what is taken from the imported module; empty where the module itself is.
    """

    importer: str
    imported: str
    name: str
    line: int

    def __str__(self) -> str:
        what = f"{self.imported}.{self.name}" if self.name else self.imported
        return f"{self.importer}, line {self.line}, imports {what}"


def violations(package: Path, layers: Iterable[Iterable[str]] = LAYERS) -> list[str]:
    """What is wrong with the imports of a package, one sentence each; empty if nothing is."""
    modules = _modules(package)
    found = [entry for name, file in modules.items() for entry in _imports(name, file, modules)]
    height = {top: i for i, layer in enumerate(layers) for top in layer}
    unknown = sorted({_top(name) for name in modules} - set(height))
    if unknown:
        return [f"{top} has no place in the list of layers" for top in unknown]
    upward = (e for e in found if height[_top(e.imported)] > height[_top(e.importer)])
    private = (e for e in found if _is_private_elsewhere(e))
    return [
        *(f"upward: {entry}" for entry in upward),
        *(f"circle: {' -> '.join(circle)}" for circle in _circles(found)),
        *(f"private: {entry}" for entry in private),
    ]


def _modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module; a folder goes by the name of its `__init__`."""
    result = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        result[".".join(parts)] = file
    return result


def _top(module: str) -> str:
    """The folder or module at the top of the package that a module belongs to."""
    return module.split(".")[1]


def _folder(module: str) -> str:
    return module.rpartition(".")[0]


def _imports(importer: str, file: Path, modules: Mapping[str, Path]) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    local: dict[str, str] = {}  # what a module is called here -> its name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = _resolved(alias.name, modules)
                if module:
                    yield Import(importer, module, "", node.lineno)
                    if alias.asname:
                        local[alias.asname] = module
        elif isinstance(node, ast.ImportFrom):
            base = _base(importer, node)
            for alias in node.names:
                module = _resolved(f"{base}.{alias.name}", modules)
                if module:
                    yield Import(importer, module, "", node.lineno)
                    local[alias.asname or alias.name] = module
                elif parent := _resolved(base, modules):
                    yield Import(importer, parent, alias.name, node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = ast.unparse(node.value)
            module = local.get(owner) or _resolved(owner, modules)
            if module:
                yield Import(importer, module, node.attr, node.lineno)


def _base(importer: str, node: ast.ImportFrom) -> str:
    """The module that `from ... import` names, dots at its beginning resolved."""
    if not node.level:
        return node.module or ""
    parents = importer.split(".")[: -node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def _resolved(name: str, modules: Mapping[str, Path]) -> str:
    """The module of this name in the package, empty where there is none."""
    return next((n for n in (name, f"{name}.__init__") if n in modules), "")


def _circles(imports: Iterable[Import]) -> list[list[str]]:
    """One circle, from a module back to itself, for each set of modules that import each other."""
    graph = nx.DiGraph((e.importer, e.imported) for e in imports)
    circles = []
    for tangle in nx.strongly_connected_components(graph):
        start = min(tangle)
        if len(tangle) > 1 or graph.has_edge(start, start):
            edges = nx.find_cycle(graph.subgraph(tangle), start)
            circles.append([edges[0][0], *(after for _, after in edges)])
    return sorted(circles)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_private_elsewhere(entry: Import) -> bool:
    """A module may use private names of its own folder, and private modules beside or above it."""
    if _is_private(entry.name):
        return _folder(entry.importer) != _folder(entry.imported)
    path = entry.imported.split(".")
    owners = [".".join(path[:at]) for at, part in enumerate(path) if _is_private(part)]
    return any(not entry.importer.startswith(f"{owner}.") for owner in owners)
