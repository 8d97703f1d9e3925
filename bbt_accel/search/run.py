"""The folder of a tuning run: the prompt, what it was tuned for, and how it was found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator
from safetensors.numpy import load_file, save

from bbt_accel.core.backbone_names import names_path
from bbt_accel.core.batch import Float32, Float64, Int64
from bbt_accel.core.bundle import INFO as BUNDLE_INFO
from bbt_accel.core.bundle import PROMPT_FACTS, Bundle, Method, PromptMode, TemplateGroup
from bbt_accel.core.engine_specs import DEFAULT_ENGINE, Precision, engine_spec, kind_of
from bbt_accel.core.objective import Objective, uninformed
from bbt_accel.core.settings import Metric, ReadoutName, Settings
from bbt_accel.errors import BundleError, RunError, translated
from bbt_accel.io.files import has_digest, sha256, write_atomically
from bbt_accel.io.hub import fetched
from bbt_accel.io.manifests import Manifest
from bbt_accel.search.history import Generation, read_history
from bbt_accel.search.readout import Readout
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.task import Task

INFO, PROMPT, READOUT, HISTORY = (
    "run.json",
    "prompt.safetensors",
    "readout.safetensors",
    "history.jsonl",
)
CURVE, EVENTS, TASK, CARD = "curve.png", "tensorboard", "task.toml", "README.md"
ESTIMATOR = "classifier.json"
"""The file that makes a folder a saved PromptClassifier, with the folders `run` and `bundle`."""


SAME = "As in bundle.json."


class BundleRecord(BaseModel, extra="forbid"):
    """The bundle that a prompt was tuned for."""

    path: str = Field(description="Absolute.")
    relative: str = Field(description="From the run's folder, so that both may move together.")
    digest: str = Field(description="sha256 of its bundle.json.")
    backbone: str = Field(description=SAME)
    revision: str | None = Field(description=SAME)
    license: str | None = Field(default=None, description=SAME)
    template_group: TemplateGroup | None = Field(default=None, description=SAME)
    method: Method = Field(description=SAME)
    prompt_mode: PromptMode = Field(description=SAME)
    prompt_init: str | None = Field(default=None, description=SAME)
    precision: Precision = Field(description=SAME)

    @classmethod
    def of(cls, bundle: Bundle, run: Path) -> BundleRecord:
        path = bundle.path.absolute()
        try:
            relative = os.path.relpath(path, run.absolute())
        except ValueError:  # another drive of Windows
            relative = str(path)
        facts = bundle.info.model_dump(include={*cls.model_fields} - {"path", "relative", "digest"})
        return cls(path=str(path), relative=relative, digest=bundle.digest, **facts)


class EngineRecord(BaseModel, extra="forbid"):
    """The engine that evaluated the candidates."""

    name: str = Field(description="torch, ort, openvino, trt, remote, or that of a plugin.")
    device: str = Field(description="cpu, cuda or cuda:N.")
    threads: int | None = Field(description="CPU threads; None for all cores.")
    workers: int | None = Field(
        default=None, description="Processes that shared the evaluation, besides the search's."
    )
    without: list[str] = Field(description="Optimizations that were switched off.")
    url: str | None = Field(
        default=None, description="Address of the server, for the engine `remote`."
    )
    versions: dict[str, str] = Field(
        default={}, description="Of the libraries that computed, and the device."
    )

    @property
    def remote(self) -> bool:
        """Whether a server computed. It is asked again only where a user names it: the run may be
        somebody else's.
        """
        return engine_spec(self.name).remote

    def used_with(self, name: str | None, device: str | None) -> tuple[str, str, list[str]]:
        """The engine, its device and what is switched off, to use the prompt: as in the search
        unless given.

        Another engine runs on the same device if it can. Without a name, what a server computed is
        computed by the default engine.
        """
        chosen = name or (DEFAULT_ENGINE if self.remote else self.name)
        spec = engine_spec(chosen)
        there = self.device if kind_of(self.device) in spec.backends else spec.device("cpu")
        return chosen, device or there, self.without if chosen == self.name else []


class DataRecord(BaseModel, extra="forbid"):
    """The few-shot rows."""

    path: str | None = Field(
        description="What was given as --data, absolute; None for the task's own data set."
    )
    digest: str = Field(description="sha256 of the train rows, then the dev rows.")
    train_rows: int = Field(description="Number of train rows.")
    dev_rows: int = Field(description="Number of dev rows.")


class BestRecord(BaseModel, extra="forbid"):
    """The generation that the saved prompt comes from; None for the prompt without a search."""

    generation: int | None = Field(description="Its number, from 0.")
    calls: int = Field(description="Calls up to and including it.")
    dev_score: float = Field(description="Metric of the prompt on the dev rows.")
    dev_loss: float = Field(description="Its loss there.")


class Baselines(BaseModel, extra="forbid"):
    """Scores of rows that take no search."""

    chance: float = Field(description="Of a class drawn at random.")
    majority: float = Field(description="Of always predicting the most frequent class.")
    without_prompt: float = Field(description="Of the label words, before the search.")
    batch_calibrated: float = Field(
        description="Of the same with each class's mean log-probability removed."
    )

    @classmethod
    def of(cls, scores: Float64, targets: Int64, metric: Metric) -> Self:
        """scores: `scores_without_search` (2, N, C); targets: (N,)."""
        _, (without_prompt, batch_calibrated) = Objective("ce", metric).score(scores, targets)
        chance, majority = uninformed(targets, scores.shape[2], metric)
        return cls(
            chance=chance,
            majority=majority,
            without_prompt=without_prompt,
            batch_calibrated=batch_calibrated,
        )


class TriedReadout(BaseModel, extra="forbid"):
    """A readout that `auto` fitted at the prompt without a search, as it scores rows that it was
    not fitted on.
    """

    name: ReadoutName = Field(description="Its name.")
    log_loss: float = Field(description="Cross-validated, on train and dev rows.")
    score: float = Field(description="The task's metric, likewise.")
    seconds: float = Field(
        description="To fit it in every fold, but for what earlier ones have fitted."
    )


class ReadoutRecord(BaseModel, extra="forbid"):
    """The readout of a run, in readout.safetensors, and why it is this one."""

    name: ReadoutName = Field(default="verbalizer", description="Its name.")
    tried: list[TriedReadout] = Field(default=[], description="What `auto` has compared.")
    searched: bool = Field(default=True, description="Whether the prompt comes from a search.")
    reason: str | None = Field(default=None, description="Why this readout and this prompt.")
    sha256: str = Field(default="", description="Of readout.safetensors.")


class RunInfo(Manifest):
    """run.json."""

    format: int = Field(default=3, description="Version of this file.")
    status: Literal["running", "interrupted", "done"] = Field(
        default="running", description="How far the search is."
    )
    task: Task = Field(description="The task, as it was.")
    label_words: list[str] = Field(description="The first label word of each class.")
    settings: Settings = Field(description="Settings of the search.")
    data: DataRecord = Field(description="The rows that it had.")
    demonstrations: list[Row] = Field(
        default=[], description="Labelled train rows that precede every row."
    )
    bundle: BundleRecord = Field(description="What the prompt was tuned for.")
    engine: EngineRecord = Field(description="What computed.")
    versions: dict[str, str] = Field(description="Of bbt-accel, cma, numpy and Python.")
    calls: int = Field(
        default=0,
        description=(
            "Calls of the search, one per candidate on the train set; dev scores are not counted."
        ),
    )
    best: BestRecord | None = Field(default=None, description="Where the prompt comes from.")
    baselines: Baselines | None = Field(
        default=None, description="Scores on the dev rows without a search."
    )
    readout: ReadoutRecord = Field(default=ReadoutRecord(), description="How classes are read.")
    seconds: float = Field(default=0.0, description="Of the search, with its readouts.")
    prompt_shape: list[int] = Field(default=[], description="Of the prompt in prompt.safetensors.")
    prompt_sha256: str = Field(default="", description="sha256 of prompt.safetensors.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        classes = self.task.n_classes
        if len(self.label_words) != classes:
            raise ValueError(f"label_words: {len(self.label_words)} for {classes} classes")
        if any(row.label is None or not 0 <= row.label < classes for row in self.demonstrations):
            raise ValueError(f"demonstrations: a label is none of {classes} classes")
        return self

    def differences(self, other: RunInfo) -> list[str]:
        """Differences that keep `other` from continuing this run, with both values. A larger budget
        is none.
        """
        settings = self.settings.differences(other.settings)
        pairs = settings | {
            "bundle": (self.bundle.digest[:12], other.bundle.digest[:12]),
            "task": (self.task.name, other.task.name),
            "engine": (self.engine.name, other.engine.name),
            "device": (self.engine.device, other.engine.device),
            "without": (self.engine.without, other.engine.without),
            "cma": (self.versions.get("cma"), other.versions.get("cma")),
        }
        if not {"seed", "k_shot"} & settings.keys():  # which choose the rows
            pairs["data"] = (self.data.digest[:12], other.data.digest[:12])
        found = [
            f"{name} (was {was}, is now {now})" for name, (was, now) in pairs.items() if was != now
        ]
        if self.task.name == other.task.name and self.task != other.task:
            found.append("task definition")
        return found

    @property
    def class_names(self) -> list[str]:
        """The task's own names of its classes, where it has them; else the first label word of
        each.
        """
        return self.task.classes or self.label_words

    @property
    def context(self) -> str:
        """In words, what precedes every row of a decoder; empty if nothing does."""
        if self.bundle.template_group != "causal":
            return ""
        instruction, shown = self.task.context.instruction, len(self.demonstrations)
        texts = [repr(instruction)] if instruction else []
        return ", then ".join(
            [*texts, f"{shown} labelled train row{'s' * (shown > 1)}"] if shown else texts
        )

    def verdict(self) -> str | None:
        """In words, which of the baselines the result does not surpass on the dev rows; None if it
        surpasses all.
        """
        if self.best is None or self.baselines is None:
            return None
        score, b, hint = (
            self.best.dev_score,
            self.baselines,
            "a larger --k-shot or another backbone may help",
        )
        if score <= max(b.chance, b.majority):
            return (
                f"at or below chance on the dev rows: this classifier has learned nothing; {hint}"
            )
        if score <= b.without_prompt:
            return f"no better on the dev rows than the label words without a prompt; {hint}"
        if score <= b.batch_calibrated:
            rest = "" if self.settings.fitted else "; --readout auto begins there"
            return (
                f"no better on the dev rows than the label words calibrated without a search{rest}"
            )
        return None


class Run:
    """A complete run folder, read and checked."""

    def __init__(self, path: Path, info: RunInfo, prompt: Float32, readout: Readout) -> None:
        self.path, self.info, self.readout = path, info, readout
        # float32 (n, H) for bbt, (L, n, H) for bbtv2: the final vectors, as engines take them
        self.prompt = prompt

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Read run.json and the prompt, of a folder or of hf://OWNER/NAME, which is downloaded.

        Of a saved PromptClassifier it is the run inside. Raises RunError when one is missing or
        damaged, or they do not match; HubError for a download that fails.
        """
        path = fetched(path)
        path = path / "run" if is_saved_classifier(path) else path
        info = read_info(path)
        file = path / PROMPT
        if info.status == "running":
            raise RunError(f"{path} is an unfinished run; continue it with bbt-accel tune --resume")
        if not file.is_file():
            raise RunError(f"{path} has no {PROMPT}; tune again")
        if sha256(file) != info.prompt_sha256:
            raise RunError(f"{file} is not the prompt that {INFO} describes (sha256); tune again")
        if not has_digest(path / READOUT, info.readout.sha256):
            raise RunError(
                f"{path / READOUT} is not the readout that {INFO} describes (sha256); tune again"
            )
        with translated(RunError, f"{file} cannot be read; tune again"):
            prompt = load_file(file)["prompt"]
        if list(prompt.shape) != info.prompt_shape:
            raise RunError(
                f"{file} has the shape {list(prompt.shape)}, not {info.prompt_shape}; tune again"
            )
        readout = Readout.load(path / READOUT)
        if (
            readout.name != info.readout.name
            or not np.isin(readout.classes, range(info.task.n_classes)).all()
        ):
            raise RunError(f"{path / READOUT} does not fit {INFO}; tune again")
        return cls(path, info, prompt, readout)

    @property
    def task(self) -> Task:
        return self.info.task

    @property
    def data_path(self) -> Path | None:
        """Where its rows are, unless they are those of the task."""
        return None if self.info.data.path is None else Path(self.info.data.path)

    @property
    def history(self) -> list[Generation]:
        return read_history(self.path / HISTORY)

    def open_bundle(self, override: str | Path | None = None) -> Bundle:
        """The bundle that the prompt was tuned for, or another of the same backbone, e.g. in
        another precision.

        Raises BundleError when it is missing, has changed since, or (an override) does not take
        this prompt.
        """
        record = self.info.bundle
        if override is None:
            places = [self.path.absolute() / record.relative, Path(record.path)]
            if is_saved_classifier(self.path.absolute().parent):
                places.insert(0, self.path.absolute().parent / "bundle")
            place = next(
                (place for place in places if has_digest(place / BUNDLE_INFO, record.digest)), None
            )
            if place is not None:
                return Bundle.read(place)
            bundle = Bundle.read(next((place for place in places if place.exists()), places[1]))
            problem = f"{bundle.path} is not the bundle that {self.path} was tuned for"
            raise BundleError(f"{problem}; pass one with --bundle")
        bundle = Bundle.read(override)
        for name in PROMPT_FACTS:
            found, wanted = getattr(bundle.info, name), getattr(record, name)
            if found != wanted and not (name == "backbone" and names_path(found, wanted)):
                problem = (
                    f"{override} has the {name} {found}, the prompt of {self.path} needs {wanted}"
                )
                raise BundleError(f"{problem}; pass a bundle that was exported as the run's was")
        if (takes := bundle.info.prompt_shape) != self.prompt.shape:
            problem = (
                f"{override} takes prompts {takes}, not {self.prompt.shape}, that of {self.path}"
            )
            raise BundleError(f"{problem}; pass a bundle with as many prompt tokens")
        return bundle


def is_saved_classifier(path: Path) -> bool:
    return (path / ESTIMATOR).is_file()


def is_run(path: Path) -> bool:
    """Whether a folder is one that `Run.read` takes: a run, or a saved classifier."""
    return (path / INFO).is_file() or is_saved_classifier(path)


def read_info(path: Path) -> RunInfo:
    """run.json of a folder. Raises RunError when it is missing, malformed or of another format."""
    return RunInfo.read(path / INFO, "run", RunError, "make one with bbt-accel tune", "tune again")


def write_info(path: Path, info: RunInfo) -> None:
    write_atomically(path / INFO, info.model_dump_json(indent=1).encode() + b"\n")


def write_prompt(path: Path, prompt: Float32) -> str:
    """Write prompt.safetensors; returns its sha256."""
    write_atomically(
        path / PROMPT, save({"prompt": np.ascontiguousarray(prompt, dtype=np.float32)})
    )
    return sha256(path / PROMPT)
