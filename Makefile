# Every target works on a fresh machine with Python (3.10 or newer, with venv). The C++ kernels need a C++ compiler.
PYTHON ?= python3
PIP_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
READY := .venv/ready
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
TYPES := build/types/pg_kernels
# What `make test-transformers` runs on: the oldest supported version, the newest, and two between them.
VERSIONS ?= 5.17.0 5.20.0 5.23.0 5.24.0
# Each test worker uses one thread, so that workers share the cores.
THREADS := OMP_NUM_THREADS=1

# The folder of a benchmark run: its JSON, tables and plots.
ifndef OUT
OUT := .benchmarks/$(shell date +%Y-%m-%d-%H%M%S)
endif
# glibc raises these limits up to these values as a process runs. Fix them: otherwise whether a tensor's memory is new or reused, which
# can be most of a small op's time, depends on what ran before.
MALLOC := env MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=67108864
SUITE = -m pytest -q benchmarks/suite -p no:xdist --benchmark-quiet --benchmark-json=$(OUT)/run.json
REPORT = -m benchmarks report $(OUT)
ifeq ($(filter bench-compare,$(MAKECMDGOALS))$(BASE),bench-compare)
$(error bench-compare: say which earlier run to compare with, BASE=folder)
endif

.PHONY: demo test test-kernels test-transformers fuzz sanitize bench bench-full bench-compare gpu types lint format clean

# README's picture is made by `.venv/bin/pg-kernels demo --draw docs/demo.png`.
demo: $(INSTALLED)  ## answer a shipped picture for each task, and draw a sheet with the answers
	$(BIN)/pg-kernels demo --draw demo.png

test: lint  ## all tests that run on this machine
	$(THREADS) $(BIN)/pytest -q -n 2 --durations=10 -p no:benchmark

test-kernels: $(READY)  ## compile every kernel for every GPU again, and rewrite the manifest that `make test` checks
	rm -f benchmarks/kernels.csv
	$(BIN)/python -m benchmarks manifest benchmarks/kernels.csv

# A failure on one version does not stop the others.
test-transformers: $(VERSIONS:%=.venv/transformers-%)  ## the integrations' tests on several transformers: VERSIONS="5.17.0 5.24.0"
	@for version in $(VERSIONS); do \
	  echo "transformers $$version"; \
	  $(THREADS) .venv/transformers-$$version/bin/python -m pytest -q -n 2 -p no:benchmark tests/integrations || failed="$$failed $$version"; \
	done; \
	test -z "$$failed" || { echo "make test-transformers: failed on$$failed"; exit 1; }

fuzz: $(READY)  ## 10,000 random calls of the ops, 2,000 damaged files, 30 runs stopped by signals: `make test` does a minute of it
	$(THREADS) $(BIN)/python tests/fuzz/ops.py --count 10000
	$(THREADS) $(BIN)/python tests/fuzz/files.py --count 2000
	$(THREADS) $(BIN)/python tests/fuzz/kills.py

sanitize: $(READY)  ## the C++ extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer; `make test` runs it too
	$(BIN)/python tests/ops/sanitize.py

bench: $(READY)  ## the quick cases of the benchmark suite, in a few minutes, into $(OUT)
	mkdir -p $(OUT)
	$(MALLOC) $(BIN)/python $(SUITE); status=$$?; $(BIN)/python $(REPORT) && exit $$status

bench-full: .venv/peers  ## all cases, beside all other packages
	mkdir -p $(OUT)
	$(MALLOC) $(BIN)/python $(SUITE) --full; status=$$?; $(BIN)/python $(REPORT) && exit $$status

bench-compare: bench  ## BASE=folder of an earlier run: what became slower since? Fails when something did
	$(BIN)/python -m benchmarks compare $(BASE) $(OUT)

# Uses $(PYTHON)'s own environment, where the package is installed: a machine with a GPU has its own torch.
gpu:  ## CUDA tests, the suite and whole models on a GPU within 8 minutes, into $(OUT)
	@$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: torch finds no CUDA GPU')"
	mkdir -p $(OUT)
	timeout 180 $(PYTHON) -m pytest -q tests -m cuda -p no:benchmark -p no:xdist > $(OUT)/tests.log 2>&1; tests=$$?; \
	  tail -n 15 $(OUT)/tests.log; \
	  $(PYTHON) $(SUITE) --on cuda --full --deadline 240; suite=$$?; \
	  $(PYTHON) $(REPORT) && exit $$((tests + suite))

# mypy does not read setup.py's package_dir. It checks links that lay the packages out as they are installed.
types:
	rm -rf $(TYPES) && mkdir -p $(TYPES)
	ln -s $(addprefix ../../../,$(wildcard pg_kernels/*) model benchmarks) $(TYPES)

lint: $(READY) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf .venv build *.egg-info pg_kernels/_C*.so demo.png

# torch is installed first and alone: if the index has a CPU build of the pinned version, nothing may replace it later.
.venv/peers: $(READY) constraints.txt
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e '.[peers]'
	touch $@

# One version of transformers with its dependencies. Everything else, torch included, comes from .venv.
.venv/transformers-%: $(READY) constraints.txt
	$(BIN)/python -m venv $@
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" > "$$($@/bin/python -c "$$site")/shared.pth"
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $@/constraints.txt
	$@/bin/python -m pip install -q $(PIP_ARGS) -c $@/constraints.txt transformers==$*
	touch $@

# The package alone, which is all that `make demo` needs.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	@$(PYTHON) -c "import venv, ensurepip" || { echo "make: $(PYTHON) lacks venv; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(PIP_ARGS) $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e .
	touch $@

$(READY): $(INSTALLED)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e '.[test]'
	touch $@
