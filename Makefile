# make train                  installs into .venv, then trains CONFIG (configs/digits.py unless given)
# make train ARGS="…"         passes flags on, such as ARGS="--config.num_steps=100 --no_report"
# make test, make test-slow   installs with the test extra, then runs lint and the quick tests, or the long tests
# make study                  repeats Li's comparison with the micro ViT (docs/reproducing.md), or resumes it
# make docs                   builds the pages of docs/ and the API reference into build/docs/site
# make … PYTHON=python3.12    uses another interpreter, with an environment of its own

PYTHON ?= python3
CONFIG ?= configs/digits.py
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

# A stem such as seed0/full is a seed and an argument of configs/two_classes.py.
MODES := full mlp attention lora head scratch scratch_adam resnet
ABLATIONS := $(addprefix full-,all cifar_mean_std schedule_100_epochs xavier_head dropout test_augment no_warmup exact_gelu \
	weight_decay no_clip)
SEEDS := seed0 seed1 seed2
stems = $(foreach arg,$(1),$(foreach seed,$(SEEDS),$(seed)/$(arg)))

.PHONY: study train test test-slow docs lint install clean

train: $(VENV)/installed
	$(if $(EPOCHS),$(error EPOCHS is not a setting: pass ARGS="--config.num_epochs=$(EPOCHS)"))
	$(BIN)/python train.py --config $(CONFIG) $(if $(WORKDIR),--workdir $(WORKDIR)) $(ARGS)

study: $(patsubst %,runs/study/%/report.html,$(call stems,$(MODES) $(ABLATIONS)))
	$(BIN)/python -m vit_jax.compare --join_seeds --curves runs/study/curves.png $(addprefix runs/study/,$(call stems,$(MODES)))
	$(BIN)/python -m vit_jax.compare --join_seeds --paired $(addprefix runs/study/,$(call stems,$(MODES) $(ABLATIONS)))

runs/study/%/report.html: runs/ViT-micro_4-eight.npz
	$(BIN)/python train.py --config configs/two_classes.py:$(notdir $*) --config.seed=$(patsubst seed%/,%,$(dir $*)) --workdir $(@D) $(ARGS)

runs/ViT-micro_4-eight.npz: | $(VENV)/installed
	$(BIN)/python train.py --config configs/cifar10_micro.py:eight $(ARGS)
	$(BIN)/python -m vit_jax.export --workdir runs/cifar10_micro-eight --format npz --out $@

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: docs $(VENV)/installed-test $(VENV)-aot/installed $(VENV)-interop/installed
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal --ignore tests/test_proofs.py --ignore tests/test_aot.py --ignore tests/pretrained/test_interop.py
	$(BIN)/python -m pytest -m slow tests/test_proofs.py  # measures time
	$(VENV)-aot/bin/python -m pytest -m slow -rs tests/test_aot.py
	$(VENV)-interop/bin/python -m pytest -m slow -rs tests/pretrained/test_interop.py tests/test_throughput.py

# The pages link to files beside docs/, so the site is built from a copy of all of them.
docs: $(VENV)-docs/installed
	rm -rf build/docs
	mkdir -p build/docs/pages
	tar -cf - *.md LICENSE benchmarks docs notebooks vit_jax/assets | tar -xf - -C build/docs/pages
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet --config-file docs/mkdocs.yml
	@echo "docs: build/docs/site/index.html"

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python %d.%d is too old; expected 3.11 or later: make … PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): JAX and its dependencies, one to three minutes …"
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@

# JAX's CUDA plugin has an environment of its own: without a GPU it warns at every start.
$(VENV)-aot/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-aot
	@$(VENV)-aot/bin/python -m pip install -qq --upgrade pip
	@$(VENV)-aot/bin/python -m pip install -qq --editable '.[aot,test]'
	@touch $@

# So have Hugging Face's transformers: torch is large. It is pinned because other releases install CUDA's libraries.
$(VENV)-interop/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-interop
	@$(VENV)-interop/bin/python -m pip install -qq --upgrade pip
	@$(VENV)-interop/bin/python -m pip install -qq torch==2.13.0
	@$(VENV)-interop/bin/python -m pip install -qq --editable '.[interop,test]'
	@touch $@

$(VENV)-docs/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-docs
	@$(VENV)-docs/bin/python -m pip install -qq --upgrade pip
	@$(VENV)-docs/bin/python -m pip install -qq --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .mypy_cache
