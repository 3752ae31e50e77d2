"""A pytest plugin for nbval, loaded with `-p tests.notebooks.nbval_strict`.

A cell tagged `raises-exception` fails when it raises nothing (nbval in lax mode lets it pass), and each
notebook runs in an empty folder, as a reader may start it anywhere.
"""

from __future__ import annotations

import tempfile

import nbval.plugin
import pytest


class ScratchKernel(nbval.plugin.RunningKernel):
    """nbval's kernel, started in a temporary folder that goes when the kernel stops."""

    def __init__(self, kernel_name, cwd=None, **options):
        self.scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        super().__init__(kernel_name, cwd=self.scratch.name, **options)

    def stop(self):
        super().stop()
        self.scratch.cleanup()


nbval.plugin.RunningKernel = ScratchKernel


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if isinstance(item, nbval.plugin.IPyNbCell) and item.options["check_exception"]:
        if not any(output.output_type == "error" for output in item.test_outputs or ()):
            item.raise_cell_error("The cell is tagged raises-exception but raised nothing")
    return result
