"""The table of registers, spills and shared memory: the Mosaic kernels' part. That of Triton is in test_triton."""

import os

import pytest

from benchmarks import registers
from benchmarks.registers import SHARED_MEMORY, Options, main

# Bytes a thread may spill (stores and loads together): the fused backward at head dim 64 spills these with documents,
# outside of the loop of full tiles.
MOST_SPILLS = 28


def test_every_mosaic_kernel_is_in_the_table(capsys):
    options = Options((80, 90), ("bfloat16", "float32"), (64,), documents=(True,), implementation=("mosaic_gpu",))
    status = main(options)
    table = capsys.readouterr().out
    with capsys.disabled():
        print("\n" + table)
    lines = [line for line in table.splitlines() if line.startswith("sm_")]
    assert [line[44:].split()[0] for line in lines] == ["forward", "dkv", "dq", "backward"]
    assert all(line.startswith("sm_90 bfloat16") for line in lines)
    for line in lines:
        _, threads_registers, spills, shared = line[44:].rstrip(" !").split()
        # Two compute warpgroups or three, and one that copies, share 64 Ki.
        assert 0 < int(threads_registers) <= 65536 // (3 * 128)
        assert int(spills) <= MOST_SPILLS, line
        assert 0 < int(shared) <= SHARED_MEMORY[90]
        assert line.endswith("!") == (int(spills) > 0)
    assert status == sum(line.endswith("!") for line in lines)


def test_spills_are_stores_and_loads_together():
    log = "    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads\nptxas info    : Used 77 registers"
    assert registers._registers_and_spills(log) == (77, 24)
    with pytest.raises(AssertionError, match=r"no .* in:\nnothing"):
        registers._registers_and_spills("nothing")


def test_products_that_wait_for_each_other_do_not_fit(monkeypatch, capsys):
    options = Options((90,), ("bfloat16",), (64,), documents=(False,), implementation=("mosaic_gpu",))
    for serialized in (False, True):
        use = registers.Usage("forward", 168, 0, 1000, serialized)
        monkeypatch.setattr(registers, "usage", lambda variant, use=use: [use])
        assert main(options) == serialized
    assert capsys.readouterr().out.count("!") == 1


def test_the_switches_are_as_they_were(monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "0")
    monkeypatch.delenv("MOSAIC_GPU_DUMP_RESOURCES", raising=False)
    before = dict(os.environ)
    with registers._said_by_mosaic() as said:
        print("from Python")
        os.write(1, b"from C\n")
    assert dict(os.environ) == before
    assert sorted(said[0].split("\n")) == ["", "from C", "from Python"]
    os.write(1, b"to the terminal")
    assert capfd.readouterr().out == "to the terminal"
