.PHONY: test lint types unit chaos test-deepspeed test-xla test-oldest test-zoo test-packages demo bench study study-quick fuzz docs dist clean
.DEFAULT_GOAL := test

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
WORKERS ?= 2

test: lint types unit ## everything that a change must pass

# uv resolves in a second what takes pip a minute, unpacks in parallel, and links in a second environment the files that the
# first one has. It has settings of its own; of pip's, be they in the environment or in a file, it is told two.
UV := .venv-uv/bin/uv
export UV_HTTP_TIMEOUT ?= 180
pip_setting = $(shell $(PYTHON) -m pip config get $(1) 2>/dev/null)
INDEX := $(or $(PIP_INDEX_URL),$(call pip_setting,global.index-url))
LINKS := $(or $(PIP_FIND_LINKS),$(call pip_setting,global.find-links))
ifdef INDEX
export UV_DEFAULT_INDEX ?= $(INDEX)
endif
ifdef LINKS
export UV_FIND_LINKS ?= $(LINKS)
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

# XLA's client for the CPU, which runs what a TPU would; it wants the torch of its own version.
.venv-xla/ready: pyproject.toml constraints.txt $(UV)
	$(venv)
	grep -vE '^(torch|torchvision)==' constraints.txt > .venv-xla/constraints.txt
	$(install) .venv-xla/constraints.txt torch==2.9.1 torch_xla==2.9.0 numpy pytest -e .
	touch $@

test-xla: .venv-xla/ready ## XLA, compiled and run on the CPU
	.venv-xla/bin/pytest -q tests/test_xla.py

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

# Packages that train with Lightning. Those of the second environment need torchvision, and run on a newer torch.
PACKAGES := pytorch-forecasting==1.8.0 darts==0.48.1 neuralforecast==3.3.0 ray[train]==2.60.0 scvi-tools==1.4.2 \
	chemprop==2.3.1 optuna==5.0.0
VISION_PACKAGES := lightly==1.6.0 anomalib==2.7.0 torchgeo==0.8.1

.venv-packages/ready: Makefile pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-packages
	grep -E '^(lightning|pytorch-lightning|torch|torchmetrics)==' constraints.txt > .venv-packages/constraints.txt
	.venv-packages/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-packages/constraints.txt torch
	.venv-packages/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-packages/constraints.txt \
		-e . pytest tensorboard optuna-integration==5.0.0 $(PACKAGES)
	touch $@

.venv-packages-vision/ready: Makefile pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-packages-vision
	grep -E '^(lightning|pytorch-lightning|torchmetrics)==' constraints.txt > .venv-packages-vision/constraints.txt
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' >> .venv-packages-vision/constraints.txt
	.venv-packages-vision/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-packages-vision/constraints.txt torch torchvision
	.venv-packages-vision/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-packages-vision/constraints.txt -e . pytest tensorboard requests $(VISION_PACKAGES)
	touch $@

test-packages: .venv-packages/ready .venv-packages-vision/ready ## the callback in packages that train with Lightning
	.venv-packages/bin/pytest -q tests/packages
	.venv-packages-vision/bin/pytest -q tests/packages

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

MINUTES ?= 55
chaos: $(READY) ## runs that are killed, disks that fill up and the like, until the minutes are over; SEED=7 begins with that one
	$(BIN)/python tests/chaos/long.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

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
