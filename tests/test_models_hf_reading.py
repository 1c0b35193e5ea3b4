"""Rows of stored tensors: each process reads its own, and the devices exchange them."""

import math

import chex
import jax
import numpy as np
import pytest
from checkpoints import SMALL, write_checkpoint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.models import from_hf_config, from_pretrained, hf_layouts, hf_reading, hf_weights
from grpo_jax.models.hf_keys import Entry, key_table
from grpo_jax.models.hf_reading import reading_sharding, row_spec
from grpo_jax.sharding import make_mesh, param_shardings
from tests.test_models_hf_weights import SpiedTensor

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


def entry(path, shape):
    layout = hf_layouts.LAYOUTS.get(path, hf_layouts.as_is)
    return Entry((path,), shape, layout(shape, from_hf_config({"model_type": "llama", **SMALL})))


@pytest.mark.parametrize(
    ("path", "shape", "spec", "rows"),
    [
        # Stored with the output axis first.
        ("mlp/up/kernel", (16, 32), P("fsdp", "tensor"), P(None, ("tensor", "data", "fsdp"))),
        ("mlp/down/kernel", (32, 16), P("tensor", "fsdp"), P(None, ("fsdp", "data", "tensor"))),
        ("attention/q/kernel", (16, 16, 4), P("fsdp", "tensor", None), P(None, ("tensor", "data", "fsdp"), None)),
        # Two heads are too few for four processes, but each head's rows divide.
        ("attention/k/kernel", (16, 2, 8), P("fsdp", None, None), P(None, ("data",), ("fsdp", "tensor"))),
        ("attention/o/kernel", (4, 8, 16), P("tensor", None, "fsdp"), P(None, None, ("fsdp", "data", "tensor"))),
        ("embed", (32, 16), P("tensor", "fsdp"), P(("tensor", "data", "fsdp"), None)),
        # Nothing else divides: as in the run.
        ("mlp/up/kernel", (8, 3), P("fsdp", None), P(("fsdp", "data"), None)),
        ("norm", (7,), P(), P(None)),
    ],
)
def test_mesh_axes_divide_the_rows_of_the_stored_tensor(path, shape, spec, rows):
    assert row_spec(spec, SIZES, entry(path, shape)) == rows
    used = [name for axes in rows for name in ((axes,) if isinstance(axes, str) else axes or ())]
    assert len(used) == len(set(used))
    for size, axes in zip(shape, rows, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        assert size % math.prod(SIZES[name] for name in names) == 0


def test_one_process_reads_as_it_holds(monkeypatch):
    sharding = NamedSharding(make_mesh(fsdp=4, tensor=2), P("fsdp", "tensor"))
    monkeypatch.setattr(hf_reading, "SMALL_BYTES", 0)
    assert reading_sharding(sharding, entry("mlp/up/kernel", (16, 32)), 4) is sharding


class FakeDevice:
    def __init__(self, process_index):
        self.process_index = process_index


class ShardingOfTwo(NamedSharding):
    """A sharding whose devices seem to belong to two processes."""

    @property
    def device_set(self):
        return {FakeDevice(0), FakeDevice(1)}


def test_a_small_parameter_is_read_as_it_is_held():
    sharding = ShardingOfTwo(make_mesh(fsdp=4, tensor=2), P("fsdp", "tensor"))
    edge = entry("mlp/up/kernel", (512, 512))  # 1 MiB in float32
    assert reading_sharding(sharding, edge, 4) is sharding
    reading = reading_sharding(sharding, edge, 8)
    assert isinstance(reading, NamedSharding)
    assert reading.spec == P(None, ("tensor", "data", "fsdp", "expert", "context"))


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)])
def test_loading_by_rows_reads_each_row_once_and_gives_the_same_parameters(shape, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, "llama_biases_linear_rope", dtype="bfloat16", max_shard_size="20KB", tokenizer=False)
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))

    def shardings(shapes):
        return param_shardings(shapes, mesh)

    wanted = from_pretrained(tmp_path, shardings=shardings)
    spied, mapped = {}, hf_weights.Stored.mapped
    monkeypatch.setattr(
        hf_weights.Stored, "mapped", lambda stored: spied.setdefault(stored, SpiedTensor(mapped(stored)))
    )
    monkeypatch.setattr(
        hf_weights,
        "reading_sharding",
        lambda sharding, entry, _: NamedSharding(mesh, row_spec(sharding.spec, dict(mesh.shape), entry)),
    )
    loaded = from_pretrained(tmp_path, shardings=shardings)
    chex.assert_trees_all_equal(wanted.params, loaded.params)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, wanted.params, loaded.params))
    stored = {tensor.file.name + str(tensor.offset): spy for tensor, spy in spied.items()}
    assert len(stored) == len(key_table(loaded.config))
    for spy in stored.values():
        assert sum(part.size for part in spy.parts) == spy.array.size
        if spy.array.ndim == 2:
            assert all(part.size % spy.array.shape[1] == 0 for part in spy.parts)  # whole rows
