"""Tokenizers of checkpoints: read as their files are, checked against the embedding, written back unchanged."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from grpo_jax.models.hf_files import check_file

TOKENIZER_FILE = "tokenizer.json"
OTHER_VOCABULARIES = {
    "tokenizer.model": "a SentencePiece model",
    "tekken.json": "a mistral-common vocabulary",
    "vocab.json": "a vocabulary without its rules",
    "vocab.txt": "a WordPiece vocabulary",
}
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SOURCE_FILES = (
    TOKENIZER_FILE,
    "tokenizer.*.json",
    "tokenizer.model.*",
    *OTHER_VOCABULARIES,
    *SETTINGS_FILES,
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
SHOWN = 5


class CheckpointTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of a checkpoint, which knows its files and how many rows the model's embedding has.

    Attributes:
        source_files: the contents of the files that it was read from, by name.
        num_rows: rows of the embedding; None for any number.
    """

    source_files: Mapping[str, bytes] = {}
    num_rows: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: a token without a row in the embedding.
        """
        encoded = super().__call__(*args, **kwargs)
        self.check_ids(number for each in encoded.encodings or () for number in each.ids)
        return encoded

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: a token without a row in the embedding.
        """
        ids = super().encode(*args, **kwargs)
        self.check_ids(np.ravel(ids).tolist())
        return ids

    def check_ids(self, ids: Iterable[int]) -> None:
        """Check that token ids have rows in the embedding.

        Raises:
            ValueError: some have none; it names them and the number of rows.
        """
        if self.num_rows is None:
            return
        missing = sorted({number for number in ids if number >= self.num_rows})
        if missing:
            raise ValueError(
                f"the model's embedding has no row for {tokens_and_ids(self.convert_ids_to_tokens(missing), missing)}: "
                f"it has {self.num_rows} rows (vocab_size), and the tokenizer has {len(self)} tokens; the embedding "
                "was not enlarged when tokens were added"
            )


def read_tokenizer(folder: Path, num_rows: int | None = None) -> CheckpointTokenizer | None:
    """The tokenizer of a checkpoint as its ``tokenizer.json`` is, whatever class its config names.

    Special tokens, added tokens and chat templates are those of the other files. Tokens around a text are those of the
    post-processor in ``tokenizer.json``; ``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json`` change
    nothing, as in transformers 5. Decoding never removes spaces (``clean_up_tokenization_spaces`` is off). No code is
    run. Encoding raises ``ValueError`` where it gives an added token that has no row in the embedding.

    Args:
        folder: the checkpoint.
        num_rows: rows of the model's embedding; more than there are tokens is fine.

    Returns:
        None if the folder has no file of a tokenizer.

    Raises:
        FileNotFoundError: there are files of a tokenizer, but no ``tokenizer.json``.
        ValueError: a file is damaged; a token of the vocabulary itself, not an added one, has no row.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        _refuse_other_files(folder)
        return None
    named = [folder / pattern for pattern in SOURCE_FILES if "*" not in pattern]  # a glob passes over dangling links
    found = [path for pattern in SOURCE_FILES if "*" in pattern for path in sorted(folder.glob(pattern))]
    sources = [path for path in [*named, *found] if path.is_symlink() or path.is_file()]
    for path in sources:
        check_file(path)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sources}
    settings, special, _ = (_json_object(folder / name, files.get(name, b"{}")) for name in SETTINGS_FILES)
    try:
        # The file is named, because tokenizer_config.json may name another, and transformers 5.0 would read that.
        file = str(folder / TOKENIZER_FILE)
        tokenizer = CheckpointTokenizer.from_pretrained(folder, tokenizer_file=file, **_as_texts(settings, special))
    except Exception as error:  # the tokenizers library raises no narrower class
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.source_files, tokenizer.num_rows = files, num_rows
    _check_vocabulary(tokenizer, folder)
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer.

    An unchanged one that ``read_tokenizer`` returned is written as the files it came from, byte for byte. Any other is
    written by transformers, with ``tokenizer_config.json`` as transformers 4 knows it.

    Args:
        tokenizer: a transformers tokenizer.
        folder: exists.
    """
    files: Mapping[str, bytes] = getattr(tokenizer, "source_files", {})
    if files:
        with tempfile.TemporaryDirectory() as place:
            _write_files(files, Path(place))
            source = read_tokenizer(Path(place))
        if _same(tokenizer, source):
            _write_files(files, folder)
            return
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        path.write_text(json.dumps(_for_any_version(json.loads(path.read_text())), indent=2, ensure_ascii=False) + "\n")


