"""Which names ftlib offers and which a notebook asks for, read from the source without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Source:
    """What ftlib offers, read from its files."""

    modules: dict[str, set[str]]  # the names in each module and room, by the path to import it by: show.plots, show
    package: set[str]  # names of the package itself
    short: dict[str, str]  # modules that the package hands out by their last name: plots is show.plots

    def missing(self, steps: list[str]) -> str | None:
        """The first name on the way ftlib.a.b.c that is not there; what functions and classes hold isn't known."""
        module = ""
        for i, step in enumerate(steps):
            if step not in (self.modules[module] if module else self.package):
                return ".".join(["ftlib", *steps[: i + 1]])
            inner = f"{module}.{step}" if module else self.short.get(step, "")
            if inner not in self.modules:
                return None
            module = inner
        return None


def top_level_names(tree: ast.Module) -> set[str]:
    """Names that a module defines or imports at its top level, inside `if` and `try` too."""
    names, todo = set(), list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
            todo += [n for field in ("body", "orelse", "finalbody") for n in getattr(node, field, [])]
            todo += [n for handler in getattr(node, "handlers", []) for n in handler.body]
    return names


def read_package(folder: Path) -> Source:
    """Read ftlib's names without importing it.

    `ftlib/__init__.py` hands out modules, and names lazily, from tables of strings, so every word of every string in
    its top-level assignments counts as offered, provided that one of the modules defines it.
    """
    modules: dict[str, set[str]] = {}
    functions: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        *rooms, name = path.relative_to(folder).with_suffix("").parts
        tree = ast.parse(path.read_text("utf8"))
        if name == "__init__" and rooms:
            modules.setdefault(".".join(rooms), set()).update(top_level_names(tree))
        elif name not in ("__init__", "__main__"):
            modules[".".join([*rooms, name])] = top_level_names(tree)
            functions |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            if rooms:
                modules.setdefault(".".join(rooms), set()).add(name)
    init, first = folder / "__init__.py", {path.split(".")[0] for path in modules}
    tree = ast.parse(init.read_text("utf8") if init.exists() else "")
    words = {
        word
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
        for word in re.findall(r"\w+", constant.value)
    }
    defined = set().union(*modules.values())
    short = {path.split(".")[-1]: path for path in modules}
    package = top_level_names(tree) | (words & defined) | first | short.keys()
    # where a module shares its name with a function or class, the package's name may be either: not looked into
    return Source(modules, package, {name: path for name, path in short.items() if name in package - functions})


def missing_names(tree: ast.Module, source: Source, aliases: dict[str, str]) -> Iterator[str]:
    """ftlib names a cell uses and the package lacks. `aliases` {variable: way to it} grows from cell to cell."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, module = alias.name.partition(".")
                if package == "ftlib":
                    found += [alias.name] if module and module not in source.modules else []
                    aliases[alias.asname or "ftlib"] = module if alias.asname else ""
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ftlib":
            module = node.module.partition(".")[2]
            if module and module not in source.modules:
                found.append(node.module)
                continue
            for alias in node.names:
                way = [*filter(None, [module]), alias.name]
                found.append(source.missing(".".join(way).split(".")))
                aliases[alias.asname or alias.name] = ".".join(way)
    for node in ast.walk(tree):
        steps: list[str] = []
        while isinstance(node, ast.Attribute):
            steps.insert(0, node.attr)
            node = node.value
        if steps and isinstance(node, ast.Name) and node.id in aliases:
            found.append(source.missing([*filter(None, aliases[node.id].split(".")), *steps]))
    yield from dict.fromkeys(filter(None, found))
