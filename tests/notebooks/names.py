"""Which names ftlib offers and which a notebook asks for, read from the source without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Source:
    """The names ftlib offers, read from its files: {module: names} and the names of the package itself."""

    modules: dict[str, set[str]]
    package: set[str]


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

    `ftlib/__init__.py` hands out names lazily, from a table of strings, so every word of every string in its
    top-level assignments counts as offered, provided that one of the modules defines it.
    """
    modules = {
        path.stem: top_level_names(ast.parse(path.read_text("utf8")))
        for path in folder.glob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    init = folder / "__init__.py"
    if not init.exists():
        return Source(modules, set(modules))
    tree = ast.parse(init.read_text("utf8"))
    defined = set().union(*modules.values())
    offered = {
        word
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
        for word in re.findall(r"\w+", constant.value)
    }
    return Source(modules, top_level_names(tree) | (offered & defined) | set(modules))


def missing_names(tree: ast.Module, source: Source, aliases: dict[str, str]) -> Iterator[str]:
    """ftlib names a cell uses and the package lacks. `aliases` {variable: module} grows from cell to cell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, module = alias.name.partition(".")
                if package == "ftlib":
                    if module and module not in source.modules:
                        yield alias.name
                    aliases[alias.asname or "ftlib"] = module if alias.asname else ""
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ftlib":
            module = node.module.partition(".")[2]
            if module and module not in source.modules:
                yield node.module
                continue
            names = source.modules[module] if module else source.package
            for alias in node.names:
                if alias.name not in names:
                    yield f"{node.module}.{alias.name}"
                if not module and alias.name in source.modules:
                    aliases[alias.asname or alias.name] = alias.name
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in aliases:
            module = aliases[node.value.id]
            if node.attr not in (source.modules.get(module, ()) if module else source.package):
                yield f"ftlib.{module}.{node.attr}" if module else f"ftlib.{node.attr}"
        elif (
            isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
            and aliases.get(node.value.value.id) == ""
            and node.value.attr in source.modules
            and node.value.attr not in own_names(source)
            and node.attr not in source.modules[node.value.attr]
        ):
            yield f"ftlib.{node.value.attr}.{node.attr}"


def own_names(source: Source) -> set[str]:
    """Modules that share their name with a function or class: `ftlib.name.x` can mean either."""
    return {name for names in source.modules.values() for name in names} & set(source.modules)
