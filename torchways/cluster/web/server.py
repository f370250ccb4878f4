"""The web page of a cluster, and /metrics for Prometheus, on one port of the resource manager.

Read-only: every request but the login is a GET. Everything is behind the cluster's token (sessions.py); what is served
without it are the login's own files.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from torchways.addresses import address_of
from torchways.cluster import metrics
from torchways.cluster.web.drawing import draw
from torchways.cluster.web.layout import layout
from torchways.cluster.web.sessions import SESSION_SECONDS, Sessions, Viewer
from torchways.cluster.web.watch import Watch
from torchways.ids import ProgramId, owner
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.identity import ClusterKey

logger = logging.getLogger(__name__)

#: How long the cluster's processes have to answer.
_SCRAPE_SECONDS = 5.0
#: Connections at a time, and how long one may stay without a whole request.
_MAX_CONNECTIONS = 64
_REQUEST_SECONDS = 5.0
#: Requests that are answered at a time; more are refused.
_MAX_REQUESTS = 16
_MAX_BODY_BYTES = 4096

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # "no-referrer" would take the header Origin, which the login checks, from the form as well.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
#: What the login says to what is neither.
_NO_SECRET = '<p role="alert">This is neither the token nor the operator\'s secret of this cluster.</p>\n'
#: Files of the package, by path.
_FILES = {
    "page.js": "text/javascript",
    "login.js": "text/javascript",
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
}

_Observe: TypeAlias = Callable[[], Awaitable[pb.Observation]]
_Describe: TypeAlias = Callable[[Sequence[ProgramId]], Awaitable[list[pb.ProgramOutline]]]
_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

_VIEWER = web.RequestKey("viewer", Viewer)


class WebServer:
    """See the module's docstring.

    Args:
        host, port: to listen on; port 0 is a free one.
        observe: says what the cluster does.
        describe: says which programs there are, or what some consist of.
    """

    #: host:port.
    address: str
    #: The cluster's, for the page's head.
    cluster_address = ""

    def __init__(
        self, host: str, port: int, token: str, key: ClusterKey, observe: _Observe, describe: _Describe
    ) -> None:
        self._host, self._port = host, port
        self._observe = observe
        self._describe = describe
        self._sessions = Sessions(token, key)
        self._watch = Watch(observe)
        self._cookie = ""
        self._num_requests = 0
        #: Connections that have sent a whole request.
        self._heard: set[asyncio.BaseProtocol] = set()
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/login", self._login_page),
                web.post("/login", self._login),
                web.get("/static/{name}", self._static),
                web.get("/metrics", self._metrics),
                web.get("/api/observation", self._observation),
                web.get("/api/programs", self._programs),
                web.get(r"/api/programs/{program_id:\d{1,20}}.svg", self._graph),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=15.0, lingering_time=1.0)
        self._server: asyncio.Server

    async def start(self) -> None:
        """Begins to listen.

        Raises:
            OSError: the address cannot be had.
        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connected, self._host, self._port)
        port = self._server.sockets[0].getsockname()[1]
        self.address = address_of(self._host, port)
        self._cookie = f"torchways-{port}"  # browsers keep the cookies of a host's ports together

    def stop_listening(self) -> None:
        """Takes no more connections; those that are open end with the process."""
        self._server.close()

    def _connected(self) -> asyncio.BaseProtocol:
        """Returns what talks to a new connection."""
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= _MAX_CONNECTIONS:
            return _Refused()
        handler = server()
        asyncio.get_running_loop().call_later(_REQUEST_SECONDS, self._close_silent, handler)
        return handler

    def _close_silent(self, handler: RequestHandler) -> None:
        """Closes a connection on which no request came; later, aiohttp's keep-alive does so."""
        server = self._runner.server
        open_now = set(server.connections) if server is not None else set()
        if handler in open_now and handler not in self._heard:
            handler.force_close()
        self._heard &= open_now

    # ---- who may see what

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        self._heard.add(request.protocol)
        response = await self._checked(request, handler)
        response.headers.update(_HEADERS)
        return response

    async def _checked(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if self._num_requests >= _MAX_REQUESTS:
            return _text("too many requests at a time; try again\n", 503)
        self._num_requests += 1
        try:
            return await self._answer(request, handler)
        except web.HTTPException as error:
            return web.Response(status=error.status, text=error.text, headers=error.headers)
        except TimeoutError:
            return _text("the cluster's processes did not answer in time\n", 503)
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            return _text("this is a bug in torchways; the resource manager's log has more\n", 500)
        finally:
            self._num_requests -= 1

    async def _answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if request.path == "/login" or request.path.startswith("/static/"):
            return await handler(request)
        viewer = self._viewer(request)
        if viewer is not None:
            request[_VIEWER] = viewer
            return await handler(request)
        if request.path == "/" and request.method == "GET":
            raise web.HTTPSeeOther("/login")
        hint = "send the header Authorization: Bearer TOKEN, or log in at /login\n"
        return web.Response(status=401, text=hint, headers={"WWW-Authenticate": "Bearer"})

    def _viewer(self, request: web.Request) -> Viewer | None:
        header = request.headers.get("Authorization")
        if header is not None:
            return self._sessions.of_header(header)
        return self._sessions.of_cookie(request.cookies.get(self._cookie, ""), time.time())

    async def _login(self, request: web.Request) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"{request.scheme}://{request.host}":
            return _text("a page of another site may not log in here\n", 403)
        form = await asyncio.wait_for(request.post(), _REQUEST_SECONDS)
        viewer = self._sessions.of_secret(str(form.get("token", "")).strip())
        if viewer is None:
            return _file("login.html", "text/html", 401, alert=_NO_SECRET)
        response = web.Response(status=303, headers={"Location": "/"})
        cookie = self._sessions.cookie(viewer, time.time())
        response.set_cookie(
            self._cookie, cookie, max_age=SESSION_SECONDS, httponly=True, samesite="Strict", secure=request.secure
        )
        return response

    # ---- pages

    async def _login_page(self, request: web.Request) -> web.StreamResponse:
        return _file("login.html", "text/html")

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return _file("page.html", "text/html")

    async def _static(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in _FILES:
            raise web.HTTPNotFound
        return _file(name, _FILES[name])

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        found = await asyncio.wait_for(self._observe(), _SCRAPE_SECONDS)
        body, content_type = metrics.page(found, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _observation(self, request: web.Request) -> web.StreamResponse:
        facts = await self._watch.facts(with_names=request[_VIEWER] is Viewer.OPERATOR)
        return web.json_response({"address": self.cluster_address, **facts})

    async def _programs(self, request: web.Request) -> web.StreamResponse:
        _check_operator(request)
        found: dict[int, list[pb.ProgramOutline]] = defaultdict(list)
        for outline in await self._describe(()):
            found[outline.program_id].append(outline)
        return web.json_response(
            [
                {
                    "program_id": str(program_id),  # JavaScript's numbers have 53 bits
                    "name": outlines[0].name,
                    "client_id": owner(program_id),
                    "num_instructions": sum(outline.num_instructions for outline in outlines),
                    "num_islands": len(outlines),
                }
                for program_id, outlines in found.items()
            ]
        )

    async def _graph(self, request: web.Request) -> web.StreamResponse:
        _check_operator(request)
        program_id = int(request.match_info["program_id"])
        outlines = await self._describe([ProgramId(program_id)]) if program_id < 1 << 64 else []
        if not outlines:
            return _text(f"there is no program {program_id}; it may be gone, or too old to be shown\n", 404)
        title = f"{outlines[0].name}, program {program_id} of client {owner(program_id)}"
        image = await asyncio.to_thread(lambda: draw(title, layout(outlines)))
        return web.Response(text=image, content_type="image/svg+xml")


class _Refused(asyncio.Protocol):
    """Closes a connection, of which there are too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        logger.warning("refused a connection to the page: %d are open", _MAX_CONNECTIONS)
        transport.close()


def _check_operator(request: web.Request) -> None:
    """Refuses who has the token alone."""
    if request[_VIEWER] is not Viewer.OPERATOR:
        raise web.HTTPForbidden(
            text="this needs the operator's secret, which the cluster's state file has; the token alone shows no "
            "programs\n"
        )


def _text(text: str, status: int) -> web.Response:
    return web.Response(text=text, status=status)


def _file(name: str, content_type: str, status: int = 200, *, alert: str = "") -> web.Response:
    """Answers with a file of ours; `alert`: HTML in the place that it has for one."""
    text = importlib.resources.files(__package__).joinpath("static", name).read_text(encoding="utf-8")
    text = text.replace("<!-- alert -->\n", alert)
    return web.Response(text=text, content_type=content_type, status=status)
