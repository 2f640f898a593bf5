"""Checks of a tokenizer's files, before transformers reads them with less helpful errors."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import conform, parse_json, read_bytes, read_text, what_it_is

MAX_BYTES = 2**26
"""Upper limit of a file; CLIP's largest has 2 MB, Qwen's 11."""
Id = Annotated[int, pydantic.Field(ge=0, le=2**24)]
T5_BEGINNING = ["<pad>", "</s>", "<unk>"]
"""The first tokens of every T5 tokenizer; transformers takes their numbers for granted."""


class TokenizerSpec(NamedTuple):
    """A tokenizer of a model's folder, and what the text encoder that reads its ids takes."""

    name: str
    """Its subfolder."""
    kind: str = "clip"
    """A key of `tokenizers.KINDS`."""
    length: int | None = None
    """Tokens of a caption, with padding; None for the number that the tokenizer's files state."""
    num_tokens: int | None = None
    """Number of tokens that the text encoder has embeddings for; None compares nothing."""
    num_positions: int | None = None
    """Number of positions that the text encoder has embeddings for; None for any number."""


class Token(pydantic.BaseModel):
    """A token in a settings file."""

    content: str


class TokenWithId(Token):
    """A token in tokenizer.json."""

    id: Id


Special = str | Token | None


class Specials(pydantic.BaseModel):
    """special_tokens_map.json."""

    bos_token: Special = None
    eos_token: Special = None
    unk_token: Special = None
    pad_token: Special = None


class Ends(pydantic.BaseModel):
    """What CLIP needs of these two files: tokens at the begin and the end of a caption, unless they are the usual."""

    bos_token: str | Token = ""
    eos_token: str | Token = ""


class Settings(Specials):
    """tokenizer_config.json."""

    model_max_length: int | Annotated[float, pydantic.Field(allow_inf_nan=False)] | None = None
    added_tokens_decoder: dict[str, Token] = pydantic.Field(default_factory=dict)
    # transformers would take these instead of the files of the vocabulary.
    vocab: None = None
    merges: None = None
    tokenizer_object: None = None


class BytePairs(pydantic.BaseModel):
    """The vocabulary of CLIP and Qwen in tokenizer.json."""

    vocab: Annotated[dict[str, Id], pydantic.Field(min_length=1)]
    merges: list[str] | list[list[str]]


Score = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Pieces = Annotated[
    list[Annotated[list[str | Score], pydantic.Field(min_length=2, max_length=2)]], pydantic.Field(min_length=3)
]


class Unigram(pydantic.BaseModel):
    """The vocabulary of T5 in tokenizer.json: pieces and the logarithms of their probabilities."""

    vocab: Pieces


class Whole(pydantic.BaseModel):
    """tokenizer.json of CLIP and Qwen."""

    model: BytePairs
    added_tokens: list[TokenWithId] = pydantic.Field(default_factory=list)


class WholeUnigram(pydantic.BaseModel):
    """tokenizer.json of T5."""

    model: Unigram
    added_tokens: list[TokenWithId] = pydantic.Field(default_factory=list)


def check_tokenizer(folder: Path, kind: str = "clip") -> None:
    """Raise FileNotFoundError or ValueError, naming the file, unless the folder holds the files of a tokenizer of this
    kind, a key of `tokenizers.KINDS`."""
    known = _unigram_vocabulary(folder) if kind == "t5" else _byte_pair_vocabulary(folder)
    added = folder / "added_tokens.json"
    if added.exists():
        known |= _read(added, dict[str, Id])
    settings, specials = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    for path in (settings, specials):
        if kind == "clip" and path.exists():
            _read(path, Ends)
    if settings.exists():
        said = _read(settings, Settings)
        numbers = [number for number in said.added_tokens_decoder if not number.isdecimal()]
        if numbers:
            raise UserError(f"{settings}: added_tokens_decoder: {numbers[0]!r} is not the number of a token")
        known |= {token.content: int(number) for number, token in said.added_tokens_decoder.items()}
        _check_specials(said, known, settings)
    if specials.exists():
        _check_specials(_read(specials, Specials), known, specials)


