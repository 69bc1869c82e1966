# make check: what to run while you work, in a minute. make test: all. make laws: the laws on random cases, by night.
# make demo, make test: from nothing but Python >= 3.11, pip and make. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
SOURCES := peftfn kernels tests benchmarks docs/conf.py docs/site docs/examples docs/recipes

.DELETE_ON_ERROR:
.PHONY: demo check test laws fuzz zoo matrix extras bench soak reproductions figures docs lint

# Waiting threads sleep instead of spinning: 5 % slower alone, 2 to 4 times faster where others share the cores.
demo check test laws fuzz zoo matrix: export OMP_WAIT_POLICY = PASSIVE

demo: $(VENV)/ready
	$(BIN)/peftfn demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2

check: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 $(CHECKED) -k "not test_law or $(subst $(space), or ,$(addprefix [,$(METHODS)))"

CHECKED := tests/testing/test_laws.py tests/core tests/test_docs.py tests/test_rooms.py
METHODS := LoRA DoRA IA3 OFT VeRA
space := $(subst ,, )

# Random cases, EXAMPLES for each law and method, and all laws for all cases of a method.
laws: export PEFTFN_EXAMPLES = $(EXAMPLES)
laws: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 tests/testing/test_laws.py

EXAMPLES := 20

# Broken and hostile files, tests/fuzz.py: the mutations of these seeds. It goes on after a failure, and fails at the end.
fuzz: $(VENV)/ready
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

FUZZ := 0 100000

# Every architecture that builds, tests/zoo: make zoo ZOO="llama bert", or ZOO=--write to list what fails today.
zoo: $(VENV)/ready
	PYTHONPATH=tests $(BIN)/python -m zoo --workers 2 $(ZOO)

# PEFT's own tests, from its source distribution, tests/matrix: make matrix MATRIX="'MLP 1' --only tables --details".
matrix: $(VENV)/ready
	mkdir -p build/peft
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest build/peft peft==$(PEFT)
	tar -xzf build/peft/peft-$(PEFT).tar.gz -C build/peft
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/peft/more parameterized==0.9.0
	PYTHONPATH=tests:build/peft/more $(BIN)/python -m matrix build/peft/peft-$(PEFT) $(MATRIX)

PEFT := 0.21.2

# The wheel with each extra alone, in an environment that has nothing else, tests/extras.py: make extras EXTRAS="serve hf".
extras: $(VENV)/ready
	PYTHONPATH=tests $(BIN)/python -m extras $(EXTRAS)

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

# `peftfn serve` under load for ten minutes, every answer compared: make soak SOAK="--clients 1 --minutes 1 --out one.json".
soak: $(VENV)/ready
	$(BIN)/python -m benchmarks.soak $(SOAK)

# Claims of papers, tried at a small scale: docs/reproductions.md. make reproductions CLAIMS="lora_plus --quick" runs one.
reproductions: $(VENV)/ready
	$(BIN)/python -m benchmarks.reproductions $(CLAIMS)

# All of docs/comparison.md and docs/reproductions.md anew: 78 minutes on two cores. FIGURES=--quick runs it in brief.
figures: $(VENV)/ready
	$(BIN)/python -m benchmarks.figures $(FIGURES)

# The site, in docs/build/index.html. A warning is an error.
docs: $(VENV)/ready
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs docs/build

lint: $(VENV)/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy peftfn kernels

# Stamps, oldest first: each is made anew when what it was made from has changed.
$(VENV)/created:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"peftfn needs Python >= 3.11, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/torch: requirements/torch.txt | $(VENV)/created
	$(PIP) -r $<
	touch $@

$(VENV)/packages: requirements/main.txt requirements/constraints.txt requirements/nodeps.txt $(VENV)/torch
	$(PIP) -r requirements/torch.txt -r requirements/main.txt -c requirements/constraints.txt
	$(PIP) --no-deps -r requirements/nodeps.txt
	touch $@

$(VENV)/ready: pyproject.toml $(VENV)/packages
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@
