"""Tokenizer files of a Hugging Face directory, rebuilt from the metadata of a GGUF file."""

from __future__ import annotations

import dataclasses
import enum
import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from optiq.errors import UnsupportedModel, UsageError
from optiq.events import Emit, Notice
from optiq.models.gguf_file import GGUFFile
from optiq.models.safetensors_io import TOKENIZER_FILES

_HINT = "give --tokenizer DIR with the model's own tokenizer.json"
_TEMPLATE_KEY = "tokenizer.chat_template"
_SPACE = "\u2581"  # how SentencePiece writes a space
# Tokens that end a turn; they end generation where the chat template writes them.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"


@dataclasses.dataclass(frozen=True)
class _PreTokenizer:
    """How text is cut before byte-level merges.

    Attributes:
        pattern: regular expression of the pieces; None for GPT-2's, which is built in.
        nfc: text is normalized first.
        ignore_merges: a piece that is in the vocabulary is taken whole.
        adds_bos: where the file does not say.
    """

    pattern: str | None = None
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


# llama.cpp cuts "smollm" at every digit first; the tokenizer.json of SmolLM2 that optiq is held to
# does not, which shows where several spaces stand before a digit.
_GPT2 = _PreTokenizer()
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _GPT2,
    "llama-bpe": _PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True),
    "qwen2": _PreTokenizer(_QWEN2, nfc=True),
}


class _Kind(enum.IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ROLES = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
}


def special_ids(file: GGUFFile, limit: int) -> dict[str, int]:
    """Ids of the special tokens that a file names, by role (`bos`, `eos`, `unk`, `pad`, ...).

    Args:
        file: a GGUF file.
        limit: number of tokens, which ids must stay below.

    Raises:
        UsageError: if one is outside the vocabulary.
    """
    ids = {role: file.required(key, int) for role, key in _ROLES.items() if key in file.fields}
    for role, token_id in ids.items():
        if not 0 <= token_id < limit:
            raise UsageError(
                f"{file.path}: '{_ROLES[role]}' is {token_id}, but there are {limit} tokens; "
                f"convert the model again"
            )
    return ids


