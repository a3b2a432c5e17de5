"""GPUs by their data sheets, and what one of their multiprocessors holds at once: the ground of every prediction."""

from dataclasses import dataclass

from effbert.bench.costs import Ceilings
from effbert.kernels.aot import Built


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: peak rates are dense; "fp32" is IEEE, on AMD through its matrix units. memory: bytes.
    watts: the most that its board draws."""

    name: str
    architecture: str
    multiprocessors: int
    memory: float
    watts: float
    ceilings: Ceilings


def _gpu(name, architecture, multiprocessors, gigabytes, watts, terabytes, half, tf32, fp32) -> Gpu:
    rates = {"bf16": half * 1e12, "fp16": half * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12}
    return Gpu(name, architecture, multiprocessors, gigabytes * 1e9, watts, Ceilings(terabytes * 1e12, rates))


# Vendors' data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (an eighth of it), MI300X.
GPUS = (
    _gpu("A100", "sm_80", 108, 80, 400, 2.039, 312, 156, 19.5),
    _gpu("H200", "sm_90", 132, 141, 700, 4.8, 989.4, 494.7, 66.9),
    _gpu("H100", "sm_90", 132, 80, 700, 3.35, 989.4, 494.7, 66.9),
    _gpu("B200", "sm_100", 148, 180, 1000, 8.0, 2250, 1125, 75),
    _gpu("MI300X", "gfx942", 304, 192, 750, 5.3, 1307.4, 653.7, 163.4),
)


def gpu_named(name: str) -> Gpu:
    """The data sheet of this name. ValueError, with those that are known, where there is none."""
    for gpu in GPUS:
        if gpu.name == name:
            return gpu
    raise ValueError(f"--gpu {name}: no such data sheet; known: {', '.join(gpu.name for gpu in GPUS)}")


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor (compute unit) holds. shared: bytes; reserved: of these, bytes a block for the system;
    warps: a scheduler; blocks: at once.
    """

    shared: int
    reserved: int
    warps: int
    blocks: int


# CUDA C++ programming guide, "technical specifications per compute capability"; AMD CDNA3 instruction set architecture
# and LLVM's AMDGPU occupancy rules. All have four schedulers of 512 registers a lane, given out in eights.
LIMITS = {
    "sm_80": Limits(164 * 1024, 1024, 16, 32),
    "sm_90": Limits(228 * 1024, 1024, 16, 32),
    "sm_100": Limits(228 * 1024, 1024, 16, 32),
    "gfx942": Limits(64 * 1024, 0, 8, 32),
}
SCHEDULERS, REGISTERS, REGISTER_UNIT, TENSOR_MEMORY = 4, 512, 8, 512


def blocks_per_multiprocessor(built: Built) -> int:
    """Blocks that registers, shared and tensor memory, warps and slots admit at once; 0 where one does not fit."""
    limits = LIMITS[built.architecture]
    registers = -(-built.registers // REGISTER_UNIT) * REGISTER_UNIT
    warps = SCHEDULERS * min(limits.warps, REGISTERS // max(registers, 1))
    blocks = min(limits.blocks, warps // built.warps, limits.shared // max(built.shared + limits.reserved, 1))
    return min(blocks, TENSOR_MEMORY // built.tensor_memory) if built.tensor_memory else blocks
