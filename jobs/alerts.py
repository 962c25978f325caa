"""Telling somebody that a night failed: a command of the user's, a webhook, or both."""

import json
import os
import subprocess
import urllib.request
from collections.abc import Callable
from typing import Any

from conf.settings import AlertSettings

_SECONDS = 30


def alert(settings: AlertSettings, failure: dict[str, str], *, say: Callable[[str], None]) -> None:
    """Run the command and call the webhook. The night's own error is what counts: trouble here is said and raises nothing.

    Args:
        settings: whom to tell.
        failure: run_id, run_date, stage, error, report: the body of the webhook, with `text`, a line that chats show.
        say: where trouble is said.
    """
    if settings.command:
        _try("alerts.command", lambda: _run(settings.command, failure), say)
    if url := os.environ.get(settings.webhook_env):
        _try(f"the webhook in {settings.webhook_env}", lambda: _post(url, failure), say)


def _try(what: str, action: Callable[[], Any], say: Callable[[str], None]) -> None:
    try:
        action()
    except Exception as trouble:  # whatever it is: the night's own error is on its way
        say(f"{what} failed, nobody was told: {type(trouble).__name__}")  # its text may hold the URL, which is a secret


def _run(command: list[str], failure: dict[str, str]) -> None:
    words = {f"MTMH_{name.upper()}": text for name, text in failure.items()}
    subprocess.run(command, env=os.environ | words, check=True, timeout=_SECONDS)  # noqa: S603 - the operator's own settings


def _post(url: str, failure: dict[str, str]) -> None:
    if not url.startswith(("https://", "http://")):
        raise ValueError("no web address")
    text = f"mtmh: night {failure['run_id']} failed in {failure['stage']}: {failure['error'].splitlines()[0]}"
    body = json.dumps({"text": text} | failure).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})  # noqa: S310 - checked above
    urllib.request.urlopen(request, timeout=_SECONDS).close()  # noqa: S310 - checked above
