# make          build libmfa into build/release
# make demo     what it does, in a few minutes: speed and memory beside PyTorch, a small GPT trained with it, and an
#               encoder of torch.nn made faster by one line
# make test     every test there is; ends with "N passed, N failed". SUITES="checks release" runs only these
# make test-metal   of these, the Metal kernels: executed, checked and linted without a GPU
# make wheels   the wheels for macOS and for Linux, all of them on Linux, into dist/
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

.PHONY: build demo wheels test test-metal bench clean distclean

build: $(venv)/.build
	@PATH="$(bin):$$PATH" cmake -S . -B build/release -G Ninja -DMFA_BENCH=ON
	@PATH="$(bin):$$PATH" cmake --build build/release

demo: build $(venv)/.demo
	@$(in_tree) "$(bin)/python" bench/demo.py

bench: build $(venv)/.demo
	@$(in_tree) "$(bin)/python" bench/versus_torch.py --json build/bench.json $(BENCH)

wheels: build/.packages-wheels $(venv)/.wheels
	@PATH="$(bin):$$PATH" python tools/wheels.py

test: build/.packages-test $(venv)/.test
	@PATH="$(bin):$$PATH" python tests/run.py $(SUITES)

test-metal:
	@$(MAKE) --no-print-directory test SUITES="metal-simulator metal-kernels metal-mutants metal-lint metal-coverage metal-host metal-python metal-cuda"

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

# demo.txt and wheels.txt include build.txt, test.txt includes both.
$(venv)/.build: requirements/build.txt
$(venv)/.demo: requirements/build.txt requirements/demo.txt
$(venv)/.wheels: requirements/build.txt requirements/wheels.txt
$(venv)/.test: $(addprefix requirements/,build.txt demo.txt wheels.txt test.txt)
$(venv)/.build $(venv)/.demo $(venv)/.wheels $(venv)/.test: | $(venv)/bin/python
	@echo "Installing requirements/$(subst .,,$(notdir $@)).txt into $(venv)"
	@"$(bin)/python" -m pip install --disable-pip-version-check $(PIP_OPTIONS) -r requirements/$(subst .,,$(notdir $@)).txt
	@touch $@
