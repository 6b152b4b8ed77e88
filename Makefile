# make demo   the main job on built-in data      make test    the tests
# make check  format, lint, types, tests         make wheel   the package
# make cuda-check  compile the CUDA kernels for every GPU (needs nvcc, no GPU); a table of what they take
# make wheel-cuda  the package with these kernels already built, for Linux on this kind of processor
# make campaign NAME=kill   a long trial outside the tests (kill, faults, corrupt, inputs, prepare); goes on where it was stopped
# Paths here are relative, so the checkout may lie anywhere, also below a folder with spaces in its name.
PY := .venv/bin/python
RWKV := .venv/bin/rwkv-train
DEMO := demo
# Many tests wait for processes of their own, so several at a time; those of a file share what they make. The order of
# the files is that of tests/conftest.py.
TESTS := -m "not gpu and not slow and not network" -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
CAMPAIGNS := kill faults corrupt inputs prepare
NAME ?= $(filter $(CAMPAIGNS),$(MAKECMDGOALS))

.PHONY: env demo test check cuda-check campaign $(CAMPAIGNS) format wheel wheel-cuda clean

env: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt .ci/make-environment
	@sh .ci/make-environment

demo: env
	@mkdir -p $(DEMO)
	@echo "== 1/6  the built-in corpus: documentation and sources that ship with Python"
	$(RWKV) prepare-data --input builtin --tokenizer bytes --output $(DEMO)/corpus --overwrite
	@echo "== 2/6  the untrained model"
	$(RWKV) init-weights --config quickstart --output $(DEMO)/untrained --overwrite
	$(RWKV) eval-ppl --checkpoint $(DEMO)/untrained --data $(DEMO)/corpus-valid.jsonl.zst
	@echo "== 3/6  pretraining (a few minutes on two cores)"
	$(RWKV) pretrain --config quickstart --set data.train=$(DEMO)/corpus-train --set data.valid=$(DEMO)/corpus-valid --set trainer.out_dir=$(DEMO)/run
	@echo "== 4/6  the trained model, by domain"
	$(RWKV) eval-ppl --checkpoint $(DEMO)/run --data $(DEMO)/corpus-valid.jsonl.zst --json $(DEMO)/perplexity.json
	@echo "== 5/6  to the official .pth and back"
	$(RWKV) convert-checkpoint $(DEMO)/run $(DEMO)/model.pth --to pth --overwrite
	$(RWKV) convert-checkpoint $(DEMO)/model.pth $(DEMO)/model --to safetensors --overwrite
	@echo "== 6/6  a sample"
	$(RWKV) generate --checkpoint $(DEMO)/model --tokenizer bytes --prompt "def " --max-tokens 300 --temperature 0.7 --seed 1
	@echo "The loss curve is $(DEMO)/run/loss.png, the perplexities are in $(DEMO)/perplexity.json."

test: env
	$(PY) -m pytest $(TESTS)

check: env
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest $(TESTS)

cuda-check: env
	$(PY) cuda/check.py

campaign: env
	$(PY) -m tests.campaigns $(NAME)

$(CAMPAIGNS): campaign

format: env
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

wheel: env
	$(PY) -m build --wheel

wheel-cuda: env
	@sh .ci/make-wheel-cuda

clean:
	rm -rf .venv build dist $(DEMO) *.egg-info
