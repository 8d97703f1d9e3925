"""The folder of a tuning run: the prompt, what it came from, and how it was found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bbt_accel.batch import Float32
from bbt_accel.bundle import Bundle, Method, PromptMode, first_problem, sha256
from bbt_accel.data import Row, rows_digest
from bbt_accel.errors import BundleError, RunError
from bbt_accel.history import Generation, read_history
from bbt_accel.settings import Settings
from bbt_accel.tasks import Task

FORMAT = 1
INFO, PROMPT, HISTORY, CURVE, EVENTS = "run.json", "prompt.safetensors", "history.jsonl", "curve.png", "tensorboard"


class BundleRecord(BaseModel):
    """The bundle that a prompt was tuned for."""

    model_config = ConfigDict(extra="forbid")
    path: str
    """Absolute."""
    relative: str
    """From the run's folder, so that both may move together."""
    digest: str
    backbone: str
    revision: str | None
    method: Method
    prompt_mode: PromptMode
    precision: str

    @classmethod
    def of(cls, bundle: Bundle, run: Path) -> BundleRecord:
        info, path = bundle.info, bundle.path.absolute()
        try:
            relative = os.path.relpath(path, run.absolute())
        except ValueError:  # another drive of Windows
            relative = str(path)
        return cls(
            path=str(path),
            relative=relative,
            digest=bundle.digest,
            backbone=info.backbone,
            revision=info.revision,
            method=info.method,
            prompt_mode=info.prompt_mode,
            precision=info.precision,
        )


class EngineRecord(BaseModel):
    """The engine that evaluated the candidates."""

    model_config = ConfigDict(extra="forbid")
    name: str
    device: str
    threads: int | None
    workers: int | None = None
    """Processes among which the population was divided; None for the process of the search alone."""
    without: list[str]
    url: str | None = None
    """Of the server, for the engine `remote`."""
    versions: dict[str, str] = {}


class DataRecord(BaseModel):
    """The few-shot rows."""

    model_config = ConfigDict(extra="forbid")
    path: str | None
    """The folder given as --data, absolute; None for the task's own data set."""
    digest: str
    """sha256 of the train rows, then the dev rows."""
    train_rows: int
    dev_rows: int

    @classmethod
    def of(cls, folder: Path | None, train: Sequence[Row], dev: Sequence[Row]) -> DataRecord:
        return cls(
            path=None if folder is None else str(folder.absolute()),
            digest=rows_digest([*train, *dev]),
            train_rows=len(train),
            dev_rows=len(dev),
        )


class Best(BaseModel):
    """Where the prompt that was kept comes from."""

    model_config = ConfigDict(extra="forbid")
    generation: int
    calls: int
    dev_score: float
    dev_loss: float


