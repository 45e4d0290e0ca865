# Seven targets. All but install expect an active virtualenv; `make install` makes one in .venv.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: install check test docs bench package clean

install:  ## virtualenv in .venv, the package and everything for development, with the CPU build of torch
	python3 -m venv .venv
	.venv/bin/pip install "torch<2.14" --index-url $(TORCH_INDEX) || true  # else the build of PyPI
	.venv/bin/pip install -e ".[dev]"

check:  ## static checks
	ruff check .
	ruff format --check .
	mypy

test:  ## all tests that need no public data
	pytest

docs:  ## generated pages, and the site in build/site
	python docs/generate.py
	mkdocs build --strict

bench:  ## passes through the expert layer, a minute
	python benchmarks/layers.py --threads 1 --rounds 3 --experts 1,4,8 --peers 4 --passes forward

package:  ## wheel and source distribution in dist/
	pip wheel --no-deps --wheel-dir dist .

clean:  ## what the other targets wrote
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
