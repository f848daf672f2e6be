# make demo   everything from a fresh clone: environment, demo data, training on this machine's CPU, report
# make test   environment and the whole test suite
# make lint   ruff, mypy, import rules
# make clean  remove what these made, but for runs/ and data/
#
# PYTHON=/path/to/python3.12 make demo   uses that Python (3.11 or newer) for the environment
# pip takes its own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf): nothing here names a server.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo demo-data test lint clean environment environment-dev
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n 2 -q

# $(call stage,TITLE,COMMAND): a line before, the seconds after.
define stage
@echo "== $(1)"; begin=$$SECONDS; { $(2); }; echo "== done in $$((SECONDS - begin)) s"
endef

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# ---- environment

$(BIN)/python:
	@found=""; tried=""; \
	for candidate in $${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do \
		version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
		tried="$$tried $$candidate ($$version)"; \
		if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "make: error: mmssl needs Python 3.11 or newer with the venv module; found:$${tried:- none}." >&2; \
		echo "Install one (Debian and Ubuntu: python3-venv too), or name one: PYTHON=/path/to/python make ..." >&2; \
		exit 2; \
	fi; \
	echo "== environment: $(VENV) with $$($$found --version)"; \
	rm -rf $(VENV); "$$found" -m venv $(VENV)

# Without --no-compile pip compiles everything there is, which takes longer than unpacking it.
# A stamp says that an install is done; it is done again when a requirement changes.  pip is only asked for what is
# not there, so this works without a network once everything is.
environment: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python tools/installed.py > /dev/null 2>&1 || $(MAKE) install REQUIREMENT="." WHAT="torch, lightning, timm and the rest"
	@touch $@

environment-dev: $(VENV)/.installed-dev
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python tools/installed.py dev > /dev/null 2>&1 || $(MAKE) install REQUIREMENT=".[dev]" WHAT="torch, lightning, timm, the test tools and the rest"
	@touch $@ $(VENV)/.installed

# Of what pip says the large downloads and the installing are shown, so that minutes are not silent.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile -c constraints.txt
SHOW := awk '/(Downloading|Using cached).*[0-9][0-9.]* [MG]B\)/ || /^Installing/ { print "   " substr($$0, 1, 100); fflush() }'

.PHONY: install
install:
	$(call stage,environment: installing $(WHAT) (3 GB to download, 6 GB on disk; 2 to 10 minutes),\
		$(PIP) -qq setuptools && $(PIP) --no-build-isolation -e "$(REQUIREMENT)" | $(SHOW))

# ---- demo

demo: environment
	@begin=$$SECONDS; \
	$(MAKE) demo-data && $(MAKE) demo-train && $(MAKE) demo-report && \
	echo "== the whole demo took $$((SECONDS - begin)) s (without the environment)"

demo-data: environment
	$(call stage,demo 1/3: data into data/demo (about a minute the first time),\
		$(BIN)/python tools/make_demo_data.py --out data/demo --if-missing)

# An earlier demo is somebody's result: it is moved aside, not overwritten.
.PHONY: demo-train demo-report
demo-train: environment
	@if [ -e runs/demo ]; then \
		n=1; while [ -e "runs/demo-$$n" ]; do n=$$((n + 1)); done; \
		mv runs/demo "runs/demo-$$n"; echo "== the demo run that was there is now runs/demo-$$n"; \
	fi
	$(call stage,demo 2/3: training configs/demo/mmm.yaml into runs/demo (about 4 minutes on 2 cores),\
		$(BIN)/mmssl fit --config configs/demo/mmm.yaml --run runs/demo)

demo-report: environment
	$(call stage,demo 3/3: report,$(BIN)/mmssl report runs/demo)

# ---- tests

test: environment-dev
	$(call stage,tests (a few minutes),OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS))

lint: environment-dev
	$(call stage,ruff check,$(BIN)/ruff check .)
	$(call stage,ruff format,$(BIN)/ruff format --check .)
	$(call stage,mypy,$(BIN)/mypy)
	$(call stage,import rules,$(BIN)/lint-imports)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
