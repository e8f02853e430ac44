# make          build libmfa into build/release
# make demo     what it does, in a few minutes: speed and memory beside PyTorch, a small GPT trained with it, and an
#               encoder of torch.nn made faster by one line
# make test     what a change must pass; ends with "N passed, N failed, N skipped". STEPS="checks release" runs only
#               these; tests/run.py --list names them
# make test-full    the same with every case also under sanitizers, emulators and metalsim, and more random problems
# make test-metal   of make test, the Metal kernels: executed, checked and linted without a GPU
# make metal-cost   what the Metal kernels cost on an Apple GPU by a model, into the table of docs/metal-kernels.md
# make wheels   the wheels for macOS and for Linux, all of them on Linux, into dist/
# make bench    all that is measured, in about ten minutes: beside PyTorch, beside other libraries, ours beside ours. Tables
#               on the terminal, rows and pictures in build/
# make bench-readme   the same, and then writes README.md's table and picture, and docs/measure.md's tables
# make bench-quick    some rows beside PyTorch, on the terminal
# make docs     the documentation, into build/docs
# make lint     formatting, spelling, types, names and so on, of all files; it corrects what it can (.pre-commit-config.yaml)
# make clean    remove what was built; make distclean removes the virtual environment too
#
# Each sets up what it needs: system packages (installed when root on Debian, else named), and pinned Python
# packages in build/venv. PIP_OPTIONS goes to pip, e.g. an --extra-index-url with PyTorch's CPU-only wheels.

PYTHON ?= python3
PIP_OPTIONS ?=
STEPS ?=

venv := build/venv
bin := $(CURDIR)/$(venv)/bin
suffix := $(if $(filter Darwin,$(shell uname -s)),dylib,so)
bench_venv := build/venv-bench
bench_python := "$(CURDIR)/$(bench_venv)/bin/python"
bench_rows := $(addprefix build/,bench.json peers.json relative.json)
in_tree := PYTHONPATH="$(CURDIR)/python" MFA_LIBRARY="$(CURDIR)/build/release/libmfa.$(suffix)"

.PHONY: build demo docs lint wheels test test-full test-metal metal-cost bench bench-quick bench-readme clean distclean

build: $(venv)/.build
	@PATH="$(bin):$$PATH" cmake -S . -B build/release -G Ninja -DMFA_BENCH=ON
	@PATH="$(bin):$$PATH" cmake --build build/release

demo: build $(venv)/.demo
	@$(in_tree) "$(bin)/python" bench/demo.py

bench: build $(bench_venv)/.peers
	@$(in_tree) $(bench_python) bench/versus_torch.py --json build/bench.json
	@$(in_tree) $(bench_python) bench/versus_peers.py --json build/peers.json
	@$(in_tree) $(bench_python) bench/relative.py --json build/relative.json
	@$(bench_python) bench/report.py $(bench_rows) --png build/bench.png --svg build/peers.svg

bench-quick: build $(venv)/.demo
	@$(in_tree) "$(bin)/python" bench/versus_torch.py --quick --json build/bench-quick.json

bench-readme: bench
	@$(bench_python) bench/report.py $(bench_rows) --svg docs/peers.svg --readme README.md --record docs/measure.md

docs: $(venv)/.docs
	@PATH="$(bin):$$PATH" python -m sphinx -W --keep-going -n -q -d build/docs-doctrees docs build/docs
	@echo "The documentation is in $(CURDIR)/build/docs/index.html"

lint: $(venv)/.lint
	@PATH="$(bin):$$PATH" pre-commit run --all-files --hook-stage manual

wheels: build/.packages-wheels $(venv)/.wheels
	@PATH="$(bin):$$PATH" python tools/wheels.py

test: build/.packages-test $(venv)/.test
	@PATH="$(bin):$$PATH" python tests/run.py $(STEPS)

test-full: build/.packages-test $(venv)/.test
	@PATH="$(bin):$$PATH" python tests/run.py --full $(STEPS)

test-metal:
	@$(MAKE) --no-print-directory test STEPS="metal metal-python"

metal-cost: build/.packages-test $(venv)/.test
	@PATH="$(bin):$$PATH" cmake --preset release
	@PATH="$(bin):$$PATH" cmake --build build/test-release --target metal_cost
	@PATH="$(bin):$$PATH" python metalsim/cost/cost.py build/test-release/metal_cost --write docs/metal-kernels.md

clean:
	find build -mindepth 1 -maxdepth 1 ! -name 'venv*' -exec rm -rf {} +

distclean:
	rm -rf build

build/.packages-%: tools/packages.sh
	@mkdir -p build
	@PYTHON="$(PYTHON)" tools/packages.sh $*
	@touch $@

$(venv)/bin/python $(bench_venv)/bin/python: | build/.packages-build
	@echo "Making a virtual environment in $(@:/bin/python=)"
	@$(PYTHON) -m venv $(@:/bin/python=)

# demo.txt and wheels.txt include build.txt, test.txt includes these, docs.txt and lint.txt. Other libraries have an environment of their own.
$(venv)/.build: requirements/build.txt
$(venv)/.demo: requirements/build.txt requirements/demo.txt
$(venv)/.docs: requirements/docs.txt
$(venv)/.lint: $(addprefix requirements/,build.txt demo.txt lint.txt)
$(venv)/.wheels: requirements/build.txt requirements/wheels.txt
$(venv)/.test: $(addprefix requirements/,build.txt demo.txt docs.txt lint.txt wheels.txt test.txt)
$(bench_venv)/.peers: $(addprefix requirements/,build.txt demo.txt peers.txt) | build/.packages-bench $(bench_venv)/bin/python
$(venv)/.build $(venv)/.demo $(venv)/.docs $(venv)/.lint $(venv)/.wheels $(venv)/.test: | $(venv)/bin/python
$(venv)/.build $(venv)/.demo $(venv)/.docs $(venv)/.lint $(venv)/.wheels $(venv)/.test $(bench_venv)/.peers:
	@echo "Installing requirements/$(subst .,,$(notdir $@)).txt into $(@D)"
	@"$(@D)/bin/python" -m pip install --disable-pip-version-check $(PIP_OPTIONS) -r requirements/$(subst .,,$(notdir $@)).txt
	@touch $@
