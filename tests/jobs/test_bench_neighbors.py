"""The benchmark's numbers come in the form that every benchmark has, and one small work of it is right."""

import json
import re
from pathlib import Path

from jobs.bench_rows import keep_row
from jobs.bench_search import _ivf_of, learned_vectors


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
