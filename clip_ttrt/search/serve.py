"""The page of a library and what it asks for, for browsers on this machine alone.

    GET /                  the page
    POST /api/query        JSON: text, picture (base64), more, less (items' ids)
    GET /thumbnail/ITEM    a JPEG of an item
    GET /file/FILE         an indexed file, by its number, whole or ranges of it"""
import base64
import io
import socket
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from clip_ttrt.errors import UserError
from clip_ttrt.pipeline.sources import Playback
from clip_ttrt.search.library import Library, parse

PAGE = Path(__file__).with_name("page.html")
HEADERS = [
    ("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; "
                                "form-action 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"), ("X-Content-Type-Options", "nosniff")]
HOSTS = ["127.0.0.1", "localhost"]  # another name is a site's that points here
LESS = -0.5  # weight of what results are to be less like
SIDE, TOP = 320, 40  # pixels of a thumbnail; results


class Server(uvicorn.Server):
    """Serves a library once it is `run` on `socket`, 127.0.0.1's `port`, which 0 chooses."""

    def __init__(self, library: Library, port: int = 8080):
        self.socket = socket.create_server((HOSTS[0], port))
        self.library, self.port = library, self.socket.getsockname()[1]
        library.model.warmup([1])  # which captures CUDA graphs before there are other threads
        routes = [Route("/", lambda _: FileResponse(PAGE)),
                  Route("/thumbnail/{item:int}", self.thumbnail),
                  Route("/file/{file:int}", self.file),
                  Route("/api/query", self.post, methods=["POST"])]
        guard = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
        app = Starlette(routes=routes, middleware=[guard], exception_handlers=dict.fromkeys(
            (OSError, ValueError, TypeError, OverflowError), refuse))
        super().__init__(uvicorn.Config(app, headers=HEADERS, log_level="warning",
                                        timeout_graceful_shutdown=1))

    def thumbnail(self, request: Request) -> Response:
        with self.library.lock:
            path, pts, start = self.library.store.item(request.path_params["item"])
        if pts is None:
            picture = Image.open(path)
            picture.draft("RGB", (2 * SIDE, 2 * SIDE))
        else:
            picture = Image.fromarray(Playback.__wrapped__(path).at(pts, start))
        picture = ImageOps.exif_transpose(picture).convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        picture.save(data := io.BytesIO(), "JPEG", quality=85)
        return Response(data.getvalue(), media_type="image/jpeg",
                        headers={"Cache-Control": "private, max-age=86400"})

    def file(self, request: Request) -> Response:
        with self.library.lock:
            path = Path(self.library.store.file(request.path_params["file"])["path"])
        if not path.is_file():
            raise FileNotFoundError("the file has gone")
        return FileResponse(path)

    async def post(self, request: Request) -> Response:
        # Pages of other sites cannot send this type unless this server allows it.
        if request.headers.get("content-type") != "application/json":
            raise ValueError("a query is application/json")
        return JSONResponse(await run_in_threadpool(self.query, **await request.json()))

    def query(self, text: str = "", picture: str = "", more: list[int] = [], less: list[int] = []
              ) -> dict[str, Any]:
        terms = parse(text, files=False) if text.strip() else []
        terms += [(1.0, base64.b64decode(picture))] if picture else []
        terms += [(1.0, int(each)) for each in more] + [(LESS, int(each)) for each in less]
        if not terms:
            raise UserError("nothing is asked for; write a text or drop a picture")
        found = self.library.query(terms, TOP + len(less))
        found["results"] = [each for each in found["results"] if not {
            each["id"], *(one["id"] for one in each["similar"])}.intersection(less)][:TOP]
        return found


def refuse(_: Request, problem: Exception) -> Response:
    status = 404 if isinstance(problem, OSError) else 400
    return JSONResponse({"error": str(problem)}, status)
