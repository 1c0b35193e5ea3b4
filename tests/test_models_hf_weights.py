"""Weights: read slice by slice onto a mesh, refused with one error, written in shards, over several processes."""

import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CASES, SMALL, random_params, write_checkpoint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from grpo_jax.models import (
    from_hf_config,
    from_pretrained,
    hf_keys,
    hf_layouts,
    hf_weights,
    param_shapes,
    save_pretrained,
)
from grpo_jax.models.hf_files import weight_files
from grpo_jax.models.hf_keys import Entry, key_table
from grpo_jax.models.hf_weights import read_slice

LLAMA = {"model_type": "llama", **SMALL}


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A checkpoint with every kind of parameter but a norm over heads, in bfloat16 and several files."""
    folder = tmp_path_factory.mktemp("biased")
    write_checkpoint(folder, "llama_biases_linear_rope", dtype="bfloat16", max_shard_size="20KB", tokenizer=False)
    return folder


SPECS = {
    "q/kernel": P("fsdp", "tensor", None),
    "k/kernel": P("fsdp", None, "tensor"),  # the hard case: every head is split
    "v/kernel": P(None, "tensor", "fsdp"),
    "o/kernel": P("tensor", "fsdp", None),
    "q/bias": P("tensor", None),
    "k/bias": P(None, ("fsdp", "tensor")),
    "gate/kernel": P("fsdp", "tensor"),
    "down/kernel": P("tensor", ("data", "fsdp")),
    "up/bias": P("tensor"),
    "embed/embedding": P(("fsdp", "tensor"), None),
    "lm_head/embedding": P("tensor", "fsdp"),
}


def on_mesh(shapes):
    """Hand-written shardings on 2 x 2 x 2 devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, SPECS.get("/".join(part.key for part in path[-2:]), P())), shapes
    )


def test_loading_onto_a_mesh_equals_loading_onto_one_device(biased):
    plain = from_pretrained(biased)
    sharded = from_pretrained(biased, shardings=on_mesh)
    wanted = on_mesh(param_shapes(plain.config))
    chex.assert_trees_all_equal(plain.params, sharded.params)
    assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding == sharding, sharded.params, wanted))
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(plain.params)} == {jax.devices()[0]}


class SpiedTensor:
    """A stored tensor that records the slices read from it; views of it read nothing."""

    def __init__(self, array, parts=None):
        self.array, self.parts = array, [] if parts is None else parts

    def mapped(self):
        return self

    def reshape(self, *shape):
        return SpiedTensor(self.array.reshape(*shape), self.parts)

    def __getitem__(self, index):
        return SpiedTensor(self.array[index], self.parts)

    def transpose(self, axes):
        self.parts.append(self.array)
        return self.array.transpose(axes)


def test_each_shard_is_read_once_and_nothing_else_is(biased, monkeypatch):
    spied, mapped = {}, hf_weights.Stored.mapped
    monkeypatch.setattr(
        hf_weights.Stored, "mapped", lambda stored: spied.setdefault(stored, SpiedTensor(mapped(stored)))
    )
    loaded = from_pretrained(biased, shardings=on_mesh)
    stored = hf_weights.read_headers(weight_files(biased))
    paths = hf_keys._flatten(loaded.params)
    for path, entry in key_table(loaded.config).items():
        (name,) = entry.names
        parts = spied[stored[name]].parts
        assert sum(part.size for part in parts) == paths[path].size, path
        assert max(part.size for part in parts) <= paths[path].addressable_shards[0].data.size, path
        assert all(part.dtype == jnp.bfloat16 for part in parts)


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_loaded_parameters_do_not_change_with_the_file(param_dtype, biased, tmp_path):
    folder = shutil.copytree(biased, tmp_path / "model")
    loaded = from_pretrained(folder, param_dtype=param_dtype)
    for file in weight_files(folder):
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
    unchanged = from_pretrained(biased, param_dtype=param_dtype)
    chex.assert_trees_all_equal(loaded.params, unchanged.params)


LAYOUTS_OF_SHAPES = {
    "linear": (hf_layouts.LINEAR, (6, 4)),
    "heads out": (hf_layouts.HEADS_OUT, (6, 4, 8)),
    "heads in": (hf_layouts.HEADS_IN, (6, 4, 8)),
    "heads bias": (hf_layouts.HEADS_BIAS, (6, 4)),
    "second of two": (hf_layouts.part(hf_layouts.LINEAR, 0, lambda config: (3, 4), 1), (6, 4)),
    "heads beside others": (hf_layouts.part(hf_layouts.HEADS_OUT, 0, lambda config: (4, 2, 2), 0), (6, 4, 8)),
    "within each head": (hf_layouts.part(hf_layouts.HEADS_OUT, 1, lambda config: (2, 8), 1), (6, 4, 8)),
}


