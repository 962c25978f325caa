"""The explorer's pages over HTTP, for a browser on the same machine. The address of a page holds all of its state.

    /?item=ID [&k=N] [&since=RUN] [&mix=VALUE] [&by=SCORE]     an item's lists
    /search?q=TEXT   /mixes?item=ID   /export?item=ID&format=csv and what else a page has   POST /feedback

Every text of an item goes through a template that escapes it; the page may run no script but its own.
"""

import csv
import io
import threading
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from conf.errors import MtmhError, TableError
from conf.settings import Settings
from conf.tables import ITEM_NEIGHBORS
from jobs import pages
from jobs.explorer.feedback import Vote, append_vote
from jobs.explorer.night import (
    BASELINES,
    CONTENT,
    FOUND_BY,
    LISTS,
    SCORES,
    Neighbor,
    PublishedNight,
    found_by_both,
    marked,
    to_rows,
    with_votes_and_both,
)
from jobs.explorer.remix import Remixer
from jobs.reader import lake_root, open_table

HOSTS = ("127.0.0.1", "localhost")
_FILES = {"page.css": "text/css", "explore.css": "text/css", "explore.js": "text/javascript", "definitions.js": "text/javascript"}
_NUM_FOUND = 12
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: https: http:; frame-ancestors 'none'; form-action 'self'; "
    "base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, kw_only=True)
class View:
    """What an address asks for."""

    item: str = ""
    k: int = 0
    since: str = ""
    mix: float | None = None
    by: str = ""

    def export(self, format: str) -> str:
        """The address of what this view shows, as a file."""
        return self.link(format=format).replace("/?", "/export?", 1)

    def link(self, **changes: object) -> str:
        """The address of this view with something changed; what is empty is left out."""
        content = {"item": self.item, "k": self.k, "since": self.since, "mix": self.mix, "by": self.by} | changes
        return "/?" + urlencode(
            {name: value for name, value in content.items() if value not in ("", None, 0) or (name == "mix" and value == 0)}
        )


@dataclass(kw_only=True)
class Explorer:
    """The current night, opened anew when another one is published."""

    settings: Settings
    _night: PublishedNight | None = None
    _remixer: Remixer | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def night(self) -> PublishedNight:
        """The night that is published now."""
        with self._lock:
            if self._night is None or open_table(lake_root(self.settings.lake), ITEM_NEIGHBORS).version() != self._night.version:
                self._night = PublishedNight.open(self.settings)
                self._remixer = Remixer(night=self._night)
            return self._night

    def remixer(self) -> Remixer:
        """Of the current night."""
        self.night()
        assert self._remixer is not None
        return self._remixer


def make_app(explorer: Explorer) -> FastAPI:
    """All routes. Handlers are plain functions, which run in threads: reading Delta would block the others."""
    app = FastAPI(title="mtmh explorer", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))  # a page elsewhere cannot pass itself off as this one
    app.middleware("http")(_with_headers)
    app.exception_handler(MtmhError)(_error_page)
    _add_pages(app, explorer)
    _add_data(app, explorer)
    return app


async def _with_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    return response


async def _error_page(request: Request, error: Exception) -> Response:
    if request.url.path in ("/search", "/mixes", "/feedback"):
        return JSONResponse({"error": str(error)}, status_code=409)
    return HTMLResponse(pages.environment().get_template("error.html").render(error=str(error)), status_code=409)