def _byte_pair_vocabulary(folder: Path) -> dict[str, int]:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.exists() and not (vocabulary.exists() and merges.exists()):
        raise MissingFileError(f"no tokenizer at {folder}: it needs vocab.json and merges.txt, or tokenizer.json")
    known: dict[str, int] = {}
    if vocabulary.exists():
        known |= _read(vocabulary, Annotated[dict[str, Id], pydantic.Field(min_length=1)])
        _check_unique(known, vocabulary)
    if merges.exists():
        _check_merges(_merges_of(merges), known, merges) if known else None
    if whole.exists():
        found = _read(whole, Whole)
        _check_unique(found.model.vocab, whole)
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in found.model.merges]
        _check_merges(pairs, found.model.vocab, whole)
        known |= found.model.vocab | {token.content: token.id for token in found.added_tokens}
    return known


def _unigram_vocabulary(folder: Path) -> dict[str, int]:
    whole, spiece = folder / "tokenizer.json", folder / "spiece.model"
    if whole.exists():
        found = _read(whole, WholeUnigram)
        pieces = [str(piece) for piece, _ in found.model.vocab]
        added = {token.content: token.id for token in found.added_tokens}
    elif spiece.exists():
        pieces, added = [piece for piece, _ in read_spiece(spiece)[0]], {}
    else:
        raise MissingFileError(f"no tokenizer at {folder}: it needs tokenizer.json or spiece.model")
    if pieces[:3] != T5_BEGINNING:
        path = whole if whole.exists() else spiece
        raise UserError(f"{path} does not begin with the tokens {', '.join(T5_BEGINNING)}, so it is not a T5 tokenizer")
    return {piece: number for number, piece in enumerate(pieces)} | added


def read_spiece(path: Path) -> tuple[list[tuple[str, float]], bytes | None]:
    """Return the pieces and scores of a sentencepiece model, and the table by which it normalises text.

    Raises a UserError if the file is not the unigram model that T5 has.
    """
    from google.protobuf.message import DecodeError  # here, since importing transformers takes seconds
    from transformers.utils import sentencepiece_model_pb2_new

    data = read_bytes(path, MAX_BYTES)
    if known := what_it_is(data[:64]):
        raise UserError(f"{path} is {known}")
    model: Any = sentencepiece_model_pb2_new.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise UserError(f"{path} is not a sentencepiece model, or is damaged; download the tokenizer again") from error
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM or not model.pieces:
        raise UserError(f"{path} is not the unigram model of T5; take a folder with T5's tokenizer.json")
    return [(piece.piece, piece.score) for piece in model.pieces], model.normalizer_spec.precompiled_charsmap or None


def read_length(folder: Path) -> int | None:
    """Return the tokens of a caption that tokenizer_config.json states, or None; UserError if it states nonsense."""
    settings = folder / "tokenizer_config.json"
    length = _read(settings, Settings).model_max_length if settings.exists() else None
    if length is None or length > 1024:  # transformers' stand-in for "not stated" is 1e30
        return None
    if length < 3 or length != int(length):
        raise UserError(f"{settings}: model_max_length is {length}, not a number from 3 to 1024")
    return int(length)


def _read(path: Path, schema: Any) -> Any:
    return conform(parse_json(_text(path), str(path)), schema, str(path))


def _text(path: Path) -> str:
    """Return the text of a file; raise ValueError for encodings that the tokenizer's library does not read."""
    if read_bytes(path, MAX_BYTES).startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
    return read_text(path, MAX_BYTES)


def _merges_of(path: Path) -> list[list[str]]:
    lines = _text(path).split("\n")
    return [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]


def _check_unique(vocabulary: dict[str, int], path: Path) -> None:
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{path} is damaged: {len(vocabulary)} tokens have {len(set(vocabulary.values()))} numbers")


def _check_merges(merges: list[list[str]], vocabulary: dict[str, int], path: Path) -> None:
    for number, merge in enumerate(merges, 1):
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            shown = " ".join(merge)
            raise UserError(
                f"{path} is damaged, or belongs to another vocabulary: merge {number}, {shown[:60]!r}, is not two "
                "tokens that make a third; download the tokenizer again"
            )


def _check_specials(said: Specials, known: dict[str, int], path: Path) -> None:
    for field in Specials.model_fields:
        token = getattr(said, field)
        content = token.content if isinstance(token, Token) else token
        if content and content not in known:
            raise UserError(f"{path}: {field} is {content!r}, which is not in the vocabulary")
