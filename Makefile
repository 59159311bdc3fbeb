# Two commands: `make demo` and `make test`. Each makes its own virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# a change of the project file, of the tested set, of the interpreter or of the folder makes a new environment
KEY := $(shell $(PYTHON) -c "import hashlib, sys; read = lambda name: open(name, 'rb').read(); \
print(hashlib.sha256(b'|'.join([read('pyproject.toml'), read('constraints.txt'), sys.version.encode(), '$(CURDIR)'.encode()])).hexdigest()[:16])")
INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
# one thread per worker: two workers share two cores
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help demo test check browser pictures wheel clean

help:
	@echo "make demo    install into $(VENV), fit HAM on real data and show what it kept"
	@echo "make test    install into $(VENV), then ruff, mypy and pytest"
	@echo "make browser open the report in a headless Chromium (tests/browser/install.sh installs one)"
	@echo "make pictures make the pictures of the README and the docs"
	@echo "make wheel   build the wheel and try it outside this folder (FULL=1: with libraries of its own)"
	@echo "make clean   remove $(VENV), dist and caches"

demo: $(VENV)/demo-$(KEY)
	@$(VENV)/bin/hamts demo $(DEMO_ARGS)

test: check
	@$(ONE_THREAD) $(RUN) -m pytest -n 2 --ignore=tests/browser $(PYTEST_ARGS)

# a step of its own: it needs a browser, and the time until a page is ready is measured
browser: $(VENV)/test-$(KEY)
	@$(ONE_THREAD) $(RUN) -m pytest tests/browser $(PYTEST_ARGS)

pictures: $(VENV)/demo-$(KEY)
	@$(RUN) -m benchmarks.pictures $(PICTURES_ARGS)

check: $(VENV)/test-$(KEY)
	@echo "== ruff, mypy"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

$(VENV)/made-$(KEY):
	@$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 15) else \
'hamts needs Python 3.11 to 3.14, this is ' + sys.version.split()[0] + '. Say which: make PYTHON=python3.12')"
	@echo "== making $(VENV)"
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && touch $@

$(VENV)/demo-$(KEY): | $(VENV)/made-$(KEY)
	@echo "== installing hamts for the demo (about two minutes the first time)"
	@$(INSTALL) -e '.[viz,datasets]' && $(RUN) -m pip check --quiet && touch $@

$(VENV)/test-$(KEY): | $(VENV)/made-$(KEY)
	@echo "== installing hamts and its test tools (about two minutes the first time)"
	@$(INSTALL) -e '.[viz,datasets,test,notebooks,browser]' && $(RUN) -m pip check && touch $@

# The wheel is tried from an empty folder, in an environment that has nothing of this clone on its path.
# Its libraries are those of .venv, by a .pth file: a folder named there is searched, but its own .pth files
# (the editable install of this clone is one) are not run. FULL=1 installs them anew instead, as a user would.
wheel: $(VENV)/test-$(KEY)
	@rm -rf dist && $(RUN) -m build --quiet --wheel --no-isolation --outdir dist . && ls dist
	@trial=$$(mktemp -d) && trap 'rm -rf "$$trial"' EXIT && set -e && $(PYTHON) -m venv "$$trial/venv" && \
	if [ -n "$(FULL)" ]; then extra='-c constraints.txt'; else extra='--no-deps'; fi && \
	"$$trial/venv/bin/python" -m pip install -qq --disable-pip-version-check $$extra dist/*.whl && \
	if [ -z "$(FULL)" ]; then $(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	> "$$($$trial/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/libraries.pth"; fi && \
	cp tests/try_wheel.py "$$trial" && cd "$$trial" && venv/bin/python -I try_wheel.py "$(CURDIR)" && venv/bin/hamts --help >/dev/null && \
	echo "== the wheel works outside the clone"

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
