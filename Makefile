.PHONY: test lint types unit test-deepspeed test-oldest test-zoo demo bench study study-quick fuzz docs dist clean
.DEFAULT_GOAL := test

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
WORKERS ?= 2

test: lint types unit ## everything that a change must pass

# uv resolves in a second what takes pip a minute, unpacks in parallel, and links in a second environment the files that the
# first one has. It has settings of its own; what pip is told by these two it is told too.
UV := .venv-uv/bin/uv
export UV_HTTP_TIMEOUT ?= 180
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
venv = $(UV) venv --quiet --seed --allow-existing --python $(PYTHON) $(@D)
install = $(UV) pip install --quiet --python $(@D)/bin/python -c

$(UV): constraints.txt
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	touch $@

$(READY): pyproject.toml constraints.txt $(UV)
	$(venv)
	$(install) constraints.txt -e ".[dev]"
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest -q -n $(WORKERS)

# DeepSpeed has an environment of its own: it builds against the torch that is there, and nobody else needs it.
.venv-deepspeed/ready: pyproject.toml constraints.txt $(UV)
	$(venv)
	$(install) constraints.txt torch numpy pytest setuptools wheel
	DS_BUILD_OPS=0 $(install) constraints.txt --no-build-isolation -e ".[deepspeed]"
	touch $@

test-deepspeed: .venv-deepspeed/ready ## ZeRO 1, 2 and 3 on two CPU processes
	.venv-deepspeed/bin/pytest -q tests/test_deepspeed.py

# The oldest Lightning and torchmetrics that pyproject.toml allows, on the same torch. They ask for older helpers.
.venv-oldest/ready: pyproject.toml constraints.txt $(UV)
	$(venv)
	grep -vE '^(fsspec|lightning|packaging|pytorch-lightning|torchmetrics)==' constraints.txt > .venv-oldest/constraints.txt
	$(install) .venv-oldest/constraints.txt -e ".[dev]" lightning==2.5.0 pytorch-lightning==2.5.0 torchmetrics==1.4.0
	touch $@

test-oldest: .venv-oldest/ready ## the oldest versions of Lightning and torchmetrics that are supported
	.venv-oldest/bin/pytest -q -n $(WORKERS)

.venv-zoo/ready: pyproject.toml constraints.txt $(UV)
	$(venv)
	$(install) constraints.txt torch torchvision transformers timm -e .
	touch $@

test-zoo: .venv-zoo/ready ## models of transformers and timm, built from configs
	.venv-zoo/bin/python examples/model_zoo.py

demo: $(READY) ## train the example three times and draw what clipping did
	$(BIN)/python examples/char_lm.py

bench: $(READY) ## what clipping adds to a step, beside Lightning and two packages that are installed for it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/peers \
		autoclip==0.2.1 smartclip==0.1.1
	PYTHONPATH=build/peers $(BIN)/python examples/benchmarks/overhead.py

study: $(READY) ## one percentile against a sweep of thresholds; an hour or more, goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python examples/study/study.py --docs docs

study-quick: $(READY) ## the same in two minutes, on five tasks
	OMP_NUM_THREADS=1 $(BIN)/python examples/study/study.py --quick

fuzz: $(READY) ## 100,000 random histories against numpy
	$(BIN)/python tests/fuzz_percentile.py

# The site has an environment of its own, without torch: the package is read, not imported.
.venv-docs/ready: constraints.txt $(UV)
	$(venv)
	$(install) constraints.txt mkdocs-material "mkdocstrings[python]" ruff
	touch $@

docs: .venv-docs/ready ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

dist: $(READY) ## a wheel and an sdist, tried in an environment of their own
	rm -rf dist build/lib build/smoke
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build
	$(BIN)/python -m build
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/smoke/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/smoke && bin/python ../../tests/smoke.py

clean:
	rm -rf .venv .venv-* build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
