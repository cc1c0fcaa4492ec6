# PYTHON runs everything; give another to use an environment of your own: make test PYTHON=python
PYTHON ?= .venv/bin/python
SYSTEM_PYTHON ?= python3
INSTALL = .venv/bin/python -m pip install --disable-pip-version-check -q

export OMP_NUM_THREADS ?= 1

ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT = .venv/installed
endif

.PHONY: .venv demo check test test-all test-cluster reproduce-smoke gallery bench clean

.venv: .venv/installed

# torch by its exact version before whatever depends on it, so that nothing pulls in another build of it.
# fairscale and deepspeed are source packages: without build isolation they see that torch, and DeepSpeed compiles nothing.
.venv/installed: setup.py constraints.txt
	$(SYSTEM_PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt torch==2.13.0 numpy
	$(INSTALL) -c constraints.txt setuptools wheel ninja packaging
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation -c constraints.txt -e '.[all]'
	touch $@

# From the text of this machine's Python standard library to a trained, evaluated, generating model: data, training on two
# processes with the value table split between them, a resume on the way, evaluation with pictures, a sample.
TORCHRUN = $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node 2 -m --
demo: $(ENVIRONMENT) data/quickstart
	$(TORCHRUN) memshard train quickstart train.steps=100
	$(TORCHRUN) memshard train quickstart
	$(PYTHON) -m memshard eval runs/quickstart --pictures runs/quickstart/pictures
	$(PYTHON) -m memshard generate runs/quickstart --prompt "def read(self, size=None):" --max-tokens 90 --temperature 0.7

data/quickstart: | $(ENVIRONMENT)
	$(PYTHON) -m memshard data build "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
		--suffix .py --vocab 4096 --out $@

check: $(ENVIRONMENT)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy memshard
	$(PYTHON) -m pytest -q tests/test_house.py

test: $(ENVIRONMENT)
	$(PYTHON) -m pytest -q -n 2 -m "not slow and not cluster"

test-all: $(ENVIRONMENT)
	$(PYTHON) -m pytest -q -n 2

# Every experiment of the papers at its smallest size; part of test-all.
reproduce-smoke: $(ENVIRONMENT)
	$(PYTHON) -m pytest -q tests/experiments/test_reproduce_smoke.py

gallery: $(ENVIRONMENT)
	$(PYTHON) -m memshard.experiments.common.gallery docs

# A real SLURM, sshd and network namespaces on this machine; .ci/run installs what they need.
test-cluster: $(ENVIRONMENT)
	$(PYTHON) -m pytest -q -m cluster

# Those that need no data; docs/benchmarks.md has the commands of the others.
bench: $(ENVIRONMENT)
	$(PYTHON) -m memshard.bench.product_topk
	OMP_NUM_THREADS=2 $(PYTHON) -m memshard bench values --threads 2 --rounds 3

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find memshard tests -name __pycache__ -type d -prune -exec rm -rf {} +
