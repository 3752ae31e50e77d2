# make help tells what there is. Needs GNU make and Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= python3
ONLY   ?=
URL    ?=

VENV := .venv
BIN  := $(VENV)/bin
PY   := $(BIN)/python
NB   := tests/notebooks

# A busy second process slows CPU PyTorch down five-fold when its idle threads spin, so they sleep instead.
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install data notebooks core lab book refresh test test-cpus lint unit gate nbval bench gpu-day url clean

help:  ## this list
	@echo 'make TARGET [ONLY="03 03b"] [PYTHON=python3.12] [FTLIB_SIZE=full]'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## .venv with exact versions and ftlib in it, editable

# The stamp holds the folder it was made for. A checkout that was moved or copied is installed again: .venv names the old
# folder, in the path of ftlib and in the first lines of its programs, which RENAMED mends.
ifneq ($(shell cat $(VENV)/.installed 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/.installed
endif
define RENAMED
import os, pathlib, re, sys
old = re.compile(rb"(#!|#!/bin/sh\n'''exec' \")[^\n]*?/\.venv/bin/python[\d.]*")
for path in pathlib.Path("$(BIN)").iterdir():
    if path.is_file() and not path.is_symlink() and old.match(program := path.read_bytes()):
        path.write_bytes(old.sub(lambda found: found[1] + os.fsencode(sys.executable), program, count=1))
endef
export RENAMED

# Fresh stamp: no pip, no network. The build tools are in the lock file, so nothing is fetched to build ftlib.
# PEP517: seqeval comes as source, and pip 23.0 would build it by setup.py, with a half of setuptools_scm.
$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python %d.%d is too old: ftlib needs 3.11 or newer; try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): some minutes the first time, most of them for torch"
	PIP_USE_PEP517=1 $(PY) -m pip install --quiet --requirement requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(PY) -c "$$RENAMED"
	@pwd -P > $@

data: install  ## all corpora and weights into data/cache; what is there stays
	$(PY) -m ftlib data fetch

# Corpora and weights of the chosen notebooks come first; those that only others use do not.
notebooks: install  ## run the series (ONLY=03: that one, ONLY="03 03b": these), end with a table
	$(PY) $(NB)/run.py $(ONLY)

core: ONLY := 01 02 03 03b 04 05 05b
core: notebooks  ## run its first part, 01 to 05b

# JupyterLab writes the version of Python into a notebook that it opens; the hook keeps it as it is stored.
lab: data  ## JupyterLab on the notebooks
	$(PY) -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks \
	  --ContentsManager.pre_save_hook=$(subst /,.,$(NB)).cells.before_saving

# What the book is built with stands in a file of its own, so that only who builds or tests it installs it.
book: $(VENV)/.book  ## one static site of the series in build/book, from the notebooks as they are stored
	$(PY) $(NB)/book.py

$(VENV)/.book: $(VENV)/.installed $(NB)/book.lock
	$(PY) -m pip install --quiet --requirement $(NB)/book.lock --constraint requirements.lock
	@touch $@

refresh: install  ## run notebooks and solutions, write the results back into notebooks/
	$(PY) $(NB)/run.py --refresh --solutions $(ONLY)

test: lint gate unit nbval  ## everything CI runs

test-cpus: data  ## unit tests and notebooks as on CPUs with SSE, AVX2 and AVX-512: rounding must change no result
	$(PY) tests/benchmarks/pins.py --cpus --notebooks

lint: install  ## ruff on code and notebooks
	$(PY) -m ruff check .

gate: install  ## static checks of the notebooks
	$(PY) $(NB)/gate.py

# Two processes of one thread each get more done on two cores than one process of two threads.
unit nbval: export OMP_NUM_THREADS := 1
unit nbval: export HF_HUB_OFFLINE := 1
# Start-up files and history of the user would change what the notebooks do.
notebooks refresh nbval: export IPYTHONDIR := $(CURDIR)/build/ipython
unit: export MPLBACKEND := Agg

unit: $(VENV)/.book  ## unit tests and doctests; the book is built too
	$(PY) -m pytest -n 2 -q

nbval: data  ## every notebook and every solution, outputs compared where tagged (ONLY=03: that one)
	chosen=$$($(PY) $(NB)/run.py --list --solutions $(ONLY)) && $(PY) -m pytest -o addopts= -p $(subst /,.,$(NB)).nbval_strict -p no:cacheprovider -n 2 --dist loadfile \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout 1200 --nbval-kernel-startup-timeout 180 \
	  --durations 10 --durations-min 5 $$chosen

BENCH := fine_tuning strategies multitask task_growth half_precision speed memory language_model million_rows step_profile

# fine_tuning, strategies and multitask measure what is missing. Not in the list, as they take long: faults,
# long_features, pins, two_hosts. What needs a GPU is gpu-day.
# As readers run it: measuring wants a quiet machine anyway, and sleeping threads take long to wake.
AWAKE := env -u OMP_WAIT_POLICY $(PY)

bench: data  ## programs of tests/benchmarks, then the tables of their README (ONLY="speed memory": these)
	@for p in $(ONLY); do test -f tests/benchmarks/$$p.py || { echo "no program $$p; there are: $(BENCH)"; exit 1; }; done
	for p in $(or $(ONLY),$(BENCH)); do $(AWAKE) tests/benchmarks/$$p.py || exit 1; done
	$(PY) tests/benchmarks/report.py

gpu-day: data  ## everything that needs a GPU, in nine minutes, then the tables; without a GPU it says how
	test -d build/gpu-day || $(PY) tests/benchmarks/gpu_accuracy.py --pack
	$(AWAKE) tests/benchmarks/gpu_day.py || echo "a part did not come to its end, see tests/benchmarks/results/gpu-day-log.json"
	$(PY) tests/benchmarks/report.py

url: install  ## titles, contents, set-up cells anew; URL=https://github.com/NAME/ftlib into them and README too
	$(PY) $(NB)/url.py $(URL)

clean:  ## remove .venv and build; downloads stay
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
