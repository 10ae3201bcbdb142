# Thin on purpose: the work is done by pip, snakemake, pytest and the command `koala`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PY := .venv/bin/python
KOALA := $(PY) -m koala_lab.cli
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1

# What is run here keeps its caches here where the home folder takes none.
ifneq ($(shell test -w "$$HOME" || echo no),)
export XDG_CACHE_HOME ?= $(CURDIR)/.snakemake/cache
export IPYTHONDIR ?= $(CURDIR)/.snakemake/ipython
export JUPYTER_RUNTIME_DIR ?= $(CURDIR)/.snakemake/jupyter
export JUPYTER_CONFIG_DIR ?= $(CURDIR)/.snakemake/jupyter
export JUPYTER_DATA_DIR ?= $(CURDIR)/.snakemake/jupyter
export MPLCONFIGDIR ?= $(CURDIR)/.snakemake/matplotlib
endif

BY_HAND = $(filter command environment,$(origin $(1)))
VERSION := $(if $(call BY_HAND,PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
UNFIT := $(shell test ! -e .venv || $(PY) -I .ci/environment.py '$(CURDIR)' $(STAMP) $(VERSION) 2>/dev/null || echo does not run)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce site test processors faults lab bench figures clean FORCE

help: ## print this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv; CPU only: make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

# A TORCH given by hand is installed again.
$(STAMP): pyproject.toml lab/pyproject.toml $(if $(call BY_HAND,TORCH)$(UNFIT),FORCE)
	$(if $(UNFIT),@echo ".venv $(UNFIT); it is made anew" && rm -rf .venv)
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv .venv || (rm -rf .venv; exit 1)
	$(PY) -m pip install $(foreach word,$(TORCH),'$(word)')
	$(PY) -m pip install -e . -e './lab[all]'
	touch $@

reproduce: setup ## execute all notebooks at the quick preset and build report/index.html
	$(PY) -m snakemake --workflow-profile profiles/local --cores $(JOBS) --quiet host reason

site: setup ## build report/index.html from what was executed, or from the committed notebooks where nothing was
	$(KOALA) report

test: setup ## lint, type check, unit tests, and every notebook against its stored outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n $(JOBS)
	$(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 -n $(JOBS) --dist loadscope notebooks

processors: setup ## the tests as processors with other instruction sets and numbers of cores run them; about 90 minutes
	tests/processors.sh

faults: setup ## kill, fill, cut and corrupt for half an hour, and prove that nothing is lost
	KOALA_RESULTS='$(CURDIR)/data/results' $(PY) -P -W ignore tests/faults.py --keep  # -P: tests/koala_lib is not the library

lab: setup ## open JupyterLab on the notebooks
	JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab

bench: setup ## time and memory of a step of each optimizer and of a training step, with the goals beside them
	KOALA_FIGURES='$(CURDIR)/figures' $(KOALA) bench --training-step

figures: setup ## refresh what is committed: notebook outputs, figures/, SCOREBOARD.md and the counts in README.md
	find notebooks -name '*.ipynb' -not -path '*/.*' -not -name '*.failed.ipynb' -print0 | KOALA_FIGURES='$(CURDIR)/figures' \
	  xargs -0 -n 1 -P $(JOBS) $(KOALA) notebook --in-place
	KOALA_FIGURES='$(CURDIR)/figures' $(KOALA) report --readme

clean: ## remove the report and all caches; keeps .venv, downloads and runs
	rm -rf report .snakemake .pytest_cache .hypothesis .mypy_cache .ruff_cache build *.egg-info