def generation_ids(file: GGUFFile, vocab_size: int) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` as config.json has them.

    Everything that ends a turn is in `eos_token_id`: the end of text, the end of turn, and the
    tokens known to end turns that the chat template writes.
    """
    ids = special_ids(file, vocab_size)
    template = file.optional(_TEMPLATE_KEY, str, "")
    tokens = file.array("tokenizer.ggml.tokens", str)
    ends = [ids[role] for role in ("eos", "eot", "eom") if role in ids]
    ends += [tokens.index(text) for text in _TURN_ENDS if text in template and text in tokens]
    ends = list(dict.fromkeys(ends))
    result: dict[str, Any] = {
        f"{role}_token_id": ids[role] for role in ("bos", "pad") if role in ids
    }
    if ends:
        result["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return result


def write_tokenizer(file: GGUFFile, vocab_size: int, out: Path, emit: Emit) -> None:
    """Rebuild tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        file: a GGUF file with its vocabulary.
        vocab_size: rows of the embedding.
        out: directory to write into.
        emit: receives a notice where the file leaves something open.

    Raises:
        UsageError: if the vocabulary is missing, damaged or without merges.
        UnsupportedModel: if the kind of tokenizer is not supported.
    """
    tokens = file.array("tokenizer.ggml.tokens", str)
    if not tokens:
        raise UsageError(f"{file.path} has no vocabulary (tokenizer.ggml.tokens); {_HINT}")
    if len(tokens) > vocab_size:
        raise UsageError(
            f"{file.path} has {len(tokens)} tokens, but the embedding has {vocab_size} rows; "
            f"{_HINT}"
        )
    model = file.required("tokenizer.ggml.model", str)
    if model not in {"gpt2", "llama"}:
        raise UnsupportedModel(f"{file.path}: tokenizer model {model!r} is not supported; {_HINT}")
    vocabulary = _Vocabulary(file, tokens)
    if model == "gpt2":
        tokenizer, adds_bos = _byte_level(file, vocabulary, emit)
    else:
        tokenizer, adds_bos = _sentencepiece(file, vocabulary), True
    vocabulary.add_to(tokenizer)
    _add_ends(file, tokenizer, vocabulary, adds_bos)
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_config(file, tokenizer, vocabulary.special, out)
    _write_template(file, out, emit)


def copy_tokenizer(source: Path, file: GGUFFile, vocab_size: int, out: Path, emit: Emit) -> None:
    """Take the tokenizer of a directory; what it lacks (config, template) is the GGUF file's.

    Raises:
        UsageError: if the directory has no readable tokenizer.json, or one whose ids do not fit the
            embedding.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{source} has no tokenizer.json; give --tokenizer a directory with one")
    tokenizer = _loaded(path)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise UsageError(
            f"{path} has ids up to {largest}, but the embedding of {file.path} has {vocab_size} "
            f"rows; give the tokenizer of this model"
        )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not (out / "tokenizer_config.json").is_file():
        _write_config(file, tokenizer, special_ids(file, vocab_size), out)
    if not _has_template(out):
        _write_template(file, out, emit)


def _loaded(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises plain Exception
        raise UsageError(f"{path} is no tokenizer ({error}); get it again") from None


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return "chat_template" in (folder / "tokenizer_config.json").read_text(encoding="utf-8")


class _Vocabulary:
    """Tokens of a file by what they are for."""

    def __init__(self, file: GGUFFile, tokens: list[str]) -> None:
        self._file = file
        self.tokens = tokens
        self.special = special_ids(file, len(tokens))
        kinds = file.array("tokenizer.ggml.token_type", int) or [_Kind.NORMAL] * len(tokens)
        if len(kinds) != len(tokens):
            raise UsageError(
                f"{file.path} has {len(tokens)} tokens but {len(kinds)} token types; {_HINT}"
            )
        special = {*self.special.values()}
        self.ids: dict[str, int] = {}
        self._added: list[AddedToken] = []
        for token_id, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
            if kind == _Kind.UNUSED and token_id not in special:
                continue  # fills the embedding up to a round number of rows
            if text in self.ids:
                raise UsageError(f"{file.path} has the token {text!r} twice; {_HINT}")
            self.ids[text] = token_id
            is_special = kind in {_Kind.CONTROL, _Kind.UNKNOWN} or token_id in special
            if is_special or kind == _Kind.USER_DEFINED:
                self._added.append(AddedToken(text, special=is_special, normalized=False))

    def merges(self) -> list[tuple[str, str]]:
        """Pairs in order of priority."""
        pairs = []
        for merge in self._file.array("tokenizer.ggml.merges", str):
            left, space, right = merge.partition(" ")
            if not (left and space and right) or " " in right:
                raise UsageError(f"{self._file.path} has the malformed merge {merge!r}; {_HINT}")
            pairs.append((left, right))
        if not pairs:
            raise UsageError(
                f"{self._file.path} holds a vocabulary without merges, from which text cannot be "
                f"tokenized as the model expects; {_HINT}"
            )
        return pairs

    def bpe(self, **options: Any) -> Tokenizer:  # noqa: ANN401  options of the library
        """A tokenizer that knows vocabulary and merges."""
        merges = self.merges()
        unk = self.tokens[self.special["unk"]] if "unk" in self.special else None
        try:
            bpe = models.BPE(self.ids, merges, unk_token=unk, fuse_unk=True, **options)
        except Exception as error:  # noqa: BLE001  the library raises plain Exception
            raise UsageError(
                f"the vocabulary of {self._file.path} is damaged ({str(error)!r}); {_HINT}"
            ) from None
        return Tokenizer(bpe)

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Make special and user-defined tokens whole, in the order of their ids."""
        tokenizer.add_tokens(self._added)


def _byte_level(file: GGUFFile, vocabulary: _Vocabulary, emit: Emit) -> tuple[Tokenizer, bool]:
    """A tokenizer like GPT-2's, and whether its family begins text with BOS."""
    name = file.optional("tokenizer.ggml.pre", str, "default")
    if name not in _PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{file.path}: pre-tokenizer {name!r} is not supported (there are "
            f"{list(_PRE_TOKENIZERS)}); {_HINT}"
        )
    if name == "default":
        text = f"{file.path} does not say how text is cut into words; GPT-2's way is used, else "
        emit(Notice(text + _HINT, "warning"))
    kind = _PRE_TOKENIZERS[name]
    tokenizer = vocabulary.bpe(ignore_merges=kind.ignore_merges)
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    prefix = file.optional("tokenizer.ggml.add_space_prefix", bool, False)
    if kind.pattern is None:
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=prefix)
    else:
        split = pre.Split(Regex(kind.pattern), behavior="isolated")
        bytes_only = pre.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.pre_tokenizer = pre.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind.adds_bos


def _sentencepiece(file: GGUFFile, vocabulary: _Vocabulary) -> Tokenizer:
    """A tokenizer of SentencePiece's BPE with bytes for what the vocabulary lacks."""
    for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
        if file.fields.get(key):
            raise UnsupportedModel(f"{file.path}: '{key}' is not supported; {_HINT}")
    tokenizer = vocabulary.bpe(byte_fallback=True)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    ends: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if file.optional("tokenizer.ggml.add_space_prefix", bool, True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def _add_ends(
    file: GGUFFile, tokenizer: Tokenizer, vocabulary: _Vocabulary, adds_bos: bool
) -> None:
    """BOS in front and EOS behind every text, where the file or its family wants them."""
    ids = vocabulary.special
    wanted = {
        "bos": file.optional("tokenizer.ggml.add_bos_token", bool, adds_bos and "bos" in ids),
        "eos": file.optional("tokenizer.ggml.add_eos_token", bool, False),
    }
    missing = [role for role, is_wanted in wanted.items() if is_wanted and role not in ids]
    if missing:
        raise UsageError(
            f"{file.path} adds {missing[0].upper()} to every text but lacks "
            f"'{_ROLES[missing[0]]}'; {_HINT}"
        )
    bos, eos = ([role] if is_wanted else [] for role, is_wanted in wanted.items())
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B:1", *eos],
            special_tokens=[
                {"id": role, "ids": [ids[role]], "tokens": [vocabulary.tokens[ids[role]]]}
                for role in (*bos, *eos)
            ],
        )


def _write_config(file: GGUFFile, tokenizer: Tokenizer, ids: dict[str, int], out: Path) -> None:
    context = file.required(f"{file.architecture}.context_length", int)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    for role in ("bos", "eos", "unk", "pad"):
        text = tokenizer.id_to_token(ids[role]) if role in ids else None
        if text is not None:
            config[f"{role}_token"] = text
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _write_template(file: GGUFFile, out: Path, emit: Emit) -> None:
    template = file.optional(_TEMPLATE_KEY, str, "")
    if template:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    named = sorted(key for key in file.fields if key.startswith(f"{_TEMPLATE_KEY}."))
    if named:
        emit(Notice(f"chat templates besides the default one are left out: {named}"))
