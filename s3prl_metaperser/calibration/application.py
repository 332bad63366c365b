"""What the page asks its server for: a route each."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from s3prl_metaperser.audio import read_audio
from s3prl_metaperser.calibration.companion import Companion
from s3prl_metaperser.calibration.explain import judged
from s3prl_metaperser.calibration.guard import Guard
from s3prl_metaperser.calibration.picture import INK, heat_map
from s3prl_metaperser.calibration.uploads import MOST_BYTES, MOST_SECONDS, TooLargeError, collect, read_upload
from s3prl_metaperser.errors import MetaPerSERError

SAMPLE_RATE = 16_000
FILES = Path(__file__).parent / "page" / "files"


def application(companion: Companion, token: str, host: str, close: Callable[[], None]) -> ASGIApp:
    """Make the page's server.

    Args:
        companion: the model, with the session that it learns from.
        token: that the page sends with whatever it asks for.
        host: that the server listens on.
        close: ends the server.

    Returns:
        An ASGI application.
    """
    routes = _Routes(companion, close)
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/session", routes.session),
            Route("/clips/{number}", routes.clip),
            Route("/clips/{number}/label", routes.label, methods=["POST"]),
            Route("/clips/{number}/skip", routes.skip, methods=["POST"]),
            Route("/model", routes.model),
            Route("/model/picture.png", routes.picture),
            Route("/model/judgement", routes.judgement),
            Route("/model/checkpoint", routes.checkpoint),
            Route("/predict", routes.predict, methods=["POST"]),
            Route("/finish", routes.finish, methods=["POST"]),
            Route("/close", routes.close, methods=["POST"]),
            Mount("/files", StaticFiles(directory=FILES)),
        ],
        exception_handlers={
            MetaPerSERError: _say,
            HTTPException: _say_http,
            ClientDisconnect: _say_nothing,
            Exception: _say_failure,
        },
    )
    # Around all else, so that an answer about a failure has the headers too.
    return Guard(app, token, host)


class _Routes:
    """Each route as a method; those that are not ``async`` are run in threads by Starlette."""

    def __init__(self, companion: Companion, close: Callable[[], None]) -> None:
        self._companion = companion
        self._session = companion.session
        self._close = close
        environment = Environment(
            loader=PackageLoader("s3prl_metaperser.calibration", "page"), autoescape=True, undefined=StrictUndefined
        )
        self._page = environment.get_template("page.html.jinja")

    def page(self, request: Request) -> Response:
        # Whoever reaches this machine may read it: nothing that is the listener's is in it.
        return HTMLResponse(
            self._page.render(
                emotions=self._companion.generic.emotions, most_bytes=MOST_BYTES, most_seconds=MOST_SECONDS
            )
        )

    def session(self, request: Request) -> Response:
        return self._as_it_stands()

    def clip(self, request: Request) -> Response:
        file = io.BytesIO()
        samples = read_audio(self._session.recording(self._number(request)), SAMPLE_RATE).numpy()
        soundfile.write(file, np.clip(samples, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
        return Response(file.getvalue(), media_type="audio/wav")

    def label(self, request: Request) -> Response:
        self._session.label(self._number(request), request.query_params.getlist("emotion"))
        return self._as_it_stands()

    def skip(self, request: Request) -> Response:
        self._session.skip(self._number(request))
        return self._as_it_stands()

    def model(self, request: Request) -> Response:
        differences = self._companion.differences()
        change = [
            [None if np.isnan(value) else round(value, 4) for value in row] for row in differences.change.tolist()
        ]
        return JSONResponse(
            {
                "emotions": differences.emotions,
                "sentences": [str(difference) for difference in differences.largest()],
                "clips": differences.clips.tolist(),
                "change": change,
            }
        )

    def picture(self, request: Request) -> Response:
        theme = request.query_params.get("theme", "light")
        if theme not in INK:
            raise MetaPerSERError(f"there is no theme {theme!r}; there are {', '.join(INK)}")
        return Response(heat_map(self._companion.differences(), theme), media_type="image/png")

    def judgement(self, request: Request) -> Response:
        return JSONResponse({"sentence": judged(self._companion.judgement())})

    def checkpoint(self, request: Request) -> Response:
        folder = TemporaryDirectory(prefix="metaperser-")
        path = Path(folder.name) / self._session.files.out.name
        try:
            self._companion.save(path, standalone=True)
        except BaseException:
            folder.cleanup()
            raise
        return FileResponse(
            path, media_type="application/octet-stream", filename=path.name, background=BackgroundTask(folder.cleanup)
        )

    async def predict(self, request: Request) -> Response:
        content = await collect(request.stream(), request.headers.get("content-length"))
        return await run_in_threadpool(self._predict, request.query_params.get("name", ""), content)

    def _predict(self, name: str, content: bytes) -> Response:
        generic, personal = self._companion.hear(read_upload(name, content))
        decided = generic if personal is None else personal
        return JSONResponse(
            {
                "emotions": self._companion.generic.emotions,
                "decided": decided.emotions,
                "generic": generic.probabilities,
                "personal": None if personal is None else personal.probabilities,
            }
        )

    def finish(self, request: Request) -> Response:
        out = self._session.files.out
        self._companion.save(out, standalone=False)
        return JSONResponse(
            {"out": str(out), "next": f"metaperser predict --checkpoint {shlex.quote(str(out))} CLIP.wav"}
        )

    def close(self, request: Request) -> Response:
        return JSONResponse({}, background=BackgroundTask(self._close))

    def _number(self, request: Request) -> int:
        said: str = request.path_params["number"]
        most = len(self._session.clips)
        # By its digits first: Python makes no number of thousands of them.
        if not (said.isascii() and said.isdecimal() and len(said) <= len(str(most)) and 1 <= int(said) <= most):
            raise HTTPException(HTTPStatus.NOT_FOUND, f"there is no clip {said:.20}")
        return int(said)

    def _as_it_stands(self) -> Response:
        session = self._session
        state: dict[str, Any] = {
            "answers": [session.answer(number) for number in range(1, len(session.clips) + 1)],
            "next": session.next,
            "labelled": session.labelled,
            "skipped": session.skipped,
            "labels": len(session.labels),
            "places": {
                "out": str(session.files.out),
                "labels": str(session.files.labels),
                "recordings": str(session.audio_root),
            },
        }
        return JSONResponse(state)


def _say(request: Request, error: Exception) -> Response:
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if isinstance(error, TooLargeError) else HTTPStatus.BAD_REQUEST
    return JSONResponse({"message": str(error)}, status_code=status)


def _say_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"message": error.detail}, status_code=error.status_code, headers=error.headers)


def _say_nothing(request: Request, error: Exception) -> Response:
    # A tab that was closed in the middle of an upload hears no answer.
    return Response(status_code=HTTPStatus.BAD_REQUEST)


def _say_failure(request: Request, error: Exception) -> Response:
    message = "the program failed; what went wrong is in the terminal that it was started from"
    return JSONResponse({"message": message}, status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
