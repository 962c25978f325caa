"""The explorer in a real browser, over a lake written by hand: finding, walking, comparing, voting; hostile titles stay text.

What needs a night that was really made (the mix, and votes that come back as labels) is tested in test_nightly.
"""

import base64
import csv
import http.client
import io
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Page, expect

from conf.errors import MachineError, TableError
from conf.settings import Settings, load_settings
from conf.tables import ITEM_NEIGHBORS, RELEVANCE_FEEDBACK, RUNS
from jobs.backtest_lists import backtest_lake, keep_lists
from jobs.backtest_results import VALIDATION
from jobs.explore import check_port
from jobs.explorer import catalog
from jobs.explorer.app import Explorer, View, no_formula
from jobs.explorer.catalog import Catalog, build_catalog, fold
from jobs.reader import artifacts_of, lake_root, open_table
from tests.browser import launched, needs_chromium, served, sticking_out, watched, window
from tests.lakes import NIGHT, RUN, RUN_BEFORE, write_lake, write_table
from tests.worlds import write_config

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==")
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}"
TITLES = {
    "soup": "Condensed soup, 10 OZ",
    "stew": "Beef stew",
    "milk": "Milch für Kinder",
    "evil/1?&<b>": HOSTILE,
    "tea": "Green tea",
    "gone": "Long gone lemonade",
    "unseen": "Unseen umbrella",
}
NUM_USER_DAYS = {name: 0 if name == "unseen" else 70 - 10 * place for place, name in enumerate(TITLES)}
OTHERS = [name for name in TITLES if name not in ("soup", "gone")]


def item(name: str) -> dict[str, object]:
    attributes = [("image_url", "https://images.invalid/soup.png"), ("maker", HOSTILE)] if name == "soup" else []
    return {
        "item_id": name,
        "title": TITLES[name],
        "num_user_days": NUM_USER_DAYS[name],
        "attributes": attributes,
        "tags": [HOSTILE] if name == "soup" else None,
        "in_catalog": name != "gone",
        "text": f"Soup for two. {HOSTILE}" if name == "soup" else None,
    }


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    heads = {"merged": ["stew", "tea", "evil/1?&<b>", "milk"], "engagement": ["milk", "tea"], "relevance": ["stew", "tea", "evil/1?&<b>"]}
    lists = {("soup", head): ids for head, ids in heads.items()} | {(name, "merged"): ["soup"] for name in OTHERS}
    before = {("soup", "merged"): ["gone", "stew", "milk", "evil/1?&<b>"]}
    made = write_lake(tmp_path_factory.mktemp("explorer"), [item(name) for name in TITLES], lists=lists, before=before)
    judge(made)
    return made


def judge(settings: Settings) -> None:
    """Two backtests of the lake, of which the later one failed; the first kept a list of soup: tea, then stew."""
    lake = backtest_lake(settings.lake)
    done = {"stage": VALIDATION, "attempt": 1, "run_date": NIGHT - timedelta(days=30)}
    runs = [done | {"run_id": "good", "status": "succeeded"}, done | {"run_id": "bad", "status": "failed"}]
    write_table(Path(lake_root(lake)), RUNS, runs)
    folder = artifacts_of(lake, "good") / "backtest"
    folder.mkdir(parents=True)
    lists = {"als": np.array([[2, 1, -1]], np.int32), "ease": np.array([[-1, -1, -1]], np.int32)}
    keep_lists(folder, ["soup", "stew", "tea"], np.array([0], np.int32), lists)


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str


