"""The page of a library: what its server gives to whom, and the page itself in a real browser."""
import base64
import http.client
import io
import json
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import searching
from browser import Browser
from PIL import Image
from searching import CAPTIONS, EVIL, TWIN, VIDEOS, pixels

from clip_ttrt import cli
from clip_ttrt.search import Library, index

pytest.importorskip("av", reason="needs the extra embed")
pytest.importorskip("starlette", reason="needs the extra search")
Server = pytest.importorskip("clip_ttrt.search.serve").Server
SECOND = VIDEOS["play.webm"][2][1]  # shown from its second 2 to 4
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(library):
    server = Server(library, 0)
    thread = threading.Thread(target=server.run, args=([server.socket],), daemon=True)
    thread.start()
    yield server
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def world(demo_artifact, tmp_path_factory):
    files, folder, _ = searching.made_once(tmp_path_factory, demo_artifact.folder)
    with serving(Library(folder)) as server:
        rows = server.library.store.db.execute(
            "SELECT files.id, path, items.id FROM files JOIN items ON file = files.id").fetchall()
        numbers = {Path(os.fsdecode(path)).name: number for number, path, _ in rows}
        items = {Path(os.fsdecode(path)).name: item for _, path, item in rows[::-1]}  # the first
        yield SimpleNamespace(server=server, files=files, numbers=numbers, items=items,
                              folder=folder)


