"""What memory is left for a process, and which errors say that it did not suffice."""

import os
import resource
from pathlib import Path

import pytest
import torch

from effbert import memory
from effbert.memory import free_memory, out_of_memory

CPU = torch.device("cpu")


def test_what_pytorch_raises_for_too_much_is_known_on_a_cpu_too():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value) and out_of_memory(torch.OutOfMemoryError("")) and out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not out_of_memory(caught.value) and not out_of_memory(ValueError("DefaultCPUAllocator"))


def test_a_limit_of_the_process_counts(monkeypatch):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (size + 2**20, size + 2**30))
    assert 0 <= free_memory(CPU) <= 2**20
    monkeypatch.setattr(resource, "getrlimit", lambda which: (size // 2, size))
    assert free_memory(CPU) == 0


@pytest.mark.parametrize("cached", ["inactive_file 500\nactive_file 9\n", "total_inactive_file 500\ninactive_file 1\n"])
def test_a_limit_of_the_container_counts_and_its_cached_files_are_free(tmp_path, monkeypatch, cached):
    files = [tmp_path / name for name in ("limit", "usage", "stat")]
    for file, text in zip(files, ("10000\n", "4000\n", cached), strict=True):
        file.write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", (tuple(map(str, files)),))
    assert free_memory(CPU) == 10000 - 4000 + 500
    files[0].write_text("max\n")
    assert free_memory(CPU) > 10**6
    files[0].unlink()
    assert free_memory(CPU) > 10**6
