# Two commands: `make demo` and `make test`. Both set up what they need in .venv, once.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
SLURM  ?= /tmp/ssl-dist-slurm
JOBS   ?= 2

.PHONY: demo test test-faults bench learn lint readme slurm-up slurm-down clean

demo: $(READY)
	@$(BIN)/ssl-dist demo

test: $(READY) lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-faults: $(READY)
	@$(BIN)/python -m pytest -m faults

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(READY)
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/data.py --views dino
	@$(BIN)/python benchmarks/stream.py
	@$(BIN)/python benchmarks/shard.py
	@$(BIN)/python benchmarks/train.py
	@$(BIN)/python benchmarks/safety.py
	@$(BIN)/python benchmarks/readme.py

learn: $(READY)
	@$(BIN)/python benchmarks/learn.py
	@$(BIN)/python benchmarks/readme.py

readme: $(READY)
	@$(BIN)/python benchmarks/readme.py

slurm-up: $(READY)
	@$(BIN)/python tests/slurm/cluster.py up $(SLURM)

slurm-down:
	@$(PYTHON) tests/slurm/cluster.py down $(SLURM)

clean:
	rm -rf demo dist build

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ssl_dist needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@echo "installing into $(VENV): about 7 GB, a few minutes"
	@DS_BUILD_OPS=0 $(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	@touch $@
