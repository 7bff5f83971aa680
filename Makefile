# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# What `make native` and `make sanitize` build, and from what.
NATIVE := build/native

.PHONY: demo test lint install develop clean native sanitize counts emulator

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Built anew when a source changed; a wheel, as a user gets it.
INSTALLED := $(VENV)/.installed
$(INSTALLED): $(BIN)/python constraints.txt pyproject.toml CMakeLists.txt \
              $(shell find csrc cmake python -type f -not -name '*.so' -not -name '*.pyc')
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	wheel=$$(echo build/wheel/*.whl) && \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$$wheel[cli,test,bench]" && \
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall "$$wheel"
	touch $@

install: $(INSTALLED)

# The CUDA kernels on the processor, for the tests; where nothing but a compiler is at hand.
EMULATOR := build/emulator/.built
$(EMULATOR): $(INSTALLED) $(shell find csrc cmake -type f)
	$(BIN)/python -m pip install --quiet pybind11 cmake ninja
	$(BIN)/cmake -S . -B build/emulator -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCMAKE_BUILD_TYPE=Release -DRNNFAST_EMULATOR=ON -DRNNFAST_CUDA=OFF \
	    -DSKBUILD_PROJECT_VERSION=0 -DSKBUILD_PROJECT_VERSION_FULL=0 \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	    -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/emulator --target _emulated --parallel $(WORKERS)
	touch $@

emulator: $(EMULATOR)

test: $(INSTALLED) $(EMULATOR)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The core without Python: kernels against plain loops, and that no object holds code that the linker
# could merge into another instruction set's.
native: $(BIN)/ninja
	$(call native_test,plain)

# The same programs with AddressSanitizer and UndefinedBehaviorSanitizer, and with ThreadSanitizer.
sanitize: $(BIN)/ninja
	$(call native_test,address,-DRNNFAST_SANITIZE='address;undefined')
	$(call native_test,thread,-DRNNFAST_SANITIZE=thread)

# Instructions of five small cases, against those kept in benchmarks/counts.json.
counts: native
	$(BIN)/python -m benchmarks.counts

$(BIN)/ninja: $(BIN)/python
	$(BIN)/python -m pip install --quiet cmake ninja

define native_test
	$(BIN)/cmake -S tests/native -B $(NATIVE)/$(1) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja $(2)
	$(BIN)/cmake --build $(NATIVE)/$(1) --parallel $(WORKERS)
	$(BIN)/ctest --test-dir $(NATIVE)/$(1) --output-on-failure
endef

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo

# Editable, rebuilt at import when a source changed; so the build's own requirements stay installed.
develop: $(BIN)/python
	$(BIN)/python -m pip install scikit-build-core pybind11 cmake ninja
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation \
	    -Ceditable.rebuild=true -e ".[cli,test,bench]"

clean:
	rm -rf build $(VENV)
