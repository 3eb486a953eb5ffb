"""The tab in TensorBoard: serves the page, plotly.js, and what the page asks for."""

from __future__ import annotations

import gzip
import json
import logging
import threading
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lightning_bn.dashboard.assets import INSTALL, STATIC, plotly_file
from lightning_bn.dashboard.runs import find_journals, roots_of
from lightning_bn.dashboard.store import JournalStore
from lightning_bn.dashboard.view import MAX_COLUMNS, channels_of, grid_of, layer_of, overview_of
from lightning_bn.journal.lines import FILE_NAME
from lightning_bn.journal.reader import JournalReader

_TYPES = {".js": "application/javascript", ".css": "text/css"}
_PATIENCE = 0.2  # seconds that TensorBoard's list of tabs may wait for the first look at the log directory
_DAY = 86_400
_LOGGER = logging.getLogger("tensorboard")


class BatchNormPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # tensorboard has no types
    """Shows the journals below TensorBoard's log directory.

    It reads nothing else: a run is asked for by a name from its own list, never by a path. An error becomes an answer
    that tells it, and a line in TensorBoard's log.
    """

    plugin_name = "lightning_bn"

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        flags = context.flags
        self._roots = roots_of(context.logdir or getattr(flags, "logdir", None), getattr(flags, "logdir_spec", None))
        self._store = JournalStore(partial(find_journals, self._roots))
        self._search: threading.Thread | None = None
        self._found = False

    def get_plugin_apps(self) -> dict[str, Any]:
        """Return what answers each route."""
        asked = (self._runs, self._summaries, self._run, self._grid, self._layer, self._channels)
        answers = {
            **{f"/{path.name}": partial(_file, path) for path in STATIC.iterdir() if path.suffix in _TYPES},
            **{f"/data/{answer.__name__[1:]}": answer for answer in asked},
            "/plotly.min.js": _plotly,
        }
        return {route: _application(answer) for route, answer in answers.items()}

    def is_active(self) -> bool:
        """Return whether there is a journal, as far as is known: the log directory is searched in the background."""
        if not self._found and (self._search is None or not self._search.is_alive()):
            self._search = threading.Thread(target=self._look, name="lightning_bn journals", daemon=True)
            self._search.start()
            self._search.join(_PATIENCE)
        return self._found

    def frontend_metadata(self) -> Any:
        """Return how the tab is called and what it loads."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Batch norm", disable_reload=True)

    def data_plugin_names(self) -> Iterable[str]:
        """Return none: the summaries in event files are others'."""
        return ()

    def _look(self) -> None:
        try:
            self._found = bool(self._store.names())
        except Exception:
            _LOGGER.exception("The log directory can't be searched for journals")

    def _runs(self, request: Any) -> dict[str, Any]:
        return {"runs": self._store.names(), "searched": [root.path for root in self._roots], "file": FILE_NAME}

    def _summaries(self, request: Any) -> list[dict[str, Any]]:
        found = []
        for name in self._store.names():
            try:
                found.append(self._store.summary(name))
            except Exception as error:
                found.append({"name": name, "verdict": f"can't be read: {error}"})
        return found

    def _run(self, request: Any) -> Any:
        name = request.args.get("run", "")
        journal = self._store.journal(name)
        with journal.lock:
            journal.refresh()
            revision = f"{journal.size}-{len(journal.reader.events['end'])}"
            if request.args.get("revision") == revision:
                return {"revision": revision, "changed": journal.changed, "same": True}
            directory = str(Path(journal.path).parent)
            return {"revision": revision, **overview_of(journal.reader, name, directory, journal.changed)}

    def _grid(self, request: Any) -> Any:
        asked = request.args
        first, last = (asked.get(name, type=int) for name in ("first", "last"))
        columns = max(1, min(asked.get("columns", MAX_COLUMNS, type=int), 4 * MAX_COLUMNS))
        make = partial(grid_of, columns=columns, first=first, last=last)
        return self._read(request, lambda reader: make(reader, asked.get("statistic", ""), asked.get("stage", "train")))

    def _layer(self, request: Any) -> Any:
        # Of a long run it takes seconds, in which others may read.
        return layer_of(self._read(request, JournalReader.snapshot), request.args.get("layer", ""))

    def _channels(self, request: Any) -> Any:
        return self._read(request, lambda reader: channels_of(reader, request.args.get("layer", "")))

    def _read(self, request: Any, make: Callable[[JournalReader], Any]) -> Any:
        journal = self._store.journal(request.args.get("run", ""))
        with journal.lock:
            journal.refresh()
            return make(journal.reader)


def _application(answer: Callable[[Any], Any]) -> Any:
    """Return a WSGI application that answers with JSON, or the response itself, and contains whatever goes wrong."""

    def contained(request: Any) -> Any:
        try:
            found = answer(request)
            return found if isinstance(found, wrappers.Response) else _respond(request, found, 200)
        except KeyError:
            return _respond(request, {"error": "There is no such run."}, 404)
        except Exception as error:
            _LOGGER.exception("The batch norm tab could not answer %s", request.path)
            return _respond(request, {"error": f"{type(error).__name__}: {error}"}, 500)

    return wrappers.Request.application(contained)


def _respond(request: Any, value: Any, code: int) -> Any:
    return http_util.Respond(request, json.dumps(value, separators=(",", ":")), "application/json", code=code)


def _file(path: Path, request: Any) -> Any:
    return http_util.Respond(request, path.read_bytes(), _TYPES[path.suffix])


def _plotly(request: Any) -> Any:
    file = plotly_file()
    if file is None:
        return _respond(request, {"error": INSTALL}, 404)
    return http_util.Respond(request, _compressed(file), _TYPES[".js"], content_encoding="gzip", expires=_DAY)


@cache
def _compressed(file: Path) -> bytes:
    return gzip.compress(file.read_bytes(), compresslevel=6)
