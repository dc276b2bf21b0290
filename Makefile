# make run    a fresh machine to a streamed continuation of a prompt: environment, model, compile for this CPU, run
# make test   lint, type check, tests (quick once the environment is there)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# mypy knows nothing of setup.py's package_dir: it is shown the packages under the names they are installed by.
TYPES := build/types
MODEL ?= smollm2-135m
PROMPT ?= Photosynthesis is the process by which

export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test tests lint bench clean

# `llmc run` on a model fetches it, compiles it for this CPU and keeps the artifact in the cache: a second run starts at once.
run: $(STAMP)
	$(BIN)/llmc run $(MODEL) --raw --max-tokens 64 "$(PROMPT)"

# mypy runs on one core: the tests begin beside it.
test: $(STAMP)
	$(MAKE) --no-print-directory -j2 lint tests

# A worker that is done takes tests from another: neighbours stay together, and share what they compiled.
tests: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES) && mkdir -p $(TYPES)/llmc
	ln -s $(addprefix $(CURDIR)/,$(wildcard llmc/*) passes schedules targets) $(TYPES)/llmc
	cd $(TYPES) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p llmc

bench: $(STAMP)
	$(BIN)/llmc bench $(MODEL)

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmc needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
