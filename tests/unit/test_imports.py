"""The rooms of the package: imports go downwards and never in a circle, those for type checkers included."""

from __future__ import annotations

import ast
from pathlib import Path

import fellrec

FLOORS = (
    ("errors", "types", "functional", "terminal"),
    ("data", "state", "distributed"),
    ("models", "metrics"),
    ("federated", "rankers"),
    ("aggregation", "cut", "pool", "tracking", "launch", "attacks"),
    ("config", "report", "callbacks"),
    ("experiment",),
    ("planning",),
    ("cli",),
    ("library",),
    ("__main__",),
)
ROOT = Path(fellrec.__file__).parent
ROOT_MODULE = "fellrec"
"""The public names of the package; it may import from everywhere and nothing may import it."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """Every module of the package → the modules that it imports, wherever the import stands."""
    names = {module_name(path): path for path in ROOT.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                found |= submodules or {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = (found & names.keys()) - {name}
    return graph


def test_imports_only_go_downwards() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if name != ROOT_MODULE and (other == ROOT_MODULE or floor[other.split(".")[1]] > floor[name.split(".")[1]])
    ]
    assert not sorted(wrong)


def test_no_module_imports_itself_through_others() -> None:
    graph = imports()

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    assert not sorted(name for name in graph if name in reachable(name))


def test_libraries_that_only_tests_compare_with_are_not_imported() -> None:
    oracles = {"byzfl", "flwr", "fluke", "nvflare", "quadprog", "ranx", "hypothesis", "pytest"}
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {f"{path.name} imports {name}" for name in names if name.split(".")[0] in oracles}
    assert not sorted(found)
