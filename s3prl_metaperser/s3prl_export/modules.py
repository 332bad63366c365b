"""The modules that a folder of s3prl's own needs, found by their imports, and how they read in there.

A module keeps its text but for three things: imports of this package become relative ones, which is what s3prl asks of
a downstream; a few modules have another name; and the commands of this package, absent there, have another wording.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

_FOLDER = Path(__file__).resolve().parent.parent
PACKAGE = _FOLDER.name

ROOTS = ("expert", "s3prl_export.prepare")
"""What the folder is entered by: s3prl's runner imports the first, its user runs the second."""
RENAMED = {"datasets": "dataset", "s3prl_export.prepare": "prepare"}
"""Names by s3prl's conventions."""
WORDING = (
    ("next: metaperser prepare", "next: python3 -m s3prl.downstream.metaperser.prepare"),
    ("metaperser prepare", "metaperser.prepare"),
    ("datasets.py", "dataset.py"),
    (f"{PACKAGE}.", "metaperser."),
)
"""Replaced in this order, in all that is not an import."""


@dataclass(frozen=True)
class Module:
    """A module of this package.

    Attributes:
        name: dotted, without the package's; empty for the package itself.
        path: its file.
        text: what the file holds.
    """

    name: str
    path: Path
    text: str

    @property
    def is_package(self) -> bool:
        """Whether modules lie in it."""
        return self.path.name == "__init__.py"

    @property
    def place(self) -> PurePosixPath:
        """Its file in the exported folder."""
        path = PurePosixPath(*_exported(self.name).split("."))
        return path / "__init__.py" if self.is_package else path.with_suffix(".py")

    @cached_property
    def own_imports(self) -> list[ast.ImportFrom]:
        """Its imports of this package, from top to bottom."""
        nodes = []
        for node in ast.walk(ast.parse(self.text, str(self.path))):
            if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
                raise ValueError(f"{self.path}:{node.lineno}: only `from … import …` can be rewritten")
            if isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
                nodes.append(node)
        return sorted(nodes, key=lambda node: node.lineno)


def needed(roots: Iterable[str] = ROOTS) -> list[Module]:
    """Follow imports, those inside functions too.

    Args:
        roots: names of modules, without the package's.

    Returns:
        The roots, all that they import of this package and the packages these lie in, sorted by name.
    """
    found: dict[str, Module] = {}
    waiting = [*roots, ""]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _file(name)
        if path is None:
            raise ValueError(f"{PACKAGE} has no module {name!r}")
        found[name] = Module(name, path, path.read_text(encoding="utf-8"))
        if name not in RENAMED:
            waiting.append(name.rpartition(".")[0])
        for node in found[name].own_imports:
            module = _inside(node)
            members = (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
            waiting += [module, *(member for member in members if _file(member) is not None)]
    return [found[name] for name in sorted(found)]


def rewritten(module: Module) -> str:
    """Give a module's text as it reads in the exported folder."""
    lines = module.text.splitlines(keepends=True)
    imports = [(range(node.lineno - 1, node.end_lineno or node.lineno), node) for node in module.own_imports]
    for number in set(range(len(lines))).difference(*(rows for rows, _ in imports)):
        for ours, theirs in WORDING:
            lines[number] = lines[number].replace(ours, theirs)
    adjacent: list[list[tuple[range, str]]] = []
    for rows, node in imports:
        relative = _relative(node, module)
        lines[rows.start] = lines[rows.start].replace(f"from {node.module} import", f"from {relative} import", 1)
        if adjacent and adjacent[-1][-1][0].stop == rows.start:
            adjacent[-1].append((rows, relative))
        else:
            adjacent.append([(rows, relative)])
    for block in adjacent:
        # Relative imports are sorted from the farthest package to the nearest.
        ordered = sorted(block, key=lambda one: (-_level(one[1]), one[1]))
        lines[block[0][0].start : block[-1][0].stop] = [lines[number] for rows, _ in ordered for number in rows]
    return "".join(lines)


def third_party(texts: Iterable[str]) -> set[str]:
    """Name the top-level modules that texts of Python import and that are neither Python's own nor relative."""
    imported: set[str] = set()
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
    return imported - sys.stdlib_module_names


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _inside(node: ast.ImportFrom) -> str:
    """Give the imported module's name without the package's."""
    return (node.module or "").removeprefix(PACKAGE).lstrip(".")


def _file(name: str) -> Path | None:
    """Find a module's file by its name without the package's."""
    path = _FOLDER.joinpath(*filter(None, name.split(".")))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _exported(name: str) -> str:
    return RENAMED.get(name, name)


def _relative(node: ast.ImportFrom, module: Module) -> str:
    """Name what a module imports, relative to where it lies in the exported folder."""
    here = module.place.parent
    target = PurePosixPath(*filter(None, _exported(_inside(node)).split(".")))
    steps = os.path.relpath(target, here).split(os.sep)
    ups = steps.count("..")
    return "." * (ups + 1) + ".".join(step for step in steps if step not in ("..", "."))


def _level(relative: str) -> int:
    return len(relative) - len(relative.lstrip("."))
