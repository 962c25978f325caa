"""The gate's own count of what filters and limits refuse, against the same words read by a loop."""

from collections import Counter

import numpy as np
from pyspark.sql import SparkSession

from conf.settings import LimitSettings
from tests.models.test_eligibility import FILTERS, NIGHT, passes, values_of
from validation.eligibility import excess_neighbors, refused_neighbors

NUM_ITEMS = 40


def test_refused_and_excess_neighbors_are_counted(spark: SparkSession) -> None:
    values = values_of(NUM_ITEMS)
    coarsest = [None, "category 0", "category 1", "category 2"] * (NUM_ITEMS // 4)
    maps = [{name: [str(v) for v in column[item]] for name, column in values.items() if column[item]} for item in range(NUM_ITEMS)]
    rows = [(f"{item}", maps[item] or None, [name] if (name := coarsest[item]) else None) for item in range(NUM_ITEMS)]
    features = spark.createDataFrame(rows, "item_id string, filter_values map<string,array<string>>, categories array<string>")
    filters = [rule.model_copy(update={"heads": [name]}) for name, rule in FILTERS.items()]  # a list for each, so that one action will do
    names = [*FILTERS, "free"]
    rng = np.random.default_rng(2)
    pairs = [
        (trigger, item) for trigger in range(NUM_ITEMS) for item in rng.choice(NUM_ITEMS, 9, replace=False).tolist() if item != trigger
    ]
    lists = [(f"{trigger}", head, f"{item}") for trigger, item in pairs for head in names]
    neighbors = spark.createDataFrame(lists, "item_id string, head string, neighbor_id string")
    refused = refused_neighbors(neighbors, features, filters=filters, names=names, run_date=NIGHT).collect()
    wanted = {(f"{t}", name, f"{i}") for name, rule in FILTERS.items() for t, i in pairs if not passes(rule, values, coarsest, t, i)}
    assert {tuple(row) for row in refused} == wanted
    assert {head for _, head, _ in wanted} == set(FILTERS)

    limits = [LimitSettings(by="brand", at_most=1, heads=["released"]), LimitSettings(by="category", at_most=2, heads=["free"])]
    excess = excess_neighbors(neighbors, features, limits=limits, names=names).collect()
    brands = Counter((f"{t}", "released", str(values["brand"][i][0])) for t, i in pairs if values["brand"][i])
    kinds = Counter((f"{t}", "free", coarsest[i]) for t, i in pairs if coarsest[i])
    too_many = {key: n for key, n in brands.items() if n > 1} | {key: n for key, n in kinds.items() if n > 2}
    assert {tuple(row)[:3]: row["count"] for row in excess} == too_many
