"""The web page: its doors over real HTTP, and the page itself in headless Chromium."""

import asyncio
import contextlib
import http.client
import json
import socket
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.serving.client import Interaction
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.rpc.validation import wall_clock_us
from tests.waiting import WAIT_S

GAP_US = 1_800_000_000


@pytest.fixture(scope="module", autouse=True)
def _aiohttp(required_module):
    required_module("aiohttp")


@pytest.fixture
def running(shared_toy, shared_triton, start_sidecar):
    return start_sidecar(shared_toy, shared_triton.grpc_url, ui_port=0)


@pytest.fixture
def toy(shared_toy):
    return shared_toy.toys[2026010101]


class Asked:
    """One HTTP exchange with the page's server."""

    def __init__(
        self,
        running,
        path: str,
        body: object = None,
        *,
        method: str | None = None,
        raw: bytes | None = None,
        **headers: str,
    ) -> None:
        where = urllib.parse.urlsplit(running.sidecar.ui_url)
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=WAIT_S)
        if body is not None or raw is not None:
            raw = json.dumps(body).encode() if raw is None else raw
            headers = {"Content-Type": "application/json", **headers}
        connection.request(
            method or ("POST" if raw is not None else "GET"),
            path,
            body=raw,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )
        reply = connection.getresponse()
        self.status = reply.status
        self.headers = reply.headers
        self.text = reply.read().decode()
        connection.close()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def ids(found: Asked, name: str) -> list[str]:
    return [item["item_id"] for item in found.json["lists"][name]["items"]]


def test_the_three_lists_are_the_model_the_mean_and_popularity(running, toy):
    now_us = wall_clock_us()
    running.client.record(
        [Interaction("ada", "item-3", now_us - 2 * GAP_US), Interaction("ada", "item-4", now_us)]
    )
    found = Asked(running, "/api/user?id=ada&k=10")
    state = toy.step(toy.start_state, "item-3")
    assert ids(found, "hiertcn") == toy.best(toy.scores(state, "item-4"), 10)
    mean = toy.vectors[toy.rows("item-4")].mean(axis=0)
    assert ids(found, "mv") == toy.best(toy.vectors @ mean, 10)
    assert found.json["lists"]["mv"]["of"] == "open session"
    # An hour ago is live; this minute is not over, so it does not count yet.
    rest = [item for item in toy.best(toy.popularity, 50) if item != "item-3"]
    assert ids(found, "popularity") == ["item-3", *rest[:9]]
    sessions = found.json["sessions"]
    assert [session["open"] for session in sessions] == [True, False]
    assert [item["item_id"] for session in sessions for item in session["items"]] == [
        "item-4",
        "item-3",
    ]
    assert found.json["release"] == toy.number


def test_a_new_user_has_no_sessions_and_no_mean(running):
    found = Asked(running, "/api/user?id=nobody")
    assert not found.json["known"]
    assert found.json["sessions"] == []
    assert ids(found, "mv") == []
    assert len(ids(found, "hiertcn")) == 20


def test_items_have_their_titles_where_the_release_knows_one(
    toy_repository, triton, start_sidecar, tmp_path
):
    names = {"item-1": "Ginger biscuits", "item-2": "Œuf <b>à la coque</b>"}
    pq.write_table(
        pa.table({"item_id": list(names), "title": list(names.values())}),
        tmp_path / "items.parquet",
    )
    toy_repository.publish(2026010101, items_file=tmp_path / "items.parquet")
    running = start_sidecar(toy_repository, triton.grpc_url, ui_port=0)
    click = {"user_id": "ada", "item_id": "item-2"}
    Asked(running, "/api/interactions", click)
    found = Asked(running, "/api/user?id=ada&k=50").json
    assert [item["title"] for item in found["sessions"][0]["items"]] == [names["item-2"]]
    for ranking in found["lists"].values():
        titles = {item["item_id"]: item["title"] for item in ranking["items"]}
        assert len(titles) == 50
        assert {item_id: title for item_id, title in titles.items() if title} == names