@pytest.mark.parametrize("name", LAYOUTS_OF_SHAPES)
def test_any_part_of_a_parameter_is_read_without_the_rest(name):
    layout, shape = LAYOUTS_OF_SHAPES[name]
    entry = Entry(("any",), shape, layout(shape, from_hf_config(LLAMA)))
    stored = SpiedTensor(np.random.default_rng(0).normal(size=entry.view.stored))
    whole = read_slice([stored], entry, tuple(map(range, entry.shape)))
    assert whole.shape == entry.shape
    assert [part.size for part in stored.parts] == [whole.size]
    for ranges in itertools.product((range(0, 6), range(2, 5)), (range(0, 4), range(1, 3)), (range(0, 8), range(4, 8))):
        stored.parts.clear()
        part = read_slice([stored], entry, ranges[: len(shape)])
        np.testing.assert_array_equal(part, whole[tuple(slice(r.start, r.stop) for r in ranges[: len(shape)])])
        assert sum(each.size for each in stored.parts) == part.size
    written = np.zeros_like(stored.array)
    entry.view.write(written, whole)
    assert np.count_nonzero(written) == whole.size
    np.testing.assert_array_equal(written[written != 0], stored.array[written != 0])


def test_slices_that_are_tensors_of_their_own_are_read_one_by_one():
    entry = Entry(("first", "second", "third"), (3, 6, 4), hf_layouts.LINEAR((6, 4), from_hf_config(LLAMA)))
    assert entry.axes == (0, 2, 1)
    stored = [SpiedTensor(np.random.default_rng(i).normal(size=(4, 6))) for i in range(3)]
    part = read_slice(stored, entry, (range(1, 3), range(2, 5), range(4)))
    np.testing.assert_array_equal(part, np.stack([stored[i].array.T[2:5] for i in (1, 2)]))
    assert [len(each.parts) for each in stored] == [0, 1, 1]


@pytest.mark.parametrize("case", CASES)
def test_the_key_table_has_the_tensors_of_transformers(case, tmp_path):
    write_checkpoint(tmp_path, case, tokenizer=False)
    config = from_hf_config(json.loads((tmp_path / "config.json").read_text()))
    stored = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    table = key_table(config).values()
    assert {name: entry.view.stored for entry in table for name in entry.names} == stored


