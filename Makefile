.PHONY: test lint types unit test-deepspeed demo bench fuzz clean
.DEFAULT_GOAL := test

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

test: lint types unit ## everything that a change must pass

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest -q

# DeepSpeed has an environment of its own: it builds against the torch that is there, and nobody else needs it.
.venv-deepspeed/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-deepspeed
	.venv-deepspeed/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		torch numpy pytest setuptools wheel
	DS_BUILD_OPS=0 .venv-deepspeed/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e ".[deepspeed]"
	touch $@

test-deepspeed: .venv-deepspeed/ready ## ZeRO 1, 2 and 3 on two CPU processes
	.venv-deepspeed/bin/pytest -q tests/test_deepspeed.py

demo: $(READY) ## train the example three times and draw what clipping did
	$(BIN)/python examples/char_lm.py

bench: $(READY) ## what clipping adds to a step, beside Lightning and two packages that are installed for it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/peers \
		autoclip==0.2.1 smartclip==0.1.1
	PYTHONPATH=build/peers $(BIN)/python examples/benchmarks/overhead.py

fuzz: $(READY) ## 100,000 random histories against numpy
	$(BIN)/python tests/fuzz_percentile.py

clean:
	rm -rf .venv .venv-deepspeed build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
