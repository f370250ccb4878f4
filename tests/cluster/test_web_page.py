"""The web page of a cluster, as programs and as a real Chromium see it."""

import http.client
import json
import os
import shutil
import socket
import time
import urllib.parse
from pathlib import Path

import pytest

from tests.cluster.test_cli import busy_client, environment, running

#: Of a script that runs a pipeline of two islands without end.
PIPELINE = """
import sys, threading, torch, torchways as tw
tw.init(*sys.argv[1:])
first, second = (tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=island) for island in (0, 1))

@tw.program(mesh=first)
def train_step(x):
    y = (x @ x).relu()
    z = tw.redistribute(y, second, ("dp",)) * 3
    return (tw.redistribute(z, first, ("dp",)) + y).sum()

array = tw.distribute_tensor(torch.ones(64, 64), first)
print("56.0" if train_step(array).item() > 0 else "", flush=True)
ended = []
threading.Thread(target=lambda: (sys.stdin.read(), ended.append(True)), daemon=True).start()
while not ended:
    train_step(array).item()
tw.shutdown()
"""


def find_chromium():
    """Returns the path of a Chromium; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


class Web:
    """Requests to a cluster's page."""

    def __init__(self, facts):
        self.host, self.port = facts["metrics_address"].split(":")
        state = json.loads(Path(facts["state"]).read_text())
        self.token, self.secret = state["token"], state["operator_secret"]

    def ask(self, path, method="GET", body=None, **headers):
        """Returns the answer's status, headers and text."""
        connection = http.client.HTTPConnection(self.host, int(self.port), timeout=20)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def login(self, secret, **headers):
        form = urllib.parse.urlencode({"token": secret})
        headers = {"Content-Type": "application/x-www-form-urlencoded", **headers}
        return self.ask("/login", "POST", form, **headers)

    def as_operator(self, path):
        return self.ask(path, Authorization=f"Bearer {self.secret}")


@pytest.fixture(scope="module")
def module_environment(tmp_path_factory):
    """As `environment`, for a module."""
    with pytest.MonkeyPatch.context() as patch:
        yield from environment.__wrapped__(patch, tmp_path_factory.mktemp("web"))


@pytest.fixture(scope="module")
def cluster(module_environment):
    with running("--metrics-port", "0", "--islands", "2") as facts:
        yield facts


@pytest.fixture(scope="module")
def web(cluster):
    return Web(cluster)


def test_nothing_is_shown_without_the_token(web):
    for path in ("/api/observation", "/api/programs", "/api/programs/1.svg", "/metrics", "/other"):
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Cookie": f"torchways-{web.port}=operator.99999999999.0"},
        ):
            status, headers, text = web.ask(path, **header)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), path
            assert "/login" in text
    status, headers, _ = web.ask("/")
    assert (status, headers["Location"]) == (303, "/login")
    # A token in the address, which logs keep, is not looked at.
    assert web.ask(f"/metrics?token={web.token}")[0] == 401


def test_a_login_gives_a_cookie_that_is_not_the_token(web):
    for wrong in ("", "wrong", web.token[:-1], web.token + "0"):
        status, headers, text = web.login(wrong)
        assert (status, "Set-Cookie" in headers) == (401, False)
        assert "neither the token nor the operator's secret" in text
    status, headers, _ = web.login(web.token)
    assert (status, headers["Location"]) == (303, "/")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert web.token not in cookie
    own = cookie.split(";")[0]
    assert web.ask("/", Cookie=own)[0] == 200
    assert json.loads(web.ask("/api/observation", Cookie=own)[2])["has_names"] is False
    for changed in (own[:-1] + ("0" if own[-1] != "0" else "1"), own.replace("viewer", "operator")):
        assert web.ask("/api/observation", Cookie=changed)[0] == 401
    # Another site's page cannot log a browser in.
    assert web.login(web.token, Origin="http://example.com")[0] == 403
    assert web.login(web.token, Origin=f"http://{web.host}:{web.port}")[0] == 303


def test_it_is_read_only_and_says_so_to_browsers(web):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        for path in ("/", "/api/observation", "/metrics"):
            assert web.ask(path, method, Authorization=f"Bearer {web.secret}")[0] == 405
    assert web.ask("/login", "POST", "token=" + "x" * 10_000)[0] in (401, 413)
    for path in ("/", "/login", "/static/page.js", "/api/observation", "/nothing"):
        headers = web.as_operator(path)[1]
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/static/page.html"):
        assert web.as_operator(path)[0] == 404
    page = web.as_operator("/")[2] + web.ask("/static/page.js")[2] + web.ask("/static/page.css")[2]
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # it works offline


