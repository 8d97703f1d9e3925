"""Redundant computation that is avoided, by name.

Each optimization gives the same numbers as the naive forward (tests/exporters/test_exactness.py)
and can be switched off by its name, for an ablation.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

from bbt_accel.core.bundle import Architecture, BundleInfo, Method
from bbt_accel.errors import check_known


@dataclass(frozen=True)
class Optimization:
    """What is avoided, and for which architectures and methods."""

    what: str
    in_graph: bool = False  # part of the graphs, and so fixed when a bundle is exported
    architectures: tuple[Architecture, ...] = get_args(Architecture)
    methods: tuple[Method, ...] = get_args(Method)

    def applies(self, info: BundleInfo) -> bool:
        """Whether it changes anything for this backbone and method."""
        return info.architecture in self.architectures and info.method in self.methods


OPTIMIZATIONS = {
    "population": Optimization(
        "several candidates in one forward pass, as many as the engine's token limit allows"
    ),
    "buckets": Optimization("rows of similar length together, so that padding is not computed"),
    "layer-cache": Optimization(
        "bbtv2: the layers below the searched one are computed once", methods=("bbtv2",)
    ),
    "context-cache": Optimization(
        "the states of the begin token and the context are computed once per search",
        False,
        ("decoder",),
    ),
    "short-decoder": Optimization(
        "the decoder ends at the readout position", architectures=("encoder-decoder",)
    ),
    "label-head": Optimization(
        "the LM head at the readout position, for the label words alone", in_graph=True
    ),
    "last-block": Optimization("the last block at the readout position alone", in_graph=True),
    "prefix-cache": Optimization(
        "the prompt's states are computed once per candidate, not per row", True, ("decoder",)
    ),
    "shared-first": Optimization(
        "the parts of the first block that candidates or rows share, once", in_graph=True
    ),
}


def check_optimizations(without: Collection[str]) -> frozenset[str]:
    """The names as a set. Raises UsageError for an unknown one."""
    for name in without:
        check_known("optimization", name, OPTIMIZATIONS)
    return frozenset(without)


def in_graph(without: Collection[str]) -> list[str]:
    """Those of the names that an export fixes, sorted."""
    return sorted(name for name in without if OPTIMIZATIONS[name].in_graph)