def test_all_problems_with_tensors_are_in_one_error(tmp_path):
    write_checkpoint(tmp_path, "llama2")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 32), np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit its config\.json") as error:
        from_pretrained(tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert sorted(line.strip() for line in lines) == [
        "dtype: model.layers.1.mlp.up_proj.weight is I8, not one of F32, BF16, F16",
        "misshapen: model.layers.0.self_attn.q_proj.weight is (16, 32), not (32, 32)",
        "missing: lm_head.weight (96, 32)",
        "missing: model.norm.weight (32,)",
        "surplus: model.layers.7.mlp.up_proj.weight (48, 32)",
    ]


def test_an_index_that_names_absent_files_is_refused_with_their_names(tmp_path):
    write_checkpoint(tmp_path, "llama2", max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {gone.name}, which its model.safetensors.index.json lists"):
        from_pretrained(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    write_checkpoint(tmp_path, "llama2")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not valid JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        from_pretrained(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    write_checkpoint(tmp_path, "llama2")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json; it has"):
        from_pretrained(tmp_path)


def test_files_are_split_at_the_limit_and_listed_in_an_index(tmp_path):
    params = random_params(from_hf_config(LLAMA))
    save_pretrained(tmp_path / "one", params, hf_config=LLAMA)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"config.json", "model.safetensors"}
    save_pretrained(tmp_path / "many", params, hf_config=LLAMA, max_shard_bytes=25_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {file.name: sum(tensor.nbytes for tensor in load_file(file).values()) for file in files}
    assert max(sizes.values()) <= 25_000
    assert index["metadata"]["total_size"] == sum(sizes.values()) == sum(x.nbytes for x in jax.tree.leaves(params))
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    one = load_file(tmp_path / "one" / "model.safetensors")
    for file in files:
        for name, tensor in load_file(file).items():
            np.testing.assert_array_equal(tensor, one[name])


def test_sharded_parameters_are_written_like_plain_ones(biased, tmp_path):
    plain, sharded = from_pretrained(biased), from_pretrained(biased, shardings=on_mesh)
    for name, loaded in (("plain", plain), ("sharded", sharded)):
        save_pretrained(tmp_path / name, loaded.params, hf_config=loaded.hf_config)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "sharded")]
    assert weights[0] == weights[1]


def test_parameters_that_do_not_fit_the_config_are_listed_in_one_error(tmp_path):
    params = random_params(from_hf_config(LLAMA))
    del params["final_norm"]
    params["extra"] = {"scale": jnp.zeros(3)}
    params["embed"]["embedding"] = jnp.zeros((95, 32))
    params["lm_head"]["embedding"] = jnp.zeros((96, 32), jnp.int32)
    with pytest.raises(ValueError, match="do not fit the config") as error:
        save_pretrained(tmp_path / "export", params, hf_config=LLAMA)
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        "dtype: lm_head/embedding is int32, not one of float32, bfloat16, float16",
        "misshapen: embed/embedding is (95, 32), not (96, 32)",
        "missing: final_norm/scale (32,)",
        "surplus: extra/scale (3,)",
    ]
    assert not list(tmp_path.iterdir())


def run_python(code, *args, environment=()):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **dict(environment)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in outputs]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_host_memory_stays_near_the_model_itself(tmp_path):
    """On CPU the parameters are in host memory: reading them needs little more than their size."""
    config = {**LLAMA, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192}
    shapes = param_shapes(from_hf_config(config))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), shapes)
    save_pretrained(tmp_path / "model", params, hf_config={**config, "eos_token_id": 1})
    code = """
        import re, sys
        from pathlib import Path
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from grpo_jax.models import from_pretrained, hf_weights

        def used():
            return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

        peak, read_slice = 0, hf_weights.read_slice
        def watched(*args):
            global peak
            part = read_slice(*args)
            peak = max(peak, used())
            return part
        hf_weights.read_slice = watched
        mesh = Mesh(np.array(jax.devices()), ("fsdp",))
        sharding = lambda leaf: NamedSharding(mesh, P("fsdp") if leaf.shape[0] % 8 == 0 else P())
        jax.device_put(np.ones(8), NamedSharding(mesh, P("fsdp"))).block_until_ready()
        before = used()
        loaded = from_pretrained(sys.argv[1], shardings=lambda shapes: jax.tree.map(sharding, shapes))
        peak = max(peak, used())
        shards = [shard.data.nbytes for x in jax.tree.leaves(loaded.params) for shard in x.addressable_shards]
        print(peak - before, sum(shards))
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    used, size = map(int, finish(run_python(code, tmp_path / "model", environment=flags))[0].split())
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    print(f"model {size / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f} MiB, used {used / 2**20:.0f} MiB")
    assert size > 100 * 2**20
    assert used < size + 2 * largest + 20 * 2**20


def test_two_processes_read_their_shards_and_write_one_checkpoint(biased, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = """
        import sys
        import jax, numpy as np
        folder, export, damaged, address, process = sys.argv[1:]
        jax.distributed.initialize(address, 2, int(process))
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from grpo_jax.models import from_pretrained, hf_reading, hf_weights, save_pretrained

        sizes, read_slice = {}, hf_weights.read_slice
        def watched(tensor, entry, ranges):
            part = read_slice(tensor, entry, ranges)
            (name,) = entry.names
            sizes[name] = sizes.get(name, 0) + part.size
            return part
        hf_weights.read_slice = watched
        mesh = Mesh(np.array(jax.devices()), ("fsdp",))
        sharding = lambda leaf: NamedSharding(mesh, P("fsdp") if leaf.shape[0] % 4 == 0 else P())
        shardings = lambda shapes: jax.tree.map(sharding, shapes)
        loaded = from_pretrained(folder, shardings=shardings)
        print("read", sizes["model.embed_tokens.weight"], jax.device_count(), jax.local_device_count())
        sizes.clear()
        hf_reading.SMALL_BYTES = 0
        exchanged = from_pretrained(folder, shardings=shardings)
        print("rows", sizes["model.embed_tokens.weight"], sizes["model.layers.0.mlp.gate_proj.weight"])
        local = lambda tree: [np.asarray(part.data) for x in jax.tree.leaves(tree) for part in x.addressable_shards]
        for x, y in zip(local(loaded.params), local(exchanged.params), strict=True):
            np.testing.assert_array_equal(x, y)
        try:
            from_pretrained(damaged, shardings=shardings)
        except ValueError as error:
            print("refused", "have NaN or infinity" in str(error), "gate_proj" in str(error))
        save_pretrained(export, loaded.params, hf_config=loaded.hf_config)
        from_pretrained(export)
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    export = tmp_path / "export"
    damaged = shutil.copytree(biased, tmp_path / "damaged")
    gate = hf_weights.read_headers(weight_files(damaged))["model.layers.0.mlp.gate_proj.weight"]
    with gate.file.open("r+b") as opened:  # a NaN in the last row, which only the second process reads
        opened.seek(gate.offset + 2 * (math.prod(gate.shape) - 1))
        opened.write(b"\xff\xff")
    processes = [run_python(code, biased, export, damaged, address, i, environment=flags) for i in range(2)]
    for output in finish(*processes):
        assert f"read {96 * 32 // 2} 4 2\n" in output
        assert f"rows {96 * 32 // 2} {math.prod(gate.shape) // 2}\n" in output
        assert "refused True True\n" in output
    chex.assert_trees_all_equal(from_pretrained(biased).params, from_pretrained(export).params)
