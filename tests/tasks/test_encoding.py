"""From rows to token ids: templates, special tokens, where the readout is, what is cut off, and
what is refused.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import takewhile
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_bundles import bundle_info, tiny_bundle

from bbt_accel.core.bundle import Bundle
from bbt_accel.core.label_words import distinct_words
from bbt_accel.errors import BundleError, DataError, TaskError
from bbt_accel.tasks import encoding
from bbt_accel.tasks.data import Row
from bbt_accel.tasks.encoding import Encoder
from bbt_accel.tasks.task import Task, load_task

SHARED = Path(__file__).parents[3] / "shared"
SST2 = load_task("sst2")
MRPC = load_task("mrpc").model_copy(update={"label_words": load_task("sst2").label_words})
FAMILIES = ["roberta", "bert", "bart", "t5", "mt5", "gpt2"]
TEXTS = st.text() | st.text("ab <>[]\\n", max_size=300) | st.sampled_from(
    ["<mask>", "x <mask> y</s>", "[MASK] [SEP]", "<extra_id_0>", "＜extra_id_0＞ </s>", "😀" * 200,
     "\n\n", " " * 500, "a" * 5000, "word " * 900, "{mask} {sentence}", "\ud800",
     "\x00[MA\x00SK]", "<ma<mask>sk>"]
)  # fmt: skip


@cache
def encoder(family: str, mode: str, pair: bool = False) -> Encoder:
    bundle = tiny_bundle(Path(mkdtemp()), family, mode, n=10, max_length=64)
    return Encoder(bundle, MRPC if pair else SST2)


def decoded(enc: Encoder, ids: list[int]) -> list[str]:
    return [enc._tokenizer.id_to_token(i) for i in ids]


@pytest.mark.parametrize("mode", ["add", "cat"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@example(texts=["a" * 5000, "b", "<mask> <extra_id_0> [MASK]"])
def test_any_text_gives_a_valid_batch(family: str, mode: str, texts: list[str]) -> None:
    enc = encoder(family, mode)
    info = enc.bundle.info
    special = info.special
    batch = enc.encode([Row({"sentence": text}, 1) for text in texts])
    lengths = batch.attention_mask.sum(1)
    assert len(batch) == len(texts)
    assert batch.input_ids.shape[1] == lengths.max() <= 64
    assert (np.diff(batch.attention_mask, axis=1) <= 0).all(), "padded on the right"
    assert (batch.input_ids[batch.attention_mask == 0] == special.pad).all()
    assert (batch.targets == 1).all()
    for ids, length, readout in zip(batch.input_ids.tolist(), lengths, batch.readout, strict=True):
        row = ids[:length]
        if special.mask is not None:
            assert row.count(special.mask) == 1
        if info.template_group == "masked":
            assert row[readout] == special.mask
            assert (row[0], row[-1]) == (special.begin, special.end)
        if info.template_group == "causal":
            assert readout == length - 1
        if info.template_group == "span":
            assert (readout, row[-2:]) == (1, [special.mask, special.end])
        first = {"causal": 0, "span": row.index(1000) if 1000 in row else -1}.get(
            info.template_group, 1
        )
        assert (row[first : first + 10] == list(range(1000, 1010))) == (mode == "add")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(first=TEXTS, second=TEXTS)
def test_truncation_keeps_template_prompt_and_end(family: str, first: str, second: str) -> None:
    enc = encoder(family, "add", pair=True)
    row, empty = (
        Row({"sentence1": first, "sentence2": second}),
        Row({"sentence1": "", "sentence2": ""}),
    )
    ids = enc.encode([row]).input_ids[0].tolist()
    template = enc.encode([empty]).input_ids[0].tolist()
    assert len(ids) <= 64
    assert ids[-1] == template[-1]
    assert sorted(i for i in ids if 1000 <= i < 1010) == list(range(1000, 1010))


@pytest.mark.parametrize("mode", ["add", "cat"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(text=TEXTS | st.text("ab é😀 <>", min_size=64))
@example(text="abba 😀é " * 40)
def test_truncation_removes_the_last_tokens_of_a_text_and_changes_no_other(
    family: str, mode: str, text: str
) -> None:
    enc = encoder(family, mode)
    row = Row({"sentence": text})
    whole, found = enc.ids([enc.fields(row)])[0], enc.encode([row]).input_ids[0].tolist()
    assert len(found) == min(len(whole), enc.limit), "no token is wasted"
    end = len(
        shared_beginning(*(enc.ids([{"sentence": text}])[0][::-1] for text in "ab"))
    )  # of the template
    kept = len(found) - end
    assert found == whole[:kept] + whole[len(whole) - end :]


@pytest.mark.parametrize("mode", ["add", "cat"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(first=TEXTS | st.text("ab 7é", min_size=30), second=TEXTS | st.text("ab 7é", min_size=30))
@example(first="7 " * 40, second="ab " * 40)
def test_the_longer_text_of_a_pair_is_truncated_first(
    family: str, mode: str, first: str, second: str
) -> None:
    enc = encoder(family, mode, pair=True)
    row = Row({"sentence1": first, "sentence2": second})
    tokens, found = enc.tokens(enc.fields(row)), enc.encode([row]).input_ids[0].tolist()
    assert [token for token, _ in tokens] == enc.ids([enc.fields(row)])[0]
    own = [[token for token, place in tokens if place == i] for i in range(2)]
    rest = len(tokens) - sum(map(len, own))
    lengths = [
        (i, min(len(tokens), enc.limit) - rest - i) for i in range(enc.limit)
    ]  # of both, for every split
    fits = [
        pair
        for pair in lengths
        if all(0 <= n <= len(text) for n, text in zip(pair, own, strict=True))
    ]
    kept = min(
        fits, key=lambda pair: (max(pair), pair)
    )  # of two equal texts the first is truncated first
    expected = []
    for place, n in enumerate(kept):
        own[place][n:] = [-1] * (len(own[place]) - n)
    for token, place in tokens:
        expected.append(token if place is None else own[place].pop(0))
    assert found == [token for token in expected if token != -1]


def shared_beginning(first: list[int], second: list[int]) -> list[int]:
    return [
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    ]


def test_a_row_is_truncated_no_further_than_needed_and_the_longest_column_first() -> None:
    enc = encoder("bert", "add", pair=True)
    batch = enc.encode([Row({"sentence1": "a " * 100, "sentence2": "b b b"})])
    tokens = decoded(enc, batch.input_ids[0].tolist())
    assert len(tokens) == 64, "no token is wasted"
    assert tokens.count("b") == 3, "the short column stays whole"


END = ["Ġ", ".", "ĠT", "h", "e", "Ġs", *"entiment", "Ġi", "s"]


def test_every_template_group_and_mode_has_its_order_of_tokens() -> None:
    row = [Row({"sentence": "ab"}, 0)]
    expected = {
        ("bert", "add"): [
            "[CLS]",
            *"0123456789",
            ".",
            "a",
            "##b",
            ".",
            "it",
            "was",
            "[MASK]",
            ".",
            "[SEP]",
        ],
        ("bert", "cat"): ["[CLS]", "a", "##b", ".", "it", "was", "[MASK]", ".", "[SEP]"],
        ("roberta", "cat"): [
            "<s>",
            "a",
            "b",
            "Ġ",
            ".",
            "ĠI",
            "t",
            "Ġw",
            "a",
            "s",
            "<mask>",
            "Ġ",
            ".",
            "</s>",
        ],
        ("t5", "add"): [
            "▁text",
            "<unk>",
            *"0123456789",
            "▁",
            "a",
            "b",
            "▁.",
            "▁It",
            "▁was",
            "<extra_id_0>",
            "</s>",
        ],
        ("t5", "cat"): [
            "▁text",
            "<unk>",
            "▁",
            "a",
            "b",
            "▁.",
            "▁It",
            "▁was",
            "<extra_id_0>",
            "</s>",
        ],
        ("gpt2", "cat"): ["a", "b", *END],
        ("gpt2", "add"): [*"0123456789", "Ġ", ".", "Ġa", "b", *END],
    }
    for (family, mode), tokens in expected.items():
        enc = encoder(family, mode)
        ids = enc.encode(row).input_ids[0].tolist()
        assert [
            str(i - 1000) if 1000 <= i < 1010 else t
            for i, t in zip(ids, decoded(enc, ids), strict=True)
        ] == tokens


def test_label_words_take_the_form_of_their_position() -> None:
    for family, tokens in {
        "roberta": ["Ġb", "Ġg"],
        "gpt2": ["Ġn", "Ġp"],
        "bert": ["bad", "great"],
        "t5": ["▁negative", "▁positive"],
    }.items():
        enc = encoder(family, "add")
        assert decoded(enc, enc.label_token_ids.tolist()) == tokens
    assert encoder("roberta", "add").label_words == ["bad", "great"]


def test_label_word_after_a_bracket_has_no_space(tmp_path: Path) -> None:
    task = with_masked(SST2, "{sentence} ({mask})", ["bad", "great"])
    enc = Encoder(tiny_bundle(tmp_path), task)
    assert decoded(enc, enc.label_token_ids.tolist()) == ["b", "g"]


def with_masked(task: Task, template: str, words: list[str]) -> Task:
    return task.model_copy(
        update={
            "templates": task.templates | {"masked": template},
            "label_words": task.label_words | {"masked": words},
        }
    )


def test_ambiguous_and_unknown_label_words_are_refused(tmp_path: Path) -> None:
    template = SST2.template("masked")
    with pytest.raises(
        TaskError, match="'good' and 'great' of task sst2 begin with the same token"
    ):
        Encoder(tiny_bundle(tmp_path / "r"), with_masked(SST2, template, ["good", "great"]))
    with pytest.raises(TaskError, match="'日本' of task sst2 is not in the vocabulary"):
        Encoder(tiny_bundle(tmp_path / "b", "bert"), with_masked(SST2, template, ["bad", "日本"]))


def test_a_small_vocabulary_repeats_its_ordinary_tokens(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, "bert", size=200, n=50, max_length=100)
    ids = Encoder(bundle, SST2).encode([Row({"sentence": "a"})]).input_ids[0, 1:51]
    assert ((ids >= 5) & (ids < 200)).all(), "no special token, none outside the vocabulary"


def test_only_tokens_of_the_tokenizer_are_prompt_or_feature_where_the_embedding_has_more_rows(
    tmp_path: Path,
) -> None:
    bundle = tiny_bundle(tmp_path, "bert", size=200, n=50, max_length=100)
    padded = Bundle(bundle.path, bundle.info.model_copy(update={"vocab_size": 256}))
    encoder = Encoder(padded, SST2)
    assert set(encoder.feature_token_ids(seed=1)) == {1, *range(5, 200)}, (
        "[UNK] and every ordinary token, no other"
    )
    assert encoder.encode([Row({"sentence": "a"})]).input_ids[0, 1:51].max() < 200
    bundle = tiny_bundle(tmp_path, "bert", size=1020, n=50, max_length=100)
    padded = Bundle(bundle.path, bundle.info.model_copy(update={"vocab_size": 1100}))
    assert Encoder(padded, SST2).encode([Row({"sentence": "a"})]).input_ids[0, 1:51].max() < 1020


def test_a_template_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"template of task sst2 alone exceeds the 15 tokens"):
        Encoder(tiny_bundle(tmp_path, max_length=15), SST2)


def test_literal_newlines_are_cleaned(tmp_path: Path) -> None:
    enc = Encoder(tiny_bundle(tmp_path, "bert"), load_task("yelpp"))
    one, other = enc.encode([Row({"text": "a\\n\\nb"}), Row({"text": "a b"})]).input_ids
    assert (one == other).all()


def test_errors_of_rows_and_bundles(tmp_path: Path) -> None:
    enc = encoder("bert", "add")
    with pytest.raises(DataError, match="a row has no 'sentence'"):
        enc.encode([Row({"text": "a"})])
    with pytest.raises(DataError, match="with N > 0"):
        enc.encode([])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"cannot read .*tokenizer\.json"):
        Encoder(Bundle(tmp_path, enc.bundle.info), SST2)


GOLDEN = {
    "roberta_add": ("roberta-base", "roberta", "add", (0, 2, 1, 4, "<mask>", None)),
    "roberta_cat": ("roberta-base", "roberta", "cat", (0, 2, 1, 4, "<mask>", None)),
    "bart-base_deep": ("bart-base", "bart", "add", (0, 2, 1, 4, "<mask>", 2)),
    "gpt2_add": ("gpt2", "gpt2", "add", (None, None, 0, None, None, None)),
    "t5-small_add": ("t5-small", "t5", "add", (None, 1, 0, 2599, "<extra_id_0>", 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("trace", GOLDEN)
def test_rows_of_the_original_program(trace: str, tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs the golden traces in ../shared")
    transformers = pytest.importorskip("transformers")
    model, family, mode, special = GOLDEN[trace]
    transformers.AutoTokenizer.from_pretrained(
        SHARED / "golden" / "models" / model
    ).save_pretrained(tmp_path)
    golden = np.load(SHARED / "golden" / f"{trace}.npz")
    files = [SHARED / "data" / "sst2" / f"{name}.jsonl" for name in ("train", "validation")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [
        json.loads(line)["sentence"].replace("-lrb- ", "(").replace(" -rrb-", ")") for line in lines
    ]
    enc = Encoder(Bundle(tmp_path, bundle_info(family, mode, 10, 512, 2600, special)), SST2)
    batch = enc.encode([Row({"sentence": text}) for text in texts])
    ours = {
        tuple(ids[: mask.sum()].tolist()): readout
        for ids, mask, readout in zip(
            batch.input_ids, batch.attention_mask, batch.readout, strict=True
        )
    }
    for split in ("train", "dev"):
        masks = golden[f"{split}_attention_mask"]
        for number, (ids, mask) in enumerate(zip(golden[f"{split}_input_ids"], masks, strict=True)):
            row = ids[: mask.sum()].tolist()
            if (
                family == "t5"
            ):  # the original decoded the prompt to text and back, which put a "▁" before it
                assert row.pop(4) == 3
            assert tuple(row) in ours
            if f"{split}_mask_pos" in golden:
                assert ours[tuple(row)] == golden[f"{split}_mask_pos"][number]
    if family == "t5":
        assert enc.label_token_ids.tolist() == golden["label_ids"].tolist()


LONG = st.sampled_from(
    ["word ", "a", " ", "\n", "filler1 ", "😀", "</s>", "x " + "y" * 150 + " ", "of the "]
)


@pytest.mark.parametrize("mode", ["add", "cat"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
@settings(max_examples=20, deadline=None)
@given(pieces=st.lists(st.tuples(LONG, st.integers(1, 6000)), min_size=1, max_size=4))
@example(
    pieces=[("word ", 5), ("filler1 ", 1272), ("</s>", 4)]
)  # a special token of T5, cut off in the middle
def test_what_is_cut_off_before_tokenizing_never_changes_a_row(
    family: str, mode: str, pieces: list[tuple[str, int]]
) -> None:
    """Not even a row that fits although its text is long, e.g. because the tokenizer drops most of
    it.

    pieces: strings, each repeated to about so many characters.
    """
    text = "".join(piece * max(1, length // len(piece)) for piece, length in pieces)
    enc, row = encoder(family, mode), Row({"sentence": text})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "MOST_CHARACTERS", 2**40)
        cut = enc.encode([row])
        patch.setattr(Encoder, "_beginning", lambda self, text: text)
        whole = enc.encode([row])
    assert cut.input_ids.tolist() == whole.input_ids.tolist()
    assert cut.readout.tolist() == whole.readout.tolist()


@pytest.mark.parametrize(
    "text", ["word " * 2_000_000, " word" + " " * 10_000_000 + "end", "a" * 10_000_000]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_work_on_a_text_is_bounded_whatever_its_length(family: str, text: str) -> None:
    enc, tokenized = encoder(family, "add"), []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def encode(self, text: str, **options: object) -> object:
            tokenized.append(len(text))
            return tokenizer.encode(text, **options)

        def encode_batch(self, texts: list[str], **options: object) -> object:
            tokenized.extend(map(len, texts))
            return tokenizer.encode_batch(texts, **options)

    tokenizer = enc._tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enc, "_tokenizer", Counting())
        enc.encode([Row({"sentence": text})])
    assert sum(tokenized) <= 4 * encoding.MOST_CHARACTERS * enc.bundle.info.max_length


def test_label_words_come_from_labels_and_differ_in_their_first_token(tmp_path: Path) -> None:
    bundle, template = (
        tiny_bundle(tmp_path, "bert"),
        "{text} {mask}",
    )  # whose words are pieces: great, bad, it, was
    assert distinct_words(bundle, template, ["bad", "great"]) == ["bad", "great"]
    assert distinct_words(bundle, template, ["was-bad", "was_great"]) == ["bad", "great"]
    assert distinct_words(bundle, template, ["great", "very great"]) == ["great", "very great"]
    assert distinct_words(bundle, template, ["x1", "x2"]) == ["x1", "A"]  # by letters alone
    assert distinct_words(bundle, template, ["好", "bad"]) == ["A", "bad"]  # not in the vocabulary
    with pytest.raises(TaskError, match="no word of label '226' begins with a token of its own"):
        distinct_words(bundle, template, ["2", *(f"2{i}" for i in range(30))])


def test_a_word_of_several_tokens_is_known(tmp_path: Path) -> None:
    task = Task(
        name="t",
        text="text",
        n_classes=2,
        templates={"masked": "{text} {mask}"},
        label_words={"masked": ["great", "xyz"]},
    )
    assert Encoder(tiny_bundle(tmp_path, "bert"), task).partial_words == {"xyz": "x"}
