"""What is said of lists, list by list: each fault is found in its list and in no other."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.list_gate import inspect_files
from models.list_rows import ARROW_SCHEMA
from validation.lists import ListRule, inspect_lists

RULE = ListRule(eligible=pa.array(["a", "b", "c", "d"]), sample=pa.array(["b"]))


def neighbors(*found: tuple[str | None, float | None]) -> list[dict[str, Any]]:
    rest = {"reason": "", "sources": [], "num_user_days": 0, "relevance": 0.0, "filled": False}
    return [{"neighbor_id": item_id, "score": score, **rest} for item_id, score in found]


def batch(**lists: list[dict[str, Any]] | None) -> pa.RecordBatch:
    rows = [{"item_id": item_id, "head": "merged", "neighbors": found, "list_hash": ""} for item_id, found in lists.items()]
    return pa.RecordBatch.from_pylist(rows, schema=ARROW_SCHEMA)


GOOD = neighbors(("b", 0.9), ("c", 0.5), ("d", 0.5))
FAULTS: dict[str, tuple[list[dict[str, Any]] | None, dict[str, Any]]] = {
    "good": (GOOD, {}),
    "empty": ([], {"num_neighbors": 0, "first": []}),
    "no list": (None, {"num_neighbors": 0, "first": []}),
    "itself": (neighbors(("b", 0.9), ("a", 0.5), ("c", 0.1)), {"holds_itself": True, "first": ["b", "a", "c"]}),
    "repeats": (neighbors(("b", 0.9), ("c", 0.5), ("b", 0.1)), {"repeats": True, "first": ["b", "c", "b"]}),
    "rises": (neighbors(("b", 0.5), ("c", 0.9), ("d", 0.1)), {"rises": True}),
    "not a number": (neighbors(("b", 0.5), ("c", float("nan")), ("d", None)), {"num_nonfinite": 2}),
    "infinite": (neighbors(("b", float("inf")), ("c", 0.5), ("d", 0.1)), {"num_nonfinite": 1}),
    "unknown": (neighbors(("b", 0.9), ("z", 0.5), ("y", 0.1)), {"num_ineligible": 2, "first": ["b", "z", "y"]}),
    "no ids": (neighbors((None, 0.9), (None, 0.5), ("d", 0.1)), {"num_ineligible": 2, "repeats": True, "first": [None, None, "d"]}),
    "no id": (neighbors(("b", 0.9), (None, 0.5), ("d", 0.1)), {"num_ineligible": 1, "first": ["b", None, "d"]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_in_its_list_alone(fault: str) -> None:
    spoilt, found = FAULTS[fault]
    clean = {
        "item_id": "a",
        "head": "merged",
        "num_neighbors": 3,
        "holds_itself": False,
        "repeats": False,
        "rises": False,
        "num_nonfinite": 0,
        "num_ineligible": 0,
        "first": ["b", "c", "d"],
        "ids": None,
    }
    before, here, after = inspect_lists(batch(b=GOOD[1:], a=spoilt, c=GOOD[:1]), rule=RULE).to_pylist()
    assert here == clean | found == inspect_lists(batch(a=spoilt), rule=RULE).to_pylist()[0]
    others = {name: value for name, value in clean.items() if name not in ("item_id", "num_neighbors", "first", "ids")}
    assert before == {**others, "item_id": "b", "num_neighbors": 2, "first": ["c", "d"], "ids": ["c", "d"]}, "in the sample: whole"
    assert after == {**others, "item_id": "c", "num_neighbors": 1, "first": ["b"], "ids": None}


def test_files_are_read_by_columns_and_only_ten_ids_are_first(tmp_path: Path) -> None:
    many = neighbors(*((f"i{n}", -float(n)) for n in range(30)))
    paths = []
    for number, item_id in enumerate("xy"):
        paths.append(str(tmp_path / f"{number}.parquet"))
        pq.write_table(pa.Table.from_batches([batch(**{item_id: many})]), paths[-1])
    named = pa.RecordBatch.from_pydict({"uri": paths})
    rows = pa.Table.from_batches(inspect_files([named], rule=RULE)).to_pylist()
    assert [row["item_id"] for row in rows] == ["x", "y"]
    assert rows[0]["first"] == [f"i{n}" for n in range(10)]
    assert rows[0]["num_ineligible"] == rows[0]["num_neighbors"] == 30
