"""The gate's rules for exercises, their check cells and their solutions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import cells
from names import top_level_names

MIN_EXERCISES = 3
Finding = tuple[int | None, str, str]  # cell number or None for the whole file, what, remedy


def exercise_number(cell: dict) -> int | None:
    found = (
        re.match(r"### Exercise (\d+)\b", cells.source(cell).lstrip())
        if cell["cell_type"] == "markdown"
        else None
    )
    return int(found.group(1)) if found else None


def binds(tree: ast.Module, name: str) -> bool:
    return name in top_level_names(tree)


def has_ellipsis(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(tree))


def check_exercises(notebook: dict) -> Iterator[Finding]:
    """At least three exercises: heading, a cell with the answer left as `...`, and its check."""
    numbered = [
        (n, exercise_number(cell)) for n, cell in enumerate(notebook["cells"], 1) if exercise_number(cell)
    ]
    if len(numbered) < MIN_EXERCISES:
        yield (
            None,
            f"{len(numbered)} exercises",
            f"write {MIN_EXERCISES} or more, each under `### Exercise N`",
        )
    for place, (number, exercise) in enumerate(numbered, 1):
        if exercise != place:
            yield number, f"exercise {exercise} comes where exercise {place} belongs", "number them 1, 2, 3"
        follow = (notebook["cells"][number:] + [{"cell_type": "markdown", "source": ""}] * 2)[:2]
        if "exercise" not in cells.tags(follow[0]) or "exercise-check" not in cells.tags(follow[1]):
            yield (
                number,
                f"exercise {exercise} is not followed by its two cells",
                "put a code cell tagged `exercise` and one tagged `exercise-check` right after the heading",
            )
            continue
        tree = cells.try_parse(cells.source(follow[0]))
        if not binds(tree, f"answer_{exercise}") or not has_ellipsis(tree):
            yield number + 1, f"answer_{exercise} is not left open", f"write `answer_{exercise} = ...`"
        for what, remedy in check_checker(follow[1], exercise, "not answered yet"):
            yield number + 2, what, remedy
    for tag in ("exercise", "exercise-check"):
        count = sum(tag in cells.tags(cell) for cell in notebook["cells"])
        if count != len(numbered):
            yield (
                None,
                f"{count} cells tagged `{tag}` for {len(numbered)} headings `### Exercise N`",
                "make them agree",
            )
    for number, cell in enumerate(notebook["cells"], 1):
        if found := cells.tags(cell) & {"solution", "wrong-answer"}:
            yield number, f"a cell tagged `{found.pop()}`", "move it to notebooks/solutions/"


def check_checker(cell: dict, exercise: int, stored: str) -> Iterator[tuple[str, str]]:
    """One exercise-check cell: check_N(answer) with hints, and the line it prints."""
    tree, name = cells.try_parse(cells.source(cell)), f"check_{exercise}"
    function = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    if function is None or len(function.args.args) != 1:
        yield f"no function {name}(answer)", f"define `def {name}(answer):`"
        return
    words = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
    if not {"not answered yet", "correct", ...} <= words:
        yield (
            f'{name} does not tell "not answered yet" from "correct"',
            'return "not answered yet" for an answer that is ..., and "correct" at the end',
        )
    asserts = [node for node in ast.walk(function) if isinstance(node, ast.Assert)]
    if not asserts or any(node.msg is None for node in asserts):
        yield f"{name} has no assert, or one without a hint", 'write `assert condition, "hint"`'
    if cells.COMPARED not in cells.tags(cell):
        yield "an exercise-check whose output is not compared", "tag it nbval-check-output too"
    shown = "".join(cells.output_text(output) for output in cell.get("outputs", ())).strip()
    if shown != f"Exercise {exercise}: {stored}":
        yield f"the check shows {shown!r}", f"print exactly `Exercise {exercise}: {stored}`"


def check_solutions(notebook: dict, lesson: dict | None) -> Iterator[Finding]:
    """For every exercise of the lesson: a solution, the same check shown correct, a wrong answer caught."""
    if lesson is None:
        yield None, "no readable notebook of this name", "name the solutions like the notebook they belong to"
        return
    asked = {
        exercise_number(cell): (cell, lesson["cells"][index + 2])
        for index, cell in enumerate(lesson["cells"])
        if exercise_number(cell) and index + 2 < len(lesson["cells"])
    }
    starts = [index for index, cell in enumerate(notebook["cells"]) if exercise_number(cell)]
    given = [exercise_number(notebook["cells"][index]) for index in starts]
    if given != list(asked):
        yield (
            None,
            f"solves exercises {given}, the notebook asks {list(asked)}",
            "solve every exercise, in order",
        )
    for start, end in zip(starts, [*starts[1:], len(notebook["cells"])], strict=True):
        exercise, block = exercise_number(notebook["cells"][start]), notebook["cells"][start:end]
        if exercise not in asked:
            continue
        heading, check = asked[exercise]
        if cells.source(block[0]).strip().splitlines()[0] != cells.source(heading).strip().splitlines()[0]:
            yield start + 1, "the heading differs from the notebook's", "copy the `### Exercise N` line"
        yield from check_solution_block(block, start + 1, exercise, cells.source(check))


def check_solution_block(block: list[dict], first: int, exercise: int, check: str) -> Iterator[Finding]:
    by_tag = {
        tag: [(first + n, cell) for n, cell in enumerate(block) if tag in cells.tags(cell)]
        for tag in ("solution", "exercise-check", "wrong-answer")
    }
    if not any(
        binds(cells.try_parse(cells.source(cell)), f"answer_{exercise}") for _, cell in by_tag["solution"]
    ):
        yield (
            first,
            f"no cell tagged `solution` gives answer_{exercise}",
            f"write `answer_{exercise} = …` there",
        )
    if len(by_tag["exercise-check"]) != 1:
        yield (
            first,
            f"{len(by_tag['exercise-check'])} check cells",
            "copy the notebook's exercise-check cell once",
        )
    for number, cell in by_tag["exercise-check"]:
        if cells.source(cell) != check:
            yield (
                number,
                "the check differs from the notebook's",
                "copy the notebook's exercise-check cell as it is",
            )
        for what, remedy in check_checker(cell, exercise, "correct"):
            yield number, what, remedy
    if not by_tag["wrong-answer"]:
        yield first, "no cell tagged `wrong-answer`", "show that a common mistake is caught"
    for number, cell in by_tag["wrong-answer"]:
        tree = cells.try_parse(cells.source(cell))
        tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
        calls = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if f"check_{exercise}" not in calls or not any(
            isinstance(node, ast.Raise)
            for attempt in tries
            for line in attempt.orelse
            for node in ast.walk(line)
        ):
            yield (
                number,
                "a wrong answer that would pass unseen",
                f"call check_{exercise} in a try whose `else:` raises AssertionError",
            )
        if not "".join(cells.output_text(output) for output in cell.get("outputs", ())).startswith("caught:"):
            yield number, "the wrong answer is not shown as caught", 'print("caught:", hint)'
