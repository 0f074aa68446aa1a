# The two commands: `make demo` runs the main job on sample data, `make test` runs the tests. Both set everything up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow lint docs speed clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## train and compare the image backbones on two sets of real images; open runs/demo/report.html
	$(BIN)/formarium demo --out runs/demo --overwrite

test: setup  ## everything but the tests marked slow
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/mkdocs build --strict --quiet

speed: setup  ## forward and training step of the image backbones, beside timm and transformers where they have them
	$(BIN)/python -m pip install --quiet -c constraints.txt transformers
	$(BIN)/python -m pip install --quiet --no-deps timm
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
