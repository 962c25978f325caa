"""The process that forks Spark's Python workers on this machine, `spark.python.daemon.module`, with less to do between tasks.

After each task a worker collects garbage, and looks for it through all that was ever imported. Here it passes over what its tasks have
imported. That goes with Unix sockets in the place of TCP, which waits for acknowledgements (`jobs.session`): either alone brings next to
nothing, as the one wait hides the other; both together are most of what a task costs that does nothing.
"""

import gc
import sys
from io import BufferedReader
from typing import BinaryIO

from pyspark import daemon

import conf  # noqa: F401 - so that workers keep the lists of archives from their first task on

_do_task = daemon.worker_main
_frozen = set[str]()


def _work(infile: BufferedReader, outfile: BinaryIO) -> None:
    """The next task. Where none comes, as Spark has ended, pyspark would answer all the same, and print that nobody listens."""
    if not infile.peek(1):
        sys.exit(1)
    _do_task(infile, outfile)
    if imported := sys.modules.keys() - _frozen:
        _frozen.update(imported)
        gc.collect()
        gc.freeze()


if __name__ == "__main__":
    daemon.worker_main = _work
    daemon.manager()  # type: ignore[no-untyped-call]
