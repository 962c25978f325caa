"""Settings, table declarations and error types: what every other room of the house may import."""

from zipimport import zipimporter


def _keep(archive: zipimporter) -> None:
    """Keep the list of files of an archive on the path: none changes while a process lives.

    Spark has a Python worker forget its import caches before every task, and zipimport then reads the lists of Spark's own archives
    anew, a dozen times: some 0.2 s a task (github.com/python/cpython/issues/103200).
    """


zipimporter.invalidate_caches = _keep  # type: ignore[assignment]
