"""Loading and saving of models as Hugging Face checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import list_repo_files, snapshot_download
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from grpo_jax.models.config import DecoderConfig, with_rope_length
from grpo_jax.models.hf_config import family_of, from_hf_config, with_scalar_head
from grpo_jax.models.hf_files import (
    config_file,
    read_json,
    refuse_other_formats,
    removed_unless_whole,
    weight_files,
)
from grpo_jax.models.hf_headers import read_headers
from grpo_jax.models.hf_sameness import check_same_checkpoint
from grpo_jax.models.hf_schemes import without_scheme
from grpo_jax.models.hf_text import text_config
from grpo_jax.models.hf_weights import (
    check_num_layers,
    check_params,
    check_weights,
    load_params,
    save_params,
)
from grpo_jax.models.kernels import AttentionName
from grpo_jax.models.lora_config import LoRA
from grpo_jax.models.parameters import param_shapes
from grpo_jax.models.pretrained import Pretrained
from grpo_jax.models.remat import Remat
from grpo_jax.models.transformer import build_model
from grpo_jax.types import Params

HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model*", "*.jinja", "merges.txt", "vocab.txt"]
NO_SUBFOLDERS = ["*/*"]
# File names that may belong to a tokenizer; read_tokenizer decides whether they do and suffice.
TOKENIZER_NAME = re.compile(r"token|vocab|merges|spiece|sentencepiece|tekken|bpe", re.IGNORECASE)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# More than any published decoder has; such a config is compared with the weights before a model is built from it.
MANY_LAYERS = 1000
PARAM_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def from_pretrained(
    name_or_folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: Remat = "none",
    attention: AttentionName = "plain",
    mesh: Mesh | None = None,
    shardings: Callable[[Any], Any] | None = None,
    scalar_head: bool = False,
    revision: str | None = None,
    rope_length: int | None = None,
    lora: LoRA | None = None,
    seed: int = 0,
) -> Pretrained:
    """Load a model from a local folder or the Hugging Face hub.

    Weights are read from safetensors one tensor at a time onto their devices, and only the local shards of each: host
    memory holds the local part of one tensor. Quantized weights are dequantized. No code from a checkpoint is run.

    Args:
        name_or_folder: a folder, or a hub id such as ``Qwen/Qwen3-0.6B``.
        dtype: compute dtype, float32 or bfloat16.
        param_dtype: dtype of the parameters (float32, bfloat16 or float16), whatever that of the checkpoint; None for
            float32, which the small steps of an optimizer need.
        remat: which activations the backward pass recomputes, as in ``build_model``.
        attention: the attention kernel of training and prefill, as in ``kernels.choose_kernel``.
        mesh: mesh that activations are sharded over, as in ``build_model``.
        shardings: from the parameters' tree of ``ShapeDtypeStruct`` to a tree of ``jax.sharding.Sharding``; None puts
            everything on the first local device.
        scalar_head: replace the output embedding by a scalar head, for a reward model or a critic; its weights are 0
            unless the checkpoint has one.
        revision: branch, tag or commit on the hub; None for its main branch.
        rope_length: for longrope and dynamic rope scaling, the longest sequence of the run in tokens, which fixes the
            frequencies for sequences of every length; None selects them for each call by its largest position, as
            transformers does.
        lora: adapters to add, as ``lora.add_adapters`` does; the model is unchanged until they are trained. None, or
            a rank of None, for none.
        seed: of the adapters.

    Raises:
        FileNotFoundError: no such folder or repository; no config or safetensors weights; or files of a tokenizer
            without ``tokenizer.json``.
        NotADirectoryError: the path of a file.
        ValueError: a config that is not supported (as ``from_hf_config``); a vocabulary with more ids than the
            embedding has rows; tensors that do not fit the config (one error lists all); a damaged file; no EOS id; or
            adapters that do not fit, before any weights are read; or a checkpoint that another process has otherwise.
    """
    lora = lora if lora is not None and lora.is_used else None
    param_dtype = jnp.float32 if param_dtype is None else param_dtype
    if param_dtype not in PARAM_DTYPES:
        raise ValueError(f"param_dtype must be float32, bfloat16 or float16, not {jnp.dtype(param_dtype).name}")
    folder = _find_folder(name_or_folder, revision)
    building = {"dtype": dtype, "remat": remat, "attention": attention, "mesh": mesh, "lora": lora}
    stored, described = _described(folder, scalar_head, rope_length, param_dtype, building)
    if mesh is not None and mesh.is_multi_process:
        check_same_checkpoint(folder)
    params = load_params(folder, stored, param_dtype=param_dtype, shardings=shardings)
    if described.config != stored:
        params = with_new_head(params, described.config, param_dtype=param_dtype, shardings=shardings)
    if lora is not None:
        from grpo_jax.models.lora import add_adapters  # late: qwix is imported only where it is used

        key = jax.random.key(seed)
        params = add_adapters(params, described.config, lora, key, dtype=dtype, shardings=shardings)
    return replace(described, params=params, source=str(name_or_folder), lora=lora)


def describe_pretrained(
    name_or_folder: str | Path, *, scalar_head: bool = False, rope_length: int | None = None
) -> Pretrained:
    """The result of ``from_pretrained`` with a ``ShapeDtypeStruct`` for each parameter, without reading weights.

    Errors of a checkpoint that is needed late in a run are raised early.

    Args:
        name_or_folder: a folder, or a hub id.
        scalar_head: as in ``from_pretrained``.
        rope_length: as in ``from_pretrained``.

    Raises:
        FileNotFoundError: as ``from_pretrained``.
        NotADirectoryError: as ``from_pretrained``.
        ValueError: as ``from_pretrained``, except for values of weights.
    """
    folder = _find_folder(name_or_folder, None)
    stored, described = _described(folder, scalar_head, rope_length, jnp.float32, {})
    check_weights(folder, stored)
    return described


def _described(
    folder: Path, scalar_head: bool, rope_length: int | None, param_dtype: Any, building: Mapping[str, Any]
) -> tuple[DecoderConfig, Pretrained]:
    """The config of the stored decoder, and the loaded model without weights, whose head may differ."""
    file_config = text_config(read_json(config_file(folder)))
    family_of(file_config)
    num_layers = file_config.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > MANY_LAYERS:
        check_num_layers(folder, read_headers(weight_files(folder)), num_layers)
    hf_config = with_scalar_head(file_config) if scalar_head else file_config
    stored, config = from_hf_config(file_config), from_hf_config(hf_config)
    if rope_length is not None:
        stored, config = with_rope_length(stored, rope_length), with_rope_length(config, rope_length)
    generation_config = _read_optional(folder / "generation_config.json")
    tokenizer = _read_tokenizer(folder, config.vocab_size)
    eos_ids = _find_eos_ids(generation_config or {}, hf_config, tokenizer, config.vocab_size)
    return stored, Pretrained(
        build_model(config, **building),
        param_shapes(config, param_dtype),
        config,
        without_scheme(hf_config),
        generation_config,
        tokenizer,
        eos_ids,
        _find_pad_id(generation_config or {}, hf_config, tokenizer, eos_ids, config.vocab_size),
        _read_optional(folder / "prompt_format.json"),
    )


def with_new_head(
    params: Params, config: DecoderConfig, *, param_dtype: Any, shardings: Callable[[Any], Any] | None
) -> Params:
    """A decoder's parameters with its output embedding replaced by a scalar head of zeros.

    Args:
        params: of the decoder with an output embedding.
        config: of the decoder with a scalar head.
        param_dtype: dtype of the head.
        shardings: as in ``from_pretrained``.
    """
    shapes = param_shapes(config, param_dtype)
    head = jnp.zeros(shapes["score"]["kernel"].shape, param_dtype)
    placement = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if shardings is not None:
        placement = shardings(shapes)["score"]["kernel"]
    others = {name: value for name, value in params.items() if name != "lm_head"}
    return {**others, "score": {"kernel": jax.device_put(head, placement)}}


def weights_digest(name_or_folder: str | Path) -> str:
    """A digest that identifies a checkpoint's weights, from a folder or hub id.

    Raises:
        FileNotFoundError: the checkpoint has no safetensors.
    """
    folder = _find_folder(name_or_folder, None)
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors")
    for path in files:
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:16]


def _find_folder(name_or_folder: str | Path, revision: str | None) -> Path:
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} applies to hub ids, and {folder} is a local folder")
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; give the folder of the checkpoint, or a hub id")
    if folder.is_symlink():
        raise FileNotFoundError(f"{folder} is a symbolic link to {folder.readlink()}, which does not exist")
    if not HUB_ID.fullmatch(str(name_or_folder)):
        raise FileNotFoundError(f"there is no folder {folder}, and it is not a hub id (owner/name)")
    try:
        downloaded = snapshot_download(
            str(name_or_folder), revision=revision, allow_patterns=HUB_FILES, ignore_patterns=NO_SUBFOLDERS
        )
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise FileNotFoundError(
            f"there is no folder {folder}, and {str(name_or_folder)!r}{at} could not be fetched from the hub: {error}"
        ) from error
    if not any(Path(downloaded).glob("*.safetensors")):
        refuse_other_formats(str(name_or_folder), list_repo_files(str(name_or_folder), revision=revision))
    return Path(downloaded)


def _read_optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_symlink() or path.exists() else None


def _read_tokenizer(folder: Path, num_rows: int) -> Any | None:
    if not any(TOKENIZER_NAME.search(path.name) for path in folder.iterdir()):
        return None
    # Imported late, because it imports torch if that is installed, which takes seconds.
    from grpo_jax.models.tokenizers import read_tokenizer

    return read_tokenizer(folder, num_rows)


def _find_eos_ids(
    generation_config: Mapping[str, Any], hf_config: Mapping[str, Any], tokenizer: Any | None, vocab_size: int
) -> tuple[int, ...]:
    # All of them: fine-tunes often name the end of a turn in one file and the end of a text in another.
    candidates = [
        *_ids_in(generation_config, "eos_token_id", "generation_config.json"),
        *_ids_in(hf_config, "eos_token_id", "config.json"),
        *([] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
    ]
    eos_ids = tuple(dict.fromkeys(eos_id for eos_id in candidates if 0 <= eos_id < vocab_size))
    if not eos_ids:
        raise ValueError(
            f"no EOS id within the vocabulary of {vocab_size}: generation_config.json, config.json and the tokenizer "
            f"name {candidates or 'none'}; set eos_token_id in generation_config.json"
        )
    return eos_ids


def _find_pad_id(
    generation_config: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    tokenizer: Any | None,
    eos_ids: tuple[int, ...],
    vocab_size: int,
) -> int:
    candidates = (
        *([] if tokenizer is None or tokenizer.pad_token_id is None else [tokenizer.pad_token_id]),
        *_ids_in(generation_config, "pad_token_id", "generation_config.json"),
        *_ids_in(hf_config, "pad_token_id", "config.json"),
        eos_ids[0],
    )
    return next(pad_id for pad_id in candidates if 0 <= pad_id < vocab_size)


def _ids_in(config: Mapping[str, Any], field: str, file: str) -> list[int]:
    value = config.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise ValueError(f"{field} in {file} must be a token id or a list of ids, and is {value!r}")
    return ids


def save_pretrained(
    folder: str | Path,
    params: Params,
    *,
    hf_config: Mapping[str, Any],
    tokenizer: Any | None = None,
    generation_config: Mapping[str, Any] | None = None,
    prompt_format: Mapping[str, Any] | None = None,
    eos_ids: Sequence[int] | None = None,
    max_shard_bytes: int = 4_000_000_000,
    dtype: Any = None,
) -> None:
    """Write a checkpoint that transformers, inference servers and ``from_pretrained`` load.

    It is written into a hidden folder beside ``folder`` that is then renamed: a write that fails or is killed leaves no
    ``folder``, and the next one removes its remains. On several processes, all call this together and the first one
    writes; others can read ``folder`` only on shared storage.

    Args:
        folder: does not exist, or is empty.
        params: the parameters, on any devices; one file's tensors are in host memory at a time.
        hf_config: becomes ``config.json``, with its dtype updated, ``architectures`` added and quantization left out.
        tokenizer: written with its chat template if given. An unchanged tokenizer of ``from_pretrained`` is written as
            its original files, byte for byte.
        generation_config: becomes ``generation_config.json`` if given.
        prompt_format: becomes ``prompt_format.json`` if given.
        eos_ids: token ids that end a sequence, which become ``eos_token_id`` of ``config.json`` and
            ``generation_config.json``, a list if there are several; None leaves both unchanged.
        max_shard_bytes: size limit of a weight file; several files get an index.
        dtype: of the weights (float32, bfloat16 or float16); None keeps the dtype of ``params``.

    Raises:
        FileExistsError: ``folder`` exists and is not empty.
        OSError: it cannot be written, such as on a full disk; ``folder`` is as it was.
        ValueError: the parameters do not fit ``hf_config`` (one error lists all that do not); ``eos_ids`` is empty or
            has an id outside the vocabulary; or ``dtype`` is another.
    """
    folder = Path(folder).expanduser()
    if dtype is not None and dtype not in PARAM_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {jnp.dtype(dtype).name}")
    config = from_hf_config(hf_config)
    check_params(params, config)
    if eos_ids is not None:
        hf_config, generation_config = _with_eos_ids(eos_ids, hf_config, generation_config, config.vocab_size)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; remove it or choose another name")
    _wait_for_all(f"{folder} is free")
    partial = folder.with_name(f".{folder.name}.partial")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    with removed_unless_whole(partial, folder):
        if jax.process_index() == 0:
            partial.mkdir(parents=True)
        save_params(partial, params, config, dtype=dtype, max_shard_bytes=max_shard_bytes)
        if jax.process_index() == 0:
            _write_json(partial / "config.json", _exported_config(hf_config, params, dtype))
            if generation_config is not None:
                _write_json(partial / "generation_config.json", generation_config)
            if prompt_format is not None:
                _write_json(partial / "prompt_format.json", prompt_format)
            if tokenizer is not None:
                _write_tokenizer(tokenizer, partial)
            partial.replace(folder)
    _wait_for_all(f"{folder} is written")


def _with_eos_ids(
    eos_ids: Sequence[int],
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    vocab_size: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    if not eos_ids or not all(0 <= eos_id < vocab_size for eos_id in eos_ids):
        raise ValueError(f"eos_ids must have at least one id, all from 0 to {vocab_size - 1}, and are {list(eos_ids)}")
    named = {"eos_token_id": int(eos_ids[0]) if len(eos_ids) == 1 else [int(eos_id) for eos_id in eos_ids]}
    if generation_config is None:  # as transformers derives it from config.json
        names = ("bos_token_id", "pad_token_id")
        generation_config = {name: hf_config[name] for name in names if hf_config.get(name) is not None}
    return {**hf_config, **named}, {**generation_config, **named}


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    from grpo_jax.models.tokenizers import write_tokenizer

    write_tokenizer(tokenizer, folder)


def _wait_for_all(stage: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(stage)


def _exported_config(hf_config: Mapping[str, Any], params: Params, dtype: Any) -> dict[str, Any]:
    name = np.dtype(dtype or jax.tree.leaves(params)[0].dtype).name
    fields = [field for field in ("torch_dtype", "dtype") if field in hf_config] or ["dtype"]
    exported = {"architectures": [family_of(hf_config).architecture], **without_scheme(hf_config)}
    return exported | dict.fromkeys(fields, name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