def test_users_of_the_release_are_suggested_the_last_active_first(running):
    users = Asked(running, "/api/users").json["users"]
    assert users == ["user-7", *(f"user-{n}" for n in range(7))]


def test_a_recorded_click_is_durable_and_counted(running):
    click = {"user_id": "eve", "item_id": "item-9"}
    assert Asked(running, "/api/interactions", click).json["accepted"] == 1
    assert [entry.item_id for entry in running.client.get_user("eve").journal] == ["item-9"]
    assert running.value("hiertcn_requests_total", method="RecordInteractions", code="OK") == 1
    status = Asked(running, "/api/status").json
    assert status["requests"]["RecordInteractions"]["OK"] == 1
    assert len(status["latency"]["RecordInteractions"]) == len(status["bounds_s"]) + 1
    assert status["latency"]["RecordInteractions"][-1] == 1


def test_live_figures_are_those_of_all_processes_that_answer():
    from hiertcn.serving.ui.figures import live_figures, summed

    processes = [Metrics(), Metrics()]
    for metrics in processes:
        metrics.requests.labels("Recommend", "OK").inc(3)
        metrics.request_seconds.labels("Recommend").observe(0.004)
        metrics.fallbacks.labels("popularity").inc()
    processes[1].requests.labels("Recommend", "UNAVAILABLE").inc()
    other = processes[1].serve("127.0.0.1", 0)
    try:
        found = asyncio.run(live_figures(processes[0], "127.0.0.1", [other.port, 1]))
    finally:
        other.stop()
    assert found["processes"] == 2
    assert found == {"processes": 2, **summed(m.registry.collect() for m in processes)}
    assert found["requests"] == {"Recommend": {"OK": 6, "UNAVAILABLE": 1}}
    at = found["bounds_s"].index(0.005)
    assert found["latency"]["Recommend"][at - 1 : at + 1] == [0, 2]
    assert found["fallbacks"] == 2


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/user?id=", None, "id is empty"),
        ("/api/user?id=ada&k=0", None, "k is '0'"),
        ("/api/user?id=ada&k=1e3", None, "k is '1e3'"),
        ("/api/user?id=" + "a" * 600, None, "id has 600 bytes"),
        ("/api/interactions", {"user_id": "ada"}, "item_id is empty"),
        ("/api/interactions", {"user_id": 7, "item_id": "x"}, "user_id is a JSON int"),
        ("/api/interactions", {"user_id": "\ud800", "item_id": "x"}, "not valid Unicode"),
        ("/api/interactions", ["ada"], "is a JSON list"),
    ],
)
def test_bad_requests_are_answered_in_words(running, path, body, said):
    found = Asked(running, path, body)
    assert found.status == 400
    assert said in found.json["error"]


def test_what_is_not_there_and_what_is_too_large_is_answered_in_words(running):
    assert Asked(running, "/etc/passwd").status == 404
    assert Asked(running, "/../options.py").status == 404
    assert Asked(running, "/api/user", {}).status == 405
    assert Asked(running, "/api/interactions", raw=b"{nonsense").status == 400
    large = Asked(running, "/api/interactions", raw=b" " * (100 << 10))
    assert large.status == 413
    assert "too large" in large.json["error"]


def test_another_sites_page_cannot_use_the_doors(running):
    click = {"user_id": "ada", "item_id": "item-1"}
    for headers, status in (
        ({"Content_Type": "text/plain"}, 400),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 400),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Host": "rebound.example"}, 403),
    ):
        assert Asked(running, "/api/interactions", click, **headers).status == status, headers
    assert running.client.get_user("ada") is None
    page = Asked(running, "/")
    assert "Access-Control-Allow-Origin" not in page.headers
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy


def test_the_page_asks_for_the_same_tokens_and_rates_as_grpc(
    shared_toy, shared_triton, start_sidecar, tmp_path
):
    reader, writer = "a-token-to-read-with", "a-token-to-write-with"
    (tmp_path / "tokens").write_text(f"read {reader}\nread,write {writer}\n")
    running = start_sidecar(
        shared_toy,
        shared_triton.grpc_url,
        ui_port=0,
        token_file=tmp_path / "tokens",
        rate_limit=3.0,
    )
    click = {"user_id": "ada", "item_id": "item-1"}
    assert Asked(running, "/").status == 200
    refused = Asked(running, "/api/status")
    assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert Asked(running, "/api/status", Authorization=f"Bearer {reader}").status == 200
    assert Asked(running, "/api/interactions", click, Authorization=f"Bearer {reader}").status == (
        403
    )
    assert Asked(running, "/api/interactions", click, Authorization=f"Bearer {writer}").status == (
        200
    )
    limited = [
        Asked(running, "/api/status", Authorization=f"Bearer {reader}").status for _ in range(20)
    ]
    assert 429 in limited


def test_a_port_in_use_is_said(running, shared_toy, shared_triton, start_sidecar, tmp_path):
    port = urllib.parse.urlsplit(running.sidecar.ui_url).port
    with pytest.raises(InputError, match=f"--ui-port {port} on 127.0.0.1 cannot be bound"):
        start_sidecar(
            shared_toy, shared_triton.grpc_url, ui_port=port, state_dir=tmp_path / "other"
        )


def test_the_page_loads_nothing_from_elsewhere(running):
    for path in ("/", "/app.js", "/style.css"):
        text = Asked(running, path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.replace("http://localhost", "") or path == "/app.js"
        assert "//cdn" not in text
        assert "@import" not in text


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=_JSON | st.dictionaries(st.sampled_from(["user_id", "item_id", "event_type"]), _JSON),
    query=st.dictionaries(st.sampled_from(["id", "k", "seen"]), st.text(max_size=30)),
    raw=st.binary(max_size=50),
)
def test_no_request_whatever_makes_the_page_fail(running, body, query, raw):
    surrogates_kept = urllib.parse.urlencode(query, errors="surrogatepass")
    for found in (
        Asked(running, "/api/interactions", raw=json.dumps(body).encode()),
        Asked(running, "/api/interactions", raw=raw),
        Asked(running, f"/api/user?{surrogates_kept}"),
    ):
        assert found.status in (200, 400), found.text
        if found.status == 400:
            assert found.json["error"]


def test_raw_bytes_on_the_port_end_their_connection_and_nothing_else(running):
    where = urllib.parse.urlsplit(running.sidecar.ui_url)
    for sent in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET " * 5000):
        with (
            contextlib.suppress(ConnectionError),
            socket.create_connection((where.hostname, where.port), timeout=WAIT_S) as connection,
        ):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert Asked(running, "/api/status").status == 200


