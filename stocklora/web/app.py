"""What the page asks of its server: reads of the workspace, and runs of the scripts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

import stocklora
from stocklora.cli.console import UserError
from stocklora.cli.settings import parse_json
from stocklora.web import assistant, data, reports
from stocklora.web.forecasts import Forecasts
from stocklora.web.guard import REPORT_POLICY, Guard
from stocklora.web.plan import Planner
from stocklora.web.prices import WatchedPrices
from stocklora.web.runs import Runs
from stocklora.web.scripts import SCRIPTS, argv_of, command_text, form_of, settings_of
from stocklora.web.workspace import Workspace

STATIC = Path(__file__).with_name("static")
LARGEST_UPLOAD = 512 * 2**20
LARGEST_BODY = 4 * 2**20
SHOWN = ("origin", "day", "last_close", "P10", "P50", "P90")  # of a forecast, in the watch list
PICTURES = {".png": "image/png"}


def make_app(workspace: Workspace, token: str, port: int) -> FastAPI:
    """The web application, guarded.

    Args:
        workspace: that it works in.
        token: that the address holds.
        port: that it is reached at.
    """
    app = FastAPI(title="stocklora", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token, port=port)
    runs, prices = Runs(workspace), WatchedPrices(workspace)
    planner = app.state.planner = Planner(workspace)
    _answer_errors(app)
    _serve_page(app, workspace)
    _serve_runs(app, workspace, runs, planner)
    _serve_forecasts(app, prices, Forecasts(workspace, prices), runs)
    _serve_files(app, workspace)
    _serve_assistant(app, runs)
    return app


def _answer_errors(app: FastAPI) -> None:
    """A user's mistake is a line for the page."""

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=400)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": f"the request is malformed: {error.errors()[0]['msg']}"}, status_code=400)


