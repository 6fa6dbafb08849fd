"""The page of a library and what it asks for, for browsers on this machine alone.

    GET /                        the page
    POST /api/query              JSON: text, picture (base64), more, less (items' ids), top
    GET /thumbnail/FILE-NUMBER   a JPEG of an item
    GET /file/FILE               an indexed file, by its number, whole or a range of it"""
import base64
import hashlib
import io
import json
import mimetypes
import os
import re
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable
from urllib.parse import urlsplit

from PIL import Image, ImageOps

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.sources import Playback
from clip_ttrt.search.library import Library, parse

PAGE = Path(__file__).with_name("page.html").read_bytes()
SCRIPT = hashlib.sha256(re.search(b"<script>(.*)</script>", PAGE, re.DOTALL)[1]).digest()
HEADERS = {
    "Content-Security-Policy":
        "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; media-src 'self'; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{base64.b64encode(SCRIPT).decode()}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff"}
HOSTS = {"127.0.0.1", "localhost", "::1"}  # another name is a site's that points here
LARGEST = 1 << 26  # bytes of a query
LESS = -0.5  # weight of what results are to be less like
SIDE = 320  # pixels of a thumbnail


class Server(ThreadingHTTPServer):
    """Serves a library on 127.0.0.1.  port: 0 for any that is free, which `server_port` is."""

    daemon_threads = True

    def __init__(self, library: Library, port: int = 8080):
        self.library, self.thumbnail = library, lru_cache(4096)(self.make_thumbnail)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as problem:
            raise UserError(f"port {port}: {problem}; --port takes another") from problem
        library.model.warmup([1])  # which captures CUDA graphs before there are other threads

    def item(self, file: int, number: int = 0) -> tuple:
        with self.library.lock:
            return self.library.store.item(file, number)

    def make_thumbnail(self, file: int, number: int) -> bytes:
        (path, pts, start, _), data = self.item(file, number), io.BytesIO()
        try:
            if pts is None:
                picture = Image.open(path)
                picture.draft("RGB", (2 * SIDE, 2 * SIDE))
            else:
                picture = Image.fromarray(Playback.__wrapped__(path).at(pts, start))
            picture = ImageOps.exif_transpose(picture).convert("RGB")
        except Exception as problem:  # of decoders, which share no type
            raise OSError(str(problem)) from problem
        picture.thumbnail((SIDE, SIDE))
        picture.save(data, "JPEG", quality=85)
        return data.getvalue()

    def query(self, text: str = "", picture: str = "", more: list = [], less: list = [],
              top: int = 40) -> dict[str, Any]:
        terms = parse(text, files=False) if text.strip() else []
        terms += [(1.0, base64.b64decode(picture))] if picture else []
        terms += [(weight, tuple(map(int, each.split("-", 1))))
                  for weight, some in ((1.0, more), (LESS, less)) for each in some]
        if not terms:
            raise UserError("nothing is asked for; write a text or drop a picture")
        found = self.library.query(terms, min(max(1, top), 500) + len(less), details=True)
        found["results"] = [each for each in found["results"] if not {
            each["id"], *(one["id"] for one in each["similar"])}.intersection(less)][:top]
        return found


class Handler(BaseHTTPRequestHandler):
    """A request.  What is not served is an error with a sentence in JSON."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(self.get)

    def do_POST(self) -> None:
        self.answer(self.post)

    def answer(self, respond: Callable[[], None]) -> None:
        try:
            asked = [f"//{self.headers.get('Host')}", self.headers.get("Origin", "//localhost")]
            if not {urlsplit(each).hostname for each in asked} <= HOSTS:
                return self.refuse(403, "this server answers at 127.0.0.1 and localhost only")
            respond()
        except ConnectionError:  # the browser has gone
            self.close_connection = True
        except OSError:
            self.refuse(404, "there is no such thing, or it cannot be read")
        except (ValueError, TypeError, AttributeError, OverflowError) as problem:
            self.refuse(400, str(problem))

    def get(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self.reply(200, "text/html; charset=utf-8", PAGE)
        elif match := re.fullmatch(r"/thumbnail/(\d{1,18})-(\d{1,18})", path, re.ASCII):
            self.reply(200, "image/jpeg", self.server.thumbnail(*map(int, match.groups())),
                       {"Cache-Control": "private, max-age=86400"})
        elif match := re.fullmatch(r"/file/(\d{1,18})", path, re.ASCII):
            self.send_file(self.server.item(int(match[1]))[0])
        else:
            raise FileNotFoundError

    def post(self) -> None:
        size = int(self.headers.get("Content-Length", -1))
        # Pages of other sites cannot send this type unless this server allows it.
        if not 0 <= size <= LARGEST or self.headers.get_content_type() != "application/json":
            raise ValueError(f"a query is application/json of at most {LARGEST} bytes")
        if self.path != "/api/query":
            raise FileNotFoundError
        found = self.server.query(**json.loads(self.rfile.read(size)))
        self.reply(200, "application/json", json.dumps(found).encode())

    def send_file(self, path: str) -> None:
        kind = mimetypes.guess_type(path)[0] or ""
        if not kind.startswith(("image/", "video/")):
            kind = "application/octet-stream"
        with open(path, "rb", opener=lambda *to: os.open(to[0], to[1] | os.O_NONBLOCK)) as file:
            size = os.fstat(file.fileno()).st_size
            begin, end, more = 0, size, {"Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""), re.ASCII)
            if asked and any(asked.groups()):
                first, last = asked.groups()
                begin = int(first) if first else max(0, size - int(last))
                end = min(size, int(last) + 1) if first and last else size
                if begin >= end:
                    return self.reply(416, kind, b"", {"Content-Range": f"bytes */{size}"})
                more["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
            self.start(206 if len(more) > 1 else 200, kind, end - begin, more)
            if end > begin:
                self.connection.sendfile(file, begin, end - begin)

    def refuse(self, status: int, sentence: str) -> None:
        self.close_connection = True  # what is left of the request was not read
        self.reply(status, "application/json", json.dumps({"error": sentence}).encode())

    def reply(self, status: int, kind: str, data: bytes, more: dict[str, str] = {}) -> None:
        self.start(status, kind, len(data), more)
        self.wfile.write(data)

    def start(self, status: int, kind: str, size: int, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": size, **HEADERS,
                            **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        """Requests are the user's own business."""
