"""Figures of texts, and shift and advice on a tiny BERT."""

import numpy as np
import pytest
import torch

from layerwise.choosing.advice import advise
from layerwise.choosing.shift import shift
from layerwise.choosing.signature import signature
from layerwise.choosing.tokens import measure_tokens

transformers = pytest.importorskip("transformers")

TOPICS = (
    ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat"],
    ["tree", "red", "blue", "small", "big", "house", "car", "drives", "parks"],
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = ["##s", "##ed", "##ing", *(f"##{letter}" for letter in LETTERS), *LETTERS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOPICS[0], *TOPICS[1], *PIECES])
    )
    return transformers.BertTokenizer(str(path))


class Texts:
    """A data set of texts as mappings, with its own tokenizer and collate function."""

    def __init__(self, tokenizer, texts, labels):
        self.tokenizer, self.texts, self.labels = tokenizer, texts, labels

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {**self.tokenizer(self.texts[index]), "labels": self.labels[index]}

    def collate(self, samples):
        longest = max(len(sample["input_ids"]) for sample in samples)
        batch = {
            key: torch.tensor([s[key] + [0] * (longest - len(s[key])) for s in samples])
            for key in ("input_ids", "attention_mask")
        }
        return {**batch, "labels": torch.tensor([s["labels"] for s in samples])}


def texts(n, seed=0, jargon=False):
    rng = np.random.default_rng(seed)
    found, labels = [], []
    for i in range(n):
        words = list(rng.choice(TOPICS[i % 2], size=rng.integers(4, 9)))
        if jargon:  # words the tokenizer cuts to letters, and a character it does not know
            words = ["".join(rng.choice(list("abcdefgh"), size=4)) for _ in words] + ["ß"]
        found.append(" ".join(words))
        labels.append(i % 2)
    return found, labels


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def test_figures_of_texts_counted_by_hand(tokenizer):
    # "the cat sat" is 3 tokens of 3 words; "abc ß" is a ##b ##c [UNK]: 4 tokens, one unknown
    batch = tokenizer(["the cat sat", "abc ß"], padding=True, return_tensors="pt")
    found = measure_tokens(batch["input_ids"], batch["attention_mask"], tokenizer)
    assert found["length"].tolist() == [3, 4]
    assert found["fertility"].tolist() == [1, 2]
    assert found["unknown"].tolist() == [0, 0.25]
    plain = measure_tokens(batch["input_ids"], batch["attention_mask"])
    assert plain["length"].tolist() == [5, 6]  # with [CLS] and [SEP]


def test_shift_of_texts_against_a_signature(model, tokenizer, tmp_path):
    # texts of the same kind: nothing; jargon: every group shifts, fertility and unknown tokens rise
    source = signature(model, Texts(tokenizer, *texts(150, seed=1)))
    path = source.save(tmp_path / "sig.safetensors")
    same = shift(model, Texts(tokenizer, *texts(120, seed=2)), path, draws=60)
    other = shift(model, Texts(tokenizer, *texts(120, seed=2, jargon=True)), path, draws=60)
    assert same.overall.nothing
    assert same.moved == ()
    assert not other.overall.nothing
    moved = {entry.name: entry.effect.value for entry in other.moved}
    assert moved["fertility"] > 0
    assert moved["unknown"] > 0
    assert [g.group.rpartition(".")[2] for g in same.groups][-1] == "classifier"


def test_padding_does_not_change_features(model, tokenizer):
    # one text alone and beside a longer one: the same shift figures of its features, since padding is masked
    from layerwise.choosing.features import collect_features, map_for

    data = Texts(tokenizer, ["the cat sat", "the dog ran under the small red tree"], [0, 1])
    layers = map_for(model, data, None, None)
    alone, together = (collect_features(model, data, layers, batch_size=n) for n in (1, 2))
    for name in layers.names[:-1]:
        np.testing.assert_allclose(alone.groups[name], together.groups[name], rtol=1e-3, atol=1e-5)


def test_advice_on_texts(model, tokenizer):
    # topics by their words: advice comes with a plan over embeddings, layers and head
    found = advise(model, Texts(tokenizer, *texts(120, seed=3)))
    assert found.similarity == "unknown"
    assert found.plan.groups[0].endswith("embeddings")
    assert found.transfer.best.probe > 0.9
