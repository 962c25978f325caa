"""Bring the current night's lists under a changed `merge_policy`, in Delta and online, without training, retrieval or Spark.

    python -m jobs.query "UPDATE merge_policy SET value = 0.05 WHERE scope = 'default'" --config demo
    python -m jobs.remerge --config demo

Candidates of the published night were kept with their scores. Their merged lists are made anew and written to the history, beside the
night's lists of the heads, as a run of its own: `<run of the night>.m<version of merge_policy>`, so that the history still says what
was served before, and `jobs.rollback` can go back to it.
"""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from threading import Thread

from deltalake import DeltaTable

from conf.errors import PublishError
from conf.settings import Settings
from conf.tables import ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY, MERGE_POLICY
from jobs.arguments import add_config, report_errors, settings_of
from jobs.ledger import Attempt, Ledger, StageRecord, recorded
from jobs.list_files import commit_lists
from jobs.merged_files import MergedFile, MergeTask, merge_file
from jobs.processes import Processes, import_modules
from jobs.progress import Display
from jobs.publication import Published, base_run, merged_policy, merged_run, publish_run, published
from jobs.publish_online import follow_online
from jobs.reader import artifacts_of, lake_root, open_table
from jobs.retrieval import CANDIDATES
from models.merge import read_policies
from validation.gates import run_gate
from validation.suites import GateContext, rules_for

STAGE = "remerge"
_FOR_GATE = ("great_expectations",)  # imports that take seconds
_FOR_ONLINE = ("feast", "jobs.publish_online")


def remerge(settings: Settings, *, display: Display, now: datetime | None = None) -> Published:
    """Merge, write to the history, gate, publish, follow online; what is done already is not done again.

    Raises:
        PublishError: nothing is published, its candidates were not kept, or somebody else published meanwhile.
        SettingsError: merge_policy has faults.
        GateError: the lists are not fit for publication.
        TableError: the night's index is of other code.
    """
    root = lake_root(settings.lake)
    ledger, current, policy = Ledger(root=root), published(root), open_table(root, MERGE_POLICY)
    _recover(ledger, current)
    like = _record_of(ledger, current.run_id)
    with Processes() as processes:
        if policy.version() == like.input_versions.get(MERGE_POLICY.name):
            display.say(f"the published lists follow version {policy.version()} of merge_policy already")
        else:
            task = _task(settings, root, current, policy)
            ahead = (*_FOR_GATE, *(_FOR_ONLINE if settings.online.enabled else ()))
            Thread(target=import_modules, args=(ahead,)).start()  # while others merge; no end interrupts it
            with recorded(ledger, STAGE, run_id=task.run_id, run_date=current.run_date, like=like) as attempt:
                attempt.inputs |= like.input_versions | {MERGE_POLICY.name: policy.version(), ITEM_NEIGHBORS.name: current.version}
                _write_history(root, current, task, attempt, processes, display)
                if settings.online.enabled:
                    processes.prepare(*_FOR_ONLINE)
                rules = rules_for(STAGE, GateContext(gates=settings.gates, source=settings.source))
                attempt.gates = run_gate(STAGE, attempt.metrics, rules).to_json()
                because = {"merged_again_from": current.run_id}
                version = publish_run(root, task.run_id, expected=current.version, inputs=attempt.inputs, because=because)
                attempt.outputs[ITEM_NEIGHBORS.name] = version
            display.say(f"item_neighbors follows version {policy.version()} of merge_policy: run {task.run_id}")
        follow_online(settings, like=like, display=display, now=now or datetime.now(UTC), processes=processes)
    return published(root)


def _recover(ledger: Ledger, current: Published) -> None:
    """Give the published run its row of `runs` if whoever merged it again was killed just before that was written."""
    policy, merged = merged_policy(current.run_id), ledger.records(run_id=current.run_id, status="succeeded", stage=STAGE)
    if policy is None or merged:
        return
    like = _record_of(ledger, base_run(current.run_id))
    with recorded(ledger, STAGE, run_id=current.run_id, run_date=current.run_date, like=like) as attempt:
        attempt.inputs |= like.input_versions | {MERGE_POLICY.name: policy}
        attempt.outputs[ITEM_NEIGHBORS.name] = current.version
        attempt.notes.append("written later: its lists were published by a process that was killed before it could say so")


def _record_of(ledger: Ledger, run_id: str) -> StageRecord:
    """The row of the job that made a run's lists."""
    made = [record for record in ledger.records(run_id=run_id, status="succeeded") if record.stage in ("publish_neighbors", STAGE)]
    if not made:
        raise PublishError(f"the table runs knows no success of run {run_id}, which item_neighbors holds; run the night again")
    return made[-1]


def _task(settings: Settings, root: str, current: Published, policy: DeltaTable) -> MergeTask:
    night = artifacts_of(settings.lake, base_run(current.run_id))
    if not (night / CANDIDATES).is_dir():
        raise PublishError(
            f"no kept candidates of run {current.run_id} under {night}: only the night that was published last has some, and only with "
            f"retrieval.keep_candidates; `python -m jobs.nightly --run-date {current.run_date}` merges its lists anew"
        )
    return MergeTask(
        index=night / "index",
        candidates=night / CANDIDATES,
        policies=read_policies(policy.to_pyarrow_table().to_pylist()),
        settings=settings.retrieval,
        run_id=merged_run(current.run_id, policy.version()),
        target=f"{root}/{ITEM_NEIGHBORS_HISTORY.name}",
    )


def _write_history(root: str, current: Published, task: MergeTask, attempt: Attempt, processes: Processes, display: Display) -> None:
    """All lists of the run, file by file in worker processes, and one commit; gives the gate its numbers."""
    sources, done = open_table(root, ITEM_NEIGHBORS, current.version).file_uris(), list[MergedFile]()
    with display.watch("merge", lambda: (len(done), len(sources), "files")):
        for merged in processes.deal(partial(merge_file, task=task), sources):
            done.append(merged)
    files = [merged.file for merged in done if merged.file is not None]
    version = commit_lists(root, task.run_id, files, metadata={"run_id": task.run_id, "stage": STAGE})
    attempt.outputs[ITEM_NEIGHBORS_HISTORY.name] = version
    sums = {name: sum(merged.sums[name] for merged in done) for name in done[0].sums}
    num_lists = sums.pop("num_lists")
    attempt.metrics |= sums | {"churn": sums["churn"] / max(1.0, num_lists)}


def main(argv: Sequence[str] | None = None) -> None:
    """Merge again."""
    parser = argparse.ArgumentParser(description="the current lists under a changed merge_policy, in Delta and online")
    add_config(parser)

    def run() -> None:
        values = parser.parse_args(argv)
        remerge(settings_of(values), display=Display())

    report_errors(run)


if __name__ == "__main__":
    main()
