"""What a sweep runs: the grid of tasks × bundles × engines × seeds, from a TOML file or from
options.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bbt_accel.core.bundle import INFO, Bundle, Method
from bbt_accel.core.engine_specs import DEFAULT_ENGINE, Device, local_engine
from bbt_accel.core.option_types import TASK_FOLDERS, Names, Seeds
from bbt_accel.core.settings import Settings, as_given, check_given, resolve
from bbt_accel.errors import BundleError, UsageError, check_known, first_line, first_problem
from bbt_accel.io.files import fingerprint
from bbt_accel.io.reporting import Schema
from bbt_accel.tasks.task import Task, absolute_file, load_task

PRESETS = Path(__file__).parent  # the folder of the shipped sweeps
RUN = "run"  # the folder of the run in the folder of a trial


def _engines(names: list[str]) -> list[str]:
    for name in names:
        local_engine(name, "sweep")
    return names


class Sweep(Schema):
    """sweep.json, and the TOML file that `--config` names. Paths are relative to the working
    directory.
    """

    tasks: Names = Field(description="Built-in tasks or paths of .toml files.")
    bundles: Names = Field(description="Bundle folders, of different names.")
    engines: Annotated[Names, AfterValidator(_engines)] = Field(default=[DEFAULT_ENGINE])
    """Engines that run the backbones."""
    seeds: Seeds = Field(
        default=[42], description="Seeds of the few-shot rows, the projection and the search."
    )
    device: Device = Field(default="cpu", description="Device of all engines.")
    data: str | None = Field(default=None, description=TASK_FOLDERS)
    method: Method | None = None
    """Method that every bundle must have been exported for; None for any."""
    needs: str | None = Field(
        default=None, description="Command that creates the bundle, for users who lack it."
    )
    cross_evaluate: bool = False
    """Also score every prompt in each bundle of the sweep that takes it, and compare the
    predictions.
    """
    settings: Annotated[dict[str, float | int | str], AfterValidator(as_given)] = Field(default={})
    """Any of `Settings` except the seed; the tasks' presets apply to the others."""

    def trials(self) -> list[Trial]:
        """Every combination, the seeds of a cell one after the other.

        Raises BundleError for a bundle that is missing or exported for another method, TaskError
        for a task, UsageError for invalid settings and for two bundles or two tasks of the same
        name.
        """
        from bbt_accel.tasks.data import task_folders

        if "seed" in self.settings:
            raise UsageError("a sweep takes no setting 'seed'; write seeds = [42, 43]")
        if self.cross_evaluate and self.settings.get("hold_out"):
            raise UsageError("cross_evaluate scores on test rows, so it does not go with hold_out")
        bundles = {path: self._bundle(Path(path)) for path in self.bundles}
        tasks = {path: load_task(path) for path in self.tasks}
        check_names("bundles", {path: bundle.path.name for path, bundle in bundles.items()})
        check_names("tasks", {path: task.name for path, task in tasks.items()})
        folders = task_folders(self.data, [task.name for task in tasks.values()])
        rows = {name: folder and fingerprint(folder) for name, folder in folders.items()}
        for bundle, task in product(bundles.values(), tasks.values()):
            settings = resolve(task.preset(bundle.info.method), self.settings)
            settings.generations(bundle.info.searched_layers)
            check_given(settings, self.settings, bundle.info)
        trials = [
            Trial(
                task=path,
                definition=task,
                bundle=str(bundle.path.absolute()),
                digest=bundle.digest,
                method=bundle.info.method,
                engine=engine,
                seed=seed,
                device=self.device,
                data=folders[task.name],
                rows=rows[task.name],
                settings=self.settings,
            )
            for bundle, engine, (path, task), seed in product(
                bundles.values(), self.engines, tasks.items(), self.seeds
            )
        ]
        counts = Counter(trial.name.casefold() for trial in trials)
        for trial in trials:
            if (
                times := counts[trial.name.casefold()]
            ) > 1:  # file systems may not tell upper case from lower
                raise UsageError(f"{times} trials are named {trial.name}; rename a bundle's folder")
        return trials

    def absolute(self) -> Sweep:
        """The same sweep with absolute paths, so that it can be resumed from any directory."""
        bundles = [str(Path(path).absolute()) for path in self.bundles]
        tasks = list(map(absolute_file, self.tasks))
        data = None if self.data is None else str(Path(self.data).absolute())
        return self.model_copy(update={"bundles": bundles, "tasks": tasks, "data": data})

    def _bundle(self, path: Path) -> Bundle:
        if not (path / INFO).is_file() and self.needs is not None:
            raise BundleError(
                f"bundle {path} does not exist; create it with {self.needs}, or pass yours as "
                "--bundles"
            )
        bundle = Bundle.read(path)
        if self.method is not None:
            bundle.require(self.method)
        return bundle


class Trial(BaseModel):
    """One tuning run and its score. A trial equal to one that is done is not run again."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    definition: Task = Field(description="The task, as it was.")
    bundle: str
    digest: str = Field(description="sha256 of the bundle.")
    method: Method
    engine: str
    seed: int
    device: Device
    data: str | None
    rows: str | None = Field(description="Digest of the files in `data`.")
    settings: dict[str, float | int | str]

    @property
    def task_name(self) -> str:
        return self.definition.name

    @property
    def search_settings(self) -> Settings:
        """Every setting of its search."""
        return resolve(self.definition.preset(self.method), self.settings, {"seed": self.seed})

    @property
    def bundle_name(self) -> str:
        return Path(self.bundle).name

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.task_name}-{self.bundle_name}-{self.engine}-{self.seed}"


def preset_names() -> list[str]:
    """Names of the shipped sweeps."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_sweep(file: Path | None, given: Mapping[str, Any]) -> Sweep:
    """A sweep from a TOML or JSON file, if any; non-empty values of `given` override the file's.

    Raises UsageError, in one line, for a file that cannot be read and for invalid values.
    """
    found = _read(file) if file is not None else {}
    given = {name: value for name, value in given.items() if value}
    if "bundles" in given:
        found.pop("needs", None)
    if isinstance(own := found.get("settings", {}), dict):
        found["settings"] = {**own, **given.get("settings", {})}
        given.pop("settings", None)
    try:
        return Sweep.model_validate({**found, **given})
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            name = first["loc"][0]
            raise UsageError(
                f"the sweep has no {name}; give --{name}, a --config or a --preset"
            ) from None
        raise UsageError(
            f"{file or 'sweep'}: {first_problem(error)}; got {first['input']!r:.50}"
        ) from None


def _read(file: Path) -> dict[str, Any]:
    parse = json.loads if file.suffix == ".json" else tomllib.loads
    try:
        found: dict[str, Any] = parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read the sweep {file} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: {first_line(error):.200}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file}: not a table of tasks, bundles, engines and seeds")
    for name in found:
        check_known(f"entry of {file}:", name, Sweep.model_fields)
    return found


def check_names(what: str, names: Mapping[str, str]) -> None:
    """Raises UsageError for two of the same name. names: path → name."""
    for (path, name), (other, same) in combinations(names.items(), 2):
        if name.casefold() == same.casefold():
            raise UsageError(f"two {what} are named {name} ({path}, {other}); rename one of them")