def _add_pages(app: FastAPI, explorer: Explorer) -> None:
    @app.get("/", response_class=HTMLResponse)
    def page(item: str = "", q: str = "", k: int = 0, since: str = "", mix: float | None = None, by: str = "") -> HTMLResponse:
        night = explorer.night()
        shared = {"night": night, "query": q}
        if not item:
            found = night.catalog.search(q, k=50)
            return _render("home.html", 200, found=found, view=View(), missing="", **shared)
        view = View(item=item, k=k, since=since, mix=mix, by=by if by in _baselines(night) else "")
        shown = night.catalog.item(item)
        if shown is None:
            return _render("home.html", 404, found=night.catalog.search(item, k=50), view=View(), missing=item, **shared)
        return _render(
            "item.html",
            200,
            view=view,
            item=shown,
            facts=shown.known,
            text=night.catalog.text_of(item),
            **shared,
            **_item_page(explorer, night, view),
        )

    @app.get("/random")
    def random_item(kind: str = "hot") -> RedirectResponse:
        item = explorer.night().catalog.random_item(kind)
        return RedirectResponse(View(item=item.item_id if item else "").link(), status_code=303)

    @app.get("/report", response_class=HTMLResponse)
    def report() -> HTMLResponse:
        path = explorer.night().artifacts / "report.html"
        if not path.is_file():
            raise TableError(f"no report at {path}; `python -m jobs.nightly` writes one, a stage that runs alone does not")
        own = b64encode(sha256(pages.text("definitions.js").encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'"  # inside it, as it must open from a disk
        return HTMLResponse(path.read_text(encoding="utf-8"), headers={"Content-Security-Policy": policy})

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in _FILES:
            return Response(status_code=404)
        return Response(pages.text(name), media_type=_FILES[name], headers={"Cache-Control": "no-cache"})


def _item_page(explorer: Explorer, night: PublishedNight, view: View) -> dict[str, Any]:
    """What the template of an item shows besides its facts."""
    lists = _lists(explorer, night, view)
    both, votes = found_by_both(lists), night.votes(view.item)
    before = night.ids_of(view.item, view.since) if view.since else {}
    shown = view.k or night.settings.explorer.num_shown
    now = {head: {neighbor.item.item_id for neighbor in neighbors} for head, neighbors in lists.items()}
    gone = {head: [other for other in ids[:shown] if other not in now.get(head, ())] for head, ids in before.items()}
    return {
        "lists": {head: with_votes_and_both(neighbors, votes=votes, both=both) for head, neighbors in lists.items()},
        "gone": {head: list(night.catalog.known(ids).values()) for head, ids in gone.items() if ids},
        "num_both": len(both),
        "shown": shown,
        "longest": max((len(neighbors) for neighbors in lists.values()), default=0),
        "kept_nights": night.kept_nights(),
        "baselines": _baselines(night),
        "groups": _groups(night),
        "meanings": LISTS,
        "scores": SCORES,
        "found_by": FOUND_BY,
    }


def _lists(explorer: Explorer, night: PublishedNight, view: View) -> dict[str, list[Neighbor]]:
    """Every list that a view shows, whole."""
    lists = night.lists(view.item, since=view.since or None)
    if view.mix is not None:
        mixes = explorer.remixer().mixes(view.item)
        nearest = min(mixes.lists, key=lambda value: abs(value - (view.mix or 0.0)))
        lists["merged"] = marked(mixes.lists[nearest], [neighbor.item.item_id for neighbor in lists.get("merged", ())])
    if view.by:
        lists[view.by] = _baseline(explorer, night, view)
    return lists


def _groups(night: PublishedNight) -> dict[str, dict[str, str]]:
    """Baselines and their meaning, by where they come from; without a backtest there are no trained ones."""
    kept = night.kept
    trained = f"As of the backtest's cut {kept.cut}, with its judges' fields withheld; only of triggers that it judged." if kept else ""
    groups = {"of this night": dict(BASELINES)}
    return groups | ({f"trained, of the backtest of {kept.cut}": dict.fromkeys(kept.methods, trained)} if kept else {})


def _baselines(night: PublishedNight) -> dict[str, str]:
    return {name: meaning for group in _groups(night).values() for name, meaning in group.items()}


def _baseline(explorer: Explorer, night: PublishedNight, view: View) -> list[Neighbor]:
    k = night.settings.retrieval.list_length
    if view.by == CONTENT:
        return explorer.remixer().content(view.item, k=k)
    return night.baseline(view.item, view.by, k=k) if view.by in BASELINES else night.trained(view.item, view.by)


def _add_data(app: FastAPI, explorer: Explorer) -> None:
    @app.get("/search")
    def search(q: str = "") -> JSONResponse:
        found = explorer.night().catalog.search(q, k=_NUM_FOUND)
        return JSONResponse([{"item_id": item.item_id, "title": item.title, "category": item.category} for item in found])

    @app.get("/mixes")
    def mixes(item: str, k: int = 0) -> JSONResponse:
        """Merged lists by value of the policy, drawn by the template that drew the page."""
        night = explorer.night()
        made = explorer.remixer().mixes(item)
        published = night.lists(item)
        both, votes = found_by_both(published), night.votes(item)
        ids = [neighbor.item.item_id for neighbor in published.get("merged", ())]
        shown = k or night.settings.explorer.num_shown
        values = [
            {
                "value": value,
                "html": _drawn(View(item=item, k=k), with_votes_and_both(marked(neighbors, ids), votes=votes, both=both)[:shown]),
                "num_changed": sum(neighbor.item.item_id not in ids[:shown] for neighbor in neighbors[:shown]),
            }
            for value, neighbors in made.lists.items()
        ]
        return JSONResponse({"kind": made.kind, "own": made.own, "values": values})

    @app.get("/export")
    def export(item: str, since: str = "", mix: float | None = None, by: str = "", format: str = "json") -> Response:
        night = explorer.night()
        view = View(item=item, since=since, mix=mix, by=by if by in _baselines(night) else "")
        rows = to_rows(item, _lists(explorer, night, view))
        name = f"neighbors.{'csv' if format == 'csv' else 'json'}"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        if format != "csv":
            return JSONResponse(rows, headers=headers)
        return Response(_csv(rows), media_type="text/csv; charset=utf-8", headers=headers)

    @app.post("/feedback")
    def feedback(vote: Vote) -> JSONResponse:
        night = explorer.night()
        append_vote(night.root, vote, run_id=night.run_id)
        return JSONResponse({"grade": vote.grade})


def _render(template: str, status: int, **content: Any) -> HTMLResponse:
    return HTMLResponse(pages.environment().get_template(template).render(**content), status_code=status)


def _drawn(view: View, neighbors: Sequence[Neighbor]) -> str:
    template: Any = pages.environment().get_template("neighbors.html").module
    return str(template.entries(view, "merged", neighbors, SCORES, FOUND_BY))


def no_formula(text: str) -> str:
    """Text that a spreadsheet does not take for a formula; ids stay as they are, as tables are joined by them."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: no_formula(value) if name in ("title", "reason") else value for name, value in row.items()} for row in rows)
    return out.getvalue()
