"""The files of a Hugging Face checkpoint, and errors for folders that are not supported checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OTHER_FORMATS = (".gguf", ".ggml", ".msgpack", ".h5", ".onnx", ".npz")


def cut(items: Iterable[str], most: int = 10, *, separator: str = ", ") -> str:
    """The first items of a list as text, and the number of the others.

    Args:
        items: the items.
        most: maximum number of items in the text.
        separator: text between items.
    """
    items = list(items)
    others = [f"... and {len(items) - most:,} more"] if len(items) > most else []
    return separator.join([*items[:most], *others])


@contextlib.contextmanager
def removed_unless_whole(partial: Path, folder: Path) -> Iterator[None]:
    """A context in which a folder is written under a hidden name, which is removed after an error.

    Args:
        partial: the folder that is written.
        folder: its name once it is whole, which the error says.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    from safetensors import SafetensorError  # late, because --help waits for this module

    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"{folder} cannot be written: {reason}") from error
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: a dangling symbolic link.
        ValueError: no JSON object, or a Git LFS pointer; the message names the file.
    """
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def check_file(path: Path) -> None:
    """Check that a file is neither a dangling symbolic link nor a Git LFS pointer.

    Raises:
        FileNotFoundError: a dangling symbolic link.
        ValueError: a Git LFS pointer.
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a symbolic link to {path.readlink()}, which does not exist; download the checkpoint again"
        )
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in {path.parent}, or fetch the "
                "repository with 'hf download'"
            )


def config_file(folder: Path) -> Path:
    """The ``config.json`` of a checkpoint.

    Raises:
        FileNotFoundError: it does not exist; the message describes the folder.
        ValueError: the folder has a LoRA adapter beside full weights.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        _refuse_adapter(folder)
    if not path.is_file() and not path.is_symlink():
        names = sorted(item.name for item in folder.iterdir())
        refuse_other_formats(folder, names)
        raise FileNotFoundError(
            f"{folder} has no config.json and so is not a checkpoint; it has {_listed(names)}"
            + (
                "; give one of its subfolders?"
                if any((item / "config.json").is_file() for item in folder.iterdir())
                else ""
            )
        )
    return path


def _refuse_adapter(folder: Path) -> None:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    merge = (
        "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder) writes "
        "the full model"
    )
    if any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise ValueError(
            f"{folder} has a LoRA adapter (adapter_config.json, base model {base!r}) beside full weights; remove the "
            f"adapter's files to load the weights only, or merge it: {merge}"
        )
    raise FileNotFoundError(
        f"{folder} has only a LoRA adapter (adapter_config.json), not the weights of its base model {base!r}: {merge}"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: ``model.safetensors``, else the shards in its index.

    transformers uses the same order; if both exist and differ, a warning is logged.

    Raises:
        FileNotFoundError: no weights, weights in another format only, or missing shards.
        ValueError: a Git LFS pointer, or an index with no files or with files outside the folder.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file() or single.is_symlink():
        check_file(single)
        if index.is_file() and any(name != SINGLE_FILE for name in _names_in_index(index)):
            logging.getLogger(__name__).warning(
                "%s has both %s and %s; the single file is loaded, as transformers does",
                folder,
                SINGLE_FILE,
                INDEX_FILE,
            )
        return [single]
    if index.is_file() or index.is_symlink():
        files = [folder / name for name in _names_in_index(index)]
        for file in files:
            if file.is_symlink() or file.exists():
                check_file(file)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {cut(missing)}, which its {INDEX_FILE} lists; download the checkpoint again"
            )
        return files
    names = sorted(path.name for path in folder.iterdir())
    refuse_other_formats(folder, names)
    shards = [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]
    if shards:
        raise FileNotFoundError(f"{folder} has {cut(shards, 3)} but no {INDEX_FILE} that lists them; fetch it too")
    raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; it has {_listed(names)}")


def _names_in_index(index: Path) -> list[str]:
    """The files that an index lists, sorted; all of them inside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensors to files")
    outside = sorted({str(name) for name in weight_map.values() if not _is_inside(name)})
    if outside:
        raise ValueError(f"{index} lists files outside its folder, or entries that are not file names: {cut(outside)}")
    others = sorted({name for name in weight_map.values() if not name.endswith(".safetensors")})
    if others:
        refuse_pickled(index, others)
        raise ValueError(f"{index} lists files that are not *.safetensors: {cut(others)}")
    return sorted(set(weight_map.values()))


def _is_inside(name: Any) -> bool:
    if not isinstance(name, str) or not name:
        return False
    paths = PurePosixPath(name), PureWindowsPath(name)
    return not any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)


def refuse_other_formats(where: Path | str, names: Sequence[str]) -> None:
    """Raise if some files have weights in a format other than safetensors, or in another layout.

    Args:
        where: folder or repository, for the message.
        names: its files.

    Raises:
        FileNotFoundError: some do; the message says how to convert them.
    """
    refuse_pickled(where, names)
    gguf = [name for name in names if name.lower().endswith((".gguf", ".ggml"))]
    if gguf:
        raise FileNotFoundError(
            f"{where} has GGUF weights ({cut(gguf, 3)}), a format of llama.cpp that is mostly quantized and cannot be "
            "trained; use the safetensors checkpoint that it was made from"
        )
    others = [name for name in names if name.lower().endswith(OTHER_FORMATS)]
    if others:
        raise FileNotFoundError(
            f"{where} has weights that are not in safetensors ({cut(others, 3)}); use the model's checkpoint that is"
        )
    misnamed = [name for name in names if name.endswith(".safetensors") and not name.startswith("model")]
    if misnamed:
        raise FileNotFoundError(
            f"{where} has {cut(misnamed, 3)}, which is not in transformers' layout (model.safetensors, or shards with "
            f"{INDEX_FILE}); use the checkpoint in that layout, or convert it with transformers"
        )


def refuse_pickled(where: Path | str, names: Iterable[str]) -> None:
    """Raise if some files are pickled weights.

    Args:
        where: folder or index, for the message.
        names: its files.

    Raises:
        FileNotFoundError: some are; the message says how to convert them.
    """
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise FileNotFoundError(
            f"{where} has pickled weights ({cut(pickled)}), which can run code when they are read and are "
            "refused. If you trust them, convert them: transformers.AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors"
        )


def _listed(names: Sequence[str]) -> str:
    return f"[{cut(map(repr, names))}]" if names else "nothing"
