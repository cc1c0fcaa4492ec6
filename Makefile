# `make help` lists the targets. PYTHON runs everything; give another to use an environment of your
# own: make test PYTHON=python
PYTHON ?= .venv/bin/python
SYSTEM_PYTHON ?= python3
INSTALL = .venv/bin/python -m pip install --disable-pip-version-check -q

export OMP_NUM_THREADS ?= 1

ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT = .venv/installed
endif

.PHONY: help .venv demo format check docs test test-all test-cluster reproduce-smoke gallery bench clean

.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z.-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 18

.venv: .venv/installed  ## an environment with the exact versions of constraints.txt and all extras

# torch by its exact version before whatever depends on it, so that nothing pulls in another build
# of it. fairscale and deepspeed are source packages: without build isolation they see that torch,
# and DeepSpeed compiles nothing.
.venv/installed: setup.py constraints.txt
	$(SYSTEM_PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt torch==2.13.0 numpy
	$(INSTALL) -c constraints.txt setuptools wheel ninja packaging
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation -c constraints.txt -e '.[all]'
	touch $@

# From the text of this machine's Python standard library to a trained, evaluated, generating model:
# data, training on two processes with the value table split between them, a resume on the way,
# evaluation with pictures, a sample.
TORCHRUN = $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node 2 -m --
demo: $(ENVIRONMENT) data/quickstart  ## data, training on two processes, a resume, evaluation, a sample
	$(TORCHRUN) memshard train quickstart train.steps=100
	$(TORCHRUN) memshard train quickstart
	$(PYTHON) -m memshard eval runs/quickstart --pictures runs/quickstart/pictures
	$(PYTHON) -m memshard generate runs/quickstart --prompt "def read(self, size=None):" --max-tokens 90 --temperature 0.7

data/quickstart: | $(ENVIRONMENT)
	$(PYTHON) -m memshard data build "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
		--suffix .py --vocab 4096 --out $@

format: $(ENVIRONMENT)  ## format the code, mend what ruff can mend
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

check: $(ENVIRONMENT)  ## format, lint, types, rules of the repository
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy memshard
	$(PYTHON) -m pytest -q tests/test_house.py

docs: $(ENVIRONMENT)  ## the documentation as a site in build/site; dead links fail
	$(PYTHON) -m mkdocs build

test: $(ENVIRONMENT)  ## fast tests
	$(PYTHON) -m pytest -q -n 2 -m "not slow and not cluster"

test-all: $(ENVIRONMENT)  ## all tests
	$(PYTHON) -m pytest -q -n 2

# Part of test-all.
reproduce-smoke: $(ENVIRONMENT)  ## every experiment of the papers at its smallest size
	$(PYTHON) -m pytest -q tests/experiments/test_reproduce_smoke.py

gallery: $(ENVIRONMENT)  ## docs/gallery.md from the result files
	$(PYTHON) -m memshard.experiments.common.gallery docs

# .ci/run installs what they need.
test-cluster: $(ENVIRONMENT)  ## real SLURM, sshd and network namespaces on this machine
	$(PYTHON) -m pytest -q -m cluster

# Those that need no data; docs/benchmarks.md has the commands of the others.
bench: $(ENVIRONMENT)  ## benchmarks that need no data
	$(PYTHON) -m memshard bench product-topk
	OMP_NUM_THREADS=2 $(PYTHON) -m memshard bench values --threads 2 --rounds 3

clean:  ## remove caches and build outputs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find memshard tests -name __pycache__ -type d -prune -exec rm -rf {} +
