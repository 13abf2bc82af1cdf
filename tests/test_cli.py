"""The command line is frozen: flags, defaults, and what `--help` says."""

import dataclasses
import json
import os
import re

import pytest

from ring_jax.mesh import default_cpu_devices, format_mesh, parse_mesh
from ring_jax.train import main, parse_args
from ring_jax.training import TrainConfig, load_config, parse_seq_len

DEFAULTS = {
    "data": (),
    "out": None,
    "resume": None,
    "model": "tiny",
    "seq_len": 16_384,
    "batch": 2,
    "steps": 80,
    "seed": 0,
    "mesh": None,
    "layout": "zigzag",
    "strategy": "ring",
    "implementation": None,
    "dtype": None,
    "remat": "attention",
    "offload": False,
    "cpu_devices": None,
    "checkpoint_every": 100,
    "keep": 2,
}
OPTIMIZER_DEFAULTS = {
    "learning_rate": None,
    "warmup": 10,
    "min_learning_rate": 0.1,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "clip": 1.0,
}


def _help(capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_flags_are_frozen(capsys, monkeypatch):
    flags = set(re.findall(r"^[ │]+(?:-h, )?(--[a-z][a-z0-9-]+)", _help(capsys, monkeypatch), re.MULTILINE))
    expected = {"--" + name.replace("_", "-") for name in (*DEFAULTS, *OPTIMIZER_DEFAULTS)}
    assert flags == expected | {"--help"}


def test_defaults_are_frozen():
    assert dataclasses.asdict(parse_args([])) == DEFAULTS | {"optimizer": OPTIMIZER_DEFAULTS}


def test_help_lists_names_and_says_what_a_flag_left_out_means(capsys, monkeypatch):
    text = _help(capsys, monkeypatch)
    for part in (
        "{tiny,small,",
        "{contiguous,zigzag,striped}",
        "{ring",
        "{none,attention,layer}",
        "data=2,seq=4",
        "16K",
    ):
        assert part in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("text", "tokens"), [("16384", 16_384), ("16K", 16_384), ("16k", 16_384), ("1M", 1_048_576), (" 2K ", 2048)]
)
def test_lengths_take_suffixes(text, tokens):
    assert parse_seq_len(text) == tokens
    assert parse_args(["--seq-len", text]).seq_len == tokens


@pytest.mark.parametrize("text", ["", "K", "16G", "-16", "1.5K", "16KB"])
def test_wrong_lengths_are_refused(text):
    with pytest.raises(ValueError, match="is not a number of tokens: write it like 16384, 16K or 1M"):
        parse_seq_len(text)


@pytest.mark.parametrize("args", [["--nope"], ["--steps", "many"], ["--seq-len", "16Q"], ["--beta1", "1"]])
def test_wrong_syntax_ends_with_status_2_and_names_the_flag(args, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_a_mesh_is_read_in_the_order_given():
    assert parse_mesh("data=2, seq=4") == {"data": 2, "seq": 4}
    assert list(parse_mesh("seq=4,data=2")) == ["seq", "data"]
    assert format_mesh(parse_mesh("data=2,seq=4")) == "data=2,seq=4"


@pytest.mark.parametrize(("mesh", "count"), [(None, 4), ("seq=2", 2), ("data=2,seq=4", 8), ("seq=64", 4)])
def test_there_are_as_many_virtual_devices_as_the_mesh_needs(mesh, count):
    assert default_cpu_devices(mesh) == count


def test_a_saved_config_comes_back(tmp_path):
    args = ["--data", os.devnull, "--mesh", "seq=2", "--learning-rate", "0.5", "--seq-len", "1K", "--dtype", "bfloat16"]
    config = parse_args(args)
    config.save(tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    resumed = parse_args(["--resume", str(tmp_path), "--steps", "7"])
    assert resumed == dataclasses.replace(config, resume=str(tmp_path), steps=7)
    assert parse_args(["--resume", "--out", str(tmp_path)]).resume == str(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"optimizer": {}, "data": [], "nope": 1}'])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json' is damaged or from another version of ring_jax"):
        parse_args(["--resume", str(tmp_path)])


def test_resume_and_another_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match="goes on in that folder: leave --out elsewhere away"):
        parse_args(["--resume", str(tmp_path), "--out", "elsewhere"])


def test_the_saved_config_is_json_without_the_folder(tmp_path):
    TrainConfig().save(tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.keys() == DEFAULTS.keys() - {"out", "resume"} | {"optimizer"}
