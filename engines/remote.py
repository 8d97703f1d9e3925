"""A backbone on a server: `bbt-accel serve BUNDLE`, over the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bbt_accel.core import inference_protocol as protocol
from bbt_accel.core.batch import Batch, Float32
from bbt_accel.core.bundle import STATES, Bundle
from bbt_accel.core.population import Population
from bbt_accel.engines.base import BoundBatch, Engine, check_tokens
from bbt_accel.engines.client import Server, ServerRefused
from bbt_accel.errors import EngineError, UsageError

HEAD = 65536  # bytes of a request that are reserved for its JSON header


def connect(bundle: Bundle, *, url: str, without: frozenset[str] = frozenset()) -> Engine:
    """An engine that sends its work to `url`, after checking that the server has the same bundle.

    Raises UsageError for `without`, which the server decides, EngineError when it cannot be reached
    or refuses, BundleError when it has another bundle.
    """
    if without:
        raise UsageError("without does not apply to a bbt-accel server; omit it")
    server = Server(url)
    try:
        if protocol.ROWS_EXTENSION not in server.facts.get("extensions", ()):
            raise EngineError(
                f"{url} is no bbt-accel server; start one with bbt-accel serve BUNDLE"
            )
        return RemoteEngine(bundle, server)
    except BaseException:
        server.close()
        raise


class RemoteEngine(Engine):
    """A bbt-accel server: rows are sent once, then only prompts."""

    def __init__(self, bundle: Bundle, server: Server) -> None:
        super().__init__(bundle)
        self.server = server
        self.facts = server.check(bundle, protocol.BACKBONE)
        self.max_batch = int(
            self.facts.get("max_batch", 2**31)
        )  # rows times candidates, per request
        self.max_bytes = int(self.facts.get("max_request_bytes", 2**31))

    def bind(self, batch: Batch) -> RemoteBoundBatch:
        check_tokens(self.bundle, batch)
        return RemoteBoundBatch(self, batch)

    def versions(self) -> dict[str, str]:
        return self.server.versions() | {"engine": self.facts.get("engine", "unknown")}

    def close(self) -> None:
        self.server.close()


class RemoteBoundBatch(BoundBatch):
    """Rows that the server caches; they are sent again when it has dropped them."""

    def __init__(self, engine: RemoteEngine, batch: Batch) -> None:
        super().__init__(engine.bundle, batch)
        self.engine, self.rows = engine, batch.inputs()
        self.hash: str | None = None  # as the server returned it; None until it has the rows

    def infer(self, model: str, own: dict[str, Any], outputs: Sequence[str]) -> dict[str, Float32]:
        server, result = self.engine.server, None
        if self.hash is not None:
            try:
                result = server.infer(model, own, self.hash)
            except ServerRefused as error:
                if error.status != protocol.UNKNOWN_ROWS:
                    raise
        if result is None:
            result = server.infer(model, {**own, **self.rows})
            self.hash = str(result.get_response().get("parameters", {}).get(protocol.ROWS))
        found = {name: result.as_numpy(name) for name in outputs}
        for name, value in found.items():
            if value is None:
                raise EngineError(f"{server.url} responded without {name}")
        return {name: np.array(value, np.float32) for name, value in found.items()}

    def _label_logits(self, population: Population) -> Float32:
        if population.layer is None:
            return self.request(protocol.BACKBONE, "prompts", population, ["label_logits"])[
                "label_logits"
            ]
        other = {"stack": population.fixed, "layer": np.array([population.layer], np.int64)}
        return self.request(protocol.LAYER, "candidates", population, ["label_logits"], other)[
            "label_logits"
        ]

    def _outputs(self, population: Population) -> dict[str, Float32]:
        return self.request(
            protocol.OUTPUTS, "prompts", population.whole(), ["label_logits", *STATES]
        )

    def request(
        self,
        model: str,
        name: str,
        population: Population,
        outputs: Sequence[str],
        other: dict[str, Any] | None = None,
    ) -> dict[str, Float32]:
        """Outputs of all candidates, as many per request as the server takes."""
        candidates, other = (
            np.asarray(population.candidates),
            other or {},
        )  # this engine does not project
        room = (
            self.engine.max_bytes
            - HEAD
            - sum(array.nbytes for array in (*other.values(), *self.rows.values()))
        )
        step = max(1, min(self.engine.max_batch // len(self.batch), room // candidates[:1].nbytes))
        parts = [candidates[i : i + step] for i in range(0, len(candidates), step)]
        found = [self.infer(model, {name: part, **other}, outputs) for part in parts]
        return {output: np.concatenate([each[output] for each in found]) for output in outputs}

    def layer_stds(self) -> Float32:
        return self.infer(protocol.STDS, {}, ["layer_stds"])["layer_stds"]