class RunInfo(BaseModel):
    """run.json."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    status: Literal["running", "interrupted", "done"] = "running"
    task: Task
    label_words: list[str]
    settings: Settings
    data: DataRecord
    bundle: BundleRecord
    engine: EngineRecord
    versions: dict[str, str]
    """Of bbt-accel, cma, numpy and Python."""
    calls: int = 0
    best: Best | None = None
    seconds: float = 0.0
    prompt_shape: list[int] = []
    prompt_sha256: str = ""
    """Of prompt.safetensors."""

    def differences(self, other: RunInfo) -> list[str]:
        """What keeps `other` from continuing this run, each named with both values."""
        pairs = {name: (getattr(self.settings, name), getattr(other.settings, name)) for name in Settings.model_fields}
        pairs |= {
            "bundle": (self.bundle.digest[:12], other.bundle.digest[:12]),
            "task": (self.task.name, other.task.name),
            "engine": (self.engine.name, other.engine.name),
            "device": (self.engine.device, other.engine.device),
            "without": (self.engine.without, other.engine.without),
            "cma": (self.versions.get("cma"), other.versions.get("cma")),
        }
        if all(pairs[name][0] == pairs[name][1] for name in ("seed", "k_shot")):  # which choose the rows
            pairs["data"] = (self.data.digest[:12], other.data.digest[:12])
        found = [f"{name} ({there} there, {here} here)" for name, (there, here) in pairs.items() if there != here]
        if self.task.name == other.task.name and self.task != other.task:
            found.append("the task's definition")
        return found


class Run:
    """A run folder that has been read and checked."""

    def __init__(self, path: Path, info: RunInfo, prompt: Float32) -> None:
        self.path = path
        self.info = info
        self.prompt = prompt
        """float32 (n, H) for bbt, (L, n, H) for bbtv2: the final vectors, as an engine takes them."""

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Read run.json and the prompt. Raises RunError when one is missing, damaged, or not the other's."""
        path = Path(path)
        info = read_info(path)
        file = path / PROMPT
        if not file.is_file():
            raise RunError(f"{path} has no {PROMPT}; tune again" if info.status != "running" else _unfinished(path))
        if sha256(file) != info.prompt_sha256:
            raise RunError(f"{file} is not the prompt that {INFO} describes (sha256); tune again")
        try:
            prompt = load(file.read_bytes())["prompt"]
        except (SafetensorError, KeyError, ValueError):
            raise RunError(f"{file} cannot be read; tune again") from None
        if prompt.dtype != np.float32 or list(prompt.shape) != info.prompt_shape:
            raise RunError(f"{file} holds a prompt {prompt.shape}, {INFO} says {tuple(info.prompt_shape)}; tune again")
        return cls(path, info, prompt)

    @property
    def task(self) -> Task:
        return self.info.task

    @property
    def history(self) -> list[Generation]:
        return read_history(self.path / HISTORY)

    def open_bundle(self, override: str | Path | None = None) -> Bundle:
        """The bundle that the prompt was tuned for, or another of the same backbone, e.g. in another precision.

        Raises BundleError when it is not there, has changed since, or (an override) does not take this prompt.
        """
        record = self.info.bundle
        if override is None:
            places = [self.path.absolute() / record.relative, Path(record.path)]
            bundle = Bundle.read(next((place for place in places if place.exists()), places[1]))
            if bundle.digest != record.digest:
                raise BundleError(
                    f"{bundle.path} is not the bundle that {self.path} was tuned for; name one by --bundle"
                )
            return bundle
        bundle, wanted = Bundle.read(override), record
        for name in ("backbone", "revision", "method", "prompt_mode"):
            if getattr(bundle.info, name) != getattr(wanted, name):
                raise BundleError(
                    f"{override} has the {name} {getattr(bundle.info, name)}, the prompt of {self.path} was tuned for "
                    f"{getattr(wanted, name)}"
                )
        if bundle.info.prompt_shape != self.prompt.shape:
            raise BundleError(f"{override} takes prompts {bundle.info.prompt_shape}, not {self.prompt.shape}")
        return bundle


def read_info(path: Path) -> RunInfo:
    """run.json of a folder. Raises RunError when it is missing, malformed or of another format."""
    file = path / INFO
    if not file.is_file():
        raise RunError(f"{path} is not a run (it has no {INFO}); make one with bbt-accel tune")
    try:
        info = RunInfo.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise RunError(f"{file} cannot be read ({first_problem(error)}); tune again") from None
    if info.format != FORMAT:
        raise RunError(f"{path} has run format {info.format}, this version reads {FORMAT}; tune again")
    return info


def write_info(path: Path, info: RunInfo) -> None:
    """Write run.json in one step: a reader sees the old one or the new one."""
    write_whole(path / INFO, info.model_dump_json(indent=1).encode() + b"\n")


def write_prompt(path: Path, prompt: Float32) -> str:
    """Write prompt.safetensors; returns its sha256."""
    write_whole(path / PROMPT, save({"prompt": np.ascontiguousarray(prompt, dtype=np.float32)}))
    return sha256(path / PROMPT)


def write_whole(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _unfinished(path: Path) -> str:
    return f"{path} is an unfinished run; continue it with bbt-accel tune --resume"