def stop_ids(tokenizer: Any, stop_tokens: Sequence[str], num_rows: int) -> list[int]:
    """The ids of tokens that end a completion.

    Args:
        tokenizer: a transformers tokenizer.
        stop_tokens: each one token of it, as it is in its vocabulary or as text.
        num_rows: rows of the model's embedding.

    Raises:
        ValueError: a text that is not one token, or one without a row in the embedding.
    """
    ids = [_id_of(tokenizer, token) for token in stop_tokens]
    unknown = [token for token, number in zip(stop_tokens, ids, strict=True) if number is None]
    if unknown:
        raise ValueError(
            f"stop_tokens: {unknown} are no tokens of the model's tokenizer; each of --stop-tokens must be one token"
        )
    missing = [(token, number) for token, number in zip(stop_tokens, ids, strict=True) if (number or 0) >= num_rows]
    if missing:
        raise ValueError(
            f"stop_tokens: the model's embedding has no row for {tokens_and_ids(*zip(*missing, strict=True))}; it has "
            f"{num_rows} rows (vocab_size)"
        )
    return [number for number in ids if number is not None]


def tokens_and_ids(tokens: Sequence[str], ids: Sequence[int]) -> str:
    """Such as ``'<a>' (322), '<b>' (323)``; of many, the first five and the number of the others."""
    shown = ", ".join(f"{token!r} ({number})" for token, number in list(zip(tokens, ids, strict=True))[:SHOWN])
    return shown if len(ids) <= SHOWN else f"{shown} and {len(ids) - SHOWN:,} more"


def _id_of(tokenizer: Any, token: str) -> int | None:
    known = tokenizer.get_vocab().get(token)
    if known is not None:
        return known
    try:
        ids = tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids
    except Exception:  # a vocabulary that has no token for the unknown
        return None
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == token else None


def _refuse_other_files(folder: Path) -> None:
    found = [name for name in (*OTHER_VOCABULARIES, *SETTINGS_FILES) if (folder / name).is_file()]
    if not found:
        return
    vocabulary = next((name for name in found if name in OTHER_VOCABULARIES), None)
    if vocabulary is None:
        raise FileNotFoundError(
            f"{folder} has {', '.join(found)} but no tokenizer.json, and so no tokenizer; copy that file from where "
            "the checkpoint came from"
        )
    raise FileNotFoundError(
        f"{folder} has no tokenizer.json, and its {vocabulary} ({OTHER_VOCABULARIES[vocabulary]}) is not read here. "
        f"Convert it once: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes "
        "tokenizer.json; compare some encodings before you rely on it"
    )


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(parsed).__name__}")
    return parsed


def _as_texts(settings: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    # Special tokens that are objects, as texts: transformers 5 does not read these everywhere that version 4 wrote
    # them. Their flags are those of tokenizer.json. As there, special_tokens_map.json counts in older folders only.
    named = settings if "added_tokens_decoder" in settings else {**settings, **special}
    texts = {}
    for name, value in named.items():
        if name.endswith("_token") and isinstance(value, dict) and "content" in value:
            texts[name] = value["content"]
        elif name in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            texts[name] = [each["content"] if isinstance(each, dict) and "content" in each else each for each in value]
    return texts


def _check_vocabulary(tokenizer: CheckpointTokenizer, folder: Path) -> None:
    if tokenizer.num_rows is None:
        return
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.added_tokens_decoder
    missing = sorted((number, token) for token, number in own.items() if number >= tokenizer.num_rows)
    missing = [(token, number) for number, token in missing if number not in added]
    if missing:
        raise ValueError(
            f"{folder}: the embedding has no row for {tokens_and_ids(*zip(*missing, strict=True))}. The tokenizer has "
            f"{len(tokenizer)} tokens, and vocab_size in config.json is {tokenizer.num_rows}, so it is not that of "
            "this model"
        )


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _same(tokenizer: Any, source: Any) -> bool:
    backend, other = tokenizer.backend_tokenizer, source.backend_tokenizer
    # Truncation and padding are what the last call asked for.
    other.no_truncation() if backend.truncation is None else other.enable_truncation(**backend.truncation)
    other.no_padding() if backend.padding is None else other.enable_padding(**backend.padding)
    return (
        backend.to_str() == other.to_str()
        and tokenizer.chat_template == source.chat_template
        and tokenizer.special_tokens_map == source.special_tokens_map
    )


def _for_any_version(config: Mapping[str, Any]) -> dict[str, Any]:
    only_here = ("backend", "is_local", "local_files_only", "model_specific_special_tokens")
    portable = {name: value for name, value in config.items() if name not in only_here}
    extra = portable.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        portable["additional_special_tokens"] = extra
    elif extra:
        portable["extra_special_tokens"] = extra
    if portable.get("tokenizer_class") in ("TokenizersBackend", "CheckpointTokenizer"):
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    return portable
