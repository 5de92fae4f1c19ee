# Two commands to start with: make demo, make test. Each sets up a virtual environment from nothing.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
LAYOUT := $(VENV)/layout
INSTALLED := $(VENV)/installed

# Of make bench and make bench-gpu.
ARGS ?=
OUT ?=
SECTIONS ?=
BUDGET ?= 540

.PHONY: help demo test test-full lint bench bench-gpu install clean FORCE

help:
	@echo "make demo       ask the tiny model about a photograph; compare and time the implementations"
	@echo "make test       the tests, minutes"
	@echo "make test-full  the long tests"
	@echo "make lint       ruff and mypy"
	@echo "make bench      benchmarks under pytest-benchmark; ARGS is passed on"
	@echo "make bench-gpu  on a bare GPU machine: tests, sanitizers, benchmarks, tuning, profiles; OUT=folder [SECTIONS=...] [BUDGET=540]"

demo: $(INSTALLED)
	$(BIN)/infimm-fast demo examples/images/raccoon.jpg

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-full: $(INSTALLED)
	$(PYTEST) -m slow --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/wheel .
	cd build/wheel && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p infimm_fast

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks $(ARGS)

# WORKERS and TESTS reach the script through the environment, if they are given.
bench-gpu:
	PYTHON=$(PYTHON) tools/bench_gpu.sh "$(OUT)" "$(BUDGET)" $(SECTIONS)

install: $(INSTALLED)

clean:
	rm -rf $(VENV) build demo_output bench_output *.egg-info

# A new folder below kernels/, export/ or benchmarks/ becomes importable only by installing again.
$(LAYOUT): FORCE
	@mkdir -p $(VENV)
	@ls -d kernels/*/ export/*/ infimm_fast/*/ benchmarks/*/__init__.py > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(INSTALLED): pyproject.toml setup.py constraints.txt $(LAYOUT)
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "infimm_fast needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev,gpu,bench,onnx,tensorrt-rtx]"
	@touch $@

FORCE:
