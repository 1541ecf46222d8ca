"""The server on a real socket: what it answers, and what it refuses. Every attack is sent as bytes."""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxinterp.commands.main import main
from jaxinterp.core.errors import UserError
from jaxinterp.explore import guard
from jaxinterp.explore.guard import Field, refusal
from jaxinterp.explore.labels import Labels
from jaxinterp.explore.server import READ, listener, server_of
from jaxinterp.explore.state import Explorer


@pytest.fixture(scope="module")
def served(index, subject, dictionary, tmp_path_factory):
    """(port, explorer) of a server that runs in a thread."""
    labels = Labels(tmp_path_factory.mktemp("labels") / "labels.json", index.features)
    explorer = Explorer(index, labels, lambda: (dictionary, subject))
    sock = listener(0)
    server = server_of(explorer, sock)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield sock.getsockname()[1], explorer
    server.should_exit = True
    thread.join(10)


def send(port, data):
    """(status, headers, body) of what these bytes bring."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as wire:
        wire.sendall(data)
        answer = b""
        try:
            while part := wire.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", body)
    return int(first.split()[1]), headers, body


def ask(port, path, body=None, method=None, **headers):
    own = {"Host": f"127.0.0.1:{port}", "Connection": "close"} | {n.replace("_", "-"): v for n, v in headers.items()}
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    if body is not None:
        own = {"Content-Type": "application/json", "Content-Length": str(len(data))} | own
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in own.items() if value is not None]
    return send(port, "\r\n".join([*lines, "", ""]).encode("latin-1") + data)


def answered(port, path, body=None):
    status, _, found = ask(port, path, body)
    return status, json.loads(found)


def test_the_page_and_its_files_come_with_a_policy(served):
    port, _ = served
    for path, kind in (
        ("/", "text/html"),
        ("/app.css", "text/css"),
        ("/app.js", "javascript"),
        ("/data.js", "javascript"),
    ):
        status, headers, body = ask(port, path)
        assert status == 200 and kind in headers["content-type"] and len(body) > 500
        assert (
            "default-src 'none'" in headers["content-security-policy"]
            and headers["x-content-type-options"] == "nosniff"
        )
        assert not [name for name in headers if name.startswith("access-control")] and "server" not in headers
    html = ask(port, "/")[2].decode()
    assert (
        "<style" not in html and "onclick" not in html and not re.search(r"<script(?! src=)", html)
    )  # what the policy takes


def test_reading_and_searching(served):
    port, _ = served
    assert answered(port, "/api/about")[1]["features"] == 128
    status, found = answered(port, "/api/features?order=largest&first=5&count=7")
    assert status == 200 and len(found["rows"]) == 7
    assert answered(port, f"/api/feature?i={found['rows'][0]['i']}")[1]["fired"] > 0
    assert answered(port, "/api/search?kind=token&q=a")[1]["rows"]
    assert answered(port, "/api/search?kind=id&q=12")[1]["rows"][0]["i"] == 12
    assert answered(port, "/api/compare")[0] == 400 and "--compare" in answered(port, "/api/other?i=1")[1]["error"]


def test_computing_and_labelling(served):
    port, explorer = served
    busiest = int(np.argmax(explorer.index.sums.fired))
    assert answered(port, "/api/text", {"text": "abc"})[1]["tokens"] == ["a", "b", "c"]
    steered = answered(port, "/api/steer", {"i": busiest, "prompt": "abc", "strength": 3, "new": 3, "seed": 1})[1]
    assert steered["kl"] > 0 and len(steered["before"]) == 8
    assert answered(port, "/api/effect", {"i": busiest})[1]["windows"] == 8
    nasty = '"><img src=x onerror=alert(1)> \u202e'
    assert answered(port, "/api/label", {"i": 3, "label": nasty}) == (200, {"i": 3, "label": nasty})
    assert answered(port, "/api/feature?i=3")[1]["label"] == nasty  # as it is; the page makes text of it
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda i: answered(port, "/api/label", {"i": i, "label": f"l{i}"})[0], range(20, 60)))
    assert done == [200] * 40 and len(answered(port, "/api/labels")[1]) == 41  # none was lost


WRONG = [
    ("/api/feature?i=128", None, "i=128 must be a number from 0 to 127"),
    ("/api/feature?i=-1", None, "i=-1 must"),
    ("/api/feature?i=1e3", None, "i=1e3 must"),
    ("/api/feature", None, "i=None must"),
    ("/api/features?count=100000", None, "count=100000 must"),
    ("/api/features?order=../../etc", None, "order="),
    ("/api/search?kind=token&q=" + "a" * 300, None, "q must be a text of at most 200"),
    ("/api/text", {"text": 7}, "text must be a text"),
    ("/api/text", {"text": ""}, "empty"),
    ("/api/text", {"text": "a" * 600}, "600 tokens: give at most 512"),
    ("/api/text", [1], "must be a JSON object"),
    ("/api/text", b"{", "not JSON"),
    ("/api/text", b"[" * 60_000, "not JSON"),
    ("/api/text", b"\xff", "not JSON"),
    ("/api/steer", {"i": 1, "prompt": "a", "strength": 1e9}, "strength=1000000000.0 must"),
    ("/api/steer", b'{"i": 1, "prompt": "a", "strength": NaN}', "strength=nan must"),
    ("/api/steer", {"i": True, "prompt": "a", "strength": 1}, "i=True must"),
    ("/api/steer", {"i": 1.5, "prompt": "a", "strength": 1}, "whole number"),
    ("/api/steer", {"i": 1, "prompt": "a", "strength": 1, "new": 4000}, "new=4000 must"),
    ("/api/label", {"i": "../../x", "label": "a"}, "i=../../x must"),
    ("/api/label", {"i": 1, "label": "a" * 501}, "at most 500"),
]


def test_what_is_wrong_is_one_clear_line(served):
    port, _ = served
    for path, body, said in WRONG:
        status, found = answered(port, path, body)
        assert status == 400 and said in found["error"] and "\n" not in found["error"], (path, found)


def test_other_hosts_and_other_sites_are_refused(served):
    """DNS rebinding (a foreign name that resolves to 127.0.0.1), cross-site requests, WebSockets, other methods."""
    port, explorer = served
    before = explorer.labels.all()
    for host in (
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"localhost.evil.example:{port}",
        "",
        None,
    ):
        assert ask(port, "/api/about", Host=host)[0] in (400, 403), host
    two = f"GET /api/about HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert send(port, two.encode())[0] in (400, 403)
    for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert ask(port, "/api/about", Host=host)[0] == 200
    label = {"i": 1, "label": "stolen"}
    assert ask(port, "/api/label", label, Origin="http://evil.example")[0] == 403
    assert ask(port, "/api/label", label, Origin="null")[0] == 403
    assert ask(port, "/api/label", label, Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(port, "/api/about", Sec_Fetch_Site="same-site")[0] == 403
    assert ask(port, "/api/label", label, Content_Type="text/plain")[0] == 415  # what a form of another page can send
    assert ask(port, "/api/label", label, Content_Type="application/x-www-form-urlencoded")[0] == 415
    status, headers, _ = ask(port, "/api/label", method="OPTIONS", Origin="http://evil.example")
    assert status in (403, 405) and not [name for name in headers if name.startswith("access-control")]
    assert ask(port, "/api/label", method="PUT")[0] == ask(port, "/", method="TRACE")[0] == 405
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Key": "AAAA",
        "Sec_WebSocket_Version": "13",
    }
    assert ask(port, "/api/none", **upgrade, Origin="http://evil.example")[0] == 403
    assert ask(port, "/api/label")[0] == 405 and ask(port, "/api/feature", label)[0] == 405
    assert explorer.labels.all() == before, "something was written"


PATHS = (
    "/../../../etc/passwd", "/..%2f..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/index.html",
    "/app.js/", "/app.js%00.html", "/api/", "/api/../app.py", "/static/../../server.py", "/labels.json", "/.git/config",
    "/api/about/", "/\\..\\..\\etc\\passwd", "/pages/app.js",
)  # fmt: skip


def test_no_path_leads_to_a_file(served):
    port, _ = served
    for path in PATHS:
        status, _, body = ask(port, path)
        assert status in (400, 404), (path, status)
        assert b"root:" not in body and b"import " not in body, path


def test_sizes_have_limits(served):
    port, _ = served
    assert ask(port, "/api/text", b" " * (guard.MOST_BYTES + 1))[0] == 413
    lying = f"POST /api/text HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    chunked = lying.encode() + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunk * 2 + b"0\r\n\r\n"
    assert send(port, chunked)[0] == 413  # without a length
    assert ask(port, "/api/search?kind=token&q=" + "a" * 3000)[0] == 414
    assert ask(port, "/" + "a" * 70_000)[0] in (400, 414)


def test_an_error_of_ours_is_not_sent(served, monkeypatch):
    port, explorer = served
    monkeypatch.setattr(explorer, "load", None)
    monkeypatch.setattr(explorer, "_loaded", None)
    assert "no model" in answered(port, "/api/text", {"text": "a"})[1]["error"]
    monkeypatch.setattr(explorer, "load", lambda: 1 / 0)
    status, found = answered(port, "/api/text", {"text": "a"})
    assert status == 500 and "ZeroDivision" not in found["error"] and "division" not in found["error"]
    assert answered(port, "/api/about")[0] == 200  # and it goes on


def test_it_listens_on_the_loopback_address_alone():
    sock = listener(0)
    assert sock.getsockname()[0] == "127.0.0.1"
    with pytest.raises(UserError, match=f"port={sock.getsockname()[1]} cannot be opened"):
        listener(sock.getsockname()[1])
    sock.close()
    with pytest.raises(UserError, match="port=70000"):
        listener(70_000)


def test_without_the_check_of_the_host_a_foreign_name_would_be_answered(served, monkeypatch):
    """The broken variant: the same request passes when the names are not looked at."""
    port, _ = served
    headers = [(b"host", b"evil.example")]
    assert refusal("GET", "/api/about", headers, port) is not None
    monkeypatch.setattr(guard, "names_of", lambda port: ("evil.example",))
    assert refusal("GET", "/api/about", headers, port) is None
    assert ask(port, "/api/about", Host="evil.example")[0] == 200


def test_fields_say_what_they_should_be():
    assert Field({"a": 3}).whole("a", 0, 5) == 3 and Field({}).number("a", 0, 1, 0.5) == 0.5
    for value in ("3", None, True, [], 10**400, float("inf")):
        with pytest.raises(UserError, match="a="):
            Field({"a": value}).whole("a", 0, 5)
    assert all(name.isalpha() for name in READ)


def test_the_command_line_says_what_is_missing(tmp_path, capsys):
    for words, said in (
        ([tmp_path / "none"], "no folder"),
        ([tmp_path], "give --model"),
        ([tmp_path, "--port", "70000"], "port"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["explore", *map(str, words), "--no-open", *([] if "--port" in words else ["--port", "0"])])
        assert stop.value.code == 2 and said in capsys.readouterr().err
