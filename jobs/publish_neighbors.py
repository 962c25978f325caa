"""Stage 5: every item's list per head, merged, with reasons: to history, through the gate, then to `item_neighbors` in one commit.

Spark tasks share one memory-mapped index; a row that enters a task is a trigger with its counted pairs, what leaves it is a file of lists.
A night older than the published one goes to history only, unless `--publish` asks for more.
"""

from collections.abc import Sequence
from functools import partial

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.faults import reach
from conf.tables import (
    ITEM_ANNOTATIONS,
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_NEIGHBORS,
    ITEM_NEIGHBORS_HISTORY,
    ITEM_POPULARITY,
    MERGE_POLICY,
)
from jobs.explorer import catalog
from jobs.explorer.night import index_titles
from jobs.lake import only_row
from jobs.list_files import FILE_SCHEMA, ListFile, ListsOf, MakeLists, commit_lists, write_task
from jobs.list_gate import list_metrics
from jobs.publication import publish_run
from jobs.retrieval import drop_candidates, index_items, list_tasks
from jobs.stage import StageRun, stage_main

STAGE = "publish_neighbors"


def publish_neighbors(run: StageRun) -> None:
    """Index, retrieve, write history, gate, publish."""
    run.night.lake.create(ITEM_NEIGHBORS)
    expected = run.night.lake.version(ITEM_NEIGHBORS)
    _start_policy(run)
    version = only_row(run.read(ITEM_EMBEDDINGS).agg(F.max("model_version").alias("version")))["version"]
    index = index_items(run)
    reach("publish_neighbors.index.written")
    publish_lists(run, *list_tasks(run, index), model_version=version, expected=expected)


def publish_lists(run: StageRun, tasks: DataFrame, make: MakeLists, *, model_version: str, expected: int) -> None:
    """History, gate, commit.

    Args:
        run: of this stage.
        tasks: input of the tasks that make the lists; a partition has all lists of its items.
        make: turns the input of a task into lists.
        model_version: behind the scores.
        expected: version of item_neighbors seen before anything was read.
    """
    lake, of = run.night.lake, ListsOf(run_date=run.run_date, run_id=run.night.run_id, model_version=model_version)
    files = list[ListFile]()

    def write() -> int:
        written = partial(write_task, make=make, of=of, folder=lake.path(ITEM_NEIGHBORS_HISTORY))
        files.extend(ListFile(**row.asDict()) for row in tasks.mapInArrow(written, FILE_SCHEMA).collect())
        return commit_lists(lake.root, of.run_id, files, metadata=run.metadata)

    lake.create(ITEM_NEIGHBORS_HISTORY)
    with run.timed("history"):
        run.write(ITEM_NEIGHBORS_HISTORY, write)
    with run.timed("gate"):
        run.gate(list_metrics(run, [file.name for file in files], expected), list_length=run.settings.retrieval.list_length)
    reach("publish_neighbors.gated")
    with run.timed("titles"):
        _index_titles(run)
    with run.timed("commit"):
        _publish(run, expected)
    lake.delete_where(ITEM_NEIGHBORS_HISTORY, f"run_date < date_sub('{run.run_date}', {run.settings.lake.keep_nights})")


def _index_titles(run: StageRun) -> None:
    """What the explorer finds items by, beside the night's other files."""
    versions = {table.name: run.version(table) for table in (ITEM_ANNOTATIONS, ITEM_FEATURES, ITEM_POPULARITY)}
    path = run.night.artifacts("explorer") / catalog.FILE
    image = run.settings.explorer.image_attribute
    index_titles(run.night.lake.root, versions, path, run_date=run.run_date, image_attribute=image)


def _start_policy(run: StageRun) -> None:
    """Write the settings' policies once; from then on the table rules."""
    lake = run.night.lake
    if not lake.exists(MERGE_POLICY) or lake.read(MERGE_POLICY).isEmpty():  # empty: a night was killed between its creation and this
        rows = [policy.model_dump() for policy in run.settings.merge]
        run.replace(MERGE_POLICY, run.night.spark.createDataFrame(rows, MERGE_POLICY.ddl))


def _publish(run: StageRun, expected: int) -> None:
    """One commit, fenced on the version seen at the start; an older night stays in history."""
    lake, night = run.night.lake, run.night
    current = only_row(lake.read(ITEM_NEIGHBORS, expected).agg(F.max("run_date").alias("date")))
    if current["date"] is not None and current["date"] > run.run_date and not night.publish:
        run.note(f"the lists of {current['date']} are published; this older night went to history only (--publish overrides)")
        return
    run.outputs[ITEM_NEIGHBORS.name] = publish_run(lake.root, night.run_id, expected=expected, inputs=run.inputs)
    reach("publish_neighbors.published")
    night.display.say(f"  published item_neighbors version {run.outputs[ITEM_NEIGHBORS.name]}")
    drop_candidates(run.settings.lake, keep=night.run_id)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, publish_neighbors, description="lists per head, merged, published", argv=argv)


if __name__ == "__main__":
    main()
