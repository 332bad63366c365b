"""Telling a download that has failed from whatever else goes wrong while an upstream is loaded."""

from __future__ import annotations

import argparse
import errno
import http.client
import socket
import ssl
import textwrap
import urllib.error
from collections.abc import Iterable, Iterator
from traceback import walk_tb
from types import FrameType

from s3prl_metaperser.errors import REFUSED, MetaPerSERError

OFFLINE = (
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    socket.herror,
    ssl.SSLError,
    urllib.error.URLError,
    http.client.HTTPException,
)
"""What Python itself raises of a network that is not there or does not answer."""
NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
HUGGING_FACE = "huggingface.co"
LONGEST_REASON = 200
CLIENTS = ("requests", "urllib3", "httpx", "httpcore", "huggingface_hub")
"""Libraries whose exceptions are all about what they did over the network."""


def not_downloaded(args: argparse.Namespace, error: Exception, own_copy: str) -> MetaPerSERError | None:
    """Say in a line that an upstream's files cannot be had over the network.

    Args:
        args: the command line.
        error: as caught around what loads the upstream.
        own_copy: what to give instead.

    Returns:
        Our error, with the address and the reason; None where it was not the network that failed.
    """
    chain = list(_chain(error))
    failed = [one for one in chain if _is_of_network(one)]
    if not failed or (isinstance(error, OSError) and error.errno in REFUSED):
        return None
    given = f"-u {args.upstream}{f' -k {args.upstream_ckpt}' if args.upstream_ckpt else ''}"
    # The deepest says what happened, those around it what they were doing.
    reason = textwrap.shorten(str(failed[-1]), LONGEST_REASON, placeholder=" …") or type(failed[-1]).__name__
    return MetaPerSERError(
        f"{given}: cannot be downloaded from {_address(chain)} ({reason}); download it once where there is a network, "
        f"as any command with this -u does, or give {own_copy}"
    )


def frames_of(error: BaseException) -> list[FrameType]:
    """Give the frames that an error went through, from where it was caught to where it was raised."""
    return [frame for frame, _ in walk_tb(error.__traceback__)]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Give an error, and what it was raised from or because of, back to the first."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _is_of_network(error: BaseException) -> bool:
    if isinstance(error, OFFLINE) or type(error).__module__.partition(".")[0] in CLIENTS:
        return True
    if isinstance(error, OSError) and error.errno in NO_ROUTE:
        return True
    # transformers turns whatever stopped it into a plain OSError that says where it has looked.
    places = [frame.f_globals.get("__name__", "") for frame in frames_of(error)[-1:]]
    is_from_transformers = any(place.startswith("transformers.") for place in places)
    return is_from_transformers and isinstance(error, OSError) and HUGGING_FACE in str(error)


def _address(chain: Iterable[BaseException]) -> str:
    """Find the address that was asked for, in the frames of whatever asked for it."""
    for error in chain:
        for frame in frames_of(error):
            url = frame.f_locals.get("url")
            if isinstance(url, str) and "://" in url:
                return url
    return HUGGING_FACE
