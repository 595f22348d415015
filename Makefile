# The two commands for a new machine: `make demo` and `make test`. Both install what is missing.

VENV := .venv
BIN := $(VENV)/bin
# Empty: pytest says what it finds. For instance: make test PYTEST_ARGS="-k record -x"
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
BENCH_ARGS ?=

# Where `make install-docs` puts manual pages and completion: PREFIX=/usr for a package, with DESTDIR.
PREFIX ?= /usr/local
SHARE = $(DESTDIR)$(PREFIX)/share

.PHONY: help setup demo test lint format bench man install-docs lock clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   install system packages, make $(VENV), install backyfs in it"
	@echo "make demo    a tour: back up a disk image twice, mount the backups, get a file back"
	@echo "make test    lint, types and the whole test suite"
	@echo "make lint    ruff and mypy alone"
	@echo "make format  let ruff format the code"
	@echo "make bench   measure against plain tools and other backup programs"
	@echo "make man     manual pages, in man/"
	@echo "make install-docs   manual pages and shell completion, to PREFIX=$(PREFIX)"
	@echo "make lock    pin the dependencies anew (needs uv)"
	@echo "make clean   remove what these made"

setup:
	@contrib/setup.sh run

demo:
	@contrib/setup.sh run demo
	@contrib/demo.sh

test:
	@contrib/setup.sh run demo test
	@$(MAKE) --no-print-directory lint-only
	$(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

lint:
	@contrib/setup.sh run test
	@$(MAKE) --no-print-directory lint-only

.PHONY: lint-only
lint-only:
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format:
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

bench:
	@contrib/setup.sh run test bench
	$(BIN)/python -m bench $(BENCH_ARGS)

man:
	@contrib/setup.sh run
	$(BIN)/python contrib/manpages.py man

install-docs:
	@[ -x $(BIN)/backyfs ] || contrib/setup.sh run
	$(BIN)/python contrib/manpages.py man
	install -d $(SHARE)/man/man1 $(SHARE)/man/man5 $(SHARE)/bash-completion/completions \
		$(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	install -m 644 man/*.1 $(SHARE)/man/man1
	install -m 644 man/*.5 $(SHARE)/man/man5
	$(BIN)/backyfs completion bash >$(SHARE)/bash-completion/completions/backyfs
	$(BIN)/backyfs completion zsh >$(SHARE)/zsh/site-functions/_backyfs
	$(BIN)/backyfs completion fish >$(SHARE)/fish/vendor_completions.d/backyfs.fish

# Pins for Python 3.11 and newer, with hashes and without naming a registry.
COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header
lock:
	$(COMPILE) --group build -o requirements-build.txt
	$(COMPILE) pyproject.toml -o requirements.txt
	$(COMPILE) pyproject.toml --group dev -c requirements.txt -o requirements-dev.txt

clean:
	rm -rf $(VENV) build dist man *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find backyfs tests bench contrib -name __pycache__ -type d -prune -exec rm -rf {} +
