# make          build libmfa into build/release
# make demo     what it does, in a few minutes: speed and memory beside PyTorch, and a small GPT trained with it
# make test     every test there is; ends with "N passed, N failed". SUITES="checks release" runs only these
# make test-metal   the Metal kernels alone: executed, checked and linted without a GPU
# make bench    the whole benchmark, into build/bench.json. BENCH=--quick takes under two minutes
# make clean    remove what was built; make distclean removes the virtual environment too
#
# Each sets up what it needs: system packages (installed when root on Debian, else named), and pinned Python
# packages in build/venv. PIP_OPTIONS goes to pip, e.g. an --extra-index-url with PyTorch's CPU-only wheels.

PYTHON ?= python3
PIP_OPTIONS ?=
SUITES ?=
BENCH ?=

venv := build/venv
bin := $(CURDIR)/$(venv)/bin
suffix := $(if $(filter Darwin,$(shell uname -s)),dylib,so)
in_tree := PYTHONPATH="$(CURDIR)/python" MFA_LIBRARY="$(CURDIR)/build/release/libmfa.$(suffix)"

.PHONY: build demo test test-metal bench clean distclean

build: $(venv)/.build
	@PATH="$(bin):$$PATH" cmake -S . -B build/release -G Ninja -DMFA_BENCH=ON
	@PATH="$(bin):$$PATH" cmake --build build/release

demo: build $(venv)/.demo
	@$(in_tree) "$(bin)/python" bench/demo.py

bench: build $(venv)/.demo
	@$(in_tree) "$(bin)/python" bench/versus_torch.py --json build/bench.json $(BENCH)

test: build/.packages-test $(venv)/.test
	@PATH="$(bin):$$PATH" python tests/run.py $(SUITES)

test-metal:
	@$(MAKE) --no-print-directory test SUITES="metal-simulator metal-kernels metal-mutants metal-lint metal-coverage"

clean:
	find build -mindepth 1 -maxdepth 1 ! -name venv -exec rm -rf {} +

distclean:
	rm -rf build

build/.packages-%: tools/packages.sh
	@mkdir -p build
	@PYTHON="$(PYTHON)" tools/packages.sh $*
	@touch $@

$(venv)/bin/python: | build/.packages-build
	@echo "Making a virtual environment in $(venv)"
	@$(PYTHON) -m venv $(venv)

# demo.txt includes build.txt, test.txt includes demo.txt.
$(venv)/.build: requirements/build.txt
$(venv)/.demo: requirements/build.txt requirements/demo.txt
$(venv)/.test: requirements/build.txt requirements/demo.txt requirements/test.txt
$(venv)/.build $(venv)/.demo $(venv)/.test: | $(venv)/bin/python
	@echo "Installing requirements/$(subst .,,$(notdir $@)).txt into $(venv)"
	@"$(bin)/python" -m pip install --disable-pip-version-check $(PIP_OPTIONS) -r requirements/$(subst .,,$(notdir $@)).txt
	@touch $@
