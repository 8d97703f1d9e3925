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
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import typer
from tiny_bundles import tiny_bundle
from typer.testing import CliRunner

from bbt_accel.benchmarks.options import BenchOptions, CompareOptions
from bbt_accel.cli.base import COMMANDS, Settable
from bbt_accel.cli.commands import FitSettings, app, main
from bbt_accel.core.settings import Settings
from bbt_accel.errors import BbtError, BundleError, EngineError
from bbt_accel.io.command import exit_on_error, print_table
from bbt_accel.io.progress import StepProgress
from bbt_accel.search.run import Baselines, ReadoutRecord, TriedReadout
from bbt_accel.serve.limits import Limits
from bbt_accel.tasks.task import load_task

TUNE = ["tune", "--bundle", "b", "--task", "sst2"]
BENCH = ["bench", "--backbone", "demo", "--task", "demo", "-o", "r"]
FIT = ["fit", "rows.csv", "--text", "a, b", "--label", "mood", "-o", "r"]
CONTRACT = {
    "export": "-o --method --prompt-mode --n-prompt-tokens --revision",
    "optimize": "-o --fp16 --bf16 --int8 --target --calibrate --data",
    "tune": "--bundle --task --data --engine --url --device --readout --set --preset --k-shot "
    "--intrinsic-dim --popsize --budget --sigma --alpha --bound --loss --eval-every --seed -o "
    "--resume --overwrite --workers --ray",
    "evaluate": "--data --engine --bundle",
    "predict": "--file",
    "bench": "--backbone --task --engines --precisions -o",
    "compare": "-o",
    "sweep": "-o",
    "serve": "--port",
    "doctor": "",
    "fit": "--text --label --backbone -o",
    "package": "-o --format",
    "push": "--yes",
}


class Program:
    """In place of the functions behind the commands: it records their arguments, and returns
    `result`.
    """

    PLACES: ClassVar = {
        "exporters.trace.export": "export_bundle",
        "exporters.convert.optimize": "optimize_bundle",
        "search.calibration": "calibrate_on",
        "predict.fit": "fit_file",
        "search.tune": "tune",
        "predict.inference": "evaluate predict_texts",
        "benchmarks.bench": "run_bench",
        "serve.server": "serve",
    }

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.result: Any = None
        self.error: BaseException | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        if self.error is not None:
            raise self.error
        return self.result

    @property
    def options(self) -> dict[str, Any]:
        return self.calls[-1][1]


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(f"bbt_accel.{name}")
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    made = Program()
    for place, functions in Program.PLACES.items():
        replaced(monkeypatch, place, **dict.fromkeys(functions.split(), made))
    return made


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split())


def options_of(command: str) -> set[str]:
    """Of a command, and of the program."""
    program: Any = typer.main.get_command(app)
    params = program.params + program.commands[command].params
    return {name for parameter in params for name in parameter.opts}


@pytest.mark.parametrize("command", CONTRACT)
def test_every_command_has_its_options_and_help_with_an_example(command: str) -> None:
    assert {*CONTRACT[command].split(), "--json", "--help-settings"} <= options_of(command)
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"Example: bbt-accel {command}" in plain(result.output)
    assert "--json" in result.output


def test_help_version_and_no_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert all(command in run(capsys, "--help")[1] for command in CONTRACT)
    assert run(capsys)[0] == 0
    assert run(capsys, "--version")[:2] == (0, "bbt-accel 0.2.0\n")
    assert "or a task file with [prompt] init" in run(capsys, "export", "--help")[1]
    tune = plain(run(capsys, "tune", "--help")[1])
    assert "(default: the task's, or 8000)" in tune
    assert "and again in the dev set (default: 16)" in tune


def test_help_loads_nothing_heavy() -> None:
    code = "import bbt_accel.cli.commands, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "torch", "transformers", "onnx", "onnxruntime", "openvino", "matplotlib"}
    assert not heavy & set(done.stdout.split())


