"""The article's table: its rows as the article has them, its figures counted, predictions labelled."""

import json

import pytest

from benchmarks import article_table, doubling
from ring_jax.planning import Cluster, Workload, find_model, make_plan


def test_the_rows_are_the_articles():
    labels = [row.label for row in article_table.ROWS]
    assert labels == ["128K/4", "128K/8", "256K/8", "256K/16", "512K/16", "1M/32", "1M/64", "1M/128"]
    assert [row.article_gb for row in article_table.ROWS[:6]] == [42.3, 22.1, 44.8, 23.5, 47.2, 49.1]
    assert [row.article_ms for row in article_table.ROWS[:6]] == [1240, 680, 2510, 1320, 5100, 11800]


def test_methods_are_counted():
    ring, ulysses, megatron, window = article_table.methods(1024, 4)
    shard = 2 * 1024 * 32 * 128 / 4
    assert ring["sent"] == 3 * 2 * shard
    assert ulysses["sent"] == 4 * shard * 3 / 4
    assert megatron["held"] > ring["held"]
    assert window["sent"] == 0
    assert ring["exists"]


def test_the_first_row_is_planned_and_labelled(tmp_path, capsys):
    article_table.main(["--rows", "1", "--no-training", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "memory planned, times predicted" in out
    assert "not measured on a100-80gb" in out
    found = json.loads((tmp_path / "article_table.json").read_text())["rows"][0]
    assert found["row"]["article_gb"] == 42.3
    assert found["plan"]["peak_memory_bytes"] <= 6e9
    assert (tmp_path / "article_table.png").stat().st_size > 0


def test_ratios_are_to_half_of_the_size_before():
    assert doubling.ratios([8, 4, 3]) == [1, 1.5]


def test_four_times_the_gpus_quarter_the_activations():
    """Stricter than halving twice: both steps together stay within what one may deviate."""
    model = find_model("attention", heads="4/4", head_dim=64, remat="layer", offload=False)
    workload = Workload(name="attention", model=model, seq_len=64 * 1024, implementation="triton")
    few, many = (
        doubling.activation_bytes(
            make_plan(workload, Cluster.of("h100", mesh), host_memory=int(2e12), progress=lambda text: None)
        )
        for mesh in ("seq=2", "seq=8")
    )
    assert many == pytest.approx(few / 4, rel=doubling.MAX_DEVIATION)
