"""The report of a benchmark, as report.json holds it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from bbt_accel.bundle import Method, PromptMode

VERSION = 1
Status = Literal["passed", "differs", "failed", "not installed"]


class Part(BaseModel):
    """What every report is made of: no field that is not described."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Machine(Part):
    """Where the benchmark ran."""

    system: str
    """Operating system, its release, and the architecture."""
    cpu: str
    """Model name of the processor."""
    cores: int
    """Logical cores that the process may use."""
    features: list[str]
    """Instruction sets that matter here: AVX2, AVX-512, AVX-512 VNNI, AMX, bf16."""
    memory_gb: float | None
    """Main memory, GiB."""
    gpus: list[str]
    """Name, memory and driver of each NVIDIA GPU."""
    fp32_rate: float
    """Measured: 10⁹ fp32 operations a second of a large square matrix product (2 n³ operations) in PyTorch."""
    int8_rate: float | None
    """The same with 8-bit integers; None where it was not measured."""
    int8_rate_by: str
    """What computed the 8-bit product, or why it was not measured."""


class Workload(Part):
    """What was timed, and what was compared."""

    rows: int
    """N, rows of the timed batch, from the task's train split."""
    length: int
    """S, tokens to which the longest row pads the batch."""
    padding: float
    """Share of the N × S tokens that is padding."""
    popsize: int
    """P, candidates a call."""
    repeats: int
    """Timed calls a row of the table, after one that is not timed; for bbtv2 sweeps of one call a layer."""
    naive_flops: int
    """Floating-point operations of one candidate in eager PyTorch: matrix products and attention, padding included."""
    device: str
    """cpu or cuda."""
    threads: int
    """CPU threads of every engine."""
    k_shot: int
    """Rows a class, for the timed batch (unless its rows were given) and for tuning."""
    test_rows: int
    """Rows on which logits, predictions and scores are compared."""
    prompt: Literal["random", "tuned"]
    """The prompt that is compared: random, as spread as the word embeddings; or the first that eager tuned."""
    seed: int
    """Of the rows, the random prompts and the first tuning run."""


class Baseline(Part):
    """The eager row's time, measured before the other rows and again after them."""

    first_ms: float
    """Milliseconds a candidate before the other rows, median."""
    last_ms: float | None
    """Milliseconds a candidate after the other rows, median; None if that failed."""
    drift: float | None
    """last_ms / first_ms − 1: how far the machine itself changed meanwhile. Ratios are no better than that."""


class Tuned(Part):
    """Whole tuning runs, one a seed."""

    seeds: list[int]
    """Seeds of rows, projection and search."""
    budget: int
    """Candidates that each run evaluated."""
    scores: list[float]
    """Test score of each run's prompt, on the row's own engine."""
    mean: float
    """Of the scores."""
    std: float | None
    """Standard deviation of the scores (n − 1); None for one seed."""
    seconds: float
    """Mean duration of a search."""


class Row(Part):
    """One engine at one precision. What is None was not measured; `reason` says why."""

    engine: str
    """eager (the baseline), torch, ort, openvino, trt."""
    precision: str
    """fp32, fp16, bf16 or int8."""
    without: list[str] = []
    """Savings that were switched off, by the names in bbt_accel.savings."""
    status: Status = "passed"
    """passed; differs (from eager by more than allowed); failed; not installed."""
    reason: str | None = None
    """Why the status is not `passed`, in one line."""
    bundle_mib: float | None = None
    """Size of the bundle that the engine read, MiB, tokenizer included."""
    ms_median: float | None = None
    """Milliseconds a candidate: a call's duration over its candidates, median of the timed calls."""
    ms_p90: float | None = None
    """The 90th percentile of the same."""
    ms_p99: float | None = None
    """The 99th percentile of the same; with few repeats the slowest call."""
    candidates_per_second: float | None = None
    """Candidates a second: 1000 over the median milliseconds."""
    speedup: float | None = None
    """Speed-up: the eager row's median milliseconds over this row's."""
    matrix_share: float | None = None
    """Effective share of the machine's fp32 matrix rate: the arithmetic of a candidate in eager PyTorch (naive_flops) ×
    candidates_per_second / fp32_rate. More than 1 where work is left out or done in lower precision."""
    peak_mib: float | None = None
    """Largest resident memory of the row's process, MiB, from its start to the end of the timed calls."""
    max_error: float | None = None
    """Largest difference of a test row's label logits from eager's, relative to the largest logit where that is
    beyond 1; None if a logit is not finite."""
    agreement: float | None = None
    """Share of the test rows whose predicted class is eager's."""
    score: float | None = None
    """The task's metric on the test rows, with the same prompt in every row of the table."""
    tuned: Tuned | None = None
    """Scores of whole tuning runs on this engine."""
    versions: dict[str, str] = {}
    """Of the libraries that compute, and the device or provider."""

    @property
    def label(self) -> str:
        """How tables and plots name the row."""
        names = ", ".join(self.without) if len(self.without) < 3 else f"{len(self.without)} savings"
        return f"{self.engine} {self.precision}" + (f" without {names}" if names else "")


class Report(Part):
    """report.json."""

    version: int = VERSION
    """Of this schema."""
    created: str
    """When the benchmark ended, UTC, ISO 8601."""
    command: str
    """The command line that repeats it."""
    backbone: str
    """Hub id, local folder or demo."""
    family: str
    """roberta, bert, bart, t5 or gpt2."""
    method: Method
    """bbt, or bbtv2 with a prompt in every layer."""
    prompt_mode: PromptMode
    """Whether prompts are added to the input or put before it."""
    n_prompt_tokens: int
    """Soft prompt vectors."""
    task: str
    """Name of the task."""
    metric: str
    """What the scores are: accuracy or f1."""
    machine: Machine
    """Where it ran."""
    workload: Workload
    """What was timed and compared."""
    baseline: Baseline
    """How steady the machine was."""
    rows: list[Row]
    """The baseline first, then one row for each engine, precision and set of savings."""
    versions: dict[str, str]
    """Of bbt-accel, Python and the packages that the benchmark found."""
