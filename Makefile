# `make demo` runs the main job, `make test` the tests; each sets itself up in a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CLIENTS ?= .venv-clients

HUB ?= .venv-hub
AUDIT ?= .venv-audit

.PHONY: audit bundle demo reproducible test lint unit soak hub screenshots clean

$(BIN)/towpath: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

# The real Globus clients live apart, so that their dependencies and ours never mix.
$(CLIENTS)/bin/globus:
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check globus-cli

demo: $(BIN)/towpath
	$(BIN)/towpath demo

# A self-contained bundle of the agent for this platform, in dist/. See docs/releases.md.
bundle: $(BIN)/towpath
	$(BIN)/python installers/build_bundle.py $(if $(ROOT),--root $(ROOT))

# Build everything twice and compare (minutes).
reproducible: $(BIN)/towpath
	$(BIN)/python -m pytest -m soak --timeout 3600 tests/installers/test_reproducible.py

# What is known against the libraries; says so, and fails, when nobody can be asked.
$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'

audit: $(BIN)/towpath $(AUDIT)/bin/pip-audit
	$(BIN)/python installers/audit.py $(AUDIT)/bin/pip-audit $(BILL)

lint: $(BIN)/towpath
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin agent protocol

# What real clients were called with is kept in a file, against which the table of docs/globus-cli.md is checked last.
CALLED = GLOBUS_CLI=$(CURDIR)/$(CLIENTS)/bin/globus TOWPATH_CALLS=$(CURDIR)/build/calls
# The files go to the workers in the order of tests/conftest.py.
test: lint $(CLIENTS)/bin/globus
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not soak and not clients'
	mkdir -p build && rm -f build/calls
	$(CALLED) $(BIN)/python -m pytest -n 2 --dist loadfile -m 'clients and not soak' tests/clients
	$(CALLED) $(BIN)/python -m pytest -m clients tests/clients/test_globus_cli_verdicts.py

unit: $(BIN)/towpath
	$(BIN)/python -m pytest -m 'not soak and not clients' tests/protocol tests/agent tests/relay

soak: $(BIN)/towpath
	$(BIN)/python -m pytest -m soak --timeout 3600

# A real JupyterHub; its proxy comes from the npm registry. The browser: tests/install.sh.
$(HUB)/bin/jupyterhub:
	$(PYTHON) -m venv $(HUB)
	$(HUB)/bin/python -m pip install --quiet --disable-pip-version-check jupyterhub oauthenticator globus-sdk
	npm install --silent --prefix $(HUB) configurable-http-proxy

hub: $(BIN)/towpath $(HUB)/bin/jupyterhub
	JUPYTERHUB=$(CURDIR)/$(HUB)/bin/jupyterhub \
	JUPYTERHUB_PROXY=$(CURDIR)/$(HUB)/node_modules/.bin/configurable-http-proxy \
	$(BIN)/python -m pytest -m soak --timeout 900 tests/clients/test_jupyterhub.py

# Look at every page in a real browser and keep the pictures. The browser: tests/install.sh.
SCREENSHOTS ?= build/screenshots
screenshots: $(BIN)/towpath
	TOWPATH_SCREENSHOTS=$(CURDIR)/$(SCREENSHOTS) $(BIN)/python -m pytest -m soak tests/clients/test_pages_seen.py

clean:
	rm -rf $(VENV) $(CLIENTS) $(HUB) $(AUDIT) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
