"""A tokenizer in CLIP's format with about a thousand tokens: byte characters, learned merges, and two special tokens.

Transformers' CLIPTokenizer reads the folder that `save` writes. A real model's tokenizer differs only in its number of
merges, 48,894. The algorithm of `learn_merges` is from Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909).
"""

import collections
import itertools
import json
from collections.abc import Iterable

from etils import epath

from dpo_jax.files import write_whole
from dpo_jax.models.random_tokenizers import write_t5_tokenizer
from dpo_jax.tiny import world

NUM_TOKENS = 1024
MAX_LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"

# Common words of prompts, so that these too become few tokens.
PROMPT_WORDS = """
a an the of in on at to with and or by from for is are under over near behind beside between around above below into
left right top bottom center centre middle corner side front back upper lower small large big little tiny huge tall
red green blue yellow purple black white orange pink brown grey gray gold silver cyan violet colour color dark light
circle square triangle cross ring star heart shape line round object background plain simple flat solid image image
photo photograph portrait painting drawing sketch illustration render art artwork digital oil watercolor pencil style
realistic detailed beautiful high quality best sharp focus soft bright warm cold sunset sunrise night day morning
landscape mountain river lake sea ocean forest tree flower garden city street house building castle bridge sky cloud
rain snow sun moon stars space planet fire water earth ice man woman boy girl child people person face eye hair hand
dress hat cat dog horse bird fish lion tiger bear dragon robot car train plane ship boat bike bicycle book table chair
cup glass bottle food fruit apple banana cake coffee holding sitting standing walking running flying looking wearing
one two three four five six seven eight nine ten fantasy future ancient modern cinematic lighting studio concept
"""


def byte_characters() -> list[str]:
    """Return the 256 characters that stand for the 256 bytes in GPT-2's and CLIP's vocabularies, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def learn_merges(words: Iterable[str], num_merges: int) -> list[tuple[str, str]]:
    """Return byte-pair merges: repeatedly of the most frequent neighbours, on a tie of the alphabetically first."""
    count_of = collections.Counter(words)
    pieces_of = {word: [*word[:-1], word[-1] + "</w>"] for word in count_of}
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, pieces in pieces_of.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += count_of[word]
        if not pairs:
            break
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((first, second))
        for pieces in pieces_of.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == (first, second):
                    pieces[i : i + 2] = [first + second]
                i += 1
    return merges


def words() -> list[str]:
    """Return all words of prompts, some of them many times."""
    return PROMPT_WORDS.split() + " ".join(world.captions()).split()


def save(folder: epath.PathLike, *, pad_token: str = END) -> int:
    """Write the tokenizer's four files; return its number of tokens."""
    characters = byte_characters()
    alphabet = characters + [character + "</w>" for character in characters]
    merges = learn_merges(words(), NUM_TOKENS - len(alphabet) - 2)
    tokens = [*alphabet, *("".join(pair) for pair in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True, **special}

    folder = epath.Path(folder)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    write_whole(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_whole(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_whole(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    return len(tokens)


def save_t5(folder: epath.PathLike) -> int:
    """Write a tokenizer in T5's format, which spells words that it does not know; return its number of tokens."""
    return write_t5_tokenizer(epath.Path(folder), dict.fromkeys(words()), max_tokens=MAX_LENGTH)
