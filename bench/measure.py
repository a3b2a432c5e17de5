"""How benchmarks take time, memory and a device's ceilings: one place, so that all mean the same by a number."""

import errno
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from effbert.bench.costs import Ceilings

WARM_UPS = 3
FLUSHED_BYTES = 256 * 2**20  # several times the L2 of any GPU of today


@dataclass(frozen=True)
class Spread:
    """Milliseconds of a call: median, first and third quartile."""

    median_ms: float
    quartile_1_ms: float
    quartile_3_ms: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Spread":
        """The spread of at least two measurements."""
        low, median, high = statistics.quantiles(milliseconds, n=4)
        return cls(median, low, high)


def device_to_measure() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict:
    """Name of the device, driver, versions and threads: what a number is worth nothing without."""
    on_gpu = device.type == "cuda"
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "driver": _driver() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
            "triton": getattr(triton, "__version__", None),
            "python": platform.python_version(),
        },
    }


def cpu_name() -> str:
    """The CPU's model, where Linux tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def output_file(path: Path) -> Path:
    """`path`, with its folder made; OSError where no file can be written there, before there is one to be lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it runs on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def wall_time(function: Callable[[], object], repeats: int, device: torch.device) -> Spread:
    """Of a call and the wait for its end, by the host's clock, after a few unmeasured calls."""
    times = []
    for run in range(repeats + WARM_UPS):
        synchronize(device)
        begun = time.perf_counter()
        function()
        synchronize(device)
        if run >= WARM_UPS:
            times.append(1e3 * (time.perf_counter() - begun))
    return Spread.of(times)


def event_time(function: Callable[[], object], repeats: int, cold: bool) -> Spread:
    """Of a call on the GPU, between two CUDA events, calls following each other without a wait for the host.

    cold: the L2 cache is overwritten before each call. Then the host prepares a call while the GPU overwrites, about
    80 µs, which hides as much of the host's own time; warm calls hide nothing.
    """
    for _ in range(WARM_UPS):
        function()
    other = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda") if cold else None
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        if cold:
            other.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return Spread.of([begin.elapsed_time(end) for begin, end in events])


def kernel_time(function: Callable[[], object], runs: int = 5) -> tuple[float, float]:
    """Milliseconds of a call's kernels, copies and fills alone, without gaps, and how many of them it starts."""
    kind = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, kind]) as profile:
        for _ in range(runs):
            function()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in on_device) / 1e3 / runs, len(on_device) / runs


def extra_memory(function: Callable[[], object]) -> int:
    """Bytes that a call needs at its peak beyond what is allocated before it, its results included."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of one call, as a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def ceilings(device: torch.device, size: int) -> Ceilings:
    """What the device reaches here: square products of side `size` in bf16, TF32 (GPUs only) and fp32 on random data,
    and a copy of size² fp32 elements, bytes read plus bytes written.
    """
    rates = {}
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    kinds = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
    try:
        for name, dtype in kinds.items():
            if name == "tf32" and device.type != "cuda":
                continue
            switch.fp32_precision = "tf32" if name == "tf32" else "ieee"
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            rates[name] = 2 * size**3 / _seconds(lambda a=a, b=b: a @ b, device)
    finally:
        switch.fp32_precision = before
    x = torch.randn(size * size, device=device)
    y = torch.empty_like(x)
    return Ceilings(2 * x.nbytes / _seconds(lambda: y.copy_(x), device), rates)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    spread = event_time(function, 10, cold=False) if device.type == "cuda" else wall_time(function, 10, device)
    return spread.median_ms / 1e3


def described(ceilings: Ceilings) -> dict[str, float]:
    """Ceilings for a record: TFLOP/s of products by type, GB/s of a copy."""
    products = {f"matmul {name} TFLOP/s": rate / 1e12 for name, rate in ceilings.flops_per_second.items()}
    return products | {"copy GB/s": ceilings.bytes_per_second / 1e9}
