# Two commands are all you need: `make demo` and `make test`. Each sets up what it needs in .venv.
#
# PYTHON chooses the interpreter for a new .venv (3.11 or later); VENV places it elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help demo test check bench docs build clean

help:
	@echo "make demo    index Python's standard library with two workers, and check every row"
	@echo "make test    run the test suite, on a PostgreSQL of its own"
	@echo "make check   lint, format, types, layers; each benchmark once, as small as can be"
	@echo "make bench   measure the drain; ARGS='depth' or ARGS='--workload chain5' for something else"
	@echo "make docs    build the site of the documents, in build/docs"
	@echo "make build   build the source distribution and a wheel"
	@echo "make clean   remove what these have made, $(VENV) included"

demo: $(VENV)/ready-for-demo
	VENV=$(VENV) ci/demo

test: $(VENV)/ready
	VENV=$(VENV) ci/test

check: $(VENV)/ready
	VENV=$(VENV) ci/check

bench: $(VENV)/ready
	VENV=$(VENV) ci/bench $(ARGS)

docs: $(VENV)/ready
	VENV=$(VENV) ci/docs

build: $(VENV)/ready
	VENV=$(VENV) ci/build

# Everything that a change of these files makes stale: the packages and the compiled extension.
SOURCES := pyproject.toml setup.py pgtask/_fastpath.pyx $(wildcard pgtask/_fastpath/*.pyx) ci/setup

# The demo needs few packages; all else needs those of the developers too, and what serves them serves the demo.
$(VENV)/ready-for-demo: $(SOURCES)
	PYTHON=$(PYTHON) VENV=$(VENV) ci/setup embedded
	touch $@

$(VENV)/ready: $(SOURCES)
	PYTHON=$(PYTHON) VENV=$(VENV) ci/setup dev
	touch $(VENV)/ready-for-demo $@

clean:
	rm -rf $(VENV) build dist *.egg-info pgtask/_fastpath.c pgtask/_fastpath.*.so
	find pgtask tests -name __pycache__ -prune -exec rm -rf {} +
