"""CMA-ES and other optimizers: the accuracy of the prompts that they find in 280 calls, on the same
rows and engine.

    pip install "../..[cpu,export,openvino]"
    python run.py --data DIR -o results    # DIR holds agnews, sst2 and yelpp; the rows of demo are
    shipped

The loss of a prompt is that of the readout `calibrated`: the cross entropy of the train rows with
the label words' own class bias refitted; or, for comparison, that of a ridge classifier on the
logits of random words. Every score is written to results/report.json at once; a second run
continues where the first ended.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import ridge
from optimizers import CmaEs, LowRankSpsa, MirroredEs, Optimizer, ToPrompts, VkdCmaEs
from tokenizers import Tokenizer

from bbt_accel import Bundle, Objective, export_bundle, load_engine, load_task
from bbt_accel.benchmarks.compare_report import CompareReport, Score, gains, make_report, summary
from bbt_accel.benchmarks.steps import compared_rows
from bbt_accel.core.batch import Batch, Float32, Float64
from bbt_accel.core.logits import log_loss
from bbt_accel.core.settings import Settings, resolve
from bbt_accel.engines.base import BoundBatch, Engine
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.io.command import exit_on_error
from bbt_accel.io.machine import describe_machine
from bbt_accel.io.reporting import write_report
from bbt_accel.search.methods import PromptSpace
from bbt_accel.search.readout_fitting import fit_bias
from bbt_accel.tasks.data import Row, labels
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.splits import load_few_shot

EVERY = 100  # calls between two scores on the dev rows
TOKENS = 20  # of the prompt
BASE = "CMA-ES"
RIDGES = ((512, 100), (512, 10_000), (64, 100))  # words and penalties
# Chosen by the dev loss with the seed 42, on demo, those of SPSA also on agnews: of the rates 0.03,
# 0.3 and 1 for the strategies, and of eight pairs with rates from 0.1 to 100 and sizes from 0.1 to
# 1 for SPSA.
ES = {"sigma": 1.0, "rate": 1.0}
SPSA = {"size": 0.3, "rate": 30.0}


class Rows:
    """Few-shot and test rows of a task on an engine, and what prompts are worth on them."""

    def __init__(
        self, engine: Engine, task: Any, data: Path | None, settings: Settings, test_rows: int
    ) -> None:
        self.encoder, self.objective = Encoder(engine.bundle, task), Objective("ce", task.metric)
        parts = [*load_few_shot(task, data, settings), compared_rows(task, data, test_rows)]
        self.targets = [labels(part) for part in parts]
        self.bound = [engine.bind(self.batch(part, settings)) for part in parts]

    def batch(self, rows: list[Row], settings: Settings) -> Batch:
        return self.encoder.encode(rows)

    def logits(self, part: BoundBatch, prompts: Float32) -> Float64:
        return np.asarray(part.label_logits(prompts), np.float64)

    def losses(self, prompts: Float32) -> Float64:
        """Of the train rows, (P,)."""
        return np.array(
            [fit_bias(own, self.targets[0])[1] for own in self.logits(self.bound[0], prompts)]
        )

    def dev_loss(self, prompt: Float32) -> float:
        """Of the dev rows, with the bias of the train rows."""
        train, dev = (self.logits(part, prompt[None])[0] for part in self.bound[:2])
        return log_loss(dev + fit_bias(train, self.targets[0])[0], self.targets[1])

    def score(self, prompt: Float32) -> float:
        """Of the test rows, with the bias of the train and the dev rows."""
        train, dev, test = (self.logits(part, prompt[None])[0] for part in self.bound)
        bias, _ = fit_bias(np.concatenate([train, dev]), np.concatenate(self.targets[:2]))
        return float(self.objective.score((test + bias)[None], self.targets[2])[1][0])


class CrossFitted(Rows):
    """Without a dev half: every prompt is scored on both halves, each with the bias of the
    other.
    """

    def losses(self, prompts: Float32) -> Float64:
        halves = [self.logits(part, prompts) for part in self.bound[:2]]
        return np.array([self.crossed(*own) for own in zip(*halves, strict=True)])

    def dev_loss(self, prompt: Float32) -> float:
        return float(self.losses(prompt[None])[0])

    def crossed(self, first: Float64, second: Float64) -> float:
        one, other = self.targets[:2]
        of_first = log_loss(first + fit_bias(second, other)[0], one)
        return (of_first + log_loss(second + fit_bias(first, one)[0], other)) / 2


class RidgeRows(Rows):
    """The loss is that of a ridge classifier on the logits of random words, with each train row
    left out.

    words: how many of them. penalty: for standardized logits; the scale is that of the prompt
    without a search.
    """

    def __init__(self, engine: Engine, *arguments: Any, words: int, penalty: float) -> None:
        self.words, self.penalty = words, penalty
        super().__init__(engine, *arguments)
        spread = self.logits(self.bound[0], engine.bundle.start_prompt()[None]).std((0, 1))
        self.scale = np.where(spread > 0, spread, 1.0)

    def batch(self, rows: list[Row], settings: Settings) -> Batch:
        drawn = self.encoder.feature_token_ids(settings.seed)[: self.words]
        return replace(super().batch(rows, settings), label_token_ids=drawn)

    def features(self, part: BoundBatch, prompts: Float32) -> Float64:
        return self.logits(part, prompts) / self.scale

    def losses(self, prompts: Float32) -> Float64:
        own = self.features(self.bound[0], prompts)
        return np.array([ridge.leave_one_out(x, self.targets[0], self.penalty) for x in own])

    def dev_loss(self, prompt: Float32) -> float:
        train, dev = (self.features(part, prompt[None])[0] for part in self.bound[:2])
        weight, bias = ridge.fit(train, self.targets[0], self.penalty)
        return float(((dev @ weight + bias - ridge.signs(self.targets[1])) ** 2).mean())

    def score(self, prompt: Float32) -> float:
        train, dev, test = (self.features(part, prompt[None])[0] for part in self.bound)
        weight, bias = ridge.fit(
            np.concatenate([train, dev]), np.concatenate(self.targets[:2]), self.penalty
        )
        return float(self.objective.score((test @ weight + bias)[None], self.targets[2])[1][0])


def search(optimizer: Optimizer, rows: Rows, start: Float32, calls: int) -> tuple[Float32, int]:
    """The prompt with the lowest dev loss, of the start and of what the optimizer found after every
    100 calls; and the calls that it took, at least those of one population."""
    best, spent = (rows.dev_loss(start), start), 0
    while True:
        prompts = optimizer.ask()
        last = spent + 2 * len(prompts) > calls
        optimizer.tell(rows.losses(prompts))
        due = (spent + len(prompts)) // EVERY > spent // EVERY
        spent += len(prompts)
        if due or last:
            best = min(
                [best, *((rows.dev_loss(p), p) for p in optimizer.found())],
                key=lambda found: found[0],
            )
        if last:
            return best[1], spent


def projected(bundle: Bundle, settings: Settings) -> ToPrompts:
    """The random projection of BBT."""
    space = PromptSpace(bundle, settings)
    return lambda points: space.population(0, points).prompts()


def direct(bundle: Bundle) -> ToPrompts:
    """No projection: a point is a prompt, in units of the word embeddings' standard deviation."""
    start, scale = bundle.start_prompt(), bundle.info.word_embedding_std
    return lambda points: (start + scale * points.reshape(-1, *start.shape)).astype(np.float32)


