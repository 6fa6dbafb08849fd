# make compile: environment, package, the fused kernels where a GPU can use them, `python -m clip_ttrt.compile --precision fp16`
# make test:    environment if it is missing, then the tests
# PYTHON=...    the interpreter to use; by default the first that answers

# A version manager's shim can be on PATH and only print an error, so each candidate must answer.
PYTHON ?= $(shell for p in python3.10 python3.11 python3.12 python3; do $$p --version >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
ARTIFACT := artifacts/demo-fp16

.PHONY: compile test clean

compile: $(ARTIFACT)/manifest.json

# Without the fused kernels TensorRT's own serve: what goes wrong with them is said and no failure.
$(ARTIFACT)/manifest.json: | $(VENV)/installed
	-@$(BIN)/python -m clip_ttrt.build_kernels --if-possible
	$(BIN)/python -m clip_ttrt.compile --precision fp16 --output $(ARTIFACT)

test: $(VENV)/installed
	$(BIN)/python -m pytest

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python answers; install Python 3.10, 3.11 or 3.12, or pass PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) artifacts
