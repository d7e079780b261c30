"""Byte-pair encoding for the pocket's captions: a merge list that makes each known word one token.

Any other word falls apart into single bytes, as in CLIP's own tokenizer, so no text is refused.
"""

from __future__ import annotations

import itertools

from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

from pocket.world import COLOUR_NAMES, JOINERS, SUBJECTS

MAX_LENGTH = 32  # tokens; three coloured subjects take 15
END_OF_WORD = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
Merge = tuple[str, str]


def known_words() -> list[str]:
    """Every word of the captions, in a fixed order."""
    text = " ".join(("a", "an", *JOINERS, *COLOUR_NAMES, *SUBJECTS))
    return list(dict.fromkeys(text.split()))


def new_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer whose vocabulary is all bytes plus the known words' merges."""
    merges: list[Merge] = []
    for word in known_words():
        pieces = encode(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters)]
    tokens += [left + right for left, right in merges]
    vocab = {token: number for number, token in enumerate([*tokens, *SPECIAL])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def encode(word: str, merges: list[Merge]) -> list[str]:
    """Byte-pair encoding of one ASCII word (Sennrich et al. 2016): apply the earliest merge first.

    Later merges never break an earlier word: at each of its steps an earlier merge applies.
    """
    rank = {merge: number for number, merge in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + END_OF_WORD]
    while True:
        pairs = [pair for pair in itertools.pairwise(pieces) if pair in rank]
        if not pairs:
            return pieces
        left, right = min(pairs, key=rank.__getitem__)
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == (left, right):
                merged[-1] = left + right
            else:
                merged.append(piece)
        pieces = merged


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int = MAX_LENGTH) -> Tensor:
    """Token ids (B, length) as Stable Diffusion pads them."""
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
