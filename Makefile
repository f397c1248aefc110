# make demo [ENGINE=fsdp|zero|ddp]   real images to shards, to a trained GC ViT, to its exact accuracy
# make test                          everything that is not slow; make test-slow for the rest
# make test-gpu                      every test that can run on a GPU, on this machine's GPU
# make test-slurm                    launch/ on a real SLURM of three nodes on this machine; as root, with SLURM installed
# make install                       the virtual environment in .venv; the other targets do it where needed
# make clean                         remove what the demo, the tests and the linters wrote; .venv stays

SHELL := /bin/bash
MAKEFLAGS += --no-builtin-rules
.NOTPARALLEL:
.PHONY: install lint test test-unit test-parity test-integration test-slow test-gpu test-slurm demo clean

BIN := .venv/bin
# One thread per process: two processes share the cores of a small machine, and sums keep their order.
export OMP_NUM_THREADS := 1

# ---- environment ----------------------------------------------------------------------------------------------

# The Python that makes .venv; by default the first of these that is new enough and has venv.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
INSTALLED := .venv/installed

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --constraint constraints.txt --editable '.[all]'
	touch $@

$(BIN)/pip:
	@for python in $(PYTHONS); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	        echo "$$python -m venv .venv"; \
	        exec $$python -m venv .venv; \
	    fi; \
	done; \
	echo "error: no Python >= 3.11 with venv: got none of $(PYTHONS); hint: install one (Debian, Ubuntu:" \
	    "apt-get install python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
	exit 2

# ---- checks ---------------------------------------------------------------------------------------------------

# The tests start more processes than a workstation has GPUs: they hide them, test-gpu apart.
PYTEST := CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest
# Two processes at a time; the tests of a file share what is set up for them. By default pytest-xdist begins with the
# files of most tests, which are short ones: tests/conftest.py has the order.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources .ci/run $(wildcard launch/*.sh launch/*.sbatch) \
	    tests/integration/slurm/cluster.sh

test: test-unit test-parity test-integration

test-unit: $(INSTALLED)
	$(PYTEST) tests/unit -m 'not slow' $(TWO)

test-parity: $(INSTALLED)
	$(PYTEST) tests/parity -m 'not slow' $(TWO)

test-integration: $(INSTALLED)
	$(PYTEST) tests/integration -m 'not slow' --ignore tests/integration/slurm $(TWO) --durations 15

# pytest exits with 5 where it selects no test; no slow test is no failure.
test-slow: $(INSTALLED)
	$(PYTEST) tests -m slow --timeout 1800 $(TWO) --durations 15 || test $$? -eq 5

# In one process: the tests measure the GPU's memory and time. GPU_TESTS_ON_CPU=1 runs them without a GPU.
test-gpu: $(INSTALLED)
	@test '$(GPU_TESTS_ON_CPU)' = 1 || $(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { \
	    echo "error: no GPU: PyTorch sees none; hint: run this on a machine with one, or set GPU_TESTS_ON_CPU=1" >&2; \
	    exit 2; \
	}
	$(BIN)/python -m pytest tests -m 'gpu and not slow' --ignore tests/integration/slurm --durations 15

# They start daemons and take all cores: no part of `make test`. Without SLURM or root they are skipped, and say so.
test-slurm: $(INSTALLED)
	$(PYTEST) tests/integration/slurm --timeout 600 --durations 10

# ---- demo -----------------------------------------------------------------------------------------------------

ENGINE ?= fsdp
DEMO_ENGINES := ddp fsdp zero
ifneq (1 $(ENGINE),$(words $(ENGINE)) $(filter $(DEMO_ENGINES),$(ENGINE)))
    $(error unknown engine: got ENGINE=$(ENGINE); expected: $(DEMO_ENGINES))
endif
DEMO_RUN := runs/demo-$(ENGINE)
DIGITS := data/digits
# On the CPU, as the tests: two processes need no two GPUs.
# The evaluation's line of JSON must be the last line of output: its log goes to stderr.
TORCHRUN := CUDA_VISIBLE_DEVICES= $(BIN)/torchrun --standalone --nproc-per-node 2

# The demo starts afresh: without the rm, train.py would find its run finished and have nothing to do.
demo: $(INSTALLED) $(DIGITS)/train/manifest.json
	rm -rf $(DEMO_RUN)
	$(TORCHRUN) train.py --config configs/digits_demo.yaml \
	    tag=demo-$(ENGINE) engine=$(ENGINE) $(if $(filter zero,$(ENGINE)),zero.stage=2)
	$(TORCHRUN) evaluate.py $(DEMO_RUN) --data_dir $(DIGITS)

$(DIGITS)/train/manifest.json: | $(INSTALLED)
	$(BIN)/python -m data_prep.digits $(DIGITS)/raw
	$(BIN)/python -m data_prep.shard $(DIGITS)/raw $(DIGITS)

# Only what these targets wrote: never runs/ or data/ as a whole, where people keep theirs.
clean:
	rm -rf $(DIGITS) $(foreach engine,$(DEMO_ENGINES),runs/demo-$(engine))
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
