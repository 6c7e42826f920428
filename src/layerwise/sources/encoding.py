"""Texts to token ids: pairs, tags of words, packed language modelling, prompts that are not learned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from layerwise.errors import DataError

IGNORED = -100  # the label that losses leave out, by the convention of torch and transformers
Encoded = dict[str, Any]


@dataclass(frozen=True)
class Encodings:
    """Samples as lists of ids, and what was cut off.

    Attributes:
        samples: one mapping a sample (``input_ids``, ``attention_mask``, ...), with ``labels`` where they
            belong to tokens.
        truncated: how many texts were longer than the limit.
        longest: tokens of the longest text before it was cut.
        empty: how many rows were left out, of whose response the tokenizer makes nothing.
        unknown: number of unknown tokens, and of all tokens.
    """

    samples: tuple[Encoded, ...]
    truncated: int
    longest: int
    empty: int = 0
    unknown: tuple[int, int] = (0, 0)


def encode_texts(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, *, max_length: int
) -> Encodings:
    """Return texts (or pairs of texts) with the tokenizer's special tokens, cut to `max_length`.

    Of a pair the longer text loses tokens first.

    Args:
        tokenizer: of transformers.
        texts: to encode.
        pairs: the second text of each, or None.
        max_length: in tokens, special ones included.
    """
    with _no_length_warning(tokenizer):
        found = tokenizer(list(texts), None if pairs is None else list(pairs), truncation=False)
    lengths = [len(ids) for ids in found["input_ids"]]
    names = list(found.keys())
    samples = [{name: found[name][index] for name in names} for index in range(len(lengths))]
    long = [index for index, length in enumerate(lengths) if length > max_length]
    if long:
        cut = tokenizer(
            [texts[index] for index in long],
            None if pairs is None else [pairs[index] for index in long],
            truncation="longest_first",
            max_length=max_length,
        )
        for position, index in enumerate(long):
            samples[index] = {name: cut[name][position] for name in names}
    return Encodings(
        tuple(samples), len(long), max(lengths, default=0), unknown=_unknown(tokenizer, found["input_ids"])
    )


def encode_words(
    tokenizer: Any, words: Sequence[Sequence[str]], tags: Sequence[Sequence[int]], *, max_length: int
) -> Encodings:
    """Return sentences of words with one label a word: on its first piece, `IGNORED` on all others.

    Args:
        tokenizer: a fast one, which knows the word of each piece.
        words: of each sentence.
        tags: class number of each word.
        max_length: in tokens; words beyond it are cut off with their tags.

    Raises:
        DataError: the tokenizer is a slow one.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "tags of words need a fast tokenizer, which knows the word of each piece; this one is a "
            f"{type(tokenizer).__name__}. Convert it to tokenizer.json."
        )
    samples, every_id = [], []
    truncated = 0
    for sentence, numbers in zip(words, tags, strict=True):
        given = as_in_text(tokenizer, sentence)
        with _no_length_warning(tokenizer):
            found = tokenizer(given, is_split_into_words=True, truncation=False)
        every_id.append(found["input_ids"])
        if len(found["input_ids"]) > max_length:
            truncated += 1
            found = tokenizer(given, is_split_into_words=True, truncation=True, max_length=max_length)
        labels, previous = [], None
        for word in found.word_ids():
            labels.append(IGNORED if word is None or word == previous else numbers[word])
            previous = word
        samples.append({**{name: found[name] for name in found}, "labels": labels})
    longest = max(map(len, every_id), default=0)
    return Encodings(tuple(samples), truncated, longest, unknown=_unknown(tokenizer, every_id))


def padding_side(tokenizer: Any) -> Literal["left", "right"]:
    """Return where texts are padded for a forward pass: on the right, whatever the tokenizer says.

    Decoders' tokenizers often say left, which is meant for generation. In a forward pass a table of positions
    (GPT-2) would be read at other rows, and the first token would be scored as one that padding predicts.
    XLNet alone reads a text at its last position.
    """
    is_xlnet = type(tokenizer).__name__.startswith("XLNet")
    return "left" if is_xlnet and tokenizer.padding_side == "left" else "right"


