"""Who may ask the page's server for what: the listener's own browser, and in it no site but the page itself."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-calibration-token"
TOKEN_PARAMETER = "token"
PAGE = "/"
LOOPBACK_NAME = "localhost"
HEADERS = {
    # Clips are fetched by the page's script, which hands them to the player as blobs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Say whether what listens on a host is reached from this machine only."""
    if host == LOOPBACK_NAME:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def with_token(address: str, token: str) -> str:
    """Give the address under which a browser is let in."""
    return f"{address}?{TOKEN_PARAMETER}={token}"


def cookie_name(port: int) -> str:
    """Name the cookie by which a browser is let in from then on: browsers do not tell cookies apart by port."""
    return f"metaperser-{port}"


class Guard:
    """Lets through only what is asked of this very server by its own page, and says in each answer what it may do.

    Others who are logged in to this machine reach the server too: a browser is let in by a token, which is in the
    address that the program prints and then, so that it stays in no history, in a cookie. Pages of this machine's other
    ports have that cookie sent along as well: whatever changes something is a POST that carries the token in a header,
    which only the page knows to do. A site with a name of its own can have that name lead here (DNS rebinding): the
    name in ``Host`` must be this machine's, or an address.

    Args:
        app: what is guarded.
        token: of this process.
        host: that the server listens on.
    """

    def __init__(self, app: ASGIApp, token: str, host: str) -> None:
        self._app = app
        self._token = token
        self._local = is_loopback(host)
        self._names = {LOOPBACK_NAME} if self._local else {LOOPBACK_NAME, host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope)
        answer = self._app
        if self._is_ours(request) and self._brings_token(request):
            answer = self._let_in(scope)
        elif refusal := self._refusal(request):
            answer = _refused(request, refusal)
        await answer(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> str | None:
        host = request.headers.get("host", "")
        if not self._is_ours(request):
            return f"this server does not answer to the name {host!r}"
        if not self._is_token(request.cookies.get(cookie_name(_port(request.scope)), "")):
            return (
                "open the address that the program printed in its terminal when it was started last, with the token "
                "that is in it (what you have saved is kept)"
            )
        if request.method in ("GET", "HEAD"):
            return None
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return f"{origin} may not change anything here"
        if not self._is_token(request.headers.get(TOKEN_HEADER, "")):
            return "this page is of an earlier start of the program; reload it (what you have saved is kept)"
        return None

    def _is_ours(self, request: Request) -> bool:
        try:
            name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
            return name in self._names or ipaddress.ip_address(name).is_loopback or not self._local
        except ValueError:  # neither a name of ours nor an address
            return False

    def _is_token(self, said: str) -> bool:
        return secrets.compare_digest(said.encode(), self._token.encode())

    def _brings_token(self, request: Request) -> bool:
        is_page = request.method == "GET" and request.url.path == PAGE
        return is_page and self._is_token(request.query_params.get(TOKEN_PARAMETER, ""))

    def _let_in(self, scope: Scope) -> Response:
        answer = RedirectResponse(PAGE, status_code=HTTPStatus.SEE_OTHER)
        # Lax, not strict: the address may be clicked in a page, such as a notebook's terminal.
        answer.set_cookie(cookie_name(_port(scope)), self._token, httponly=True, samesite="lax")
        return answer


def _port(scope: Scope) -> int:
    port: int = scope["server"][1]
    return port


def _refused(request: Request, why: str) -> Response:
    if request.url.path == PAGE:  # read by a person
        return PlainTextResponse(f"{why[:1].upper()}{why[1:]}.\n", status_code=HTTPStatus.FORBIDDEN)
    return JSONResponse({"message": why}, status_code=HTTPStatus.FORBIDDEN)
