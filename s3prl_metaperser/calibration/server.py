"""The page's server on this machine: its address, and its life until it is stopped."""

from __future__ import annotations

import secrets
import socket
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from html import escape
from pathlib import Path
from threading import Thread

import uvicorn

from s3prl_metaperser.calibration.application import application
from s3prl_metaperser.calibration.companion import Companion
from s3prl_metaperser.calibration.guard import is_loopback, with_token
from s3prl_metaperser.errors import MetaPerSERError

FIRST_PORT = 7860
PORTS_TRIED = 20
SHUTDOWN_SECONDS = 2
REDIRECTION = '<!doctype html>\n<meta http-equiv="refresh" content="0; url='
"""What a file begins with that leads to a page."""


def listen(host: str, port: int | None) -> socket.socket:
    """Take an address.

    Args:
        host: name or address to listen on.
        port: to take; None: a free one, from :data:`FIRST_PORT` up.

    Returns:
        A socket that takes connections from now on, though nobody answers yet.

    Raises:
        MetaPerSERError: when the port is in use, or the host is none of this machine's.
    """
    fault = ""
    for tried in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED) if port is None else (port,):
        try:
            family, *_, numeric = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
            return socket.create_server((numeric[0], tried), family=family)
        except (OSError, OverflowError) as error:
            fault = getattr(error, "strerror", None) or str(error)
    tried_ports = f"port {port}" if port is not None else f"ports {FIRST_PORT} to {FIRST_PORT + PORTS_TRIED - 1}"
    raise MetaPerSERError(f"cannot listen on {host}, {tried_ports}: {fault}; choose another --port or --host")


def address(listening: socket.socket) -> str:
    """Give the address under which a browser on this machine finds a listening socket's page."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(companion: Companion, listening: socket.socket, host: str, browser: bool) -> None:
    """Serve the page until Ctrl-C, or until the page says that it is done.

    Args:
        companion: the model, with its session.
        listening: as :func:`listen` gives it.
        host: as it was given to :func:`listen`.
        browser: whether to open the page in the user's browser.
    """
    if not is_loopback(host):
        print(
            "warning: other machines reach this page, and what goes to and fro, its token too, is not encrypted; where "
            "others may listen in, leave --host out and bring the port here by ssh -L",
            file=sys.stderr,
            flush=True,
        )
    token = secrets.token_urlsafe()
    page = with_token(address(listening), token)
    print(f"Open {page} in a browser. Ctrl-C stops; what was answered is kept.", flush=True)
    server: uvicorn.Server

    def close() -> None:
        server.should_exit = True

    app = application(companion, token, host, close)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        server_header=False,
    )
    server = uvicorn.Server(config)
    entrance = companion.session.files.entrance
    # Ctrl-C is how it is meant to be stopped.
    with _shown(page, entrance) if browser else nullcontext(), suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


@contextmanager
def _shown(page: str, entrance: Path) -> Iterator[None]:
    """Show a page in the user's browser, by way of a file that leads there and that nobody else may read.

    A browser's command line is everybody's to read on this machine, and the page's address has the token in it.
    """
    if not _leads_to(page, entrance):  # the address was printed
        yield
        return
    # In a thread: some browsers' commands return when the browser is closed.
    Thread(target=webbrowser.open, args=(entrance.absolute().as_uri(),), daemon=True).start()
    try:
        yield
    finally:
        entrance.unlink(missing_ok=True)


def _leads_to(page: str, entrance: Path) -> bool:
    """Write a file that leads to a page, unless a file of the user's own is there, or the disk is full."""
    try:
        if entrance.exists() and entrance.read_bytes().startswith(REDIRECTION.encode()):
            entrance.unlink()  # which a killed process has left
        entrance.touch(mode=0o600, exist_ok=False)
    except OSError:
        return False
    try:
        entrance.write_text(f'{REDIRECTION}{escape(page)}">\n', encoding="utf-8")
    except OSError:
        entrance.unlink()
        return False
    return True
