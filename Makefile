# Needs make and Python 3.11 or newer. The first run creates .venv; later runs start at once.
PYTHON ?= python3
# Used only where the default package index has no CPU build of torch.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
INSTALLED := .venv/installed
INSTALL := $(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

unexport PYTHONPATH PYTHONHOME
.NOTPARALLEL:
.PHONY: test slow demo lint format pytest wheel fuzz suites test-vllm clean

test: lint pytest wheel

demo: $(INSTALLED)
	$(BIN)/python -m sparse_compile demo
	$(BIN)/python -W ignore -m bench.lab.demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict sparse_compile tests $(if $(wildcard bench/*.py),bench)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each worker gets one thread: two workers fill two cores, and threads that wait for each other spin.
pytest: $(INSTALLED)
	$(PYTEST) -m 'not slow' --durations 10

# Benchmarks at small sizes, a million tokens, and what else takes long.
slow: $(INSTALLED)
	$(PYTEST) -m slow --durations 10

# Builds the wheel from the sdist and tests it in a virtual environment outside the checkout, which borrows only dependencies
# from .venv.
wheel: $(INSTALLED)
	tests/wheel/run

# Random uses of the library against a dense oracle, for a night. Batches of cases follow from SEED, so another SEED plays others.
COUNT ?= 10000
SEED ?= 0
PROCESSES ?= 2
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m fuzz --count $(COUNT) --seed $(SEED) --processes $(PROCESSES)

# The tests of transformers over compiled models. TESTS is a checkout of transformers; without it, git fetches one.
TESTS ?=
FAMILIES ?= gpt2 phi3 gpt_neox mixtral qwen2 qwen2_vl llava gemma3
suites: $(INSTALLED)
	PYTHONPATH=.:tests $(BIN)/python -m suites $(if $(TESTS),--tests $(TESTS)) $(FAMILIES)

# The plug-in inside vLLM on a CPU, which pins other versions than .venv has. VLLM_VERSIONS="0.32.0" runs one of the two.
test-vllm:
	PYTHON=$(PYTHON) TORCH_CPU_INDEX=$(TORCH_CPU_INDEX) tests/vllm_plugin/served/run

clean:
	rm -rf .venv .venv-vllm-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch is installed first, because a package that depends on it would install the CUDA build.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; \
	  sys.exit(sys.version_info < (3, 11) and "sparse_compile needs Python 3.11 or newer, got %s: make PYTHON=..." % v)'
	@echo "Installing into .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(INSTALL) torch setuptools || $(INSTALL) --extra-index-url $(TORCH_CPU_INDEX) torch setuptools
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@
