"""Spark SQL over the lake: every table is a view by its name, and `item_neighbor_rows` has one row a neighbor with its rank.

`merge_policy` is a table that statements may change, e.g. `UPDATE merge_policy SET value = 0.05`; then `jobs.remerge` follows it.
"""

import argparse
from collections.abc import Iterable, Sequence

from pyspark.errors import PySparkException

from conf.errors import TableError
from conf.tables import ITEM_NEIGHBORS, MERGE_POLICY, tables_with
from jobs.arguments import add_config, report_errors, settings_of
from jobs.lake import Lake, open_lake
from jobs.session import start_session

NEIGHBOR_ROWS = """
CREATE OR REPLACE TEMPORARY VIEW item_neighbor_rows AS
SELECT run_date, run_id, item_id, head, position + 1 AS rank, neighbor.*
FROM item_neighbors LATERAL VIEW posexplode(neighbors) AS position, neighbor
"""


def register_views(lake: Lake, *, signals: Iterable[str] = ()) -> None:
    """Make every existing table, and `item_neighbor_rows`, a temporary view of the session; merge_policy a table of its catalog."""
    for table in tables_with(signals):
        if lake.exists(table) and table is not MERGE_POLICY:
            lake.read(table).createOrReplaceTempView(table.name)
    if lake.exists(MERGE_POLICY):  # external, so that dropping the name of another lake's table drops nothing else
        lake.spark.sql(f"DROP TABLE IF EXISTS {MERGE_POLICY.name}")
        lake.spark.sql(f"CREATE TABLE {MERGE_POLICY.name} USING delta LOCATION '{lake.path(MERGE_POLICY)}'")
    if lake.exists(ITEM_NEIGHBORS):
        lake.spark.sql(NEIGHBOR_ROWS)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the result of one statement."""
    parser = argparse.ArgumentParser(description="Spark SQL over the lake's tables")
    parser.add_argument("sql", help="e.g. \"SELECT * FROM item_neighbor_rows WHERE item_id = '1029743' AND rank <= 5\"")
    parser.add_argument("--rows", type=int, default=50, help="rows printed at most")
    add_config(parser, default="demo")

    def run() -> None:
        values = parser.parse_args(argv)
        settings = settings_of(values)
        spark = start_session(settings.spark, app_name="mtmh query")
        register_views(open_lake(spark, settings.lake), signals=settings.pairs.signals)
        try:
            spark.sql(values.sql).show(values.rows, truncate=80)
        except PySparkException as error:
            names = ", ".join(sorted({row["tableName"] for row in spark.sql("SHOW TABLES").collect()}))
            raise TableError(f"cannot run the statement: {str(error).splitlines()[0]}\ntables: {names}") from error

    report_errors(run)


if __name__ == "__main__":
    main()
