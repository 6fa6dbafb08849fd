# make compile: environment, with an NVIDIA GPU the fused kernels, and the embedded model in fp16
# make test:    environment, then the tests
# make lint:    ruff over the Python, clang-format over the kernels
# PYTHON=...    the interpreter of a new .venv; by default the first below that answers
# GPU=1, GPU=   with a GPU or without one, whatever nvidia-smi says

# A version manager's shim can be on PATH and only print an error, so each candidate must answer.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3.10 python3; do \
            $$p --version >/dev/null 2>&1 && echo $$p && break; done)
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU' | grep -v '^0')

VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports: all that is installed would take two minutes more.
PIP := PIP_NO_COMPILE=1 $(BIN)/python -m pip --quiet --disable-pip-version-check
ARTIFACT := artifacts/demo-fp16

# One stamp for each combination of extras, which its name lists.  Without a GPU all is from PyPI,
# and TensorRT-RTX, where it has wheels, builds real plans in the tests.
COMPILE_STAMP := $(VENV)/installed$(if $(GPU),-tensorrt)
TEST_STAMP := $(VENV)/installed-test$(if $(GPU),-tensorrt,-rtx)
# What the library of kernels is built of: newer sources build it and the artifact anew.
KERNELS := $(if $(GPU),$(shell find kernels clip_ttrt -name '*.cu' -o -name '*.cpp' -o -name '*.h' \
             2>/dev/null))

.PHONY: compile test lint clean

compile: $(ARTIFACT)/manifest.json

# What was compiled in another environment may not load in this one: a new stamp compiles anew.
# Without the fused kernels TensorRT's own serve: what goes wrong with them is said and no failure.
$(ARTIFACT)/manifest.json: $(COMPILE_STAMP) $(KERNELS)
	-@$(if $(GPU),$(BIN)/python -m clip_ttrt.build_kernels --if-possible)
	$(BIN)/python -m clip_ttrt.compile --precision fp16 --output $(ARTIFACT) --force

# Two files of tests at a time, each on one core; where a GPU is, all would share it.
test: $(TEST_STAMP)
	$(if $(GPU),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest $(if $(GPU),,-n 2 --dist loadfile --no-loadscope-reorder)

lint: $(VENV)/installed-lint
	$(BIN)/ruff check
	$(BIN)/clang-format --dry-run --Werror $$(find kernels tests/kernels examples \
	    -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "make: no Python answers; install Python 3.10 to 3.13," \
	    "or pass PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/pip
	$(PIP) install -e .
	@touch $@

$(VENV)/installed-lint: pyproject.toml | $(BIN)/pip
	$(PIP) install ruff==0.17.* clang-format==21.*
	@touch $@

# The two Torch-TensorRT wheels hold the same files: the other one goes before one comes.
$(VENV)/installed-test-rtx: pyproject.toml | $(BIN)/pip
	@rm -f $(VENV)/installed*-tensorrt
	@$(PIP) --quiet uninstall --yes torch-tensorrt
	$(PIP) install -e '.[test,rtx]'
	@touch $@

# TensorRT's wheels are fetched from NVIDIA's index while they install.  Where that fails all else
# is installed and gets its stamp; this one stays away, and the next `make` tries again.
$(VENV)/installed-tensorrt: EXTRAS := [tensorrt]
$(VENV)/installed-test-tensorrt: EXTRAS := [test,tensorrt]
$(VENV)/installed-test-tensorrt: OTHERS := [test]
$(VENV)/installed-tensorrt $(VENV)/installed-test-tensorrt: pyproject.toml | $(BIN)/pip
	@rm -f $(VENV)/installed*-rtx
	@$(PIP) --quiet uninstall --yes torch-tensorrt-rtx
	@echo "$(PIP) install -e '.$(EXTRAS)'"
	@if $(PIP) install -e '.$(EXTRAS)' >$(VENV)/tensorrt.log 2>&1; then touch $@; else \
	    echo "make: TensorRT could not be installed (why: $(VENV)/tensorrt.log), so TorchScript" \
	        "serves on the GPU until another make finds it" >&2; \
	    $(PIP) install -e '.$(OTHERS)' && touch $(@:-tensorrt=); fi

clean:
	rm -rf $(VENV) artifacts