def ask(address: str, path: str, *, body: object = None, **headers: str) -> Answer:
    """One request, redirects not followed; a body is posted, as JSON unless the headers say otherwise."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    content = None if body is None else json.dumps(body)
    given = ({"content-type": "application/json"} if body is not None else {}) | {name.replace("_", "-"): headers[name] for name in headers}
    connection.request("GET" if body is None else "POST", path, body=content, headers=given)
    answer = connection.getresponse()
    found = Answer(status=answer.status, headers={k.lower(): v for k, v in answer.getheaders()}, text=answer.read().decode())
    connection.close()
    return found


@dataclass(frozen=True, kw_only=True)
class Opened:
    page: Page
    address: str
    faults: list[str]

    def titles(self, head: str) -> list[str]:
        return self.page.locator(f"#list-{head} .neighbor .what > a").all_inner_texts()


@pytest.fixture(scope="module")
def address(settings: Settings) -> Iterator[str]:
    with served(settings) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def opened(address: str, browser: Browser) -> Iterator[Opened]:
    context = window(browser)
    context.route("https://images.invalid/*", lambda route: route.fulfill(body=PIXEL, content_type="image/png"))
    page, faults = watched(context)
    yield Opened(page=page, address=address, faults=faults)
    context.close()


@needs_chromium
def test_an_item_is_found_by_typing_and_its_lists_are_walked_by_keyboard(opened: Opened) -> None:
    page = opened.page
    page.goto(opened.address)
    page.keyboard.press("/")
    expect(page.locator("#find")).to_be_focused()
    page.keyboard.type("condnsed sou")
    options = page.get_by_role("listbox", name="Items found").get_by_role("option")
    expect(options).to_have_count(1)
    page.keyboard.press("ArrowDown")
    expect(options.and_(page.get_by_role("option", selected=True))).to_contain_text("Condensed soup")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(TITLES["soup"])
    assert opened.titles("merged") == ["Beef stew", "Green tea", HOSTILE, "Milch für Kinder"]
    assert page.locator("#list-engagement .badge.both").count() == page.locator("#list-relevance .badge.both").count() == 1
    expect(page.get_by_role("status")).to_contain_text("1 item found by both heads")
    page.get_by_role("link", name="Beef stew").first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Beef stew")
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text(TITLES["soup"])
    expect(page.get_by_role("status")).to_contain_text("the index of night")  # this night has none, so that nothing can be mixed
    assert [fault for fault in opened.faults if "409" not in fault] == []


@needs_chromium
def test_hostile_titles_are_text_and_nothing_else(opened: Opened) -> None:
    page = opened.page
    page.goto(opened.address + View(item="evil/1?&<b>").link())
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
    page.goto(opened.address + View(item="soup").link(since=RUN_BEFORE, by="cosine"))
    expect(page.locator("#about")).to_have_text(f"Soup for two. {HOSTILE}")
    page.locator("#find").fill("<script>alert(1)")
    expect(page.get_by_role("listbox", name="Items found").get_by_role("option")).to_have_text(HOSTILE + "shop · evil/1?&<b>")
    page.goto(f"{opened.address}/?q={HOSTILE}")
    page.goto(f"{opened.address}/?item={HOSTILE}")
    expect(page.get_by_role("alert")).to_contain_text(HOSTILE)
    assert page.locator("main script, main img").count() == 0
    assert [fault for fault in opened.faults if "404" not in fault and "409" not in fault] == []


@needs_chromium
def test_changes_baselines_and_votes_are_shown_and_the_address_keeps_them(settings: Settings, opened: Opened) -> None:
    page = opened.page
    page.goto(opened.address + "/?item=soup")
    page.get_by_label("Changes since").select_option(RUN_BEFORE)
    page.wait_for_url("**since=*")
    page.get_by_label("Compare with").select_option("cosine")
    page.wait_for_url("**by=cosine*")
    assert page.locator("#list-merged .neighbor .what").first.inner_text().startswith("Beef stew ▲\N{NO-BREAK SPACE}1")
    assert page.locator("#list-merged .badge.new").count() == 1
    assert page.locator("#list-merged .gone").inner_text() == TITLES["gone"]
    assert opened.titles("cosine")[:2] == [TITLES["stew"], TITLES["milk"]]
    for name, expected in {"als": ["tea", "stew"], "ease": [], "popularity": ["stew", "milk", "evil/1?&<b>", "tea", "unseen"]}.items():
        page.get_by_label("Compare with").select_option(name)
        page.wait_for_url(f"**by={name}*")
        assert opened.titles(name) == [TITLES[other] for other in expected], name
    expect(page.locator("#list-popularity")).to_contain_text("score 60")
    expect(page.locator("optgroup").nth(1)).to_have_attribute("label", "trained, of the backtest of 2024-03-01")
    up = page.locator("#list-merged .neighbor").first.get_by_role("button", name="Relevant", exact=True)
    up.click()
    expect(up).to_have_attribute("aria-pressed", "true")
    page.reload()
    for head in ("merged", "relevance"):
        expect(page.locator(f"#list-{head} [data-item=stew] [data-grade='1']")).to_have_attribute("aria-pressed", "true")
    up.click()
    expect(up).to_have_attribute("aria-pressed", "false")
    votes = open_table(settings.lake.root, RELEVANCE_FEEDBACK).to_pyarrow_table().sort_by("rated_at").to_pylist()
    assert [(vote["other_item_id"], vote["grade"], vote["head"], vote["run_id"]) for vote in votes] == [
        ("stew", 1.0, "merged", RUN),
        ("stew", None, "merged", RUN),
    ]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_a_phone_and_work_without_scripts(address: str, browser: Browser, dark: bool) -> None:
    context = window(browser, width=360, height=740, dark=dark, scripts=dark)
    page, _ = watched(context)
    for path in ("/", "/?q=soup", f"/?item=soup&since={RUN_BEFORE}&by=cosine"):
        page.goto(address + path)
        assert page.locator("h1").count() == 1
        if dark:
            assert not sticking_out(page), path
    background = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor") if dark else ""
    assert not dark or max(map(int, background.strip("rgb()").split(","))) < 60
    if not dark:
        page.get_by_role("searchbox").or_(page.get_by_role("combobox", name="Find an item")).first.fill("stew")
        page.keyboard.press("Enter")
        page.get_by_role("link", name="Beef stew").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Beef stew")
    context.close()


@needs_chromium
def test_definitions_are_shown_to_fingers_and_keyboards(address: str, browser: Browser) -> None:
    context = window(browser, width=390, height=780, touch=True)
    context.route("https://images.invalid/*", lambda route: route.fulfill(body=PIXEL, content_type="image/png"))
    page, faults = watched(context)
    page.goto(f"{address}/?item=soup&since={RUN_BEFORE}")
    said = page.get_by_role("tooltip")
    expect(said).to_be_hidden()
    page.get_by_text("user-days", exact=True).tap()
    expect(said).to_have_text("Days with an engagement, summed over users")
    score = page.locator("#list-merged .neighbor").nth(1).get_by_text("score")  # not a stop of the Tab key, as the first one says the same
    assert score.evaluate("e => e.tabIndex") == -1
    score.tap()
    expect(said).to_contain_text("What the merged list is ordered by")
    assert sticking_out(page) == []
    page.get_by_role("heading", level=1).tap()
    expect(said).to_be_hidden()
    page.locator("#list-merged").get_by_role("heading").get_by_text("merged").tap()
    expect(said).to_contain_text("What is offered")
    page.locator("#list-relevance .why").first.tap()
    expect(said).to_contain_text("users: known to the same users")
    stops = page.locator("dl [title]")
    stops.first.focus()
    for place in range(1, stops.count()):
        page.keyboard.press("Tab")
        expect(stops.nth(place)).to_be_focused()
        expect(said).to_have_text(stops.nth(place).get_attribute("title") or "")
        assert stops.nth(place).get_attribute("aria-describedby") == said.get_attribute("id")
    page.keyboard.press("Escape")
    expect(said).to_be_hidden()
    assert [fault for fault in faults if "409" not in fault] == []
    context.close()


def test_only_this_machine_is_answered_and_bad_requests_are_refused(address: str) -> None:
    assert ask(address, "/", host="elsewhere.example").status == 400
    assert "default-src 'self'" in ask(address, "/").headers["content-security-policy"]
    vote = {"item_id": "soup", "other_item_id": "stew", "grade": 1, "head": "merged"}
    for wrong in ({"other_item_id": "soup"}, {"grade": 2}, {"item_id": ""}, {"more": 1}):
        assert ask(address, "/feedback", body=vote | wrong).status == 422, wrong
    # a form of another site can send this without asking first; JSON it cannot
    assert ask(address, "/feedback", body=vote, content_type="text/plain").status == 422
    assert ask(address, "/static/../app.py").status == 404
    assert ask(address, "/random?kind=hot").headers["location"] == "/?item=soup"
    assert ask(address, "/random?kind=cold").headers["location"] == "/?item=unseen"
    rows = json.loads(ask(address, "/export?item=soup&format=json").text)
    lines = list(csv.DictReader(io.StringIO(ask(address, "/export?item=soup&format=csv").text)))
    shown = json.loads(ask(address, View(item="soup", since=RUN_BEFORE, by="als").export("json")).text)
    assert [(row["title"], row["score"]) for row in shown if row["head"] == "als"] == [("Green tea", None), ("Beef stew", None)]
    assert [row["change"] for row in shown if row["head"] == "merged"] == ["+1", "new", "+1", "-1"]
    assert no_formula("=HYPERLINK(1)") == "'=HYPERLINK(1)"
    assert [row["title"] for row in rows] == [line["title"] for line in lines]
    assert [(row["head"], row["rank"]) for row in rows][:5] == [*(("merged", rank) for rank in range(1, 5)), ("engagement", 1)]


def test_what_is_missing_is_said(address: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no table item_neighbors under"):
        Explorer(settings=load_settings(str(write_config(tmp_path)))).night()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MachineError, match=r"port \d+ of 127.0.0.1 cannot be used.*--set explorer.port"):
            check_port(taken.getsockname()[1])
    for what in ("mix=0.3", "by=content"):  # both need the index, which this night does not have
        found = ask(address, f"/?item=soup&{what}")
        assert found.status == 409
        assert "run the night again" in found.text


def test_another_night_is_shown_once_it_is_published(tmp_path: Path) -> None:
    lists = {("soup", "merged"): ["stew"]}
    made = write_lake(tmp_path, [item("soup"), item("stew")], lists=lists, before={})
    explorer = Explorer(settings=made)
    assert [neighbor.item.item_id for neighbor in explorer.night().lists("soup")["merged"]] == ["stew"]
    first = explorer.night()
    assert explorer.night() is first
    open_table(made.lake.root, ITEM_NEIGHBORS).delete("item_id = 'soup'")
    open_table(made.lake.root, ITEM_NEIGHBORS).restore(0)
    assert explorer.night() is not first
    assert explorer.night().version == 2


@pytest.fixture(scope="module")
def titles(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    path = tmp_path_factory.mktemp("catalog") / "c.sqlite"
    extra = {
        "m1": "Milk 100%_fat",
        "m2": "Milkshake",
        "p": "7 up",
        "jp": "緑茶のティーバッグ",
        "none": None,
        "buttermilk": "Cultured buttermilk",
    }
    named = TITLES | extra
    days = [*NUM_USER_DAYS.values(), 5, 500, 4, 3, 2, 1]
    columns = {name: pa.nulls(len(named)) for name in catalog.FEATURES} | {
        "item_id": list(named),
        "title": list(named.values()),
        "in_catalog": [name != "gone" for name in named],
        "num_user_days": days,
    }
    popularity = pa.table({name: pa.array([], pa.string()) for name in catalog.POPULARITY})
    texts = pa.table({name: pa.array([], pa.string()) for name in catalog.TEXTS})
    build_catalog(pa.table(columns), popularity, texts, path, image_attribute="image_url")
    return Catalog.open(path)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("soup", ["soup"]),
        ("CONDENSED", ["soup"]),
        ("milch fur", ["milk"]),  # without the accent, and by the start of the second word
        ("kinder milch", ["milk"]),  # in any order
        ("milk", ["milk", "m2", "m1", "buttermilk"]),  # the id, then words that begin so, then words that hold it
        ("mi", ["m2", "milk", "m1"]),
        ("soop", ["soup"]),
        ("condesned", ["soup"]),  # transposed
        ("lemonade", []),  # it left the catalog
        ("gone", ["gone", "none"]),  # but its id is known, and something is spelled nearly so
        ("7", ["p"]),
        ("100%_", ["m1"]),
        ("%", []),
        ("緑茶の", ["jp"]),
        ("none", ["none"]),
        ('"*^ OR NEAR(', []),
        ("   ", []),
    ],
)
def test_titles_are_found_as_people_write_them(titles: Catalog, query: str, found: list[str]) -> None:
    assert [item.item_id for item in titles.search(query, k=10)] == found


def test_a_title_is_folded() -> None:
    assert fold("  Crème   BRÛLÉE ") == "creme brulee"


@needs_chromium
def test_everything_that_is_operated_has_a_name_and_images_are_shown(opened: Opened) -> None:
    """What a screen reader says: landmarks, one main heading, a name for every control, lists as lists; and nothing twice."""
    page = opened.page
    page.goto(f"{opened.address}/?item=soup&by=als")
    for role in ("banner", "main", "contentinfo", "search"):
        expect(page.get_by_role(role)).to_have_count(1)  # type: ignore[arg-type]
    operated = page.locator("a, button, input:not([type=hidden]), select").filter(visible=True)
    names = operated.evaluate_all("all => all.map(e => e.ariaLabel || e.labels?.[0]?.innerText.trim() || e.innerText.trim())")
    assert len(names) > 30
    assert all(names), names
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(later - sooner <= 1 for sooner, later in pairwise(levels))
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    for attribute in ("aria-labelledby", "aria-controls", "for"):
        pointed = page.locator(f"[{attribute}]").evaluate_all(f"all => all.map(e => e.getAttribute('{attribute}'))")
        assert set(pointed) <= set(ids), attribute
    assert page.locator("ol > :not(li)").count() == 0
    expect(page.get_by_role("group", name="Is Beef stew relevant?").first.get_by_role("button")).to_have_count(2)
    image = page.locator(".trigger img")
    assert image.evaluate("e => e.complete && e.naturalWidth") == 1
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the lists")).to_be_focused()
    assert opened.page.evaluate("document.documentElement.lang") == "en"
