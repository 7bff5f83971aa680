# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test lint install develop clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Built anew when a source changed; a wheel, as a user gets it.
INSTALLED := $(VENV)/.installed
$(INSTALLED): $(BIN)/python constraints.txt pyproject.toml CMakeLists.txt \
              $(shell find csrc cmake python -type f -not -name '*.so' -not -name '*.pyc')
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ".[cli,test,bench]"
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall .
	touch $@

install: $(INSTALLED)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo

# Editable, rebuilt at import when a source changed; so the build's own requirements stay installed.
develop: $(BIN)/python
	$(BIN)/python -m pip install scikit-build-core pybind11 cmake ninja
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation \
	    -Ceditable.rebuild=true -e ".[cli,test,bench]"

clean:
	rm -rf build $(VENV)
