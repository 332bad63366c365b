"""Who may ask the page's server for what: the listener's own browser, and in it no site but the page itself."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-calibration-token"
PAGE, FILES = "/", "/files/"
"""What anybody may read: the page as it is before it has asked for anything, and the folder of its script and style."""
LOOPBACK_NAME = "localhost"
HEADERS = {
    # Clips and pictures are fetched by the page's script, with the token, and shown as blobs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
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
    """Give the address of a page that may ask for anything: what follows ``#`` is sent to no server."""
    return f"{address}#token={token}"


class Guard:
    """Lets through only what is asked of this very server by its own page, and says in each answer what it may do.

    Others who are logged in to this machine reach the server too, and so do other sites in the listener's browser. So
    whatever is asked comes with a token, which is in the address that the program prints, and which the page sends in a
    header. It is no cookie: browsers send those to all ports of a machine. A site with a name of its own can have that
    name lead here (DNS rebinding): the name in ``Host`` must be this machine's, or an address.

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

        refusal = self._refusal(Request(scope))
        answer = self._app if refusal is None else JSONResponse({"message": refusal}, status_code=403)
        await answer(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> str | None:
        host = request.headers.get("host", "")
        if not self._is_ours(host):
            return f"this server does not answer to the name {host!r}"
        path: str = request.scope["path"]
        if request.method in ("GET", "HEAD") and (path == PAGE or path.startswith(FILES)):
            return None
        origin = request.headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return f"{origin} may ask for nothing here"
        if not secrets.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), self._token.encode()):
            return (
                "open the address that the program printed in its terminal when it was last started; it has a token in "
                "it, another one at each start (what you have saved is kept)"
            )
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._names or ipaddress.ip_address(name).is_loopback or not self._local
        except ValueError:  # neither a name of ours nor an address
            return False