def cma_es(bundle: Bundle, settings: Settings) -> Optimizer:
    return CmaEs(PromptSpace(bundle, settings), settings)


def cma_es_with_mean(bundle: Bundle, settings: Settings) -> Optimizer:
    return CmaEs(PromptSpace(bundle, settings), settings, mean=True)


def vkd_cma_es(bundle: Bundle, settings: Settings) -> Optimizer:
    return VkdCmaEs(PromptSpace(bundle, settings), settings)


def mirrored_es(bundle: Bundle, settings: Settings) -> Optimizer:
    return MirroredEs(projected(bundle, settings), settings.intrinsic_dim, settings.seed, **ES)


def direct_es(bundle: Bundle, settings: Settings) -> Optimizer:
    return MirroredEs(direct(bundle), int(np.prod(bundle.info.prompt_shape)), settings.seed, **ES)


def low_rank_spsa(bundle: Bundle, settings: Settings) -> Optimizer:
    n, H = bundle.info.prompt_shape
    return LowRankSpsa(direct(bundle), (n, H), settings.seed, **SPSA)


@dataclass(frozen=True)
class Contender:
    """calls: a share of those given. words: whether the prompt starts from the words of the
    template.
    """

    optimizer: Callable[[Bundle, Settings], Optimizer]
    rows: Callable[..., Rows] = Rows
    calls: float = 1.0
    words: bool = False