def as_in_text(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Return words as a tokenizer must be given them, so that their pieces are those of the whole text.

    Byte-level tokenizers (GPT-2's, RoBERTa's, Llama 3's) keep the space before a word in its first piece;
    without it, a word reads as the end of the one before. All others are given the words as they are.
    """
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer)
    return [*words[:1], *(f" {word}" for word in words[1:])] if byte_level else list(words)


def pack_texts(tokenizer: Any, texts: Sequence[str], *, block_size: int, masked: bool = False) -> Encodings:
    """Return texts joined and cut into blocks of `block_size` tokens, for language modelling.

    No token is padding but those of the last block, and none is lost, except that a last block of one
    token, which would predict nothing, is left out. Texts are joined by the end token
    (the separator for masked models), so a block may hold the end of one text and the start of the next.

    Args:
        tokenizer: of transformers.
        texts: to join, in this order.
        block_size: in tokens.
        masked: leave ``labels`` out; they are drawn with the masks (see `layerwise.sources.text`).

    Raises:
        DataError: the tokenizer has neither an end nor a separator token.
    """
    end = tokenizer.sep_token_id if masked else tokenizer.eos_token_id
    end = end if end is not None else tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end token to put between texts; set eos_token.")
    with _no_length_warning(tokenizer):
        found = tokenizer(list(texts), add_special_tokens=False, truncation=False)["input_ids"]
    stream = [token for ids in found for token in (*ids, end)]
    samples: list[Encoded] = []
    for start in range(0, len(stream), block_size):
        ids = stream[start : start + block_size]
        if len(ids) < 2 and samples:
            continue
        sample: Encoded = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        samples.append(sample if masked else {**sample, "labels": list(ids)})
    longest = max(map(len, found), default=0)
    return Encodings(tuple(samples), 0, longest, unknown=_unknown(tokenizer, found))


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], *, max_length: int
) -> Encodings:
    """Return prompt and response as one sequence whose labels are `IGNORED` on the prompt.

    The two are tokenized apart, so the border is exact; the response ends in the end token, which is
    learned. Too long a sequence loses the *start* of its prompt (and its first token stays, if the
    tokenizer begins texts with one); a response longer than the limit is cut at its end. Rows of whose
    response the tokenizer makes nothing are left out and counted.

    Args:
        tokenizer: with an end token.
        prompts: what is given.
        responses: what is learned.
        max_length: in tokens.

    Raises:
        DataError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token, which a response must learn to end with; set eos_token."
        )
    begin = [tokenizer.bos_token_id] if _begins_texts(tokenizer) else []
    with _no_length_warning(tokenizer):
        given = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        learned = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    samples: list[Encoded] = []
    truncated = longest = empty = 0
    for prompt, response in zip(given, learned, strict=True):
        if not response:
            empty += 1
            continue
        answer = [*response, tokenizer.eos_token_id]
        length = len(begin) + len(prompt) + len(answer)
        longest = max(longest, length)
        if length > max_length:
            truncated += 1
            room = max(max_length - len(begin) - len(answer), 0)
            prompt = prompt[len(prompt) - room :]
            answer = answer[: max_length - len(begin) - len(prompt)]
        ids = [*begin, *prompt, *answer]
        labels = [IGNORED] * (len(begin) + len(prompt)) + answer
        samples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Encodings(tuple(samples), truncated, longest, empty, _unknown(tokenizer, [*given, *learned]))


def encode_givens(tokenizer: Any, prompts: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Return prompts that a model shall go on from, as `encode_prompts` writes them before a response.

    Args:
        tokenizer: of transformers.
        prompts: with their template.
        max_length: in tokens; too long a prompt loses its start.
    """
    begin = [tokenizer.bos_token_id] if _begins_texts(tokenizer) else []
    with _no_length_warning(tokenizer):
        given = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    room = max(max_length - len(begin), 1)
    return [[*begin, *ids[-room:]] for ids in given]


def _begins_texts(tokenizer: Any) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _unknown(tokenizer: Any, ids: Sequence[Sequence[int]]) -> tuple[int, int]:
    unknown = tokenizer.unk_token_id
    total = sum(map(len, ids))
    # Byte-level tokenizers name another token as unknown without ever making one.
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        return 0, total
    return sum(list(row).count(unknown) for row in ids), total


@contextlib.contextmanager
def _no_length_warning(tokenizer: Any) -> Iterator[None]:
    """Keep the tokenizer from warning of long texts: they are counted, cut and reported here."""
    before = tokenizer.model_max_length
    tokenizer.model_max_length = 10**30
    try:
        yield
    finally:
        tokenizer.model_max_length = before
