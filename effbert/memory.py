"""How much memory there is, and how a lack of it shows: what a process may still take, and which errors say it was too
much."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUPS = (  # of the container that a process may be in: limit, usage, statistics; version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    tuple(f"/sys/fs/cgroup/memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),
)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device: on a CPU the least of what the machine has left, its
    container's limit and its own (ulimit -v)."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return max(0, min(_rooms()))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or a CPU: PyTorch has a type for the one alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _rooms() -> Iterator[int]:
    try:
        found = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        yield 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError):  # no Linux: what no process and no cache holds
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, usage, statistics in _CGROUPS:
        room = _room_of_container(Path(limit), Path(usage), Path(statistics))
        if room is not None:
            yield room
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        yield most - pages * os.sysconf("SC_PAGE_SIZE")


def _room_of_container(limit: Path, usage: Path, statistics: Path) -> int | None:
    """None where there is no such limit. Cached files count as free, as they do for the machine."""
    try:
        most = limit.read_text(encoding="ascii").strip()
        if most == "max":
            return None
        lines = dict(line.split() for line in statistics.read_text(encoding="ascii").splitlines())
        cached = int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))
        return int(most) - int(usage.read_text(encoding="ascii")) + cached
    except (OSError, ValueError):
        return None
