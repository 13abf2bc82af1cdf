"""A checkpoint comes back bit for bit on any mesh; a damaged or other one is refused, by name, and left alone."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ring_jax.checkpoint import checkpoint_steps, read_info, restore_checkpoint, save_checkpoint

INFO = {"model": "tiny", "seq_len": 128, "dtype": None}


def _mesh(size: int) -> Mesh:
    return jax.make_mesh((size,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def _state(size: int = 4):
    sharded = NamedSharding(_mesh(size), PartitionSpec("seq"))
    weight = jax.random.normal(jax.random.key(0), (64, 16))
    return {
        "weight": jax.device_put(weight, sharded),
        "low": jax.device_put(weight.astype(jnp.bfloat16), sharded),
        "step": jax.device_put(jnp.int32(7), NamedSharding(_mesh(size), PartitionSpec())),
    }


def _like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_checkpoint(folder, 7, _state(), INFO, keep=2)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.mark.parametrize("size", [1, 4, 8])
def test_it_comes_back_bit_for_bit_on_any_mesh(saved, size):
    expected = _state(size)
    restored = restore_checkpoint(saved, 7, _like(expected), INFO)
    for name, value in expected.items():
        assert restored[name].sharding == value.sharding
        assert restored[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(restored[name]), np.asarray(value))
    assert read_info(saved, 7) == INFO


def test_the_latest_are_kept_and_a_finished_one_is_never_written_again(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, _state(), INFO, keep=2)
    assert checkpoint_steps(tmp_path) == [2, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "10.json", "2", "2.json"]
    before = _files(tmp_path)
    save_checkpoint(tmp_path, 10, {"other": jnp.zeros(3)}, INFO, keep=2)
    assert _files(tmp_path) == before


def test_one_cut_off_while_writing_does_not_count_and_can_be_written_again(folder):
    (folder / "7.json").unlink()
    assert checkpoint_steps(folder) == []
    save_checkpoint(folder, 7, _state(), INFO, keep=2)
    assert checkpoint_steps(folder) == [7]
    restore_checkpoint(folder, 7, _like(_state()), INFO)


def test_no_folder_has_no_checkpoints(tmp_path):
    assert checkpoint_steps(tmp_path / "nowhere") == []


def _data_file(folder):
    return max((path for path in (folder / "7").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: _flip(_data_file(folder)), id="one bit"),
        pytest.param(lambda folder: _cut(_data_file(folder)), id="one byte"),
        pytest.param(lambda folder: _data_file(folder).unlink(), id="a file"),
        pytest.param(lambda folder: shutil.rmtree(folder / "7"), id="all data"),
        pytest.param(lambda folder: (folder / "7.json").write_text("{"), id="its note"),
        pytest.param(lambda folder: (folder / "7.json").write_text('{"step": 8, "info": {}}'), id="another note"),
    ],
)
def test_a_damaged_one_is_refused_and_left_alone(folder, damage):
    damage(folder)
    before = _files(folder)
    with pytest.raises(ValueError, match=r"checkpoint .*7 is damaged: .*; there is no other checkpoint in this folder"):
        restore_checkpoint(folder, 7, _like(_state()), INFO)
    assert _files(folder) == before


def test_the_error_names_an_older_checkpoint_to_go_on_from(folder):
    save_checkpoint(folder, 8, _state(), INFO, keep=2)
    (folder / "8" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(ValueError, match=r"to go on from step 7 instead, move .*8\.json away"):
        restore_checkpoint(folder, 8, _like(_state()), INFO)


def test_a_mismatch_says_which_fields_differ(saved):
    other = INFO | {"model": "small", "seq_len": 256}
    message = "model is 'tiny' in the checkpoint and 'small' here; seq_len is 128 in the checkpoint and 256 here"
    with pytest.raises(ValueError, match=message):
        restore_checkpoint(saved, 7, _like(_state()), other)


def test_a_mismatch_says_which_arrays_differ(saved):
    like = _like(_state())
    like["weight"] = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=like["weight"].sharding)
    like["extra"] = like.pop("low")
    message = (
        r"extra is None in the checkpoint and 'bfloat16\[64, 16\]' here; low is 'bfloat16\[64, 16\]' in the checkpoint "
        r"and None here; weight is 'float32\[64, 16\]' in the checkpoint and 'float32\[32, 16\]' here"
    )
    with pytest.raises(ValueError, match=message):
        restore_checkpoint(saved, 7, like, INFO)
