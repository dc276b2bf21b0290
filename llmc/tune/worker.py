"""The process that builds, checks and times candidates of one kernel call, and may crash or hang doing so.

``python -m llmc.tune.worker`` reads a JSON object a line and answers each with one; :class:`Worker` is the other end.
A setup (:meth:`llmc.tune.task.Task.setup`) says which call from now on; then ``{"build": config}`` builds and checks a candidate,
``{"time": number}`` times one.
"""

from __future__ import annotations

from typing import Any

from llmc.errors import InternalError, LlmcError
from llmc.tune.child import Child, ChildEnded, answer_all


class CandidateFailed(Exception):
    """A candidate that does not compile, computes something wrong, crashes its process or takes too long. The text says which."""


class Worker:
    """A worker process for one call at a time. It is started again after a candidate has ended it; candidates built before are gone
    then."""

    def __init__(
        self, setup: dict[str, Any], *, build_seconds: float = 60.0, time_seconds: float = 20.0, module: str = "llmc.tune.worker"
    ) -> None:
        """``setup``: the first message (see the module). ``module``: what to run. Raises the LlmcError of setting up."""
        self._setup, self._limits, self._module = setup, (build_seconds, time_seconds), module
        self._child: Child | None = None
        self._built: dict[str, int] = {}
        self.device = ""
        self._start()

    def switch(self, setup: dict[str, Any]) -> None:
        """Go on with another call, in the same process: importing a compiler takes seconds. Raises as :meth:`__init__`."""
        self._setup = setup
        self._start()

    def _start(self) -> None:
        self._child, self._built = self._child or Child(self._module), {}
        try:
            answer = self._ask(self._setup, 300.0)
        except CandidateFailed as error:
            raise InternalError(f"the tuning worker for {self._setup['family']} does not start: {error}") from error
        if "refused" in answer:
            raise LlmcError(answer["refused"])
        self.device = answer["device"]

    def _ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._child is not None
        try:
            return self._child.ask(message, seconds)
        except ChildEnded as error:
            self._child, self._built = None, {}
            raise CandidateFailed(str(error)) from None

    def build(self, config: dict[str, Any], text: str) -> None:
        """Build and check a candidate, named ``text`` from now on. Raises CandidateFailed."""
        if self._child is None:
            self._start()
        answer = self._ask({"build": config}, self._limits[0])
        if "failed" in answer:
            raise CandidateFailed(answer["failed"])
        self._built[text] = answer["number"]

    def has(self, text: str) -> bool:
        """Whether the candidate is built in the process as it is now."""
        return text in self._built

    def time(self, text: str) -> list[float]:
        """Seconds of one call at each size, measured once. Raises CandidateFailed."""
        answer = self._ask({"time": self._built[text]}, self._limits[1])
        if "failed" in answer:
            raise CandidateFailed(answer["failed"])
        return list(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        child, self._child, self._built = self._child, None, {}
        if child is not None:
            child.close()


class _Server:
    """The worker's side."""

    def __init__(self, setup: dict[str, Any]) -> None:
        from llmc.tune import inputs
        from llmc.tune.bench import Before, Bench
        from llmc.tune.build import compile_one
        from llmc.tune.devices import open_device
        from llmc.tune.task import from_setup

        task = from_setup(setup)
        self.target, self.runs, self.space = task.target, task.runs, task.space
        self.sizes = sizes = task.sizes
        arrays = [inputs.make(task.call, s) for s in sizes]
        wanted = [inputs.expected(task.family, task.call, s, a, task.fused) for s, a in zip(sizes, arrays, strict=True)]
        self.device = open_device(self.target.kind)
        before = None
        if (first := task.preceding()) is not None:
            kernel = compile_one(first.family, first.call, self.target, first.default, first.sizes).kernel
            before = Before(kernel, first.call, first.sizes, [inputs.make(first.call, s) for s in first.sizes])
        self.bench = Bench(self.device, task.call, sizes, arrays, wanted, before)
        self.timers: list[Any] = []

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            if "build" in message:
                return self._build(message["build"])
            return {"seconds": [timer() for timer in self.timers[message["time"]]]}
        except Exception as error:  # a candidate may fail in any way
            lines = str(error).strip().splitlines() or [""]
            return {"failed": f"{type(error).__name__}: {lines[-1][:200]}"}

    def _build(self, config: dict[str, Any]) -> dict[str, Any]:
        from llmc.schedules.records import config_text, restore
        from llmc.tune.build import compile_one

        restored = restore(config_text(config), self.space)
        if restored is None:
            raise ValueError("the configuration is not in the family's space")
        made = compile_one(*self.runs, self.target, restored, self.sizes, self.bench.repeats)
        error = self.bench.check(made.kernel)
        self.timers.append(self.bench.timers(made.kernel, made.steps))
        return {"number": len(self.timers) - 1, "error": error}


def serve() -> None:
    """Be the worker: answer what comes on stdin."""
    server: _Server | None = None

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        nonlocal server
        if server is not None and "family" not in message:
            return server.answer(message)
        if server is not None:
            server.device.close()
            server = None  # its inputs make room for the next
        try:
            server = _Server(message)
        except LlmcError as error:
            return {"refused": str(error)}
        return {"device": server.device.name}

    answer_all(answer)


if __name__ == "__main__":
    serve()