@pytest.fixture(scope="module")
def browser(required_program, required_module) -> Iterator[Any]:
    required_module("selenium")
    from selenium import webdriver

    chromium, driver = required_program("chromium"), required_program("chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--force-prefers-reduced-motion",
            f"--user-data-dir={profile}",
            "--window-size=1400,1000",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        found = webdriver.Chrome(options, webdriver.ChromeService(driver))
        yield found
        found.quit()


@pytest.fixture
def until(browser) -> Callable[[Callable[[], Any]], Any]:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(
        browser,
        WAIT_S,
        poll_frequency=0.05,
        ignored_exceptions=[StaleElementReferenceException],
    )
    return lambda holds: wait.until(lambda _: holds())


class Page:
    """What a person sees and does."""

    def __init__(self, browser, until) -> None:
        self._browser = browser
        self._until = until

    def all(self, css: str) -> list[Any]:
        return self._browser.find_elements("css selector", css)

    def text(self, css: str) -> str:
        return self.all(css)[0].text

    def type(self, css: str, text: str) -> None:
        field = self.all(css)[0]
        field.clear()
        field.send_keys(text + "\n")

    def items(self, name: str) -> list[str]:
        return [
            button.get_attribute("data-item") for button in self.all(f"[data-list={name}] button")
        ]

    def show(self, user: str) -> None:
        self._until(lambda: self.all("#user"))
        self.type("#user", user)
        self._until(lambda: len(self.items("hiertcn")) == 20)


def test_a_click_changes_the_list_in_front_of_the_user(running, toy, browser, until):
    from selenium.webdriver.common.keys import Keys

    browser.get(running.sidecar.ui_url)
    page = Page(browser, until)
    until(lambda: page.text("#release") == str(toy.number))
    page.show("ada")
    assert page.items("hiertcn") == toy.best(toy.scores(toy.start_state), 20)
    assert page.items("mv") == []
    assert "new user" in page.text("#sessions")

    clicked = page.items("popularity")[3]
    page.all(f"[data-list=popularity] button[data-item={clicked}]")[0].click()
    expected = toy.best(toy.scores(toy.start_state, clicked), 20)
    until(lambda: page.items("hiertcn") == expected)
    until(lambda: "items are new" in page.text("#said"))
    assert page.all(".change")
    assert "Open session" in page.text("#sessions")
    assert clicked in page.text("#sessions")
    mean = toy.vectors[toy.rows(clicked)].mean(axis=0)
    assert page.items("mv") == toy.best(toy.vectors @ mean, 20)
    assert [entry.item_id for entry in running.client.get_user("ada").journal] == [clicked]

    page.all("#seen")[0].click()
    until(lambda: clicked not in page.items("mv"))
    best = toy.best(toy.scores(toy.start_state, clicked), 21)
    assert page.items("hiertcn") == [item for item in best if item != clicked][:20]
    page.all("#seen")[0].click()
    until(lambda: page.items("hiertcn") == expected)

    # The same by keyboard alone.
    first = page.all("[data-list=hiertcn] button")[0]
    second = first.get_attribute("data-item")
    first.send_keys(Keys.ENTER)
    until(
        lambda: page.items("hiertcn") == toy.best(toy.scores(toy.start_state, clicked, second), 20)
    )
    until(lambda: page.text("#p50") not in ("…", "–"))
    assert float(page.text("#rate")) >= 0
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def test_errors_and_unknown_items_are_shown_in_words(running, browser, until):
    browser.get(running.sidecar.ui_url)
    page = Page(browser, until)
    page.show("bob")
    page.type("#item", "no-such-item")
    until(lambda: "does not know" in page.text("#said"))
    page.type("#user", "é" * 300)
    until(lambda: "expected at most 512" in page.text("#error"))
    running.stop()
    until(lambda: "does not answer" in page.text("#error"))


def test_the_page_fits_a_phone_and_takes_a_token(
    shared_toy, shared_triton, start_sidecar, tmp_path, browser, until
):
    (tmp_path / "tokens").write_text("read,write a-token-for-the-page\n")
    running = start_sidecar(
        shared_toy, shared_triton.grpc_url, ui_port=0, token_file=tmp_path / "tokens"
    )
    browser.set_window_size(390, 800)
    try:
        browser.get(running.sidecar.ui_url + "#user=user-0")
        page = Page(browser, until)
        until(lambda: page.all("#token")[0].is_displayed())
        page.type("#token", "a-token-for-the-page")
        until(lambda: len(page.items("hiertcn")) == 20)
        wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
        lists = {name: page.all(f"[data-list={name}]")[0] for name in ("hiertcn", "popularity")}
        assert lists["hiertcn"].is_displayed()
        assert not lists["popularity"].is_displayed()
        page.all(".tabs label")[2].click()
        until(lambda: lists["popularity"].is_displayed())
    finally:
        browser.set_window_size(1400, 1000)
