# make demo   set up, then new images from φ of photographs, with the denoiser that ships; report in
#             out/demo/report.html, in two minutes; TRAIN=4500 first trains a small one on them, so many steps
# make test   set up, run every test
# make check  set up, linters and types (what CI runs beside the tests)
# make bench  the CPU engine beside its peers (PyTorch, OpenVINO, ONNX Runtime, ncnn), tables and JSON in
#             out/bench; half an hour on two quiet cores; BENCH="network --only phi" runs a part
# make sanitize  the C++ engine's tests with AddressSanitizer and UBSan, on each instruction set (those of
#             ISAS that this processor has)
# make race  the C++ engine's tests with ThreadSanitizer; needs LLVM's OpenMP (Debian: libomp-14-dev)
# make fuzz  random gestures on a model, damaged files, and hostile arguments to the C++ engine's sanitized
#             build, other ones each time: MINUTES=10 for the first two, and for the third on each of ISAS
# make gpu-static  what can be checked of the GPU engine without a GPU: needs nvcc (CUDA 13), downloads
#             a torch with CUDA and two Tritons into CACHE (3 GB)
# make gpu-pretend  every test marked gpu on a pretended GPU (tools/pretend_gpu): needs nvcc (CUDA 13) and
#             Python 3.12, downloads a torch with CUDA into CACHE (5 GB)
# make gpu-bundle  what a machine with a GPU and without a network needs beside the repository, into .dev:
#             compiled libraries, Triton's caches, a newer ptxas; needs what gpu-pretend needs; half an hour
# make gpu-first SECONDS=450  tests and times where a GPU is, with PYTHON, which must have a torch with CUDA and
#             pytest; into OUT=out/gpu; AGAIN=FILE goes on after an earlier results.jsonl; no network
#
# Set-up is the project's own virtual environment, .venv, with the compiled extension; an interrupted
# command goes on where it stopped. Variables:
#   TORCH=torch==2.13.0  the torch to install      PYTHON=python3  the Python to use
#   DATA=folder          the photographs of the demo (default: the two that scikit-learn ships)

TORCH  ?= torch==2.13.0
# for tests in its interpreter, whose 3.6 needs that numpy
TRITON ?= 'triton==3.6.0' 'numpy<2.4'
PYTHON ?= python3
DATA   ?=
TRAIN  ?=
OUT    ?= out/demo
CACHE  ?= $(HOME)/.cache/fastphi

VENV := .venv
BIN  := $(VENV)/bin
C_FILES := find csrc tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.md')

.PHONY: setup demo test check format wheel doctor bench sanitize race fuzz gpu-static gpu-pretend gpu-bundle gpu-first clean

# A stamp a step: what an interruption leaves done is not done again. Each use installs what it needs:
# the demo neither Triton nor a linter.
PIP := $(BIN)/python -m pip install -q

setup: $(VENV)/built

$(VENV)/torch: Makefile
	@echo "== Set-up 1/3: a virtual environment and $(TORCH) (half a minute, most of it download)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) "$(TORCH)" ninja numpy
	@touch $@

$(VENV)/packages: $(VENV)/torch pyproject.toml
	@echo "== Set-up 2/3: the packages that fastphi needs (half a minute)"
	$(BIN)/python tools/requirements.py > $(VENV)/packages.txt
	$(PIP) -r $(VENV)/packages.txt
	@touch $@

$(VENV)/built: $(VENV)/packages $(SOURCES)
	@echo "== Set-up 3/3: compiling the C++ engine, its kernels for each instruction set at once (a minute on two cores)"
	$(PIP) --no-build-isolation --no-deps -e .
	$(BIN)/fastphi doctor
	@touch $@

$(VENV)/test: $(VENV)/packages
	@echo "== Set-up: what the tests need beside"
	@# a torch with CUDA has brought its own Triton
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON)
	$(BIN)/python tools/requirements.py test > $(VENV)/test.txt
	$(PIP) -r $(VENV)/test.txt
	@touch $@

$(VENV)/dev: $(VENV)/packages
	@echo "== Set-up: linters, mypy, build tools"
	$(BIN)/python tools/requirements.py dev > $(VENV)/dev.txt
	$(PIP) -r $(VENV)/dev.txt
	@touch $@

$(VENV)/bench: $(VENV)/packages
	$(BIN)/python tools/requirements.py bench > $(VENV)/bench.txt
	$(PIP) -r $(VENV)/bench.txt
	@touch $@

