# Two commands do all: `make demo` and `make test`. Both set up first; so does `make bench`.
.PHONY: setup demo test bench screenshots audit lint clean
SHELL := /bin/bash
ACTIVATE := source setup.bash

setup:
	@scripts/setup.sh

demo: setup
	@$(ACTIVATE) && exec genforce demo $(ARGS)

test: setup lint
	@$(ACTIVATE) && scripts/test.sh $(ARGS)

lint: setup
	@$(ACTIVATE) && ruff check . && ruff format --check . && python -m mypy

bench: setup
	@$(ACTIVATE) && python bench/run.py $(if $(ONLY),--only $(ONLY)) $(ARGS)

screenshots: setup
	@$(ACTIVATE) && python docs/make_screenshots.py runs/demo $(ARGS)

# Known vulnerabilities of what is pinned; fails on what it could not ask about as well.
audit: setup
	@$(ACTIVATE) && python -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit==2.10.1 \
	    && .venv/audit/bin/pip-audit --strict --no-deps --disable-pip \
	        -r requirements/base.txt -r requirements/dev.txt

clean:
	rm -rf .venv ros2_ws/build ros2_ws/install ros2_ws/log
