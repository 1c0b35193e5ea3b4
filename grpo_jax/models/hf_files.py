"""The files of a Hugging Face checkpoint: which hold the weights, and why a folder is not one that can be loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LFS_POINTER = b"version https://git-lfs"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OTHER_FORMATS = (".gguf", ".ggml", ".msgpack", ".h5", ".onnx", ".npz")


def cut(items: Iterable[str], most: int = 10, *, separator: str = ", ") -> str:
    """The first ``most`` of the items in one text, and how many more there are."""
    items = list(items)
    rest = [f"... and {len(items) - most:,} more"] if len(items) > most else []
    return separator.join([*items[:most], *rest])


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: for a symbolic link to nothing.
        ValueError: if it holds something else, or is a Git LFS pointer; the message names the file.
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
    """Check that a file is really there, not a link to nothing or a placeholder.

    Raises:
        FileNotFoundError: for a symbolic link whose target does not exist.
        ValueError: for a Git LFS pointer.
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
        FileNotFoundError: if there is none, or only a link to nothing; the message says what the folder is instead.
        ValueError: if the folder has a LoRA adapter beside whole weights.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        _refuse_adapter(folder)
    if not path.is_file() and not path.is_symlink():
        names = sorted(each.name for each in folder.iterdir())
        refuse_other_formats(folder, names)
        raise FileNotFoundError(
            f"{folder} has no config.json and so is no checkpoint; it has {_shown(names)}"
            + (
                "; give one of its subfolders?"
                if any((each / "config.json").is_file() for each in folder.iterdir())
                else ""
            )
        )
    return path


def _refuse_adapter(folder: Path) -> None:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    merge = (
        "peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder) writes "
        "the whole model"
    )
    if any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise ValueError(
            f"{folder} has a LoRA adapter (adapter_config.json, base model {base!r}) beside whole weights; remove the "
            f"adapter's files to load the weights alone, or merge it: {merge}"
        )
    raise FileNotFoundError(
        f"{folder} has only a LoRA adapter (adapter_config.json), not the weights of its base model {base!r}: {merge}"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: ``model.safetensors``, else the shards that its index names.

    This is the order of transformers; where both are there and differ, a warning is logged.

    Raises:
        FileNotFoundError: if there are none, or only weights in another format, or if the index names files that are
            not there.
        ValueError: for a Git LFS pointer, and for an index that names no files or files outside the folder.
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
                f"{folder} lacks {cut(missing)}, which its {INDEX_FILE} names; download the checkpoint again"
            )
        return files
    names = sorted(path.name for path in folder.iterdir())
    refuse_other_formats(folder, names)
    shards = [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]
    if shards:
        raise FileNotFoundError(f"{folder} has {cut(shards, 3)} but no {INDEX_FILE} that lists them; fetch it too")
    raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; it has {_shown(names)}")


def _names_in_index(index: Path) -> list[str]:
    """The file names in an index, sorted, each of a file in the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, which says in which file each tensor is")
    odd = sorted({str(name) for name in weight_map.values() if not _is_inside(name)})
    if odd:
        raise ValueError(f"{index} names files outside of its folder, or no files: {cut(odd)}")
    others = sorted({name for name in weight_map.values() if not name.endswith(".safetensors")})
    if others:
        refuse_pickled(index, others)
        raise ValueError(f"{index} names files that are not *.safetensors: {cut(others)}")
    return sorted(set(weight_map.values()))


def _is_inside(name: Any) -> bool:
    if not isinstance(name, str) or not name:
        return False
    paths = PurePosixPath(name), PureWindowsPath(name)
    return not any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)


def refuse_other_formats(where: Path | str, names: Sequence[str]) -> None:
    """Raise if any of the files holds weights in a format other than safetensors.

    Raises:
        FileNotFoundError: some do; the error names them and says how to convert them.
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
    named = [n for n in names if n.endswith(".safetensors") and not n.startswith("model")]
    if named:
        raise FileNotFoundError(
            f"{where} has {cut(named, 3)}, which is not in transformers' layout (model.safetensors, or shards with "
            f"{INDEX_FILE}); use the checkpoint in that layout, or convert it with transformers"
        )


def refuse_pickled(where: Path | str, names: Iterable[str]) -> None:
    """Raise if any of the files is pickled weights.

    Raises:
        FileNotFoundError: some are; the error names them and says how to convert them.
    """
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise FileNotFoundError(
            f"{where} has pickled weights ({cut(pickled)}), which can run code when they are read and are "
            "refused. Convert them where you trust them: transformers.AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors"
        )


def _shown(names: Sequence[str]) -> str:
    return f"[{cut(map(repr, names))}]" if names else "nothing"
