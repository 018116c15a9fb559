"""Observes a mounted store for the web server, without blocking the event loop.

The threads of the web server call the monitor.  The event loop only copies counters
and builds the fields of `status`.  The calling thread counts missing shards, and
formats the text.  All answers within one second share one observation.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any, TypeVar

import trio

from ..errors import FusestoreError
from ..store.report import Missing, count_missing
from ..store.store import Store
from ..tally import Tallies
from ..typed_json import from_json
from .families import Metrics
from .fields import Cleaning, MountStatus
from .health import health, status_of
from .observation import Observation
from .page import page, page_fields
from .web import Answer, Route

ANSWER_SECONDS = 5.0
"""How long the event loop may take to answer."""
SHARED_SECONDS = 1.0
SAMPLE_SECONDS = 2.0
SAMPLES_MAX = 300
"""The samples that the charts of the status page show: ten minutes."""
MEASURE_SECONDS_MIN = 5.0
MEASURE_SHARE = 0.01
"""The least pause between measurements of the nodes' room, and their largest share of the time:
a measurement looks at each segment."""

T = TypeVar("T")


class Monitor:
    """Observes an open, mounted store; must be made on the event loop."""

    def __init__(
        self,
        store: Store,
        cleaning: Callable[[], dict[str, Any]],
        tallies: Tallies,
        about: Callable[[], MountStatus],
    ) -> None:
        """`cleaning` returns the fields of `Cleaning`, and `about` describes the mount."""
        self._store = store
        self._cleaning = cleaning
        self._tallies = tallies
        self._about = about
        self._token = trio.lowlevel.current_trio_token()
        self._looking = threading.Lock()
        self._last: tuple[float, Observation] | None = None
        self._samples: deque[tuple[float, ...]] = deque(maxlen=SAMPLES_MAX)
        self._metrics = Metrics(self.observe)

    async def run(self) -> None:
        """Take samples for the charts, and measure the nodes, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure)
            while True:
                self._sample()
                await trio.sleep(SAMPLE_SECONDS)

    async def _measure(self) -> None:
        while True:
            began = trio.current_time()
            await self._store.reporter.measure()
            took = trio.current_time() - began
            await trio.sleep(max(MEASURE_SECONDS_MIN, took / MEASURE_SHARE))

    def _sample(self) -> None:
        tallies = self._tallies
        operations = sum(tally.times.count for tally in tallies.values())
        sizes = (tallies["read"].size, tallies["write"].size)
        self._samples.append((round(time.time(), 3), *sizes, operations))

    # --- observing -------------------------------------------------------------

    def observe(self) -> Observation:
        """Return the store as it was at most one second ago; not for the event loop.

        FusestoreError if the event loop does not answer in time.
        """
        with self._looking:
            if self._last is None or time.monotonic() - self._last[0] > SHARED_SECONDS:
                missing = count_missing(self._ask(lambda: self._store.log.engine.view(b"M")))
                self._last = (time.monotonic(), self._ask(lambda: self._take(missing)))
            return self._last[1]

    def _ask(self, question: Callable[[], T]) -> T:
        """Run a function on the event loop, and return its result."""
        future: Future[T] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(question())
                except BaseException as error:
                    future.set_exception(error)

        try:
            self._token.run_sync_soon(answer)
            return future.result(ANSWER_SECONDS)
        except trio.RunFinishedError:
            raise FusestoreError("The mount has ended.") from None
        except TimeoutError:
            future.cancel()
            raise FusestoreError(
                f"The daemon did not answer within {ANSWER_SECONDS:.0f} seconds."
            ) from None

    def _take(self, missing: Missing | None) -> Observation:
        store = self._store
        mount = self._about()
        cleaning = from_json(Cleaning, self._cleaning())
        return Observation(
            status=status_of(store.reporter.report(missing), cleaning=cleaning, mount=mount),
            mount=mount,
            tallies={name: tally.copy() for name, tally in self._tallies.items()},
            commits=store.committer.commits.copy(),
            checkpoints=store.committer.checkpointer.took.copy(),
            flushes=[(m.name, m.flushes.copy()) for m in store.log.members.all],
            caches={"stripes": store.reader.cached, "unsealed": len(store.log.unsealed)},
            pending=store.log.engine.changed_keys,
        )

    # --- serving ---------------------------------------------------------------

    def routes(self) -> Mapping[str, Route]:
        """Return the function that answers each path."""
        return {
            "/": page,
            "/metrics": self._metrics.answer,
            "/healthz": self._healthz,
            "/status.json": lambda accept: page_fields(self.observe(), self._samples),
        }

    def _healthz(self, accept: str) -> Answer:
        good, sentence = health(self.observe().status)
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        return Answer(f"{sentence}\n".encode(), status=status)
