"""Compiles launches that were only noted down (`launch.recording`), for any architecture, on a machine that has none.

The one idea: the launch's arguments go through Triton's own binder with the backend of the wanted target, so signature,
specialised integers, aligned pointers and options are those of a real launch there; then the numbers that decide how
fast the kernel can be (registers, spills, shared memory, matrix instructions) are read from what the compiler wrote.
"""

import contextlib
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from effbert.kernels.launch import Launch, is_interpreted

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_MATRIX_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma.sync": "mma.sync",
    "mfma": "v_mfma_",
}
_RUN_OPTIONS = ("instrumentation_mode", "fpsan_homomorphic_casts")  # what JITFunction.run adds to its options
_INTERPRETED = "TRITON_INTERPRET=1 keeps kernels from being compiled: unset it in a new process"
_ELEMENTS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}


class BuildError(ValueError):
    """A kernel that does not compile; one line that names it, the architecture and the compiler's reason."""


@dataclass(frozen=True)
class Built:
    """One compiled kernel.

    key: what tells this compilation from others of the same architecture.
    registers: 32-bit registers a thread. stack: bytes a thread that were spilled. shared: bytes a block.
    tensor_memory: columns of it that a block holds (sm_100). warps: of a block, as built.
    products: operand types of the matrix products in the source: "bf16", "fp16", "tf32", "fp32" for IEEE ones.
    matrix_instructions: kinds found in `assembly` (PTX or AMD's): "wgmma", "mma.sync", "tcgen05", "mfma".
    seconds: what the compilation took, next to nothing where Triton's cache had it.
    """

    key: str
    architecture: str
    name: str
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    warps: int
    products: tuple[str, ...]
    matrix_instructions: tuple[str, ...]
    assembly: str
    seconds: float


def build(launch: Launch, architecture: str, anew: bool = False) -> Built:
    """Compile what `launch` (noted down by `recording(architecture)`) would run on `architecture`, one of TARGETS.

    anew: even where Triton's cache has it. ValueError for an unknown architecture, or where TRITON_INTERPRET keeps
    kernels from being compiled; BuildError where the compiler refuses.
    """
    return _compile(_bind(launch, architecture), anew)


def build_all(
    launches: Iterable[Launch], architecture: str, workers: int | None = None, failures: list[BuildError] | None = None
) -> dict[str, tuple[Built, int]]:
    """Build many, each distinct compilation once: key -> (built, how many launches use it), in order of first use.

    workers: threads; by default one for each CPU. failures: where given, what does not compile is noted there and left
    out of the result; else it is raised.
    """
    bound = [_bind(launch, architecture) for launch in launches]
    counts = Counter(one.key for one in bound)
    distinct = {one.key: one for one in bound}
    built = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for key, result in zip(distinct, pool.map(_try, distinct.values()), strict=True):
            if isinstance(result, Built):
                built[key] = result, counts[key]
            elif failures is None:
                pool.shutdown(cancel_futures=True)
                raise result
            else:
                failures.append(result)
    return built


def compilation_key(launch: Launch, architecture: str) -> str:
    """What tells the compilation that `launch` needs from others; nothing is compiled."""
    return _bind(launch, architecture).key


def check(architecture: str) -> None:
    """ValueError where nothing can be built for it: not one of TARGETS, TRITON_INTERPRET is set, no Triton."""
    if architecture not in TARGETS:
        raise ValueError(f"unknown architecture {architecture!r}: one of {', '.join(TARGETS)}")
    if is_interpreted():
        raise ValueError(_INTERPRETED)
    _backend(architecture)


@dataclass(frozen=True)
class _Bound:
    """A launch as Triton's binder sees it: ready to be compiled."""

    key: str
    architecture: str
    kernel: object
    signature: dict
    constants: dict
    attributes: dict
    options: dict


