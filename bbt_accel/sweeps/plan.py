"""What a sweep is to do: tasks × bundles × engines × seeds, as a TOML file or options say it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bbt_accel.bundle import Bundle, Method, first_problem
from bbt_accel.engines.registry import ENGINES
from bbt_accel.errors import BundleError, UsageError
from bbt_accel.settings import resolve
from bbt_accel.tasks import load_task

FOLDER = Path(__file__).parent


def _once(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("each may stand once")
    return values


def _known(values: list[str]) -> list[str]:
    for name in values:
        if name == "remote":
            raise ValueError("a sweep has no --url for the engine remote; tune and evaluate have")
        if name not in ENGINES:
            raise ValueError(f"there is no engine {name!r}, they are {', '.join(ENGINES)}")
    return values


class Sweep(BaseModel):
    """sweep.json, and the TOML file that `--config` names. Paths are relative to where the command is run."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_once)]
    """Names of built-in tasks, or paths of .toml files."""
    bundles: Annotated[list[str], Field(min_length=1), AfterValidator(_once)]
    """Paths; the folder's name is the bundle's in the table."""
    engines: Annotated[list[str], Field(min_length=1), AfterValidator(_once), AfterValidator(_known)] = ["ort"]
    """By the names of `load_engine`."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), AfterValidator(_once)] = [42]
    """Of rows, projection and search."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where all engines run."""
    data: str | None = None
    """A folder with a folder for each task, in which its rows are; None for the tasks' own data sets."""
    method: Method | None = None
    """What every bundle must have been exported for; None for either."""
    needs: str | None = None
    """The command that makes the bundle, for those who lack it."""
    settings: dict[str, float | int | str] = {}
    """Any of `Settings` but the seed; the tasks' presets hold for what is not given."""

    def trials(self) -> list[Trial]:
        """Every combination, the seeds of a cell one after the other.

        Raises BundleError for a bundle that is missing, or exported for another method than the sweep wants; TaskError;
        UsageError for settings that cannot be and for two bundles or tasks of the same name.
        """
        if "seed" in self.settings:
            raise UsageError("a sweep has seeds, not the setting 'seed'; write seeds = [42, 43]")
        bundles = {path: self._bundle(Path(path)) for path in self.bundles}
        tasks = {path: load_task(path) for path in self.tasks}
        _differ("bundles", {path: bundle.path.name for path, bundle in bundles.items()})
        _differ("tasks", {path: task.name for path, task in tasks.items()})
        for task in tasks.values():
            for info in (bundle.info for bundle in bundles.values()):
                resolve(task.preset(info.method), self.settings).generations(info.method, info.n_layers)
        return [
            Trial(
                task=path,
                task_name=task.name,
                metric=task.metric,
                bundle=str(bundle.path.absolute()),
                digest=bundle.digest,
                method=bundle.info.method,
                engine=engine,
                seed=seed,
                device=self.device,
                data=None if self.data is None else str(Path(self.data, task.name)),
                settings=self.settings,
            )
            for bundle in bundles.values()
            for engine in self.engines
            for path, task in tasks.items()
            for seed in self.seeds
        ]

    def _bundle(self, path: Path) -> Bundle:
        if not (path / "bundle.json").is_file() and self.needs is not None:
            raise BundleError(f"there is no bundle {path}: make it with {self.needs}, or name yours by --bundle")
        bundle = Bundle.read(path)
        if self.method is not None:
            bundle.require(self.method)
        return bundle


class Trial(BaseModel):
    """One tuning run and its score. A trial that is equal to one that was done is not run again."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    task_name: str
    metric: Literal["accuracy", "f1"]
    bundle: str
    digest: str
    """Of the bundle."""
    method: Method
    engine: str
    seed: int
    device: Literal["cpu", "cuda"]
    data: str | None
    settings: dict[str, float | int | str]

    @property
    def bundle_name(self) -> str:
        return Path(self.bundle).name

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task_name}-{self.bundle_name}-{self.engine}-{self.seed}"


def preset_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def read_sweep(file: Path | None, given: Mapping[str, Any]) -> Sweep:
    """A sweep from a TOML or JSON file, or from nothing, in which what is given replaces what stands there.

    Raises UsageError, in one line, for a file that cannot be read and for what cannot be.
    """
    found: dict[str, Any] = {}
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
            found = Sweep.model_validate_json(text).model_dump() if file.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            raise UsageError(f"cannot read the sweep {file} ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise UsageError(f"{file}: {first_problem(error)}") from None
    for name in found:
        if name not in Sweep.model_fields:
            close = get_close_matches(name, Sweep.model_fields, 1)
            hint = f"did you mean {close[0]}?" if close else f"a sweep has {', '.join(Sweep.model_fields)}"
            raise UsageError(f"{file}: there is no {name!r}; {hint}")
    given = {name: value for name, value in given.items() if value}
    if "bundles" in given:
        found.pop("needs", None)
    settings = {**found.get("settings", {}), **given.get("settings", {})}
    try:
        return Sweep.model_validate({**found, **given, "settings": settings})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            name = str(first["loc"][0])
            raise UsageError(
                f"the sweep names no {name}; give --{name.removesuffix('s')}, a --config or a --preset"
            ) from None
        raise UsageError(f"{file or 'sweep'}: {first_problem(error).replace('Value error, ', '')}") from None


def absolute(sweep: Sweep) -> Sweep:
    """The same with absolute paths, so that it can be continued from anywhere."""
    paths = {"bundles": [str(Path(path).absolute()) for path in sweep.bundles]}
    tasks = [str(Path(task).absolute()) if task.endswith(".toml") else task for task in sweep.tasks]
    data = None if sweep.data is None else str(Path(sweep.data).absolute())
    return sweep.model_copy(update={**paths, "tasks": tasks, "data": data})


def _differ(what: str, names: Mapping[str, str]) -> None:
    for path, name in names.items():
        others = [other for other in names if names[other] == name and other != path]
        if others:
            raise UsageError(f"two {what} have the name {name} ({path}, {others[0]}); rename one of them")