demo: setup
	$(BIN)/python -m fastphi.demo --out $(OUT) $(if $(DATA),--data "$(DATA)") $(if $(TRAIN),--train $(TRAIN))

test: setup $(VENV)/test
	$(BIN)/python -m pytest -q

check: setup $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$($(C_FILES))
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: setup $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$($(C_FILES))

wheel: setup $(VENV)/dev
	$(BIN)/python -m build --wheel --no-isolation

doctor: setup
	$(BIN)/fastphi doctor

bench: setup $(VENV)/bench
	$(BIN)/python tools/cpu_bench.py $(BENCH)

# The sanitizers' libraries come first in the process; Python's own leaks are not ours; what is more than
# there is memory is an error of ours, not the sanitizer's. pytest without `python -m`, which would find the
# usual build in this folder first; what a sanitizer writes is not caught.
SANITIZED := out/sanitize
LIBRARIES  = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
SANITIZE   = PYTHONPATH=$(SANITIZED)/lib LD_PRELOAD="$(LIBRARIES)" OMP_NUM_THREADS=2 \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
ISAS      ?= amx avx512 avx2 plain

$(SANITIZED)/built: setup $(VENV)/test $(SOURCES)
	FASTPHI_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@touch $@

sanitize: $(SANITIZED)/built
	for isa in $(ISAS); do echo "== $$isa"; FASTPHI_ISA=$$isa $(SANITIZE) \
	  $(BIN)/pytest -q -p no:cacheprovider --capture=sys tests/engine/test_ops.py tests/engine/test_weights.py \
	  tests/engine/cpu/test_runner.py tests/engine/cpu/test_bf16.py tests/engine/cpu/test_winograd.py tests/engine/cpu/test_training.py \
	  tests/sampling/test_guidance.py tests/fuzz/test_hostile_ops.py || exit 1; done

# ThreadSanitizer knows nothing of GCC's OpenMP: LLVM's takes its place, whose Archer tells it who waits for
# whom. Its fixed addresses and a kernel's random ones do not go together.
LLVM_OMP ?= $(firstword $(wildcard /usr/lib/llvm-*/lib))
race: setup $(VENV)/test
	@test -e "$(LLVM_OMP)/libarcher.so" || { echo "make race needs LLVM's OpenMP with Archer (Debian: libomp-14-dev)"; exit 1; }
	FASTPHI_SANITIZE=thread $(BIN)/python setup.py -q build --build-base out/race --build-lib out/race/lib
	PYTHONPATH=out/race/lib LD_PRELOAD="$(shell $(CXX) -print-file-name=libtsan.so) $(LLVM_OMP)/libomp.so.5" \
	  OMP_TOOL_LIBRARIES=$(LLVM_OMP)/libarcher.so OMP_NUM_THREADS=2 TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
	  setarch -R $(BIN)/pytest -q -p no:cacheprovider --capture=sys --deselect \
	  tests/engine/test_ops.py::test_one_openmp_runtime tests/engine/test_ops.py tests/engine/test_weights.py \
	  tests/engine/cpu/test_runner.py tests/engine/cpu/test_winograd.py tests/engine/cpu/test_training.py \
	  tests/sampling/test_guidance.py

# Other cases each time, for so many minutes; the ops as the sanitized build on each instruction set.
MINUTES ?= 10
fuzz: $(SANITIZED)/built
	$(BIN)/python tools/fuzz.py --minutes $(MINUTES) --only gestures --only bytes
	for isa in $(ISAS); do echo "== ops, $$isa"; FASTPHI_ISA=$$isa $(SANITIZE) $(BIN)/python tools/fuzz.py \
	  --minutes $(MINUTES) --only hostile_ops --pytest $(BIN)/pytest || exit 1; done

gpu-static: setup
	$(BIN)/python tools/gpu_static.py --cache "$(CACHE)"

gpu-pretend:
	$(PYTHON) tools/gpu_pretend.py --cache "$(CACHE)"

gpu-bundle:
	$(PYTHON) tools/gpu_bundle.py --cache "$(CACHE)"

SECONDS ?= 450
gpu-first:
	$(PYTHON) tools/gpu_first.py --seconds $(SECONDS) $(if $(AGAIN),--again "$(AGAIN)") \
	  --out "$(if $(filter file,$(origin OUT)),out/gpu,$(OUT))"

clean:
	rm -rf build dist *.egg-info fastphi/*.so out
