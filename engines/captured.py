"""Which calls on a GPU become CUDA graphs, and which of those are kept."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

from bbt_accel.engines.cuda import Cuda

RESERVE = 2**29
"""Bytes of the GPU's memory that are left free: every graph has an execution context, and contexts
hold memory that the shared scratch buffer does not cover."""
CALLS = 10_000  # that are remembered until they come again
ATTEMPTS = 2  # to capture the same call: a failure may pass, as when memory was short


@dataclass
class Captured:
    """A CUDA graph, the context that it was captured from, which must live as long, and when it was
    launched last.
    """

    graph: Any
    context: Any
    used: int


class CapturedCalls:
    """Calls by what identifies them: their stage, shapes and addresses. A call is captured when it
    comes again.

    Where memory is short, the graph that was launched the longest ago gives way to the new one, if
    it has not been
    launched since that call came the last time: a search that repeats more calls than fit keeps the
    graphs it has.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.graphs: OrderedDict[object, Captured] = OrderedDict()
        """The least recently launched first."""
        self.came: dict[object, int] = {}
        """Calls without a graph → when they came last."""
        self.failures: Counter[object] = Counter()
        self.turn = 0
        self.captured = self.launched = 0
        """Calls so far that were captured, and that were launched as graphs."""
        self.short = False
        """Whether there was no memory for a call's graph."""

    def launch(self, call: object) -> bool:
        """Launch the call's graph, if there is one."""
        self.turn += 1
        found = self.graphs.get(call)
        if found is None:
            return False
        found.used = self.turn
        self.graphs.move_to_end(call)
        self.cuda.launch(found.graph)
        self.launched += 1
        return True

    def worth_capturing(self, call: object) -> bool:
        """Whether the call came before, and there is memory for its graph, or an idle one's to be
        freed.
        """
        before = self.came.pop(call, None)  # so that the last one of the dictionary came last
        self.came[call] = self.turn
        if len(self.came) > CALLS:
            self.came.pop(next(iter(self.came)))
        if before is None or self.failures[call] >= ATTEMPTS:
            return False
        while self.cuda.free_memory() < RESERVE:
            oldest = next(iter(self.graphs), None)
            if oldest is None or self.graphs[oldest].used > before:
                self.short = True
                return False
            self.drop(oldest)
        return True

    def add(self, call: object, graph: Any, context: Any) -> None:
        self.came.pop(call, None)
        self.failures.pop(call, None)
        self.graphs[call] = Captured(graph, context, self.turn)
        self.captured += 1

    def drop(self, call: object) -> None:
        """Free a graph and its context, once nothing runs that uses them."""
        self.cuda.synchronize()
        self.cuda.destroy(self.graphs.pop(call).graph)

    def clear(self) -> None:
        """Free all graphs, as when the addresses of their arrays become invalid."""
        try:
            if self.graphs:
                self.cuda.synchronize()
            for found in self.graphs.values():
                self.cuda.destroy(found.graph)
        finally:
            self.graphs.clear()
            self.came.clear()
            self.failures.clear()
