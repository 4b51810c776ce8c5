# make demo   installs what running needs into .venv and makes a video with the bundled model
# make test   installs the development requirements as well, then lint, types and tests
# make lint   the first two of these
# Both set up once; a second call goes straight to work. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/wan_tiny_4step.yml
# More key=value words for the demo: make demo ARGS='seed=3'
ARGS ?=
PYTEST_ARGS ?=

.PHONY: demo test lint clean

# Without a platform named, libtpu, which the tests bring along, would look for a TPU and say that there is none.
demo: $(VENV)/.runtime
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python generate_wan.py $(CONFIG) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/.runtime: requirements.txt | $(BIN)/python
	@echo 'installing what running needs (1.2 GB, about a minute)'
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.development: requirements-dev.txt requirements-official.txt $(VENV)/.runtime
	@echo 'installing what the tests need'
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-official.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
