"""The command line: what each command passes on and prints, its exit codes, and its errors of one
line.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from tiny_bundles import tiny_bundle
from typer.testing import CliRunner

from bbt_accel.benchmarks.options import BenchOptions
from bbt_accel.cli import options as cli_options
from bbt_accel.cli.commands import app, main
from bbt_accel.core.bundle import Bundle
from bbt_accel.core.settings import Settings
from bbt_accel.errors import BbtError, BundleError, EngineError
from bbt_accel.io.command import exit_on_error, print_table
from bbt_accel.io.machine import release
from bbt_accel.io.progress import StepProgress
from bbt_accel.predict.inference import EngineOptions
from bbt_accel.search.run import Baselines, ReadoutRecord, TriedReadout
from bbt_accel.serve.limits import Limits
from bbt_accel.tasks.task import load_task

COMMANDS = ["export", "optimize", "triton", "fit", "tune", "sweep", "evaluate", "predict"]
COMMANDS += ["package", "push", "serve", "bench", "compare", "doctor"]
NO_TIMEOUT = "--timeout: Input should be a finite number; got nan"
if release(typer.__version__) >= (0, 29):  # whose ranges hold no NaN
    NO_TIMEOUT = "Invalid value for '--timeout'"
SCORE = {
    "bundle": "b",
    "split": "test",
    "metric": "accuracy",
    "score": 0.75,
    "rows": 8,
    "engine": "ort",
    "without_prompt": 0.5,
}


class Program:
    """Replaces the functions behind the commands: they record their arguments and return
    `result`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.result: Any = None
        self.error: BaseException | None = None
        for place in (
            "exporters.trace.export.export_bundle",
            "exporters.convert.optimize.optimize_bundle",
            "exporters.convert.triton.write_repository",
            "predict.fit.fit_file",
            "search.calibration.calibrate_on",
            "search.tune.tune",
            "predict.inference.evaluate",
            "predict.inference.predict",
            "benchmarks.bench.run_bench",
            "serve.server.serve",
        ):
            module, _, function = f"bbt_accel.{place}".rpartition(".")
            fake = (
                sys.modules[module] if isinstance(sys.modules.get(module), Fake) else Fake(module)
            )
            setattr(fake, function, self._call)
            monkeypatch.setitem(sys.modules, module, fake)

    def _call(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        if self.error is not None:
            raise self.error
        return self.result

    @property
    def options(self) -> dict[str, Any]:
        return self.calls[-1][1]


class Fake(ModuleType):
    pass


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    return Program(monkeypatch)  # type: ignore[return-value]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: bbt-accel {command}" in plain(result.output)
    assert "--json" in plain(result.output)


def test_help_keeps_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert "or a task file with [prompt] init" in run(capsys, "export", "--help")[1]


def test_brackets_in_names_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich would take them for markup, and fail over a closing tag."""
    print_table("out/b[/v1]", [("[red]a", "c")], ["text [b]", "label"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("out/b[/v1]", "[red]a", "text [b]"))
    with StepProgress() as bar:
        bar("exporting out/b[/v1]")


def test_control_characters_of_foreign_files_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table("t", [("a", "\x1b]52;c;eA==\x07\x1b[2J \u00e9")])
    with pytest.raises(SystemExit), exit_on_error():
        raise BbtError("no such \x1b[31mfile")
    printed = "".join(capsys.readouterr())
    assert "\x1b]" not in printed
    assert "\x1b[31m" not in printed
    assert "\u00e9" in printed


def test_a_terminal_without_unicode_gets_escapes() -> None:
    code = "from bbt_accel.io.command import print_json; import bbt_accel.cli.commands as c\n"
    code += "c.app = lambda **_: print('\u6771') or print_json({'a': '\u6771'})\nc.main(['x'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["\\u6771", '{"a": "\\u6771"}'])


def test_help_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(command in run(capsys, "--help")[1] for command in COMMANDS)
    assert run(capsys)[0] == 0
    assert run(capsys, "--version")[:2] == (0, "bbt-accel 0.2.0\n")


def test_help_loads_nothing_heavy() -> None:
    code = "import bbt_accel.cli.commands, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "numpy",
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "openvino",
        "pyarrow",
        "datasets",
        "matplotlib",
    }
    assert not heavy & set(loaded)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tune"], "Missing option '--bundle'; see bbt-accel tune --help"),
        (
            ["tune", "--bundle", "b", "--task", "t", "--engine", "openvin"],
            "unknown engine 'openvin'; did you mean openvino?",
        ),
        (
            ["evaluate", "r", "--engine", "tf"],
            "unknown engine 'tf'; choose from torch, ort, openvino, trt, remote",
        ),
        (["tune", "--bundle", "b", "--task", "t", "--seed", "x"], "Invalid value for '--seed'"),
        (["export"], "Missing argument '"),
        (["export", "demo"], "Missing option '-o' / '--output'"),
        (["serve", "b", "--engine", "remote"], "a server cannot use --engine remote"),
        (["serve", "b", "--port", "70000"], "Invalid value for '--port'"),
        (
            ["serve", "b", "--keep-alive", "inf"],
            "--keep-alive: Input should be a finite number; got inf",
        ),
        (["serve", "b", "--timeout", "nan"], NO_TIMEOUT),
        (["optimise"], "No such command 'optimise'"),
        (["doctor", "--jsn"], "No such option"),
        (
            ["optimize", "b", "-o", "c", "--fp16", "--int8"],
            "choose one of --fp16, --bf16, --int8 and --int4",
        ),
        (
            ["export", "demo", "-o", "b", "--n-prompt-tokens", "0"],
            "Invalid value for '--n-prompt-tokens'",
        ),
        (["optimize", "b", "-o", "c", "--threads", "1000000000"], "Invalid value for '--threads'"),
        (["package", "r", "-o", "p", "--threads", "1000000000"], "Invalid value for '--threads'"),
        (["tune", "--bundle", "b", "--task", "t", "--budget", "0"], "Invalid value for '--budget'"),
        (["bench", "--task", "demo", "-o", "r"], "Missing option '--backbone'"),
        (
            ["bench", "--backbone", "demo", "--task", "demo", "-o", "r", "--popsize", "1"],
            "Invalid value for '--popsize'",
        ),
        (
            ["bench", "--backbone", "demo", "--task", "demo", "-o", "r", "--device", "tpu"],
            "--device must be cpu, cuda or cuda:N",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    program: Program, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert complaint in err
    assert not program.calls


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BundleError("b is not a bundle"), 1, "error: b is not a bundle"),
        (EngineError("two\nlines"), 1, "error: two lines"),
        (MemoryError(), 1, "error: out of memory; use a smaller backbone, --popsize or --k-shot"),
        (OSError(errno.ENOSPC, "No space left", "run"), 1,
         "error: run: No space left; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "error: x: Permission denied"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1,
         'error: torch is not installed: pip install "bbt-accel[export]"'),
        (ValueError("odd"), 1,
         "error: internal error: ValueError: odd; run again with --debug for the traceback"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)  # fmt: skip
def test_failures_are_one_line(
    program: Program, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    program.error = error
    assert run(capsys, "tune", "--bundle", "b", "--task", "sst2") == (code, "", f"{line}\n")


@pytest.mark.parametrize("words", [["--debug", "evaluate", "r"], ["evaluate", "r", "--debug"]])
def test_debug_shows_the_traceback(
    program: Program, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    program.error = BundleError("broken")
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("error: broken\n")


def test_export_passes_what_is_given_and_prints_the_bundle(
    program: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program.result = tiny_bundle(tmp_path)
    more = ["--without", "last-block", "--json"]
    code, out, _ = run(
        capsys, "export", "demo", "-o", "b", "--method", "bbtv2", "--revision", "main", *more
    )
    assert code == 0
    assert json.loads(out)["backbone"] == "tiny-roberta"
    assert program.calls[0][0] == ("demo", Path("b"))
    assert callable(program.options.pop("on_progress"))
    assert program.options == {"method": "bbtv2", "revision": "main", "without": ["last-block"]}
    code, out, _ = run(capsys, "export", "demo", "-o", "b")
    assert code == 0
    assert "tiny-roberta" in out


def test_triton_passes_the_bundle_and_prints_the_names_of_the_models(
    program: Program,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = tiny_bundle(tmp_path)
    monkeypatch.setattr(Bundle, "read", lambda path: bundle)
    program.result = ["sst2_embedding", "sst2_blocks"]
    code, out, _ = run(capsys, "triton", "b", "-o", "models", "--name", "sst2", "--json")
    assert (code, json.loads(out)) == (0, {"repository": "models", "models": program.result})
    assert program.calls[0] == ((bundle, Path("models"), "sst2"), {})
    assert (
        "wrote sst2_embedding, sst2_blocks to models"
        in run(capsys, "triton", "b", "-o", "models")[1]
    )


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ([], "fp32"),
        (["--fp16"], "fp16"),
        (["--bf16"], "bf16"),
        (["--int8"], "int8"),
        (["--int4"], "int4"),
    ],
)
def test_optimize_passes_the_precision_and_prints_what_was_fused(
    program: Program,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flags: list[str],
    precision: str,
) -> None:
    program.result = tiny_bundle(tmp_path)
    program.result.info.optimization = {"agreement": 1.0, "fused": ["LayerNormalization"]}
    options = ["--target", "openvino", "--calibrate", "sst2", "--data", "d", "--max-rmse", "0.1"]
    options += ["--compute-capability", "8.6,8.9"]
    code, out, _ = run(capsys, "optimize", "a", "-o", "b", *options, *flags)
    assert code == 0
    assert "LayerNormalization" in out
    assert program.calls[0][0] == ("sst2", Path("d"))
    read = {
        "calibration": program.result,
        "max_rmse": 0.1,
        "compute_capability": "8.6,8.9",
    }
    assert callable(program.options.pop("on_progress"))
    assert program.options == {"precision": precision, "target": "openvino", **read}


def finished(status: str = "done") -> SimpleNamespace:
    info = SimpleNamespace(
        task=load_task("sst2"),
        settings=SimpleNamespace(k_shot=16, seed=42, allow_rare_classes=False),
        bundle=SimpleNamespace(backbone="tiny", method="bbt", precision="fp32"),
        engine=SimpleNamespace(name="ort", device="cpu", workers=None, url=None),
        status=status,
        calls=8000,
        seconds=12.5,
        best=SimpleNamespace(dev_score=0.9375, dev_loss=0.2, calls=7900),
        baselines=Baselines(chance=0.5, majority=0.5, without_prompt=0.79, calibrated=0.85),
        verdict=lambda: "no better than",
        readout=ReadoutRecord(
            name="states", tried=[TriedReadout(name="mean", log_loss=0.5, score=0.8, seconds=1.0)]
        ),
        model_dump=lambda mode: {"status": status},
    )
    return SimpleNamespace(path=Path("runs/x"), info=info)


def test_tune_passes_only_what_is_given(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    program.result = finished()
    words = [
        "tune",
        "--bundle",
        "b",
        "--task",
        "sst2",
        "--sigma",
        "0.5",
        "--loss",
        "hinge",
        "--without",
        "kv, cache",
    ]
    code, out, _ = run(capsys, *words, "-o", "r", "--resume", "--random-proj", "uniform")
    assert code == 0
    assert all(
        value in out for value in ("0.9375", "without prompt", "0.79", "note: no better than")
    )
    assert program.options == {
        "bundle": Path("b"),
        "task": "sst2",
        "without": ["kv", "cache"],
        "output": Path("r"),
        "resume": True,
        "settings": {"sigma": 0.5, "loss": "hinge", "random_proj": "uniform"},
        "progress": True,
    }


@pytest.mark.parametrize(
    ("function", "models"),
    [
        ("exporters.trace.export:export_bundle", (cli_options.ExportOptions,)),
        ("exporters.convert.optimize:optimize_bundle", (cli_options.OptimizeOptions,)),
        ("predict.fit:fit_file", (cli_options.FitOptions,)),
        ("search.tune:tune", (cli_options.TuneOptions, cli_options.TuneExecution)),
        (
            "benchmarks.sweep.runner:run_sweep",
            (cli_options.SweepOptions, cli_options.SweepExecution),
        ),
        ("predict.inference:evaluate", (cli_options.EvaluateOptions, cli_options.RunExecution)),
        ("predict.inference:predict", (cli_options.RunExecution,)),
    ],
)
def test_options_are_arguments_of_the_function_and_have_its_defaults(
    function: str, models: tuple[type[BaseModel], ...]
) -> None:
    module, _, name = function.partition(":")
    if module.startswith("exporters"):
        pytest.importorskip("torch")
    arguments = dict(
        inspect.signature(getattr(import_module(f"bbt_accel.{module}"), name)).parameters
    )
    if arguments.pop(
        "options", None
    ):  # **options: Unpack[EngineOptions], none of which has a default
        arguments |= dict.fromkeys(EngineOptions.__annotations__)
    for name, field in (pair for model in models for pair in model.model_fields.items()):
        if name in ("fp16", "bf16", "int8", "int4"):  # together the argument `precision`
            continue
        if name in ("calibrate", "data") and models == (cli_options.OptimizeOptions,):
            continue  # together the argument `calibration`
        assert name in arguments
        if field.default not in (PydanticUndefined, None, []):
            assert arguments[name].default == field.default, name


def test_an_interrupted_search_exits_with_130(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    program.result = finished("interrupted")
    code, out, err = run(capsys, "tune", "--bundle", "b", "--task", "sst2")
    assert (code, err) == (130, "interrupted\n")
    assert "continue with --resume" in out
    assert (
        json.loads(run(capsys, "tune", "--bundle", "b", "--task", "sst2", "--json")[1])["status"]
        == "interrupted"
    )


def test_evaluate_passes_what_is_given_and_prints_the_score(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    program.result = SCORE
    code, out, _ = run(capsys, "evaluate", "r", "--engine", "openvino", "--json")
    assert (code, json.loads(out)) == (0, SCORE)
    assert program.calls[0][0] == (Path("r"),)
    assert program.options == {"engine": "openvino"}
    assert "0.75" in run(capsys, "evaluate", "r")[1]


@pytest.fixture
def sst2_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("bbt_accel.search.run")
    fake.Run = SimpleNamespace(read=lambda path: SimpleNamespace(task=load_task("sst2")))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bbt_accel.search.run", fake)


def test_predict_passes_texts_as_rows_and_prints_their_classes(
    program: Program, capsys: pytest.CaptureFixture[str], sst2_run: None
) -> None:
    prediction = {
        "label": 1,
        "word": "great",
        "class": "great",
        "probabilities": {"bad": 0.125, "great": 0.875},
    }
    program.result = [prediction] * 2
    code, out, _ = run(capsys, "predict", "r", "fun [b]", "dull", "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"text": "fun [b]", **prediction},
        {"text": "dull", **prediction},
    ]
    assert program.calls[0][0] == (Path("r"), [{"sentence": "fun [b]"}, {"sentence": "dull"}])
    table = run(capsys, "predict", "r", "fun [b]", "dull")[1]
    assert "fun [b]" in table
    assert "0.875" in table


def test_predict_takes_debug_for_a_text_after_two_dashes(
    program: Program, capsys: pytest.CaptureFixture[str], sst2_run: None
) -> None:
    program.result = [{"label": 0, "word": "bad", "class": "bad", "probabilities": {"bad": 1.0}}]
    assert (
        json.loads(run(capsys, "predict", "r", "--json", "--", "--debug")[1])["text"] == "--debug"
    )


def test_predict_of_a_folder_that_is_no_run(
    capsys: pytest.CaptureFixture[str], program: Program, tmp_path: Path
) -> None:
    code, _, err = run(capsys, "predict", str(tmp_path), "text")
    assert (code, err.count("\n")) == (1, 1)
    assert "is not a run" in err


def test_serve_passes_what_is_given_and_prints_its_address(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(
            capsys,
            "serve",
            "r",
            "--engine",
            "ort",
            "--port",
            "0",
            "--max-request-mib",
            "2",
            "--json",
        )[0]
        == 0
    )
    assert program.calls[0][0] == (Path("r"),)
    limits, ready = program.options.pop("limits"), program.options.pop("ready")
    assert limits == Limits(
        2 * 2**20, 16384, 300.0, 16, requests=64, bodies=4, idle=10.0, keep_alive=75.0
    )
    assert program.options == {"engine": "ort", "host": "127.0.0.1", "port": 0}
    ready("http://127.0.0.1:8000", ["backbone"])
    assert json.loads(capsys.readouterr().out) == {
        "url": "http://127.0.0.1:8000",
        "models": ["backbone"],
    }


def test_limits_of_a_server_are_options(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["--max-batch", "8", "--timeout", "3", "--keep-rows", "2", "--max-tokens", "512"]
    run(capsys, "serve", "r", "--keep-alive", "5", *some)
    assert program.options["limits"] == Limits(
        64 * 2**20, 8, 3.0, 2, row_tokens=512, keep_alive=5.0
    )


def test_bench_passes_what_is_given_and_prints_the_report(
    program: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text('{"rows": []}')
    (tmp_path / "report.md").write_text("| engine | ms |\n|---|---|\n| ort | 12 |\n")
    words = [
        "bench",
        "--backbone",
        "demo",
        "--task",
        "demo",
        "-o",
        str(tmp_path),
        "--engines",
        "torch,ort",
        "--ablate",
    ]
    code, out, _ = run(
        capsys, *words, "--seeds", "2", "--without", "buckets, layer-cache", "--json"
    )
    assert (code, json.loads(out)) == (0, {"rows": []})
    wanted = {
        "engines": ["torch", "ort"],
        "seeds": 2,
        "without": ["buckets", "layer-cache"],
        "ablate": True,
    }
    assert program.calls[0][0] == (BenchOptions(backbone="demo", task="demo", **wanted), tmp_path)
    assert program.options == {"progress": False}
    assert "ort" in run(capsys, *words)[1]


def test_doctor_prints_the_versions_and_what_can_run_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert json.loads(run(capsys, "doctor", "--json")[1])["versions"]["bbt-accel"] == "0.2.0"
    out = run(capsys, "doctor")[1]
    assert "can run here" in out
    assert "Recommended" in out


@pytest.mark.parametrize("command", ["tune", "sweep"])
def test_settings_are_documented_with_their_defaults(command: str) -> None:
    text = plain(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "500"}).output)
    assert "(default: the task's, or 8000)" in text
    assert "and again in the dev set (default: 16)" in text
    options = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    assert options - set(text.split()) == ({"--seed"} if command == "sweep" else set())


@pytest.mark.parametrize(
    "name", ["k_shot", "budget", "seed", "threads", "n_prompt_tokens", "demonstrations"]
)
def test_an_option_has_the_same_limits_in_every_command(name: str) -> None:
    signatures = [
        inspect.signature(command.callback)
        for command in app.registered_commands
        if command.callback
    ]
    options = [
        get_args(found.parameters[name].annotation)[1]
        for found in signatures
        if name in found.parameters
    ]
    [limits] = {(option.min, option.max) for option in options}
    assert limits != (None, None)


def test_the_estimator_has_the_defaults_of_fit() -> None:
    pytest.importorskip("sklearn")
    from bbt_accel.predict.classifier import PromptClassifier

    estimator = {
        name: value.default
        for name, value in inspect.signature(PromptClassifier).parameters.items()
    }
    fields = cli_options.FitOptions.model_fields
    for name in ("budget", "n_prompt_tokens", "seed", "engine", "precision", "method", "readout"):
        assert estimator[name] == fields[name].default, name


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("bbt-accel tune --engine o", ["ort", "openvino"]),
        ("bbt-accel optimize b --target op", ["openvino"]),
        ("bbt-accel evaluate r --engine unknown --spl", ["--split"]),
        ("bbt-accel sweep --preset paper-", ["paper-v2"]),
    ],
)
def test_the_shell_completes_options_and_names(
    line: str, found: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "_BBT_ACCEL_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert run(capsys)[1].split() == found