def test_names_of_files_are_printed_as_they_are_but_for_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rich would take brackets for markup, and fail over a closing tag."""
    print_table("out/b[/v1]", [("[red]a", "c \x1b]52;c;eA==\x07\x1b[2J \u00e9")], ["t [b]", "l"])
    with StepProgress() as bar:
        bar("exporting out/b[/v1]")
    with pytest.raises(SystemExit), exit_on_error():
        raise BbtError("no such \x1b[31mfile")
    printed = "".join(capsys.readouterr())
    assert all(name in printed for name in ("out/b[/v1]", "[red]a", "t [b]", "\u00e9"))
    assert not any(code in printed for code in ("\x1b]", "\x1b[31m"))


def test_a_terminal_without_unicode_gets_escapes() -> None:
    code = "from bbt_accel.io.command import print_json; import bbt_accel.cli.commands as c\n"
    code += "c.app = lambda **_: print('\u6771') or print_json({'a': '\u6771'})\nc.main(['x'])"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["\\u6771", '{"a": "\\u6771"}'])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tune"], "Missing option '--bundle'; see bbt-accel tune --help"),
        ([*TUNE, "--seed", "x"], "Invalid value for '--seed'"),
        ([*TUNE, "--budget", "0"], "Invalid value for '--budget'"),
        ([*TUNE, "--set", "hold-out=true"], "unknown setting 'hold-out'; did you mean hold_out?"),
        ([*TUNE, "--set", "hold_out=perhaps"], "--set hold_out: Input should be a valid boolean"),
        ([*TUNE, "--set", "demonstrations=-1"], "greater than or equal to 0; got '-1'"),
        ([*TUNE, "--set", "hold_out"], "--set hold_out: give a value"),
        ([*TUNE, "--set", "budget=5"], "--set budget: it has an option of its own"),
        (["export"], "Missing argument '"),
        (["export", "demo"], "Missing option '-o' / '--output'"),
        (["export", "demo", "-o", "b", "--n-prompt-tokens", "0"], "for '--n-prompt-tokens'"),
        ([*TUNE, "--engine", "openvin"], "unknown engine 'openvin'; did you mean openvino?"),
        (["serve", "b", "--engine", "remote"], "a server cannot use --engine remote"),
        (["serve", "b", "--port", "70000"], "Invalid value for '--port'"),
        (["serve", "b", "--set", "keep_alive=inf"], "--set keep_alive: Input should be a finite"),
        (["serve", "b", "--set", "timeout=nan"], "--set timeout: Input should be"),
        (["optimise"], "No such command 'optimise'"),
        (["doctor", "--jsn"], "No such option"),
        (["optimize", "b", "-o", "c", "--fp16", "--int8"], "choose one of --fp16, --bf16, --int8"),
        (["optimize", "b", "-o", "c", "--set", "threads=1000000000"], "less than or equal to 1024"),
        (["predict", "r", "text", "--threads", "0"], "Invalid value for '--threads'"),
        (["doctor", "--help-settings"], "doctor has no settings"),
        (["bench", "--task", "demo", "-o", "r"], "Missing option '--backbone'"),
        ([*BENCH, "--set", "popsize=1"], "--set popsize: Input should be greater than"),
        ([*BENCH, "--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
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
def test_failures_are_one_line_after_the_traceback_with_debug(
    program: Program, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    program.error = error
    assert run(capsys, *TUNE) == (code, "", f"{line}\n")
    if isinstance(error, Exception):
        for words in (["--debug", *TUNE], [*TUNE, "--debug"]):
            found, _, err = run(capsys, *words)
            assert (found, "Traceback" in err) == (code, True)
            assert err.endswith(f"{line}\n")


@pytest.mark.parametrize(
    "command", [name for name, made in COMMANDS.items() if issubclass(made, Settable)]
)
def test_settings_without_an_option_are_listed_with_their_defaults_and_meanings(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = run(capsys, command, "--help-settings")
    assert code == 0
    made = COMMANDS[command]
    assert issubclass(made, Settable)
    assert all(f" {key} " in out for key in made.without_option())
    if command == "tune":
        assert re.search(r"covariance +│ full\|diagonal +│ full +│ What CMA-ES adapts", out)
        options = {name.lstrip("-").replace("-", "_") for name in options_of("tune")}
        assert Settings.model_fields.keys() <= options | {*made.without_option()}
    assert command != "sweep" or "seed" not in made.without_option()


def test_the_command_of_a_report_gives_settings_as_the_command_line_takes_them() -> None:
    for command, model in (("bench", BenchOptions), ("compare", CompareOptions)):
        made = COMMANDS[command]
        assert issubclass(made, Settable)
        assert model.without_option == tuple(made.without_option())


def test_export_passes_what_is_given_and_prints_the_bundle(
    program: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program.result = tiny_bundle(tmp_path)
    words = ["export", "demo", "-o", "b", "--method", "bbtv2", "--revision", "main"]
    code, out, _ = run(capsys, *words, "--json")
    assert (code, json.loads(out)["backbone"]) == (0, "tiny-roberta")
    assert program.calls[0][0] == ("demo", Path("b"))
    assert callable(program.options.pop("on_progress"))
    assert program.options == {"method": "bbtv2", "revision": "main"}
    assert "tiny-roberta" in run(capsys, *words)[1]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_optimize_passes_the_precision_and_prints_what_was_fused(
    program: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path, precision: str
) -> None:
    program.result = tiny_bundle(tmp_path)
    program.result.info.optimization = {"agreement": 1.0, "fused": ["LayerNormalization"]}
    words = ["--target", "openvino", "--calibrate", "sst2", "--data", "d", "--set", "max_rmse=0.1"]
    words += ["--compute-capability", "8.6,8.9"]
    words += [] if precision == "fp32" else [f"--{precision}"]
    code, out, _ = run(capsys, "optimize", "a", "-o", "b", *words)
    assert (code, "LayerNormalization" in out) == (0, True)
    assert program.calls[0][0] == ("sst2", Path("d"))
    assert callable(program.options.pop("on_progress"))
    assert program.options == {
        "precision": precision,
        "target": "openvino",
        "calibration": program.result,
        "max_rmse": 0.1,
        "compute_capability": "8.6,8.9",
    }


def finished(status: str = "done") -> SimpleNamespace:
    tried = TriedReadout(name="mean", log_loss=0.5, score=0.8, seconds=1.0)
    info = SimpleNamespace(
        task=load_task("sst2"),
        settings=SimpleNamespace(k_shot=16, seed=42, allow_rare_classes=False),
        bundle=SimpleNamespace(backbone="tiny", method="bbt", precision="fp32"),
        engine=SimpleNamespace(name="ort", device="cpu", workers=None, url=None),
        status=status,
        calls=8000,
        seconds=12.5,
        best=SimpleNamespace(dev_score=0.9375, dev_loss=0.2, calls=7900),
        baselines=Baselines(chance=0.5, majority=0.5, without_prompt=0.79, batch_calibrated=0.85),
        verdict=lambda: "no better than",
        readout=ReadoutRecord(name="states", tried=[tried]),
        model_dump=lambda mode: {"status": status},
    )
    return SimpleNamespace(path=Path("runs/x"), info=info)


def test_tune_passes_what_is_given_and_prints_the_run(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    program.result = finished()
    words = [*TUNE, "--sigma", "0.5", "--loss", "hinge", "-o", "r", "--resume"]
    words += ["--set", "without=kv, cache", "--set", "random_proj=uniform", "--set", "threads=2"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert all(text in out for text in ("0.9375", "without prompt", "0.79", "note: no better than"))
    assert program.options == {
        "bundle": Path("b"),
        "task": "sst2",
        "without": ["kv", "cache"],
        "threads": 2,
        "output": Path("r"),
        "resume": True,
        "overwrite": False,
        "settings": {"sigma": 0.5, "loss": "hinge", "random_proj": "uniform"},
        "progress": True,
    }


def test_an_interrupted_search_exits_with_130(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    program.result = finished("interrupted")
    code, out, err = run(capsys, *TUNE)
    assert (code, err) == (130, "interrupted\n")
    assert "continue with --resume" in out
    assert json.loads(run(capsys, *TUNE, "--json")[1])["status"] == "interrupted"


def test_fit_passes_columns_options_and_settings(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = SimpleNamespace(script=lambda: ["bbt-accel tune"], counts={"down": 3})
    program.result = SimpleNamespace(run=finished(), plan=plan, score=None)
    code, out, _ = run(capsys, *FIT, "--budget", "9", "--set", "balanced=true", "--json")
    assert (code, json.loads(out)["commands"]) == (0, ["bbt-accel tune"])
    assert program.calls[0][0] == (Path("rows.csv"), Path("r"))
    del program.options["announce"]
    assert program.options == {
        "text": ["a", "b"],
        "label": "mood",
        "backbone": "demo",
        "overwrite": False,
        "progress": False,
        "budget": 9,
        "balanced": True,
    }


def test_evaluate_passes_what_is_given_and_prints_the_score(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    program.result = {"bundle": "b", "split": "test", "score": 0.75, "without_prompt": 0.5}
    code, out, _ = run(capsys, "evaluate", "r", "--engine", "openvino", "--json")
    assert (code, json.loads(out)) == (0, program.result)
    assert program.calls[0][0] == (Path("r"),)
    assert program.options == {"engine": "openvino"}
    assert "0.75" in run(capsys, "evaluate", "r")[1]


def test_predict_passes_texts_as_rows_and_prints_their_classes(
    program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SimpleNamespace(read=lambda path: SimpleNamespace(task=load_task("sst2")))
    replaced(monkeypatch, "search.run", Run=read)
    found = {"label": 1, "class": "great", "probabilities": {"bad": 0.125, "great": 0.875}}
    program.result = [found] * 2
    code, out, _ = run(capsys, "predict", "r", "fun [b]", "dull", "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"text": "fun [b]", **found},
        {"text": "dull", **found},
    ]
    assert program.calls[0][0] == (Path("r"), [{"sentence": "fun [b]"}, {"sentence": "dull"}])
    table = run(capsys, "predict", "r", "fun [b]", "dull")[1]
    assert all(text in table for text in ("fun [b]", "0.875"))
    out = run(capsys, "predict", "r", "--json", "--", "--debug", "dull")[1]
    assert json.loads(out.splitlines()[0])["text"] == "--debug"


def test_predict_of_a_folder_that_is_no_run(
    capsys: pytest.CaptureFixture[str], program: Program, tmp_path: Path
) -> None:
    code, _, err = run(capsys, "predict", str(tmp_path), "text")
    assert (code, err.count("\n")) == (1, 1)
    assert "is not a run" in err


def test_serve_passes_place_and_limits_and_prints_its_address(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "r", "--engine", "ort", "--port", "0", "--json"]
    for setting in ("request_bytes=2000", "batch=8", "timeout=3", "cached_batches=2"):
        words += ["--set", setting]
    words += ["--set", "row_tokens=512", "--set", "threads=2"]
    assert run(capsys, *words, "--set", "keep_alive=5")[0] == 0
    assert program.calls[0][0] == (Path("r"),)
    limits, ready = program.options.pop("limits"), program.options.pop("ready")
    assert limits == Limits(2000, 8, 3.0, 2, row_tokens=512, keep_alive=5.0)
    assert program.options == {"engine": "ort", "host": "127.0.0.1", "port": 0, "threads": 2}
    ready("http://127.0.0.1:8000", ["backbone"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"url": "http://127.0.0.1:8000", "models": ["backbone"]}
    run(capsys, "serve", "r")
    assert program.options["limits"] == Limits()


def test_bench_passes_what_is_given_and_prints_the_report(
    program: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text('{"rows": []}')
    (tmp_path / "report.md").write_text("| engine | ms |\n|---|---|\n| ort | 12 |\n")
    words = [*BENCH[:-1], str(tmp_path), "--engines", "torch,ort", "--ablate"]
    words += ["--set", "seeds=2", "--set", "without=buckets, layer-cache"]
    code, out, _ = run(capsys, *words, "--json")
    assert (code, json.loads(out)) == (0, {"rows": []})
    wanted = BenchOptions(
        backbone="demo",
        task="demo",
        engines=["torch", "ort"],
        seeds=2,
        without=["buckets", "layer-cache"],
        ablate=True,
    )
    assert program.calls == [((wanted, tmp_path), {"progress": False})]
    assert "ort" in run(capsys, *words)[1]


def test_doctor_prints_the_versions_and_what_can_run_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert json.loads(run(capsys, "doctor", "--json")[1])["versions"]["bbt-accel"] == "0.2.0"
    out = run(capsys, "doctor")[1]
    assert all(title in out for title in ("can run here", "Recommended"))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("bbt-accel tune --engine o", ["ort", "openvino"]),
        ("bbt-accel optimize b --target op", ["openvino"]),
        ("bbt-accel evaluate r --engine unknown --dev", ["--device"]),
        ("bbt-accel sweep --preset paper-", ["paper-v2"]),
    ],
)
def test_the_shell_completes_options_and_names(
    line: str, found: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_BBT_ACCEL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    assert run(capsys)[1].split() == found


def test_every_public_name_is_what_its_import_says() -> None:
    """Also after the folder of the same name was imported."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    import bbt_accel
    import bbt_accel.predict.inference

    for name in bbt_accel.__all__:
        assert not isinstance(getattr(bbt_accel, name), ModuleType), name


def test_a_fit_has_the_same_defaults_on_the_command_line_and_in_python() -> None:
    pytest.importorskip("sklearn")
    from bbt_accel import PromptClassifier
    from bbt_accel.predict.fit import fit_file

    for made in (PromptClassifier, fit_file):
        arguments = inspect.signature(made).parameters
        for name, field in FitSettings.model_fields.items():
            if name in arguments:
                assert arguments[name].default == field.default, name
