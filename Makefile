# `make isoflop` and `make test` are all a newcomer needs; each sets up .venv first.

PYTHON ?= python3
STUDY ?= quick
# A named interpreter has an environment of its own.
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
WORKERS ?= 0
# Huge pages cost nothing and save a quarter of a step on Linux.
RUN = GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(VENV)/bin/python
WORKDIR = runs/isoflop_cpu$(if $(filter quick,$(STUDY)),,_$(STUDY))
CONFIG = configs/isoflop_cpu.py:$(STUDY)

.PHONY: help setup isoflop test test-slow lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/installed  ## .venv with everything that the two commands need

# Debian's python3 may lack venv; virtualenv from the package index does the same.
$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
	  echo "no python3-venv here: using virtualenv"; \
	  $(PYTHON) -m pip install --quiet --target $(VENV)-bootstrap virtualenv && \
	  PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv --quiet $(VENV) && \
	  rm -rf $(VENV)-bootstrap; }

$(VENV)/installed: setup.py constraints.txt $(VENV)/bin/python
	@echo "installing into $(VENV) (a minute or two)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' $(if $(filter true 1,$(CI)),-c constraints.txt)
	@touch $@

isoflop: setup  ## real text in, fitted exponents out (STUDY=quick|smoke|full)
	@$(RUN) -m lm.data --config=$(CONFIG)
	@$(RUN) -m lm.sweep --config=$(CONFIG) --workdir=$(WORKDIR) --backend=processes --workers=$(WORKERS)
	@$(RUN) -m lm.fit --runs=$(WORKDIR) --out=$(WORKDIR)

test: setup  ## the tests, without the slow ones
	@$(RUN) -m pytest -m "not slow" -n 2

test-slow: setup  ## the slow tests
	@$(RUN) -m pytest -m slow -n 2

lint: setup  ## ruff
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

clean:  ## removes the environments and what `make isoflop` wrote
	rm -rf .venv .venv-* runs/isoflop_cpu runs/isoflop_cpu_*
