# `make tune` and `make test` do all the set-up they need: a virtual environment in $(VENV), with uv where it is
# there, else with venv and pip. Name another Python 3.11+ with `make PYTHON=python3.13 ...`.
VENV ?= .venv
PYTHON ?= python3
OUT ?= out/tune
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BROWSER_READY := $(VENV)/.browser-ready
EXTRAS := all,test,bench

# A fast provider: 0.2 s a call, 80 calls a second; so about 16 calls at once are right.
DEMO := --seconds 1 --levels "2 4 8 16 32 64" --simulate latency_seconds=0.2 \
  --simulate requests_per_minute=4800 --simulate bucket_seconds=2

.PHONY: tune test browser test-browser acceptance coverage receivers mutants bench bench-tables bench-readme soak pace judge
.PHONY: notebooks docs lint clean
.DEFAULT_GOAL := tune

tune: $(READY)
	@rm -rf $(OUT)
	$(BIN)/llmq tune --out $(OUT) $(DEMO)

test: $(READY) receivers
	$(BIN)/python -m pytest -n 2 --dist loadfile -p no:benchmark -m "not alone and not acceptance and not notebooks"
	$(BIN)/python -m pytest -m "alone and not acceptance and not notebooks"

# JupyterLab and Chromium; once they are there, `make test` runs the browser's tests, too.
browser: $(BROWSER_READY)
	@sh tests/browser.sh

# Only those tests. The docs' screenshots: make test-browser LLMQ_SCREENSHOTS=docs/images
test-browser: browser
	$(BIN)/python -m pytest tests/test_browser.py

# Minutes of real time over HTTP, for a quiet machine: virtual equals real, what-if, and tune against llmock.
acceptance: $(READY)
	$(BIN)/python -m pytest -m acceptance

coverage: $(READY) receivers
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

# The Prometheus server that tests/test_receivers.py needs; says so where it cannot be had.
receivers:
	@sh tests/receivers.sh

mutants: $(READY)
	$(BIN)/python tests/mutants/run.py

# The suites, kept in out/bench/ by commit and compared with the run before. `bench-tables`: README, docs/measured.md.
bench: $(READY)
	$(BIN)/python benchmarks/run.py

bench-tables: $(READY)
	$(BIN)/python benchmarks/table.py
	$(BIN)/python benchmarks/telemetry_cost.py

bench-readme: $(READY)
	$(BIN)/python benchmarks/table.py --write
	$(BIN)/python benchmarks/telemetry_cost.py --write

soak: $(READY)
	$(BIN)/python benchmarks/soak.py

pace: $(READY)
	$(BIN)/python benchmarks/pace.py

judge: $(READY)
	$(BIN)/python benchmarks/judge.py

# Runs every notebook and writes its .ipynb, then 01 and 02 with half the limit; `make test` runs the cheap ones.
notebooks: $(READY)
	$(BIN)/python notebooks/execute.py
	$(BIN)/python -m pytest -m notebooks tests/test_notebook_limits.py

# The site, into out/docs/; it is not in $(READY), since nothing else needs what it needs.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file .mkdocs.yml
	@echo "Open out/docs/index.html, or with its search: python3 -m http.server --directory out/docs"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# This package with some extras, into $(VENV).
define install
if command -v uv >/dev/null 2>&1; then \
  uv pip install --quiet --python $(BIN)/python -e '.[$(1)]'; \
else \
  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(1)]'; \
fi
endef

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmq needs Python 3.11 or newer; name one: make PYTHON=python3.13")'
	@echo "Setting up $(VENV) ..."
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	fi
	@$(call install,$(EXTRAS))
	@touch $@

$(BROWSER_READY): $(READY)
	@echo "Installing JupyterLab and selenium into $(VENV) ..."
	@$(call install,browser)
	@touch $@

$(VENV)/.docs: $(READY)
	@$(call install,docs)
	@touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
