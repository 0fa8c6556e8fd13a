# make demo   set up, then new images from φ of photographs, with the denoiser that ships; report in
#             out/demo/report.html, in two minutes; TRAIN=4500 first trains a small one on them, so many steps
# make test   set up, run every test
# make check  set up, linters and types (what CI runs beside the tests)
# make bench  the CPU engine beside its peers (PyTorch, OpenVINO, ONNX Runtime, ncnn), tables and JSON in
#             out/bench; half an hour on two quiet cores; BENCH="network --only phi" runs a part
# make sanitize  the C++ engine's tests with AddressSanitizer and UBSan, on each instruction set (those of
#             ISAS that this processor has)
# make gpu-static  what can be checked of the GPU engine without a GPU: needs nvcc (CUDA 13), downloads
#             a torch with CUDA and two Tritons into CACHE (3 GB)
# make gpu-suite PART="build tests"  what is to be run where a GPU is: tools/gpu_suite.py says which parts
#             there are; with PYTHON, which must have a torch with CUDA, into OUT=out/gpu; no network
#
# Set-up is the project's own virtual environment, .venv, with the compiled extension. Variables:
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
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: setup demo test check format wheel doctor bench sanitize gpu-static gpu-suite clean

setup: $(VENV)/built

$(VENV)/packages: pyproject.toml Makefile
	@echo "== Set-up 1/2: virtual environment and packages (a minute or two, most of it download)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q "$(TORCH)" ninja numpy
	@# a torch with CUDA has brought its own Triton
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install -q $(TRITON)
	$(BIN)/python tools/requirements.py test dev > $(VENV)/requirements.txt
	$(BIN)/python -m pip install -q -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/packages $(SOURCES)
	@echo "== Set-up 2/2: compiling the C++ engine (about a minute)"
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	$(BIN)/fastphi doctor
	@touch $@

demo: setup
	$(BIN)/python -m fastphi.demo --out $(OUT) $(if $(DATA),--data "$(DATA)") $(if $(TRAIN),--train $(TRAIN))

test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$($(C_FILES))
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$($(C_FILES))

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation

doctor: setup
	$(BIN)/fastphi doctor

bench: setup
	$(BIN)/python tools/requirements.py bench > $(VENV)/bench.txt
	$(BIN)/python -m pip install -q -r $(VENV)/bench.txt
	$(BIN)/python tools/cpu_bench.py $(BENCH)

# The sanitizers' libraries come first in the process; Python's own leaks are not ours. pytest without
# `python -m`, which would find the usual build in this folder first.
SANITIZED := out/sanitize
LIBRARIES  = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
ISAS      ?= amx avx512_bf16 avx512 avx2 plain

sanitize: setup
	FASTPHI_SANITIZE=1 $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	for isa in $(ISAS); do echo "== $$isa"; FASTPHI_ISA=$$isa PYTHONPATH=$(SANITIZED)/lib \
	  LD_PRELOAD="$(LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  $(BIN)/pytest -q -p no:cacheprovider tests/engine/cpu \
	  tests/engine/test_ops.py || exit 1; done

gpu-static: setup
	$(BIN)/python tools/gpu_static.py --cache "$(CACHE)"

PART ?= build tests
gpu-suite:
	$(PYTHON) tools/gpu_suite.py --out "$(if $(filter file,$(origin OUT)),out/gpu,$(OUT))" $(PART)

clean:
	rm -rf build dist *.egg-info fastphi/*.so out
