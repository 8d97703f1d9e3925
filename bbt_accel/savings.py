"""Work that is left out, by name.

Each saving gives the same numbers as the naive forward (tests/test_exactness.py) and can be switched off by its name,
to be measured.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from bbt_accel.bundle import BundleInfo
from bbt_accel.errors import UsageError

ALL = ("roberta", "bert", "bart", "t5", "gpt2")


@dataclass(frozen=True)
class Saving:
    """One kind of work that need not be done."""

    what: str
    inside: bool = False
    """Part of the graphs, and so fixed when a bundle is exported."""
    families: tuple[str, ...] = ALL
    method: str | None = None
    modes: tuple[str, ...] = ("add", "cat")

    def applies(self, info: BundleInfo) -> bool:
        """Whether it leaves anything out for this backbone, method and prompt mode."""
        return (
            info.family in self.families and self.method in (None, info.method) and info.prompt_mode in self.modes
        )  # fmt: skip


SAVINGS = {
    "population": Saving("all candidates in one call"),
    "buckets": Saving("rows of like length together, so that padding is not computed"),
    "layer-cache": Saving("bbtv2: the layers below the one that is searched are computed once", method="bbtv2"),
    "short-decoder": Saving("BART and T5: the decoder ends at the readout position", families=("bart", "t5")),
    "label-head": Saving("the LM head at the readout position, for the label words alone", inside=True),
    "last-block": Saving("the last block computes the readout position alone", inside=True),
    "prefix-cache": Saving("GPT-2: the prompt's states once a candidate, not once a row", True, ("gpt2",)),
    "shared-first": Saving("what the first block computes alike for all candidates or all rows, once", inside=True),
}


def check_savings(without: Collection[str]) -> frozenset[str]:
    """The names as a set; UsageError for one that does not exist."""
    for name in without:
        if name not in SAVINGS:
            near = difflib.get_close_matches(name, SAVINGS, n=1)
            raise UsageError(
                f"--without does not know {name!r}. "
                + (f"Did you mean {near[0]}?" if near else f"Savings are {', '.join(SAVINGS)}.")
            )
    return frozenset(without)


def inside(without: Collection[str]) -> list[str]:
    """Of these names, those that an export fixes, sorted."""
    return sorted(name for name in without if SAVINGS[name].inside)
