# `make demo` and `make test` need nothing but Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-gpu check bench-digits bench-proving bench-estimate bench-gpu bench-char bench-conversion bench-char-conversion bench-quaternion bench-rotations bench-chain bench-ray-pool clean

setup: $(STAMP)

# torch first and pinned: any other version would pull gigabytes of CUDA libraries on a CPU machine.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/mambaint demo

test: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadgroup

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Twenty minutes: ten seeds of the demo model and its float twin, three of the large one, then the circuit.
bench-digits: setup
	$(BIN)/python -m benchmarks.digits

# Five minutes on a quiet machine: the cost model against a dozen circuits that it was not fitted to.
bench-estimate: setup
	$(BIN)/python -m benchmarks.estimate

# Two minutes, after bench-digits: both forms of the same circuits beside the recorded naive export.
bench-proving: setup
	$(BIN)/python -m benchmarks.proving runs/bench-digits

# Ten minutes on a GPU. PEERS is a directory with the sources mamba_ssm/ and minimamba/ of those packages.
bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu $(if $(PEERS),--peers $(PEERS))

# Three minutes on a GPU: ten million parameters on bytes of Moby Dick, ternary, int8 and float.
bench-char: setup
	$(BIN)/python -m benchmarks.char

# Ten minutes on a quiet machine: float models trained, converted and compared; sizes; ONNX Runtime beside floats.
bench-conversion: setup
	$(BIN)/python -m benchmarks.conversion
	$(BIN)/python -m benchmarks.conversion_size
	$(BIN)/python -m benchmarks.onnx_runtime

# Two minutes on a GPU: a float text model, its int8 and ternary forms, fine-tuned.
bench-char-conversion: setup
	$(BIN)/python -m benchmarks.char_conversion

# Three minutes on a GPU: quaternion Mamba-2 beside Mamba-2, and its scan.
bench-quaternion: setup
	$(BIN)/python -m benchmarks.quaternion

# Three minutes on a GPU: which models compose rotations.
bench-rotations: setup
	$(BIN)/python -m benchmarks.rotations

# Ten minutes on two cores: sequences of 64 to 1,024 tokens in linked segments, and a model of nanoGPT's size.
bench-chain: setup
	$(BIN)/python -m benchmarks.chain

# Ten minutes: Ray beside the local pool, a simulated cluster, and twenty kills.
bench-ray-pool: setup
	$(BIN)/python -m benchmarks.ray_pool
	$(BIN)/python -m benchmarks.cluster
	$(BIN)/python -m benchmarks.killed_chain

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-out runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
