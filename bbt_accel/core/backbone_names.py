"""What a backbone is called where others read it: hub ids as they are, local checkpoints without
their paths.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePath

from bbt_accel.io.files import fingerprint


def backbone_name(backbone: str) -> str:
    """The backbone's public name: a hub id, or a folder's name without its path."""
    return PurePath(backbone).name if PurePath(backbone).is_absolute() else backbone


def is_local(backbone: str) -> bool:
    """Whether it is a checkpoint on this machine; `demo` is the shipped one, whatever is in the
    working directory.
    """
    return backbone != "demo" and Path(backbone).exists()


def backbone_digest(backbone: str) -> str:
    """sha256 (hex) of the name, and of the content of a local checkpoint."""
    return (
        fingerprint(backbone)
        if is_local(backbone)
        else hashlib.sha256(backbone.encode()).hexdigest()
    )


def hub_id(backbone: str, revision: str | None) -> str | None:
    """The backbone, if it is a hub id rather than a folder, a file or the shipped one."""
    local = is_local(backbone) or PurePath(backbone).is_absolute() or backbone.startswith(".")
    local |= "/" not in backbone and revision is None  # a folder's name in what was pushed
    return None if local or backbone == "demo" or backbone.endswith(".gguf") else backbone


def names_path(one: str, other: str) -> bool:
    """Whether one backbone is the bare name of the local checkpoint that the other has the path of.

    What was pushed names a local checkpoint without its path. The revision, which only those of the
    hub have, keeps it apart from a hub id without an owner. Two paths must be equal: folders of one
    name may hold different checkpoints.
    """
    paths = [name for name in (one, other) if PurePath(name).is_absolute()]
    return len(paths) == 1 and backbone_name(one) == backbone_name(other)
