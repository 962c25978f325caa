"""Spark SQL over the lake: every table is a view by its name, and `item_neighbor_rows` has one row a neighbor with its rank."""

import argparse
from collections.abc import Sequence

from pyspark.errors import PySparkException

from conf.errors import TableError
from conf.settings import load_settings
from conf.tables import ITEM_NEIGHBORS, TABLES
from jobs.arguments import add_config, report_errors
from jobs.lake import Lake, open_lake
from jobs.session import start_session

NEIGHBOR_ROWS = """
CREATE OR REPLACE TEMPORARY VIEW item_neighbor_rows AS
SELECT run_date, run_id, item_id, head, position + 1 AS rank, neighbor.*
FROM item_neighbors LATERAL VIEW posexplode(neighbors) AS position, neighbor
"""


def register_views(lake: Lake) -> None:
    """Make every existing table, and `item_neighbor_rows`, a temporary view of the session."""
    for table in TABLES.values():
        if lake.exists(table):
            lake.read(table).createOrReplaceTempView(table.name)
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
        settings = load_settings(values.config, values.set)
        spark = start_session(settings.spark, app_name="mtmh query")
        register_views(open_lake(spark, settings.lake))
        try:
            spark.sql(values.sql).show(values.rows, truncate=80)
        except PySparkException as error:
            views = ", ".join(sorted(row["viewName"] for row in spark.sql("SHOW VIEWS").collect()))
            raise TableError(f"cannot run the statement: {str(error).splitlines()[0]}\nviews: {views}") from error

    report_errors(run)


if __name__ == "__main__":
    main()
