# Every target sets up what it needs in .venv; TORCH chooses the build of torch, for example
#   make test TORCH="torch --index-url <the index of the CUDA build you want>"
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h') setup.py pyproject.toml

.PHONY: demo test sanitize bench lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first, by itself: a dependency that asks for "torch" must find it installed
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || { $(BIN)/pip install $(TORCH) && \
	  echo "Installed $(TORCH). For a CUDA build: make $(MAKECMDGOALS) TORCH=..., see README.md"; }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -e ".[test,demo]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m sparse_attn demo

# a CUDA build of torch brings its own; without any the tests of Triton kernels are skipped
$(VENV)/.triton: $(VENV)/.torch
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install $(TRITON) || \
	  echo "No $(TRITON) for this machine: its tests will be skipped"
	@touch $@

test: $(VENV)/.installed $(VENV)/.triton
	$(BIN)/python -m pytest -n auto --dist worksteal

# the operators' tests on a copy whose extension checks every access to memory; libstdc++ is loaded
# first as well because AddressSanitizer must find its exceptions
sanitize: $(VENV)/.installed
	rm -rf build/sanitize && mkdir -p build/sanitize
	git ls-files -z | xargs -0 cp --parents -t build/sanitize
	cd build/sanitize && SPARSE_ATTN_BUILD=cpu CXX=g++ LDFLAGS=-fsanitize=address \
		CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer -g1" \
		$(abspath $(BIN))/python setup.py -q build_ext --inplace \
		2>build.log || { tail build.log; exit 1; }
	nm -D build/sanitize/sparse_attn/_C.abi3.so | grep -q __asan_report
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(abspath $(BIN))/python -m pytest --capture=sys tests/ops

bench: $(VENV)/.installed
	$(BIN)/python -m bench

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build sparse_attn/*.so sparse_attn/_build_info.py *.egg-info