def test_the_page_has_the_facts_of_top(web, cluster, module_environment):
    with busy_client(module_environment, cluster["address"]) as client:
        name = f"script.py pid {client.pid}"
        deadline = time.monotonic() + 20
        while True:
            facts = json.loads(web.as_operator("/api/observation")[2])
            if (facts["clients"] and facts["clients"][0]["got"] == 1.0) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        [shown] = facts["clients"]
        assert (shown["name"], shown["got"]) == (name, 1.0)
        assert [island["platform"] for island in facts["islands"]] == ["cpu", "cpu"]
        assert facts["address"] == cluster["address"]
        assert facts["executors"][0]["num_programs"] == 1
        assert facts["timeline"][-1]["busy"].keys() == {str(shown["client_id"])}

        nameless = json.loads(web.ask("/api/observation", Authorization=f"Bearer {web.token}")[2])
        assert [item["name"] for item in nameless["clients"]] == [""]
        assert nameless["clients"][0]["client_id"] == shown["client_id"]
        assert "double" not in json.dumps(nameless)
        for path in ("/api/programs", "/api/programs/1.svg"):
            status, _, text = web.ask(path, Authorization=f"Bearer {web.token}")
            assert (status, "operator's secret" in text) == (403, True)

        [program] = json.loads(web.as_operator("/api/programs")[2])
        assert (program["name"], program["client_id"]) == ("double", shown["client_id"])
        status, headers, image = web.as_operator(f"/api/programs/{program['program_id']}.svg")
        assert (status, headers["Content-Type"]) == (200, "image/svg+xml; charset=utf-8")
        assert "double" in image
        assert "script.py:9" in image
    assert web.as_operator("/api/programs/7.svg")[0] == 404


def test_silent_and_many_connections_do_not_hold_up_others(web):
    silent = [socket.create_connection((web.host, int(web.port))) for _ in range(20)]
    try:
        silent[0].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")  # and nothing more
        assert web.as_operator("/api/observation")[0] == 200
        silent[0].settimeout(20)
        assert silent[0].recv(100) == b""
        more = [socket.create_connection((web.host, int(web.port))) for _ in range(100)]
        for one in more:
            one.close()
    finally:
        for one in silent:
            one.close()
    deadline = time.monotonic() + 20
    while True:
        try:
            assert web.as_operator("/api/observation")[0] == 200
            break
        except (http.client.HTTPException, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on PATH (Debian: apt install chromium)")
def test_in_a_real_chromium(web, cluster, module_environment, tmp_path):
    """Screenshots go to the folder that TORCHWAYS_SCREENSHOTS names, which is how docs/ gets its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    folder = Path(os.environ.get("TORCHWAYS_SCREENSHOTS", tmp_path))
    script = module_environment / "pipeline"
    script.mkdir(exist_ok=True)
    seconds = 25 if "TORCHWAYS_SCREENSHOTS" in os.environ else 3
    with (
        busy_client(module_environment, cluster["address"]),
        busy_client(script, cluster["address"], PIPELINE, "train.py"),
        playwright.sync_playwright() as started,
    ):
        browser = started.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            page.set_default_timeout(30_000)
            complaints, hosts = [], set()
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).netloc))
            root = f"http://{web.host}:{web.port}/"

            page.goto(root)
            page.fill("#token", "wrong")
            page.click("button")
            page.get_by_role("alert").wait_for()
            complaints.clear()  # the browser itself notes the status 401
            # The fragment logs in, stays in no history, and reaches no server.
            page.goto("about:blank")
            page.goto(f"{root}login#token={web.secret}")
            page.wait_for_url(root)
            page.get_by_text("train.py pid").first.wait_for()
            assert page.evaluate("document.cookie") == ""  # not for scripts
            page.locator("#timeline rect").first.wait_for(state="attached")
            page.wait_for_timeout(1000 * seconds)
            assert page.locator("#clients tr").count() == 3
            assert page.locator("#islands tr").count() == 3
            assert "no answer" not in page.inner_text("#state")
            page.screenshot(path=folder / "web-page.png", full_page=True)

            page.get_by_role("button", name="train_step").click()
            graph = page.locator("#graph svg")
            graph.wait_for()
            assert "send to @1" in graph.text_content()
            assert "receive from @0" in graph.text_content()
            page.locator("#with-graph").screenshot(path=folder / "web-graph.png")
            assert complaints == []
            assert hosts <= {"", f"{web.host}:{web.port}"}
        finally:
            browser.close()
    assert max((folder / name).stat().st_size for name in ("web-page.png", "web-graph.png")) < 200_000
