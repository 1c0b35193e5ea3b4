"""Tokenizers of checkpoints: read from their files, checked against the embedding, and written back unchanged."""

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
MAX_LISTED = 5


class CheckpointTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of a checkpoint, with its original files and the number of rows of the model's embedding.

    Attributes:
        source_files: contents of the files that it was read from, by name.
        num_rows: rows of the embedding; None disables the check.
    """

    source_files: Mapping[str, bytes] = {}
    num_rows: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: a token without a row in the embedding.
        """
        encoded = super().__call__(*args, **kwargs)
        self.check_ids(token_id for encoding in encoded.encodings or () for token_id in encoding.ids)
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
            ValueError: some have none; the message lists them.
        """
        if self.num_rows is None:
            return
        missing = sorted({token_id for token_id in ids if token_id >= self.num_rows})
        if missing:
            raise ValueError(
                f"the model's embedding has no row for {tokens_and_ids(self.convert_ids_to_tokens(missing), missing)}: "
                f"it has {self.num_rows} rows (vocab_size), and the tokenizer has {len(self)} tokens; the embedding "
                "was not resized when tokens were added"
            )


def read_tokenizer(folder: Path, num_rows: int | None = None) -> CheckpointTokenizer | None:
    """The tokenizer in a checkpoint's ``tokenizer.json``, whatever class ``tokenizer_config.json`` names.

    Special tokens, added tokens and chat templates are read from the other files. BOS and EOS are added to a text by
    the post-processor in ``tokenizer.json``; ``add_bos_token`` and ``add_eos_token`` of ``tokenizer_config.json`` have
    no effect, as in transformers 5. Decoding never removes spaces (``clean_up_tokenization_spaces`` is off). No code
    is run. Encoding raises ``ValueError`` for an added token without a row in the embedding.

    Args:
        folder: the checkpoint.
        num_rows: rows of the model's embedding, which may exceed the number of tokens.

    Returns:
        The tokenizer; None if the folder has no tokenizer files.

    Raises:
        FileNotFoundError: there are tokenizer files, but no ``tokenizer.json``.
        ValueError: a file is damaged, or a token of the vocabulary, not an added one, has no row.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        _refuse_other_files(folder)
        return None
    plain = [folder / pattern for pattern in SOURCE_FILES if "*" not in pattern]  # a glob skips dangling links
    matched = [path for pattern in SOURCE_FILES if "*" in pattern for path in sorted(folder.glob(pattern))]
    sources = [path for path in [*plain, *matched] if path.is_symlink() or path.is_file()]
    for path in sources:
        check_file(path)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sources}
    settings, special, _ = (_json_object(folder / name, files.get(name, b"{}")) for name in SETTINGS_FILES)
    try:
        # With the file's path, because tokenizer_config.json may name another, which transformers 5.0 would read.
        file = str(folder / TOKENIZER_FILE)
        tokenizer = CheckpointTokenizer.from_pretrained(
            folder, tokenizer_file=file, **_special_tokens(settings, special)
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.source_files, tokenizer.num_rows = files, num_rows
    _check_vocabulary(tokenizer, folder)
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer.

    An unchanged tokenizer of ``read_tokenizer`` is written as its original files, byte for byte. Any other is written
    by transformers, with a ``tokenizer_config.json`` that transformers 4 reads too.

    Args:
        tokenizer: a transformers tokenizer.
        folder: an existing folder.
    """
    files: Mapping[str, bytes] = getattr(tokenizer, "source_files", {})
    if files:
        with tempfile.TemporaryDirectory() as original:
            _write_files(files, Path(original))
            source = read_tokenizer(Path(original))
        if _same(tokenizer, source):
            _write_files(files, folder)
            return
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        path.write_text(json.dumps(_portable_config(json.loads(path.read_text())), indent=2, ensure_ascii=False) + "\n")


def stop_ids(tokenizer: Any, stop_tokens: Sequence[str], num_rows: int) -> list[int]:
    """The ids of tokens that end a completion.

    Args:
        tokenizer: a transformers tokenizer.
        stop_tokens: single tokens, as in the vocabulary or as text.
        num_rows: rows of the model's embedding.

    Raises:
        ValueError: a text that is not a single token, or a token without a row in the embedding.
    """
    ids = [_id_of(tokenizer, token) for token in stop_tokens]
    unknown = [token for token, token_id in zip(stop_tokens, ids, strict=True) if token_id is None]
    if unknown:
        raise ValueError(
            f"stop_tokens: {unknown} are not tokens of the model's tokenizer; --stop-tokens must be single tokens"
        )
    missing = [pair for pair in zip(stop_tokens, ids, strict=True) if (pair[1] or 0) >= num_rows]
    if missing:
        raise ValueError(
            f"stop_tokens: the model's embedding has no row for {tokens_and_ids(*zip(*missing, strict=True))}; it has "
            f"{num_rows} rows (vocab_size)"
        )
    return [token_id for token_id in ids if token_id is not None]


def tokens_and_ids(tokens: Sequence[str], ids: Sequence[int]) -> str:
    """Tokens with their ids for messages, ``'<a>' (322), '<b>' (323)``: the first five, and how many others.

    Args:
        tokens: texts of the tokens.
        ids: their ids.
    """
    pairs = list(zip(tokens, ids, strict=True))[:MAX_LISTED]
    text = ", ".join(f"{token!r} ({token_id})" for token, token_id in pairs)
    return text if len(ids) <= MAX_LISTED else f"{text} and {len(ids) - MAX_LISTED:,} more"


def _id_of(tokenizer: Any, token: str) -> int | None:
    known = tokenizer.get_vocab().get(token)
    if known is not None:
        return known
    try:
        ids = tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids
    except Exception:  # a vocabulary without an unknown token
        return None
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == token else None


def _refuse_other_files(folder: Path) -> None:
    found = [name for name in (*OTHER_VOCABULARIES, *SETTINGS_FILES) if (folder / name).is_file()]
    if not found:
        return
    vocabulary = next((name for name in found if name in OTHER_VOCABULARIES), None)
    if vocabulary is None:
        raise FileNotFoundError(
            f"{folder} has {', '.join(found)} but no tokenizer.json; copy that file from the source of the checkpoint"
        )
    raise FileNotFoundError(
        f"{folder} has no tokenizer.json, and its {vocabulary} ({OTHER_VOCABULARIES[vocabulary]}) is not supported. "
        f"Convert it once: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes "
        "tokenizer.json; compare some encodings before using it"
    )


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(parsed).__name__}")
    return parsed


def _special_tokens(settings: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    # Special tokens as texts: transformers 5 does not read all the objects that version 4 wrote. Their flags are in
    # tokenizer.json. As in transformers, special_tokens_map.json is read in older folders only.
    fields = settings if "added_tokens_decoder" in settings else {**settings, **special}
    texts = {}
    for name, value in fields.items():
        if name.endswith("_token") and isinstance(value, dict) and "content" in value:
            texts[name] = value["content"]
        elif name in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            texts[name] = [
                token["content"] if isinstance(token, dict) and "content" in token else token for token in value
            ]
    return texts


def _check_vocabulary(tokenizer: CheckpointTokenizer, folder: Path) -> None:
    if tokenizer.num_rows is None:
        return
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.added_tokens_decoder
    missing = sorted((token_id, token) for token, token_id in vocabulary.items() if token_id >= tokenizer.num_rows)
    missing = [(token, token_id) for token_id, token in missing if token_id not in added]
    if missing:
        raise ValueError(
            f"{folder}: the embedding has no row for {tokens_and_ids(*zip(*missing, strict=True))}. The tokenizer has "
            f"{len(tokenizer)} tokens, and vocab_size in config.json is {tokenizer.num_rows}: the tokenizer belongs to "
            "another model"
        )


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _same(tokenizer: Any, source: Any) -> bool:
    backend, other = tokenizer.backend_tokenizer, source.backend_tokenizer
    # Truncation and padding are those of the last call, which do not count as changes.
    other.no_truncation() if backend.truncation is None else other.enable_truncation(**backend.truncation)
    other.no_padding() if backend.padding is None else other.enable_padding(**backend.padding)
    return (
        backend.to_str() == other.to_str()
        and tokenizer.chat_template == source.chat_template
        and tokenizer.special_tokens_map == source.special_tokens_map
    )


def _portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
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
