"""The benchmark's numbers come in the form that every benchmark has, its works run, and the small ones are right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench_filters import filters
from jobs.bench_rows import keep_row
from jobs.bench_search import _ivf_of, learned_vectors
from tests.conftest import ROOT


def test_rows_are_kept_in_the_common_form(tmp_path: Path) -> None:
    seconds, rows = _ivf_of(tmp_path, 6_000)
    assert seconds > 0
    for row in [*rows, rows[0]]:  # the second of a kind replaces the first
        keep_row({"peak_rss_mb": 1.0, **row}, tmp_path / "neighbors.json")
    content = json.loads((tmp_path / "neighbors.json").read_text())
    assert {"machine", "commit"} <= content.keys()
    assert [row["method"] for row in content["rows"]] == ["exact", "mtmh"]
    wanted = {"work", "size", "method", "median_s", "min_s", "max_s", "runs", "peak_rss_mb"}
    assert all(wanted <= row.keys() for row in content["rows"])
    assert float(re.findall(r"recall on 2,000 other queries ([\d.]+)", content["rows"][1]["note"])[0]) > 0.95
    trigger, target = learned_vectors(500)
    assert trigger.shape == target.shape == (500, 128)


def test_lists_under_rules_that_leave_little_are_as_long_as_they_can_be(tmp_path: Path) -> None:
    found = {row["work"]: row["note"] for row in filters(tmp_path, 3_000)}
    assert len(found) == 5
    lengths = {work: tuple(map(int, re.findall(r"lists of (\d+) to (\d+)", note)[0])) for work, note in found.items()}
    assert lengths["lists under no rule"] == lengths["lists under no variants"] == (100, 100)
    assert lengths["lists under a market of 60 items shared"] == (59, 59)
    assert lengths["lists under 3 of each of 20 brands"] == (60, 60)
    assert 0 < lengths["lists under a market of 1 % shared"][0] < 60  # of 3,000 items some 30


@pytest.mark.night
def test_lists_are_published_and_looked_up(tmp_path: Path) -> None:
    """In a process of its own: the work starts a Spark session, and stops it."""
    command = [sys.executable, "-m", "jobs.bench_neighbors", "--works", "publication", "lookups", "online", "--items", "400"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "var" / "bench" / "neighbors.json").read_text())["rows"]
    works = {"history, gate, commit", "point lookup in Delta", "online lookup of 1", "online lookup of 100"}
    works |= {"publish online, one process", "publish online again, a process a core"}
    assert works == {row["work"] for row in rows}
    assert all(row["median_s"] > 0 for row in rows)
