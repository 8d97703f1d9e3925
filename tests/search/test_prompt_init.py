"""A prompt that starts from a text: its tokens set the prompt's length, its embeddings are p0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from conftest import Load
from tiny_backbones import save_backbone
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bbt_accel import Batch, Bundle, export_bundle, tune
from bbt_accel.core.demo import DATA
from bbt_accel.errors import UsageError
from bbt_accel.exporters.convert.optimize import optimize_bundle
from bbt_accel.exporters.families.loading import load_model, load_tokenizer
from bbt_accel.exporters.trace import export, validate
from bbt_accel.search.methods import PromptSpace
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.task import load_task

TEXT = "to it"
FAMILIES = ["roberta", "electra", "albert", "modernbert", "bart", "t5", "gpt2", "llama", "gemma3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("init")


@pytest.fixture(autouse=True)
def _validate_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "validated", validate.validate)


def made(root: Path, name: str, mode: str, **options: Any) -> tuple[Path, Bundle]:
    checkpoint, output = root / name, root / f"{name}-{mode}"
    if not checkpoint.exists():
        save_backbone(name, checkpoint)
    if not output.exists():
        export_bundle(checkpoint, output, prompt_mode=mode, **{"prompt_init": TEXT, **options})  # type: ignore[arg-type]
    return checkpoint, Bundle.read(output)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_has_the_tokens_of_the_text(root: Path, name: str) -> None:
    checkpoint, bundle = made(root, name, "cat")
    ids = AutoTokenizer.from_pretrained(checkpoint).encode(TEXT, add_special_tokens=False)
    assert bundle.info.prompt_ids == ids
    assert (bundle.info.prompt_init, bundle.info.n_prompt_tokens) == (TEXT, len(ids))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "t5", "gpt2", "llama", "gemma3"])
def test_in_cat_mode_p0_gives_the_logits_of_the_text_in_front(
    root: Path, loaded: Load, name: str
) -> None:
    """Where embeddings are of tokens alone: the naive forward of a row that begins with the text's
    own tokens.
    """
    checkpoint, bundle = made(root, name, "cat")
    info, n = bundle.info, bundle.info.n_prompt_tokens
    p0 = bundle.initial_prompt()
    assert p0 is not None
    ids = np.random.default_rng(0).integers(5, 300, (2, 9))
    if (begin := info.special.begin) is not None:
        ids[:, 0] = begin
    rows = Batch(
        ids, np.ones_like(ids), np.array([1, 1] if info.decodes else [8, 8]), [0, 0], [7, 8, 9]
    )  # type: ignore[arg-type]
    with loaded(bundle, "ort").bind(rows) as bound:
        found = bound.label_logits(p0[None])[0]
    at = info.prompt_start
    text = np.tile(info.prompt_ids or [], (2, 1))
    whole = torch.from_numpy(np.concatenate([ids[:, :at], text, ids[:, at:]], axis=1))
    inputs = {"input_ids": whole}
    if info.decodes:
        decoder = rows.with_decoder_input(info).decoder_input_ids
        inputs["decoder_input_ids"] = torch.from_numpy(decoder)
    with torch.inference_mode():
        logits = load_model(checkpoint)(**inputs).logits[:, 1 if info.decodes else 8 + n]
    np.testing.assert_allclose(found, logits[:, [7, 8, 9]].numpy(), atol=1e-4)


@pytest.mark.usefixtures("without_graphs")
def test_in_add_mode_the_text_stands_where_the_prompt_is_added(root: Path) -> None:
    _, bundle = made(root / "untraced", "roberta", "add")
    assert bundle.initial_prompt() is None
    encoder = Encoder(bundle, load_task("demo"))
    (row,) = encoder.encode([_row("a")]).input_ids.tolist()
    assert row[1 : 1 + bundle.info.n_prompt_tokens] == bundle.info.prompt_ids


@pytest.mark.slow
def test_a_search_starts_at_the_text(root: Path, tmp_path: Path) -> None:
    _, bundle = made(root, "gpt2", "cat")
    settings: dict[str, object] = {"k_shot": 2, "popsize": 4, "budget": 4, "intrinsic_dim": 5}
    run = tune(
        bundle, "demo", data=DATA, output=tmp_path / "run", settings=settings, progress=False
    )
    space = PromptSpace(bundle, run.info.settings)
    np.testing.assert_array_equal(space.prompt(0, np.zeros(5)), bundle.initial_prompt())


@pytest.mark.slow
def test_an_optimized_bundle_starts_there_too(root: Path, tmp_path: Path) -> None:
    _, bundle = made(root, "gpt2", "cat")
    optimized = optimize_bundle(bundle.path, tmp_path / "ort")
    np.testing.assert_array_equal(optimized.initial_prompt(), bundle.initial_prompt())
    assert optimized.info.prompt_ids == bundle.info.prompt_ids


TASK = """
name = "mood"
text = ["text"]
n_classes = 2
[templates]
causal = "{text} is"
[label_words]
causal = ["bad", "great"]
[prompt]
init = "go to"
"""


@pytest.mark.usefixtures("without_graphs")
def test_a_task_file_may_have_the_text(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mood.toml"
    file.write_text(TASK)
    checkpoint, other = made(root / "untraced", "gpt2", "cat")
    bundle = export_bundle(
        checkpoint, tmp_path / "bundle", prompt_mode="cat", prompt_init=str(file)
    )
    assert bundle.info.prompt_init == "go to"
    with pytest.raises(
        UsageError, match="task mood starts from a text; export the bundle with --prompt-init"
    ):
        tune(other, str(file), data=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("", "has no tokens"), ("demo.toml", "no \\[prompt\\] init")]
)
def test_what_cannot_start_a_prompt_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "demo.toml").write_text(TASK.split("[prompt]")[0])
    checkpoint = save_backbone("gpt2", tmp_path / "gpt2")
    given = str(tmp_path / text) if text else text
    with pytest.raises(UsageError, match=message):
        export_bundle(checkpoint, tmp_path / "bundle", prompt_mode="cat", prompt_init=given)


def _row(text: str) -> Any:
    from bbt_accel.tasks.data import Row

    return Row({"text": text}, 0)


def test_a_mask_token_in_the_text_is_ordinary_text(root: Path) -> None:
    """As a second mask token it would be where every row is read, within the prompt; a decoder's
    text may have some.
    """
    save_backbone("roberta", root / "masked")
    tokenizer = load_tokenizer(root / "masked")
    _, ids = export.initial_text("go <mask> to", tokenizer, causal=False)
    assert tokenizer.mask_token_id not in ids
    assert ids[0] == export.initial_text("go", tokenizer, causal=False)[1][0]
    assert tokenizer.mask_token_id in export.initial_text("go <mask> to", tokenizer, causal=True)[1]


def test_padding_and_truncation_of_a_tokenizer_file_are_not_applied_to_the_text(root: Path) -> None:
    save_backbone("roberta", root / "padded")
    _, ids = export.initial_text("go to it", load_tokenizer(root / "padded"), causal=False)
    file = root / "padded" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(file))
    assert export.initial_text("go to it", load_tokenizer(root / "padded"), causal=False)[1] == ids
