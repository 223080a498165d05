# make demo   generate a small ILSVRC2012-shaped set, index it, train on it, test it      make demo DATA=folder   the same on real archives
# make test   the tests                                                                     make lint               flake8 and mypy
# make bench   every tier against other people's loaders (INDEX=, PACKED=)                  make bench-parallel     one process against towers, data, weird
# make bench-gpu   all about the GPU at hand, in ten minutes (without one: a try at toy sizes)
# make docs   the documentation, into build/docs
# make clean   everything made here
# All of them first install what is missing into $(VENV); a stamp file makes that step instant until setup.cfg or constraints.txt change.

VENV  ?= .venv
# The first interpreter that really runs, is 3.11 or 3.12 and can make an environment: a name on the PATH may be a shim without a Python behind it.
# Looked for once, and only when it is needed.
PYTHON ?= $(eval PYTHON := $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 \
	&& { command -v $$p; break; }; done))$(PYTHON)
BIN   := $(VENV)/bin
STAMP := $(VENV)/installed-$(or $(CUDA),12)

DATA   ?=
RECIPE ?=
OUT    ?= $(if $(DATA),demo-data,demo)
INDEX  ?=
PACKED ?=

.PHONY: install demo test lint bench bench-parallel bench-gpu docs clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv found; install one, or say PYTHON=/path/to/python" >&2; exit 2; }
	@echo "installing into $(VENV) (the first time takes minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,demo,plots$(if $(filter 13,$(CUDA)),$(comma)cuda13)]'
ifeq ($(CUDA),13)
	# Both flavours own nvidia/dali: take the CUDA 12 one away, then lay the files they share anew.
	$(BIN)/python -m pip uninstall --yes --quiet nvidia-dali-cuda120
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --force-reinstall --no-deps -c constraints.txt nvidia-dali-cuda130
endif
	@rm -f $(VENV)/installed-* && touch $@

demo: $(STAMP)
	$(BIN)/python -m tools.demo --out $(OUT) $(if $(DATA),--data '$(DATA)') $(if $(RECIPE),--recipe '$(RECIPE)')

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m flake8 pipeline model train tools tests
	$(BIN)/python -m mypy

docs: $(STAMP)
	$(BIN)/python -m tools.docs.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m tools.bench $(INDEX) --out docs/results/bench $(if $(PACKED),--packed '$(PACKED)') $(ARGS)

bench-parallel: $(STAMP)
	$(BIN)/python -m tools.bench.step --ways one,towers,data,weird,towers-x-data --train.batch=64 --machine.device=cpu --machine.torch_threads=1 $(ARGS)

bench-gpu: $(STAMP)
	mkdir -p build/gpu
	$(BIN)/python tools/gpu_report.py --json build/gpu/report.json --page build/gpu/report.html $(if $(INDEX),--index '$(INDEX)') $(ARGS)

clean:
	test ! -e demo/GENERATED || rm -rf demo
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

comma := ,
