"""Make a kept night the current one again, in Delta and in the online store: `python -m jobs.rollback --to-run RUN --config demo`.

The lists come from `item_neighbors_history`, whose runs are kept for `lake.keep_nights`. Rolling back is a publication like any other: one
fenced commit, a row in `runs`, and then the online store. It needs no Spark, and can itself be rolled back.
"""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime

from conf.errors import PublishError
from conf.settings import Settings
from conf.tables import ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY
from jobs.arguments import add_config, report_errors, settings_of
from jobs.ledger import Ledger, StageRecord, recorded
from jobs.online import serves_published
from jobs.processes import Processes
from jobs.progress import Display
from jobs.publication import Published, kept_runs, publish_run, published
from jobs.publish_online import follow_online
from jobs.reader import lake_root, open_table

STAGE = "rollback"
_SHOWN_RUNS = 10


def roll_back(settings: Settings, run_id: str, *, display: Display, now: datetime | None = None) -> int:
    """Publish a kept run again; returns the new version of item_neighbors.

    Raises:
        PublishError: the run is unknown, is not kept any more or failed its gate, is the current one already, or somebody else published
            meanwhile; nothing is published.
    """
    root = lake_root(settings.lake)
    ledger, current = Ledger(root=root), published(root)
    record = _good_record(ledger, root, run_id)
    if current.run_id != run_id:
        _publish(ledger, root, record, current)
        display.say(f"item_neighbors version {published(root).version} holds run {run_id} again, instead of {current.run_id}")
    elif not settings.online.enabled or serves_published(settings):
        raise PublishError(f"run {run_id} is the current one (item_neighbors version {current.version}): there is nothing to roll back")
    with Processes() as processes:
        follow_online(settings, like=record, display=display, now=now or datetime.now(UTC), processes=processes)
    return published(root).version


def _publish(ledger: Ledger, root: str, record: StageRecord, current: Published) -> None:
    with recorded(ledger, STAGE, run_id=record.run_id, run_date=record.run_date, like=record) as attempt:
        attempt.inputs[ITEM_NEIGHBORS_HISTORY.name] = open_table(root, ITEM_NEIGHBORS_HISTORY).version()
        because = {"rolled_back_from": current.run_id}
        version = publish_run(root, record.run_id, expected=current.version, inputs=record.input_versions, because=because)
        attempt.outputs[ITEM_NEIGHBORS.name] = version


def _good_record(ledger: Ledger, root: str, run_id: str) -> StageRecord:
    """The row of the run's lists: they passed their gate, and are kept."""
    kept = kept_runs(root)
    written = [record for record in ledger.records(run_id=run_id) if record.stage in ("publish_neighbors", "remerge")]
    good = bool(written) and written[-1].status == "succeeded"  # the last attempt is the one whose lists the history holds
    if run_id in kept and good:
        return written[-1]
    passed = {record.run_id for record in ledger.records(status="succeeded") if record.stage in ("publish_neighbors", "remerge")}
    choice = f"runs to roll back to: {', '.join([run for run in kept if run in passed][-_SHOWN_RUNS:]) or 'none'}"
    if written and not good:
        raise PublishError(f"run {run_id} failed, so that its lists are not for publication: {written[-1].error}\n{choice}")
    if good:
        raise PublishError(f"the lists of run {run_id} are not in the history any more; lake.keep_nights says for how long\n{choice}")
    raise PublishError(f"no run {run_id} has written lists\n{choice}")


def main(argv: Sequence[str] | None = None) -> None:
    """Roll back."""
    parser = argparse.ArgumentParser(description="make a kept night the current one again, in Delta and online")
    parser.add_argument("--to-run", required=True, metavar="RUN", help="run id, as in the tables runs and item_neighbors_history")
    add_config(parser)

    def run() -> None:
        values = parser.parse_args(argv)
        roll_back(settings_of(values), values.to_run, display=Display())

    report_errors(run)


if __name__ == "__main__":
    main()