def _bind(launch: Launch, architecture: str) -> _Bound:
    """The steps of triton's JITFunction.run (3.6 to 3.9) before it compiles, with a backend of our choice."""
    check(architecture)
    from triton import knobs
    from triton.runtime.jit import JITFunction, compute_cache_key

    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise ValueError(_INTERPRETED)
    given = launch.arguments | launch.options
    given["debug"] = bool(kernel.debug) or knobs.runtime.debug
    given |= {name: getattr(knobs.compilation, name) for name in _RUN_OPTIONS if hasattr(knobs.compilation, name)}
    bound, specialization, options = _binder(kernel, architecture)(**given)
    key = f"{launch.name} {kernel.cache_key} {compute_cache_key({}, specialization, options)}"
    options, signature, constants, attributes = kernel._pack_args(
        _backend(architecture), given, bound, specialization, options
    )
    digest = hashlib.sha256(key.encode()).hexdigest()
    return _Bound(digest, architecture, kernel, signature, constants, attributes, options.__dict__)


@functools.lru_cache(maxsize=256)
def _binder(kernel, architecture: str):
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, _backend(architecture))


@functools.cache
def _backend(architecture: str):
    try:
        from triton.compiler import make_backend
    except ImportError as error:
        raise ValueError(f"building kernels needs triton >=3.6,<3.10, which cannot be imported ({error})") from None
    return make_backend(_target(architecture))


def _target(architecture: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget(*TARGETS[architecture])


def _try(bound: _Bound) -> Built | BuildError:
    try:
        return _compile(bound)
    except BuildError as error:
        return error


def _compile(bound: _Bound, anew: bool = False) -> Built:
    from triton import knobs
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    source = ASTSource(bound.kernel, bound.signature, bound.constants, bound.attributes)
    begun = time.perf_counter()
    try:
        with _always(knobs.compilation) if anew else contextlib.nullcontext():
            compiled = triton_compile(source, target=_target(bound.architecture), options=bound.options)
    except Exception as error:  # the compiler raises many kinds
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        name = bound.kernel.__name__
        raise BuildError(f"{name} does not compile for {bound.architecture}: {reason[0].strip()}") from error
    seconds = time.perf_counter() - begun
    amd = "amdgcn" in compiled.asm
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    registers, stack = _amd_usage(assembly) if amd else _nvidia_usage(compiled.asm["cubin"])
    return Built(
        key=bound.key,
        architecture=bound.architecture,
        name=bound.kernel.__name__,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        warps=compiled.metadata.num_warps,
        products=_products(compiled.asm["ttir"]),
        matrix_instructions=tuple(kind for kind, text in _MATRIX_INSTRUCTIONS.items() if text in assembly),
        assembly=assembly,
        seconds=seconds,
    )


@contextlib.contextmanager
def _always(compilation):
    """Triton compiles even what its cache has; for the whole process, so not for several threads."""
    with compilation.scope():
        compilation.always_compile = True
        yield


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as the cuobjdump in the triton package tells them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def serialises(built: Built) -> bool:
    """Whether NVIDIA's assembler makes asynchronous products (wgmma) wait for each other, which it says in its log
    alone (C7510 to C7519): right, but slower. It is asked again for that, with the allocation of registers that Triton
    3.9 asks for, so this takes as long as assembling."""
    if "wgmma" not in built.matrix_instructions:
        return False
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", built.assembly, re.M)[1]
    ptxas = get_ptxas(TARGETS[built.architecture][1]).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx", encoding="utf-8") as file:
        file.write(built.assembly)
        file.flush()
        command = [ptxas, "-v", "--regAllocOptLevel=2", "--gpu-name", target, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.search(r"\(C751\d\)", said) is not None


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers (the accumulation registers among them) and scratch bytes a thread, from the metadata."""

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    spilled = 4 * field("vgpr_spill_count")
    return field("vgpr_count"), max(spilled, field("private_segment_fixed_size"))


def _products(ttir: str) -> tuple[str, ...]:
    """Operand types of the tl.dot calls in a kernel's first form."""
    kinds = set()
    for line in re.findall(r"tt\.dot .*", ttir):
        element = re.search(r": tensor<[\dx]*x(\w+)", line)[1]
        precision = re.search(r"inputPrecision = (\w+)", line)
        kinds.add(precision[1] if precision and element == "f32" else _ELEMENTS.get(element, element))
    return tuple(sorted(kinds))