# A cross-fitted call takes twice the rows, so half the calls cost what the others cost.
CONTENDERS = {
    BASE: Contender(cma_es),
    "CMA-ES, its mean scored too": Contender(cma_es_with_mean),
    "VkD-CMA-ES": Contender(vkd_cma_es),
    "mirrored ES": Contender(mirrored_es),
    "mirrored ES without a projection": Contender(direct_es),
    "low rank, SPSA": Contender(low_rank_spsa),
    "CMA-ES from the template's words": Contender(cma_es, words=True),
    "CMA-ES, cross-fitted": Contender(cma_es, CrossFitted),
    "CMA-ES, cross-fitted, half the calls": Contender(cma_es, CrossFitted, calls=0.5),
}
CONTENDERS |= {
    f"ridge on {count} words, penalty {penalty:,}{end}": Contender(
        cma_es, partial(RidgeRows, words=count, penalty=penalty), calls
    )
    for count, penalty in RIDGES
    for end, calls in ((", without a search", 0.0), ("", 1.0))
}


def bundle(given: argparse.Namespace, task: str | None) -> Bundle:
    """The backbone in int8. task: its prompt starts from the words of this task's template."""
    name, options = task or "plain", dict[str, Any](n_prompt_tokens=TOKENS)
    if task is not None:
        options = {"prompt_init": words(bundle(given, None), task)}
    exported, optimized = given.output / "bundles" / name, given.output / "bundles" / f"{name}-int8"
    if not exported.exists():
        export_bundle(given.backbone, exported, **options)
    if not optimized.exists():
        optimize_bundle(exported, optimized, precision="int8", target=given.engine)
    return Bundle.read(optimized)


def words(plain: Bundle, task: str) -> str:
    """The words of a task's template, repeated to `TOKENS` tokens or fewer."""
    own = " ".join(re.sub(r"\{\w+\}", " ", load_task(task).template("masked")).split())
    tokenizer = Tokenizer.from_file(str(plain.path / "tokenizer.json"))
    return " ".join([own] * (TOKENS // len(tokenizer.encode(own, add_special_tokens=False).ids)))


def contend(given: argparse.Namespace, name: str, task: str, seed: int) -> Score:
    """The score of a contender's prompt on the test rows."""
    own, settings = CONTENDERS[name], resolve({"seed": seed})
    made, calls = bundle(given, task if own.words else None), int(given.calls * own.calls)
    data, metric = None if task == "demo" else given.data / task, load_task(task).metric
    started = time.perf_counter()
    with load_engine(made, given.engine, threads=given.threads) as engine:
        rows = own.rows(engine, load_task(task), data, settings, given.test_rows)
        start = made.start_prompt()
        best, calls = (
            search(own.optimizer(made, settings), rows, start, calls) if calls else (start, 0)
        )
        seconds = time.perf_counter() - started
        return Score(
            contender=name, task=task, metric=metric, seed=seed, budget=None, calls=calls, score=rows.score(best),
            seconds=seconds, peak_mib=None, chosen=None,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with a folder of rows per task")
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--tasks", default="demo,agnews,sst2,yelpp")
    parser.add_argument(
        "--contenders", default=";".join(CONTENDERS), help="separated by semicolons"
    )
    parser.add_argument("--seeds", default="42,43,44,45,46")
    parser.add_argument("--calls", type=int, default=280)
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"))
    given = parser.parse_args()
    if unknown := set(given.contenders.split(";")) - CONTENDERS.keys():
        parser.error(f"no contender {min(unknown)!r}; known: {'; '.join(CONTENDERS)}")
    if given.data is None and given.tasks != "demo":
        parser.error("--data is missing: the folder with a folder of rows for each task but demo")
    for task in set(given.tasks.split(",")) - {"demo"}:
        if not (given.data / task).is_dir():
            parser.error(f"--data: {given.data / task} is not a folder")
    given.output.mkdir(parents=True, exist_ok=True)
    file, scores = given.output / "report.json", list[Score]()
    facts = {
        name: str(getattr(given, name)) for name in ("calls", "backbone", "engine", "test_rows")
    }
    if file.exists():
        former = CompareReport.model_validate_json(file.read_text(encoding="utf-8"))
        if differing := [name for name, value in facts.items() if former.facts.get(name) != value]:
            parser.error(f"{file} is of other {', '.join(differing)}; choose another -o")
        scores = former.scores
    done = {(score.contender, score.task, score.seed) for score in scores}
    every = product(
        given.contenders.split(";"), map(int, given.seeds.split(",")), given.tasks.split(",")
    )
    wanted = [(name, task, seed) for name, seed, task in every if (name, task, seed) not in done]
    facts["machine"] = describe_machine()["cpu"]
    for number, trial in enumerate(wanted, 1):
        scores.append(contend(given, *trial))
        print(
            f"{number} of {len(wanted)}: {', '.join(map(str, trial))}: {scores[-1].score:.3f}",
            flush=True,
        )
        report = make_report(scores, {}, facts, reference=BASE)
        write_report(
            given.output, report, f"# Optimizers\n\n{summary(report)}\n\n{gains(report)}\n"
        )
    print(file.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    with exit_on_error():
        main()
