"""Whether anything of the judges reaches the model: everything is trained again with the withheld fields dealt out anew among the items.

A backtest withholds what its judges read. If it does so everywhere, permuting these fields leaves every content vector, every relevance
example and every embedding as it is. The second lake also holds no engagement after the cut, so that equal vectors mean as well that
nothing of the future reached the first model.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from conf.errors import GateError
from conf.tables import ITEM_ANNOTATIONS, ITEM_EMBEDDINGS, ITEM_FEATURES, PAIR_RELEVANCE, RELEVANCE_EXAMPLES, Table
from features.content import permute
from jobs.build_features import build_features
from jobs.build_pairs import build_pairs
from jobs.ingest import ingest
from jobs.stage import Night, StageRun, make_night, run_stage
from jobs.train_model import train_model

TRAINING = {"build_pairs": build_pairs, "build_features": build_features, "train_model": train_model}
"""The stages between the clean tables and a trained model."""
_COMPARED = {ITEM_FEATURES: ("content_vector",), RELEVANCE_EXAMPLES: ("target",), ITEM_EMBEDDINGS: ("trigger_vector", "target_vector")}
_TOLERANCE = 1e-6


def check_leaks(trained: Night, fields: Sequence[str]) -> Mapping[str, int]:
    """Train again on permuted fields, in a lake variant of its own, and compare.

    Args:
        trained: a night whose training stages are done, without a warm start.
        fields: what judges read, as in features.judge_fields.

    Returns:
        Rows compared per table.

    Raises:
        GateError: rows differ, so a judge's field reaches the model.
    """
    lake = trained.settings.lake
    settings = trained.settings.model_copy(update={"lake": lake.model_copy(update={"variant": f"{lake.variant}-permuted".lstrip("-")})})
    night = make_night(settings, trained.run_date, spark=trained.spark, display=trained.display, now=trained.now)
    run_stage(night, "ingest", ingest, force=True)  # from the sources: a second check must not start from permuted fields
    run_stage(night, "permute_judges", partial(_permute, fields=fields), force=True)
    for name, stage in TRAINING.items():
        run_stage(night, name, stage, force=True)
    compared, faults = {}, []
    for table, columns in _COMPARED.items():
        compared[table.name], differing = _differences(trained, night, table, columns)
        if differing:
            faults.append(f"{differing:,} of {compared[table.name]:,} rows of {table.name} changed in {', '.join(columns)}")
    if faults:
        raise GateError(
            f"permuting {sorted(fields)} among the items changed what the model is made from: {'; '.join(faults)}. A judge's field reaches "
            "training: look for it in features and models, and trust no relevance of this backtest"
        )
    return compared


def _permute(run: StageRun, *, fields: Sequence[str]) -> None:
    run.replace(ITEM_ANNOTATIONS, permute(run.read(ITEM_ANNOTATIONS), fields))
    if "pair_relevance" in fields:
        run.replace(PAIR_RELEVANCE, run.read(PAIR_RELEVANCE).withColumn("grade", (1 - F.col("grade")) / 2))


def _differences(one: Night, other: Night, table: Table, columns: Sequence[str]) -> tuple[int, int]:
    """Rows of both nights, and how many are in one only or have other numbers."""
    left, right = (_values(night, table, columns) for night in (one, other))
    both = left.join(right.withColumnsRenamed({name: f"_{name}" for name in columns}), on=list(table.key), how="full")
    same = F.lit(True)
    for name in columns:
        same = same & F.coalesce(_close(F.col(name), F.col(f"_{name}")), F.lit(False))
    row = both.agg(F.count(F.lit(1)).alias("rows"), F.count_if(~same).alias("differing")).first()
    assert row is not None  # an aggregate without groups has one row
    return row["rows"], row["differing"]


def _values(night: Night, table: Table, columns: Sequence[str]) -> DataFrame:
    """The key and the columns, numbers as arrays."""
    frame = night.lake.read(table, night.pinned_version(table))
    arrays = [F.col(name) if table is not RELEVANCE_EXAMPLES else F.array(name).alias(name) for name in columns]
    return frame.select(*table.key, *arrays)


def _close(left: Column, right: Column) -> Column:
    return (F.size(left) == F.size(right)) & ~F.exists(F.arrays_zip(left.alias("a"), right.alias("b")), _apart)


def _apart(pair: Column) -> Column:
    return F.abs(pair["a"] - pair["b"]) > _TOLERANCE
