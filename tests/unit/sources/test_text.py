"""Texts become token ids: padded, masked, packed, tagged; what is cut is counted."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from layerwise.errors import DataError, ModelError
from layerwise.sources.encoding import IGNORED, encode_words
from layerwise.sources.text import encode, text_list
from layerwise.sources.texttable import TextPart, TextTable
from tiny_transformers import save_tokenizer

pytest.importorskip("transformers")


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


def table(task="text_classification", classes=("x", "y"), val=None, **columns):
    parts = {"train": TextPart(**columns)}
    if val is not None:
        parts["val"] = TextPart(**val)
    return TextTable(task, parts, classes)


TEXTS = ["the cat runs", "a red dog", "the sun and the moon or a house", "cat"]


def ids(tokenizer, text):
    return tokenizer.convert_tokens_to_ids(text.split())


def test_samples_have_ids_and_class_numbers(tokenizer):
    data = encode(table(texts=TEXTS, targets=["y", "x", "x", "y"]), tokenizer, max_length=20)
    assert data.train[0]["input_ids"] == ids(tokenizer, "[CLS] the cat runs [SEP]")
    assert [data.train[index]["labels"] for index in range(4)] == [1, 0, 0, 1]
    assert data.train.targets == (1, 0, 0, 1)
    assert data.train.lengths == (5, 5, 10, 3)
    assert data.train.counts == {"x": 2, "y": 2}
    assert data.train.deterministic


def test_batches_are_padded_to_their_own_longest(tokenizer):
    data = encode(table(texts=TEXTS, targets=["y", "x", "x", "y"]), tokenizer, max_length=20)
    batches = list(DataLoader(data.train, batch_size=2, collate_fn=data.train.collate, num_workers=1))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 5), (2, 10)]
    expected = tokenizer.pad(
        [{k: v for k, v in data.train[i].items() if k != "labels"} for i in (2, 3)], return_tensors="pt"
    )
    for name, value in expected.items():
        assert torch.equal(batches[1][name], value)
    assert batches[1]["labels"].tolist() == [0, 1]


def test_texts_are_padded_on_the_right_but_for_xlnet(tokenizer):
    # On the left, as generation wants it, GPT-2 reads other positions; XLNet reads the last one.
    data = encode(table(texts=TEXTS, targets=["y", "x", "x", "y"]), tokenizer, max_length=20).train
    tokenizer.padding_side = "left"
    assert data.collate([data[2], data[3]])["attention_mask"][1].tolist() == [1] * 3 + [0] * 7
    tokenizer.__class__ = type("XLNetTokenizer", (type(tokenizer),), {})
    assert data.collate([data[2], data[3]])["attention_mask"][1].tolist() == [0] * 7 + [1] * 3


def test_long_texts_are_cut_and_counted(tokenizer):
    data = encode(
        table(texts=TEXTS, targets=["y", "x", "x", "y"], val={"texts": ["cat"], "targets": ["x"]}),
        tokenizer,
        max_length=5,
    )
    assert data.truncated == {"train": 1, "val": 0}
    assert data.train[2]["input_ids"] == ids(tokenizer, "[CLS] the sun and [SEP]")
    assert any("1 of 4 texts (25%) cut to 5 tokens; the longest has 10" in note for note in data.notes)
    assert not any(note.startswith("val") for note in data.notes)


def test_pairs_have_both_texts(tokenizer):
    data = encode(table(texts=["the cat"], pairs=["a dog runs"], targets=["x"]), tokenizer, max_length=20)
    assert data.train[0]["input_ids"] == ids(tokenizer, "[CLS] the cat [SEP] a dog runs [SEP]")
    assert data.train[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    cut = encode(table(texts=["the cat"], pairs=["a dog runs"], targets=["x"]), tokenizer, max_length=7)
    assert cut.train[0]["input_ids"] == ids(tokenizer, "[CLS] the cat [SEP] a dog [SEP]")


def test_several_labels_and_numbers(tokenizer):
    several = encode(
        table("multi_label", ("a", "b", "c"), texts=TEXTS[:2], targets=[("c", "a"), ()]),
        tokenizer,
        max_length=9,
    )
    batch = several.train.collate([several.train[0], several.train[1]])
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert batch["labels"].dtype == torch.float32
    numbers = encode(table("regression", (), texts=TEXTS[:2], targets=[0.5, -3.0]), tokenizer, max_length=9)
    assert numbers.train.collate([numbers.train[1]])["labels"].tolist() == [-3.0]
    assert numbers.train.targets is None


def test_unknown_words_are_told(tokenizer):
    data = encode(table(texts=["zebra yak cat"], targets=["x"]), tokenizer, max_length=9)
    assert any("unknown to the tokenizer" in note for note in data.notes)


def test_tags_stand_on_the_first_piece_of_a_word(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = {p: i for i, p in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##happ", "##y", "cat"])}
    core = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    tags = table(
        "token_classification",
        ("B-A", "O"),
        words=[["unhappy", "cat"], ["cat"]],
        targets=[("B-A", "O"), ("O",)],
    )
    data = encode(tags, tokenizer, max_length=10)
    assert data.train[0]["input_ids"] == [2, 4, 5, 6, 7, 3]
    assert data.train[0]["labels"] == [IGNORED, 0, IGNORED, IGNORED, 1, IGNORED]
    batch = data.train.collate([data.train[0], data.train[1]])
    assert batch["labels"][1].tolist() == [IGNORED, 1, IGNORED, IGNORED, IGNORED, IGNORED]
    cut = encode(tags, tokenizer, max_length=4)
    assert cut.train[0]["labels"] == [IGNORED, 0, IGNORED, IGNORED]  # [CLS] un ##happ [SEP]
    assert cut.truncated == {"train": 1}


@pytest.mark.parametrize("whole", [True, False])
def test_words_of_byte_level_tokenizers_have_the_pieces_of_their_text(whole):
    # The space before a word is part of its first piece (RoBERTa's kind, and Llama 3's of two steps).
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)
    split = pre_tokenizers.Split(Regex(r" ?[a-z]+|'[a-z]+"), "isolated")
    core.pre_tokenizer = level if whole else pre_tokenizers.Sequence([split, level])
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(["the cat don't run", "a cat runs"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="!")
    words = ["cat", "don't", "run"]
    tags = table("token_classification", ("A", "B", "C"), words=[words], targets=[("A", "B", "C")])
    sample = encode(tags, tokenizer, max_length=30).train[0]
    assert sample["input_ids"] == tokenizer(" ".join(words))["input_ids"]
    assert sample["input_ids"] != tokenizer(words, is_split_into_words=True)["input_ids"]
    assert [label for label in sample["labels"] if label != IGNORED] == [0, 1, 2]


def test_packing_loses_no_token_and_pads_none(tmp_path):
    tokenizer = save_tokenizer(tmp_path, decoder=True)
    data = encode(table("causal_lm", (), texts=TEXTS), tokenizer, max_length=6)
    joined = [token for sample in data.train.samples for token in sample["input_ids"]]
    stream = ids(tokenizer, " [SEP] ".join(TEXTS) + " [SEP]")
    assert len(stream) == 19
    assert joined == stream[:18]  # one token alone predicts nothing
    assert data.train.lengths == (6, 6, 6)
    uneven = encode(table("causal_lm", (), texts=TEXTS), tokenizer, max_length=8).train
    assert uneven.lengths == (8, 8, 3)
    assert [token for sample in uneven.samples for token in sample["input_ids"]] == stream
    assert all(sample["labels"] == sample["input_ids"] for sample in data.train.samples)
    assert data.truncated == {"train": 0}


def test_prompts_are_not_learned(tmp_path):
    tokenizer = save_tokenizer(tmp_path, decoder=True)
    data = encode(
        table("causal_lm", (), texts=["the cat", "the sun and the moon"], responses=["runs", "red and blue"]),
        tokenizer,
        max_length=7,
    )
    assert data.train[0]["input_ids"] == ids(tokenizer, "the cat runs [SEP]")
    assert data.train[0]["labels"] == [IGNORED] * 2 + ids(tokenizer, "runs [SEP]")
    # Too long: the start of the prompt goes, the response stays whole.
    assert data.train[1]["input_ids"] == ids(tokenizer, "and the moon red and blue [SEP]")
    assert data.train[1]["labels"] == [IGNORED] * 3 + ids(tokenizer, "red and blue [SEP]")
    assert data.truncated == {"train": 1}
    tight = encode(
        table("causal_lm", (), texts=["the cat"], responses=["red and blue and slow"]),
        tokenizer,
        max_length=3,
    )
    assert tight.train[0]["labels"] == ids(tokenizer, "red and blue")


def test_a_prompt_begins_as_the_tokenizer_begins_texts(tmp_path):
    # Llama's begin token comes first, is not learned, and stays when the start of a prompt is cut
    tokenizer = save_tokenizer(tmp_path, decoder=True)
    tokenizer.bos_token = "[CLS]"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.bos_token_id)]
    )
    columns = {"texts": ["the cat", "the sun and the moon"], "responses": ["runs", "red"]}
    data = encode(table("causal_lm", (), **columns), tokenizer, max_length=5)
    assert data.train[0]["input_ids"] == ids(tokenizer, "[CLS] the cat runs [SEP]")
    assert data.train[0]["labels"] == [IGNORED] * 3 + ids(tokenizer, "runs [SEP]")
    assert data.train[1]["input_ids"] == ids(tokenizer, "[CLS] the moon red [SEP]")


def test_responses_without_tokens_are_left_out_and_told(tmp_path):
    # a zero-width space is no blank, and BERT's normaliser makes nothing of it
    tokenizer = save_tokenizer(tmp_path, decoder=True)
    tokenizer.backend_tokenizer.normalizer = BertNormalizer()
    columns = {"texts": ["the cat", "a dog"], "responses": ["\u200b", "runs"]}
    data = encode(table("causal_lm", (), **columns), tokenizer, max_length=9)
    assert [sample["input_ids"] for sample in data.train.samples] == [ids(tokenizer, "a dog runs [SEP]")]
    assert "train: 1 of 2 rows left out: no tokens in their responses" in data.notes
    with pytest.raises(DataError, match="no tokens of the responses of the train part"):
        encode(table("causal_lm", (), texts=["the cat"], responses=["\u200b"]), tokenizer, max_length=9)


def test_masks_are_drawn_anew_by_torchs_generator(tokenizer):
    data = encode(table("masked_lm", (), texts=TEXTS * 20), tokenizer, max_length=20, mask_frac=0.3)
    assert not data.train.deterministic
    torch.manual_seed(0)
    first = [data.train[index] for index in range(len(data.train))]
    torch.manual_seed(0)
    assert [data.train[index] for index in range(len(data.train))] == first
    assert [data.train[index] for index in range(len(data.train))] != first
    hidden = masked = total = 0
    for sample, original in zip(first, data.train.samples, strict=True):
        for now, label, before in zip(
            sample["input_ids"], sample["labels"], original["input_ids"], strict=True
        ):
            assert label in (IGNORED, before)
            if label == IGNORED:
                assert now == before
            assert not (before == tokenizer.sep_token_id and label != IGNORED)
            total += before != tokenizer.sep_token_id
            hidden += label != IGNORED
            masked += now == tokenizer.mask_token_id
    assert 0.2 < hidden / total < 0.4
    assert 0.65 < masked / hidden < 0.95


def test_subset_fingerprint_and_pickle(tokenizer):
    data = encode(table(texts=TEXTS, targets=["y", "x", "x", "y"]), tokenizer, max_length=20)
    part = data.train.subset([2, 0])
    assert (part.lengths, part.targets) == ((10, 5), (0, 1))
    assert pickle.loads(pickle.dumps(part))[1] == data.train[0]
    cut = encode(table(texts=TEXTS, targets=["y", "x", "x", "y"]), tokenizer, max_length=5)
    moved = encode(table(texts=TEXTS, targets=["x", "x", "x", "y"]), tokenizer, max_length=20)
    prints = {
        part.fingerprint(),
        data.train.fingerprint(),
        cut.train.fingerprint(),
        moved.train.fingerprint(),
    }
    assert len(prints) == 4
    assert json.dumps(data.train.fingerprint())


def test_a_part_without_rows_is_named(tokenizer):
    with pytest.raises(DataError, match="the val part has no rows"):
        encode(table(texts=TEXTS, targets=["y", "x", "x", "y"], val={"targets": []}), tokenizer, max_length=9)


def test_limits_and_tokens_that_are_missing(tmp_path, tokenizer):
    with pytest.raises(DataError, match="max_length is 1"):
        encode(table(texts=TEXTS, targets=["x"] * 4), tokenizer, max_length=1)
    decoder = save_tokenizer(tmp_path / "d", decoder=True)
    with pytest.raises(ModelError, match="no mask token"):
        encode(table("masked_lm", (), texts=TEXTS), decoder, max_length=8)
    decoder.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        encode(table("causal_lm", (), texts=TEXTS), decoder, max_length=8)
    with pytest.raises(DataError, match="no end token, which a response"):
        encode(table("causal_lm", (), texts=["a"], responses=["dog"]), decoder, max_length=8)
    with pytest.raises(DataError, match="mask_frac is 1; expected a share above 0 and below 1"):
        encode(table("masked_lm", (), texts=TEXTS), tokenizer, max_length=8, mask_frac=1)


def test_tags_of_a_slow_tokenizer_are_refused():
    # it does not know which word a piece is of
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(DataError, match=r"need a fast tokenizer.*SimpleNamespace"):
        encode_words(slow, [["a"]], [[0]], max_length=9)


def test_texts_for_prediction(tokenizer):
    found = text_list(["the cat", "a dog runs"], tokenizer, max_length=9)
    assert set(found.collate([found[0], found[1]])) == {"input_ids", "token_type_ids", "attention_mask"}
    with pytest.raises(DataError, match="texts 2, 3 are empty"):
        text_list(["x", "", "  "], tokenizer, max_length=9)
    with pytest.raises(DataError, match="no texts"):
        text_list([], tokenizer, max_length=9)