def ask(world, path, headers={}, method="GET", body=None):
    """(status, headers, body) of a request whose path goes as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", world.server.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        if body is not None:
            connection.putheader("Content-Length", len(body))
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def post(world, **asked):
    status, _, body = ask(world, "/api/query", JSON, "POST", json.dumps(asked).encode())
    return status, json.loads(body)


@pytest.mark.parametrize("asked, part", [
    (None, slice(None)), ("bytes=0-", slice(0, None)), ("bytes=100-199", slice(100, 200)),
    ("bytes=0-0", slice(0, 1)), ("bytes=-50", slice(-50, None)), ("bytes=-9999999", slice(None)),
    ("bytes=5-9999999", slice(5, None)), ("bytes=9999999-", 416), ("lines=1-2", 400),
    ("bytes=7-3", 400)])
def test_ranges_of_a_file(world, asked, part):
    data = (world.files / "play.webm").read_bytes()
    status, headers, body = ask(world, f"/file/{world.numbers['play.webm']}", {"Range": asked})
    if isinstance(part, int):
        assert status == part and headers["Content-Range"] in (None, f"bytes */{len(data)}")
        return
    assert body == data[part] and status == (206 if asked else 200)
    assert headers["Content-Type"] == "video/webm" and headers["Accept-Ranges"] == "bytes"
    if asked:
        begin = data.index(body) if len(body) > 1 else 0
        assert headers["Content-Range"] == f"bytes {begin}-{begin + len(body) - 1}/{len(data)}"


def test_a_file_that_has_changed_since(world, demo_artifact, tmp_path):
    (tmp_path / "0.png").write_bytes((world.files / "0.png").read_bytes())
    index(tmp_path / "l", [tmp_path], demo_artifact.folder)
    with serving(Library(tmp_path / "l")) as server:
        here = SimpleNamespace(server=server)
        (tmp_path / "0.png").write_bytes(b"")
        assert [ask(here, path)[0] for path in ("/file/1", "/thumbnail/1")] == [200, 404]
        (tmp_path / "0.png").unlink()
        assert ask(here, "/file/1")[0] == 404


def test_it_answers_this_machine_only_and_no_other_sites(world):
    assert world.server.socket.getsockname()[0] == "127.0.0.1"
    for headers, status in (
            ({"Host": "localhost:9"}, 200), ({"Host": "evil.example"}, 400),
            ({"Host": "127.0.0.1.evil.example:80"}, 400), ({"Host": None}, 400),
            ({"Host": ""}, 400), ({"Host": "127.0.0.1@evil.example"}, 400)):
        for path in ("/", f"/file/{world.numbers['play.webm']}"):
            assert ask(world, path, headers)[0] == status, headers
    # What a browser asks before it sends JSON to another site, and what it sends without asking.
    about = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "content-type"}
    status, headers, _ = ask(world, "/api/query", about, "OPTIONS")
    assert status == 405 and headers["Access-Control-Allow-Origin"] is None
    assert ask(world, "/api/query", {"Content-Type": "text/plain"}, "POST", b"{}")[0] == 400
    _, headers, _ = ask(world, "/")
    assert "default-src 'self'" in headers["Content-Security-Policy"]  # nothing from elsewhere
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_no_path_leads_to_another_file(world):
    broken = world.items["broken.webm"]
    for path in ("/file/../../etc/passwd", "/file/..%2f..%2fetc%2fpasswd", "//etc/passwd",
                 "/file//etc/passwd", "/etc/passwd", "/file/1/../2", "/file/-1", "/file/+1",
                 "/file/1e1", "/file/0x1", "/file/1%00", "/file/%201", "/file/", "/file/999",
                 "/library.db", "/page.html", "/thumbnail/999", f"/thumbnail/{broken}",
                 "/thumbnail/1/..", "/..", "/%2e%2e/library.db", "*"):
        assert ask(world, path)[0] == 404, path
    assert ask(world, "/file/" + "9" * 30)[0] == 400
    assert ask(world, "/", method="DELETE")[0] == 405


def test_what_is_no_query_is_a_sentence(world):
    big = base64.b64encode(b"no picture").decode()
    for asked, words in (({}, "nothing is asked for"), ({"text": " "}, "nothing is asked for"),
                         ({"text": "a +"}, "is no query"), ({"picture": big}, "picture 0"),
                         ({"picture": "?"}, ""), ({"other": 1}, "other"),
                         ({"more": ["../1"]}, ""), ({"more": 3}, "")):
        status, answer = post(world, **asked)
        assert status == 400 and words in answer["error"] and "\n" not in answer["error"], asked
    assert post(world, more=[999])[0] == 404
    for body in (b"{", b"[1]"):
        assert ask(world, "/api/query", JSON, "POST", body)[0] == 400
    path = world.files / "0.png"  # a text here, and no way to a file
    assert post(world, text=str(path))[1]["results"][0]["score"] < 0.9


def test_more_and_less_and_a_picture(world):
    picture = base64.b64encode((world.files / "0.png").read_bytes()).decode()
    [best, *_] = post(world, picture=picture)[1]["results"]
    assert Path(best["path"]).name == "0.png" and best["score"] > 0.99
    plain, less = (post(world, text=CAPTIONS[0], **more)[1]["results"]
                   for more in ({}, {"less": [best["id"]]}))
    more = post(world, text=CAPTIONS[36], more=[best["id"]])[1]["results"]
    assert plain[0]["id"] == best["id"] and len(less) == len(plain) - 1
    assert best["id"] not in [each["id"] for each in less]
    assert {Path(each["path"]).name for each in more[:2]} == {"0.png", "36.png"}


def test_thumbnails_are_of_the_frame(world):
    for name, number, shown in (("0.png", 0, 0), ("play.webm", 3, SECOND), ("ntsc.mp4", 0, 1)):
        status, headers, body = ask(world, f"/thumbnail/{world.items[name] + number}")
        picture = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), int)
        assert status == 200 and headers["Content-Type"] == "image/jpeg"
        distances = np.abs(picture - pixels().astype(int)).mean((1, 2, 3))
        assert picture.shape == (112, 112, 3) and distances.argmin() == shown


def test_a_port_that_is_taken(world, capsys):
    port = str(world.server.port)
    assert cli.main(["search", "serve", str(world.folder), "--port", port]) == 2
    told = capsys.readouterr().err
    assert "Address already in use" in told and port in told and told.count("\n") == 1


def test_without_the_extra_it_says_so(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["search", "serve", str(world.folder)]) == 2
    assert capsys.readouterr().err == (
        "clip_ttrt: uvicorn is missing; pip install 'clip_ttrt[search]' brings it\n")


@pytest.fixture(scope="module")
def browser(world, tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def page(world, browser):
    """The page as it opens."""
    browser("Page.navigate", url="about:blank")
    browser("Page.navigate", url=f"http://127.0.0.1:{world.server.port}/")
    browser.until("document.activeElement?.id === 'text'")
    yield browser
    assert browser.value("window.hit") is None
    thrown = [each for each in browser.events if each["method"] == "Runtime.exceptionThrown"]
    assert not thrown, thrown


def test_without_chromium_the_page_is_not_tested_and_in_ci_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CLIP_TTRT_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no chromium"):
        Browser(tmp_path)
    monkeypatch.setenv("CLIP_TTRT_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="no chromium"):
        Browser(tmp_path)


NAMES = "[...document.querySelectorAll('.card .name')].map((each) => each.textContent)"


def search(page, text):
    """Type a text, and wait for its answer."""
    page.value("document.getElementById('text').select()")
    page.type(text)
    page.press("Enter")
    page.until(f"new URLSearchParams(location.search).get('q') === {json.dumps(text)} && "
               "document.querySelectorAll('.card').length")
    return page.value(NAMES)


def playing(page):
    """Wait for the video to play, and return where it began and what it shows."""
    page.until("document.querySelector('video')?.readyState >= 2")
    begun = page.value("document.querySelector('video').currentTime")
    page.until(f"document.querySelector('video').currentTime > {begun} + 0.05")
    shown = page.value("""(() => {
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.drawImage(document.querySelector("video"), 0, 0, 112, 112);
        return [...canvas.getImageData(0, 0, 112, 112).data];
    })()""")
    shown = np.array(shown).reshape(112, 112, 4)[:, :, :3]
    return begun, np.abs(shown - pixels().astype(int)).mean((1, 2, 3)).argmin()


def test_a_text_is_typed_and_hits_are_seen(world, page):
    names = search(page, CAPTIONS[0])
    assert names[0] == "0.png" and len(names) == 9 + len(VIDEOS) + 1
    page.until("[...document.querySelectorAll('.card > .open img')].slice(0, 5)"
               ".every((each) => each.complete && each.naturalWidth > 0)")
    status, answer = (page.value(f"document.getElementById('{each}').textContent")
                      for each in ("status", "answer"))
    assert status == f"{len(names)} files of 41 pictures and frames"
    assert "(demo, fp16) answered in" in answer and "exact search" in answer
    scores = page.value("[...document.querySelectorAll('.score')].map((each) => each.textContent)")
    assert scores[0].startswith("+") and "σ · closest 2 %" in scores[0]
    assert page.value("document.querySelector('#distribution svg').childElementCount") > 40
    assert EVIL in names and page.value("document.querySelectorAll('main img[src=x]').length") == 0
    if path := os.environ.get("CLIP_TTRT_SCREENSHOT"):
        search(page, f'"{CAPTIONS[SECOND]}" + 0.5*"yellow stars"')
        page.value("Promise.all([...document.images].map((each) => each.decode().catch(() => 0)))")
        shot = Image.open(io.BytesIO(page.screenshot()))
        shot.convert("RGB").quantize(128).save(path, optimize=True)
    page.value("document.getElementById('text').select()")
    page.type("red - red")
    page.press("Enter")
    page.until("document.getElementById('status').textContent.includes('cancel each other')")
    assert page.value(NAMES)  # the last answer stays


def test_a_picture_is_dropped(world, page):
    number = world.numbers["45.png"]
    page.value(f"""fetch("/file/{number}").then((one) => one.blob()).then((blob) => {{
        const transfer = new DataTransfer();
        transfer.items.add(new File([blob], "<b>dropped</b>.png", {{type: "image/png"}}));
        for (const kind of ["dragenter", "dragover", "drop"])
            document.body.dispatchEvent(new DragEvent(kind, {{
                dataTransfer: transfer, bubbles: true, cancelable: true}}));
    }})""")
    page.until(f"({NAMES})[0] === '45.png'")
    assert page.value("document.getElementById('terms').textContent") == "<b>dropped</b>.png ✕"
    assert not page.value("document.body.classList.contains('over')")
    page.click("#terms button")
    page.until("document.getElementById('terms').childElementCount === 0")


def test_more_less_and_what_is_alike(world, page):
    assert set(search(page, CAPTIONS[9])[:1]) <= {"9.png", TWIN}
    toggle = ".card:first-child .actions button:last-child"
    assert page.value(f"document.querySelector('{toggle}').textContent") == "+1 alike"
    assert page.value("document.querySelector('.card .alike').checkVisibility()") is False
    page.click(toggle)
    page.until("document.querySelector('.card .alike').checkVisibility()")
    label = page.value("document.querySelector('.card .alike button').ariaLabel")
    assert label in ("Open 9.png", f"Open {TWIN}")
    page.click(".card:first-child .actions button:nth-child(2)")
    page.until("document.getElementById('terms').textContent.startsWith('Less like 9')")
    page.until(f"!({NAMES})[0].startsWith('9')")  # nor its twin
    second = page.value(f"({NAMES})[4]")
    page.click(".card:nth-child(5) .actions button")
    page.until(f"({NAMES})[0] === {json.dumps(second)}")
    assert page.value("document.getElementById('terms').childElementCount") == 2


def test_a_hit_in_a_video_plays_from_its_second(world, page):
    assert search(page, CAPTIONS[SECOND])[0] == "play.webm"
    page.click(".card:first-child > .open")
    begun, shown = playing(page)
    assert 2 <= begun < 3.9 and shown == SECOND
    page.press("Escape")
    page.until("!document.getElementById('viewer').open && !document.querySelector('video')")

    strip = ".card:first-child .strip"
    label = page.value(f"document.querySelector('{strip} button').ariaLabel")
    assert label.startswith("Play 0:02 to 0:04, best at 0:0")
    page.click(strip, across=5.2 / 6)
    begun, shown = playing(page)
    assert 5 <= begun < 5.9 and shown == VIDEOS["play.webm"][2][2]
    page.click("#close")
    page.click(f"{strip} button")
    assert playing(page)[1] == SECOND


def test_all_of_it_by_the_keyboard(world, page):
    focused = "document.activeElement"
    page.press("Tab")
    assert page.value(f"{focused}.textContent") == "Search"
    page.press("/")
    assert page.value(f"{focused}.id") == "text"
    search(page, CAPTIONS[SECOND])
    page.press("ArrowDown")
    assert page.value(f"{focused}.ariaLabel").startswith("Play play.webm from 0:0")
    assert page.value(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.press("ArrowRight", 2)
    page.press("ArrowLeft", 2)
    page.press("Enter")
    assert playing(page)[1] == SECOND
    assert page.value(f"{focused}.closest('dialog') !== null")
    page.press("Escape")
    page.until(f"{focused}.ariaLabel?.startsWith('Play play.webm')")  # where it was
    page.press("Tab")  # the segment
    assert page.value(f"{focused}.ariaLabel").startswith("Play 0:02 to 0:04")
    page.press("Tab")
    assert page.value(f"{focused}.ariaLabel") == "More like play.webm"
    page.press("Enter")
    page.until("document.getElementById('terms').textContent === 'More like play.webm ✕'")
    nameless = page.value("""[...document.querySelectorAll("button, input, img, video, a[href]")]
        .filter((each) => !(each.ariaLabel || each.textContent.trim() || each.labels?.length ||
                            each.hasAttribute("alt"))).map((each) => each.outerHTML)""")
    assert nameless == []


def test_on_a_phone(world, page):
    page("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2,
         mobile=True)
    page("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        search(page, CAPTIONS[SECOND])
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.value("new Set([...document.querySelectorAll('.card')].slice(0, 4)"
                          ".map((each) => each.getBoundingClientRect().left)).size") == 2
        buttons = "[...document.querySelectorAll('form button, .actions button')]"
        assert page.value(f"Math.min(...{buttons}.map((each) => "
                          "each.getBoundingClientRect().height))") >= 44
        x, y = page.value("""(() => {
            const sides = document.querySelector(".card .open").getBoundingClientRect();
            return [sides.left + 40, sides.top + 40];
        })()""")
        page("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        page("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        assert playing(page)[1] == SECOND
        assert page.value("document.querySelector('video').getBoundingClientRect().right") <= 360
    finally:
        page("Emulation.clearDeviceMetricsOverride")
        page("Emulation.setTouchEmulationEnabled", enabled=False)