async def _body(request: Request) -> dict[str, Any]:
    """A request's JSON object.

    Raises:
        UserError: it is none, or too large.
    """
    try:
        content = parse_json((await _bytes(request, LARGEST_BODY)).decode())
    except ValueError as error:
        raise UserError(f"the request is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError("the request must be a JSON object")
    return content


async def _bytes(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise UserError(f"that is more than {most // 2**20} MB; put the file into the workspace folder yourself")
        parts.append(part)
    return b"".join(parts)


def _serve_page(app: FastAPI, workspace: Workspace) -> None:
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/")
    def page() -> Response:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        return {
            "version": stocklora.__version__, "workspace": str(workspace.root), "scripts": list(SCRIPTS),
            "cpus": os.cpu_count(), "base_models": workspace.base_models(), "weights": workspace.weights(),
            "adapters": workspace.adapters(), "files": data.files_of(workspace),
        }  # fmt: skip


def _serve_runs(app: FastAPI, workspace: Workspace, runs: Runs, planner: Planner) -> None:
    @app.get("/api/forms/{script}")
    def form(script: str) -> dict[str, Any]:
        return form_of(script)

    @app.post("/api/forms/{script}/check")
    async def check(script: str, request: Request) -> dict[str, Any]:
        values = await _body(request)
        argv = argv_of(script, settings_of(script, values, workspace))
        return {"command": command_text(argv, workspace.root)}

    @app.post("/api/plan")
    async def plan(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(planner.plan, await _body(request))

    @app.get("/api/runs")
    def all_runs() -> list[dict[str, Any]]:
        return runs.all()

    @app.post("/api/runs")
    async def start(request: Request) -> dict[str, Any]:
        asked = await _body(request)
        values = asked.get("values", {})
        if not isinstance(asked.get("script"), str) or not isinstance(values, dict):
            raise UserError("a run needs a script and its values")
        return await asyncio.to_thread(runs.start, asked["script"], values)

    @app.get("/api/runs/{name}")
    def one_run(name: str) -> dict[str, Any]:
        return runs.describe(name)

    @app.get("/api/runs/{name}/log")
    def log(name: str, start: int = -1) -> dict[str, Any]:
        run = runs.describe(name)  # before its log: of a run that is over the last lines come along
        return {**runs.log(name, start), "run": run}

    @app.get("/api/runs/{name}/curve")
    def curve(name: str) -> dict[str, Any]:
        run = runs.describe(name)
        finished = run["state"] in ("done", "stopped")
        whole = reports.training_curve(workspace, run["script"], run["values"]) if finished else []
        return {"live": runs.losses(name), "whole": whole}

    @app.post("/api/runs/{name}/stop")
    def stop(name: str) -> dict[str, Any]:
        return runs.stop(name)


def _serve_forecasts(app: FastAPI, prices: WatchedPrices, forecasts: Forecasts, runs: Runs) -> None:
    @app.get("/api/watch")
    def watch() -> Response:
        waiting = prices.refresh()
        rows, lines = forecasts.rows(), prices.lines()
        for line in lines:
            line["forecast"] = [{name: row[name] for name in SHOWN} for row in rows.get(line["ticker"], [])]
        # As it is: FastAPI would look at each of some hundred thousand numbers first.
        return JSONResponse({
            "reading": waiting, "errors": prices.errors, "lines": lines, "arguments": prices.arguments(),
            "version": prices.version,
        })  # fmt: skip

    @app.get("/api/record")
    def record() -> dict[str, Any]:
        return forecasts.record()

    @app.get("/api/ticker")
    def ticker(name: str, days: int = 250) -> dict[str, Any]:
        frame = prices.frame(name).tail(max(2, min(days, 5000)))
        columns = [frame[column].to_numpy() for column in ("Open", "High", "Low", "Close", "Volume")]
        bars = [
            [f"{day:%Y-%m-%d}", *(float(f"{column[place]:.7g}") for column in columns)]
            for place, day in enumerate(frame.index)
        ]
        return {"bars": bars, "forecast": forecasts.rows().get(name, []), "why": forecasts.explanation(name)}

    @app.get("/api/paths")
    def paths(name: str) -> Response:
        return JSONResponse(forecasts.paths(name))

    @app.post("/api/prices")
    async def upload(request: Request, name: str) -> dict[str, Any]:
        content = await _bytes(request, LARGEST_UPLOAD)
        return {"tickers": await asyncio.to_thread(prices.add, name, content)}

    @app.post("/api/prices/remove")
    async def remove(request: Request) -> dict[str, Any]:
        await asyncio.to_thread(prices.remove, str((await _body(request)).get("name")))
        return {}


def _serve_files(app: FastAPI, workspace: Workspace) -> None:
    @app.get("/api/backtests")
    def backtests() -> list[dict[str, Any]]:
        return reports.backtests(workspace)

    @app.get("/api/file")
    def describe(name: str) -> dict[str, Any]:
        return data.describe_file(name, workspace)

    @app.get("/files/{name:path}")
    def raw(name: str) -> Response:
        path = workspace.inside(name)
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(workspace.root).parts):
            raise UserError(f"no file {name[:80]}")
        if path.suffix == ".html":
            return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})
        if path.suffix in PICTURES:
            return FileResponse(path, media_type=PICTURES[path.suffix])
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)


def _serve_assistant(app: FastAPI, runs: Runs) -> None:
    @app.get("/api/assistant")
    def server() -> dict[str, Any]:
        found = assistant.server_of(runs)
        models = assistant.models_of(found["port"]) if found and found["port"] else []
        return {"server": found, "models": models, "schemas": assistant.schemas()}

    @app.post("/api/chat")
    async def chat(request: Request) -> Response:
        body = assistant.check_request(await _body(request))
        found = await asyncio.to_thread(assistant.server_of, runs)
        if found is None or found["port"] is None:
            raise UserError("no chat server runs; start one first")
        events = assistant.relay(found["port"], body)
        await anext(events)  # a refusal comes before the stream begins
        return StreamingResponse(_closing(events), media_type="text/event-stream")


async def _closing(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What ``events`` has; they are closed when the reader goes away."""
    try:
        async for event in events:
            yield event
    finally:
        await events.aclose()  # type: ignore[attr-defined]
