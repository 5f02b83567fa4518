# Everything a developer types. A user of ServerControl needs only servercontrol.py.
PYTHON ?= python3
BIN := .venv/bin
# What the tests stand on, and the two packages that the server uses when they are there.
TEST_PACKAGES := pytest pytest-xdist hypothesis websockets h11
EXTRA_PACKAGES := psutil uvloop
# What drives a browser through the page (it needs Debian's chromium-headless-shell, or chromium, as
# well), a terminal emulator to compare the page's with, and axe-core, which finds barriers. Not part
# of `make matrix`.
PAGE_PACKAGES := playwright pyte axe-playwright-python wcwidth
# Read what `discover --ansible` writes; neither is this part of `make matrix`.
RECIPE_PACKAGES := ansible-core
# The other peer of `make bench`, beside websockets; the tests do not need it.
BENCH_PACKAGES := picows
CHECK_PACKAGES := ruff mypy types-psutil
# A class in one process: its tests share a server, or a browser.
PYTEST := -m pytest -q -ra -n 5 --dist loadscope \
  -W error::pytest.PytestUnhandledThreadExceptionWarning
# Compiling the tests takes 8 s: it is done once, and not by five processes at the same time.
COMPILE := -m pytest -qq --collect-only test_servercontrol.py
INSTALL := -m pip install --quiet --no-compile --upgrade
FUZZ_SECONDS ?= 120
export TEST_PACKAGES EXTRA_PACKAGES PYTEST COMPILE INSTALL
unexport PYTHONDONTWRITEBYTECODE

help:            ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

run:             ## start the server on this machine
	$(PYTHON) servercontrol.py

test: .venv/compiled  ## run all tests (makes .venv on first use); says what it skipped
	$(BIN)/python $(PYTEST) test_servercontrol.py

check: .venv/ok  ## lint, format (the page's by Prettier) and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict servercontrol.py
	.ci/prettier --check

matrix: .venv/ok ## tests on every CPython 3.9 to 3.15 found, or in a chroot
	@.ci/matrix $(VERSIONS)

bench: .venv/ok  ## measure beside the websockets and picows packages
	$(BIN)/python test_servercontrol.py bench

soak: .venv/ok   ## minutes of cut connections, stalls, floods and short tasks
	$(BIN)/python test_servercontrol.py soak

fuzz: .venv/ok   ## mutated and random input, for FUZZ_SECONDS (120)
	$(BIN)/python test_servercontrol.py fuzz --seconds $(FUZZ_SECONDS)

shots: .venv/ok  ## pictures of the page in ten states, to be looked at, in .shots/
	$(BIN)/python .ci/shots

clean:           ## remove what make made
	rm -rf .venv .venv-* .shots __pycache__ .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/ok: Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) $(TEST_PACKAGES) $(CHECK_PACKAGES)
	$(BIN)/python $(INSTALL) $(EXTRA_PACKAGES) || \
	  echo "NOT INSTALLED: $(EXTRA_PACKAGES); their tests will be skipped"
	$(BIN)/python $(INSTALL) $(BENCH_PACKAGES) || \
	  echo "NOT INSTALLED: $(BENCH_PACKAGES); make bench cannot be run"
	$(BIN)/python $(INSTALL) $(PAGE_PACKAGES) || \
	  echo "NOT INSTALLED: $(PAGE_PACKAGES); the page will not be tested"
	$(BIN)/python $(INSTALL) $(RECIPE_PACKAGES) || \
	  echo "NOT INSTALLED: $(RECIPE_PACKAGES); Ansible will not be tested"
	npm install --silent --prefix .venv/npm prettier@3 || \
	  echo "NOT INSTALLED: prettier (it needs Node.js); the page's format will not be checked"
	touch .venv/ok

# If this fails, the tests say why.
.venv/compiled: .venv/ok test_servercontrol.py
	@$(BIN)/python $(COMPILE) >/dev/null && touch .venv/compiled || true

.PHONY: help run test check matrix bench soak fuzz shots clean
