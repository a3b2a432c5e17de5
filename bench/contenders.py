"""The models that `effbert bench inference` compares, the runtimes they run in, and the process each pair has.

The one idea: a model in a runtime has a process of its own, so that its memory is its own; it is asked for a few calls
at a time, so that models can take turns. All have random weights and two classes: speed asks for no others.
"""

import gc
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from effbert.bench.measure import captured, synchronize
from effbert.errors import first_line
from effbert.inference import InferenceModel
from effbert.model import EffBertConfig, EffBertForSequenceClassification
from effbert.models import model_fields, sized_down

VOCABULARY = 30522
SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}  # to try it out
OURS, OURS_PLAIN, BASE = "efficientbert", "efficientbert-transformers", "bert-base"


@dataclass(frozen=True)
class Runtime:
    """What a model runs in. kind: eager, compiled, graph or onnx. what: in words."""

    what: str
    kind: str = "eager"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    int8: bool = False


RUNTIMES = {
    "fp32": Runtime("PyTorch, fp32"),
    "bf16": Runtime("PyTorch, weights in bf16", dtype=torch.bfloat16),
    "compiled": Runtime("torch.compile, fp32", "compiled"),
    "onnx": Runtime("ONNX Runtime, fp32", "onnx"),
    "onnx-int8": Runtime("ONNX Runtime, int8 weights", "onnx", int8=True),
    "gpu-fp32": Runtime("PyTorch, fp32 without TF32", device="cuda"),
    "gpu-bf16": Runtime("PyTorch, bf16", dtype=torch.bfloat16, device="cuda"),
    "gpu-compiled": Runtime("torch.compile, reduce-overhead, bf16", "compiled", torch.bfloat16, "cuda"),
    "gpu-graph": Runtime("bf16 in a CUDA graph, no mask given", "graph", torch.bfloat16, "cuda"),
}


def default_runtimes() -> list[str]:
    """Those of the CPU, and of the GPU where there is one."""
    return [name for name, runtime in RUNTIMES.items() if runtime.device == "cpu" or torch.cuda.is_available()]


def _student(small: bool) -> EffBertForSequenceClassification:
    fields = model_fields("efficientbert")
    if small:
        last = fields["architecture"].split(", ")[-SMALL["num_hidden_layers"] :]
        fields |= SMALL | {"embedding_size": 8, "architecture": ", ".join(last)}
    return EffBertForSequenceClassification(EffBertConfig(**fields, vocab_size=VOCABULARY))


def _bert(layers: int = 12, hidden: int = 768, intermediate: int = 3072) -> Callable[[bool], nn.Module]:
    def make(small: bool) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
        return BertForSequenceClassification(BertConfig(**sizes | (SMALL if small else {})))

    return make


def _equal_bert(small: bool) -> nn.Module:
    """A plain BERT of BERT-base's proportions and as many parameters as ours."""
    from transformers import BertConfig

    with torch.device("meta"):
        parameters = _student(False).num_parameters()
    layers = EffBertConfig().num_hidden_layers
    fields = model_fields(sized_down(BertConfig(), layers, parameters))
    return _bert(layers, fields["hidden_size"], fields["intermediate_size"])(small)


def _mobilebert_tiny(small: bool) -> nn.Module:
    """15.5 M parameters without its pooler, where 15.1 M were published."""
    from transformers import MobileBertConfig, MobileBertForSequenceClassification

    sizes = {"num_hidden_layers": 2} if small else {}
    choices = {"num_feedforward_networks": 2, "use_bottleneck_attention": True, "key_query_shared_bottleneck": False}
    return MobileBertForSequenceClassification(MobileBertConfig(**choices, **sizes))


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    OURS: _student,
    OURS_PLAIN: _student,
    BASE: _bert(),
    "tinybert-4": _bert(4, 312, 1200),
    "tinybert-6": _bert(6),
    "mobilebert-tiny": _mobilebert_tiny,
    "bert-equal": _equal_bert,
}


def make(name: str, runtime: Runtime, small: bool) -> nn.Module:
    """The model as it is saved: on the CPU, in the runtime's type, in evaluation mode."""
    torch.manual_seed(0)
    return MODELS[name](small).to(runtime.dtype).eval()


def refuse_missing(name: str, runtime: Runtime) -> None:
    """ValueError where the runtime is not to be had here, or the pair is another one's twin."""
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no GPU")
    if runtime.kind == "compiled" and runtime.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("torch.compile needs a C++ compiler: install g++, or name one in CXX")
    if runtime.kind == "onnx":
        from effbert import onnx_export

        onnx_export.check_installed()
        if name == OURS_PLAIN:
            raise ValueError(f"the file is that of {OURS}")


def onnx_file(folder: Path, name: str, int8: bool) -> Path:
    """Where `write_files` puts a model."""
    return folder / f"{name}{'-int8' if int8 else ''}.onnx"


def write_files(name: str, runtime_name: str, small: bool, folder: Path) -> dict:
    """Parameters, and bytes of the model's file in the runtime's type; ONNX files stay in `folder`."""
    runtime = RUNTIMES[runtime_name]
    refuse_missing(name, runtime)
    model = make(name, runtime, small)
    if runtime.kind == "onnx":
        path = _written_onnx(model, folder, name, runtime.int8)
        size = path.stat().st_size
    else:
        size = _saved_bytes(model, folder)
    return {"parameters": sum(p.numel() for p in model.parameters()), "file_bytes": size}


def _saved_bytes(model: nn.Module, folder: Path) -> int:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder / "saved")
    size = (folder / "saved" / "model.safetensors").stat().st_size
    shutil.rmtree(folder / "saved")
    return size


def _written_onnx(model: nn.Module, folder: Path, name: str, int8: bool) -> Path:
    from effbert import onnx_export, standalone

    path = onnx_file(folder, name, False)
    if not path.exists():
        if name == OURS:
            model = standalone.plain_model(model, standalone.load(standalone.source(model.config)))
        onnx_export.to_onnx(model, path, onnx_export.DEFAULT_OPSET)
    if int8:
        onnx_export.quantise(path, onnx_file(folder, name, True))
    return onnx_file(folder, name, int8)


def runnable(name: str, runtime: Runtime, small: bool, folder: Path) -> Callable:
    """(input_ids, attention_mask) -> logits, on the runtime's device."""
    if runtime.kind == "onnx":
        return _onnx_runnable(onnx_file(folder, name, runtime.int8))
    model = make(name, runtime, small).to(runtime.device)
    if name == OURS:
        model = InferenceModel(model)
    if runtime.kind == "compiled":
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # where a mask is looked at, a graph ends: known
        options = {"mode": "reduce-overhead"} if runtime.device == "cuda" else {"dynamic": True}
        model = torch.compile(model, **options)
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits


def _onnx_runnable(path: Path) -> Callable:
    from effbert.onnx_export import OnnxModel

    # slower fused: 8 x 128 took 456 ms with it and 393 without, BERT-base 2,676 and 2,653
    model = OnnxModel(path, None, disabled_optimizers=("SkipLayerNormFusion",))
    return lambda ids, mask: model(ids, mask, torch.zeros_like(ids))[0]


def _import(name: str, runtime: Runtime) -> None:
    """Load the code that a model needs, so that it does not count as the model's memory."""
    make(name, runtime, small=True)
    if runtime.kind == "onnx":
        import onnxruntime  # noqa: F401

        import effbert.onnx_export  # noqa: F401


class Contender:
    """A model in a runtime, as its own process calls it."""

    def __init__(self, name: str, runtime_name: str, small: bool, folder: Path):
        self.runtime = RUNTIMES[runtime_name]
        self.device = torch.device(self.runtime.device)
        _import(name, self.runtime)
        self.before = _resident("VmRSS")
        with torch.inference_mode(False):
            self.run = runnable(name, self.runtime, small, folder)
        self.shape, self.call = None, None
        gc.collect()

    @torch.inference_mode()
    def timed(self, batch: int, length: int, seconds: float) -> list[float]:
        """Milliseconds of calls made for so many seconds, of one at least; the first of several is left out.

        ValueError where an output is not finite.
        """
        if self.shape != (batch, length):
            self._prepare(batch, length)
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            synchronize(self.device)
            begun = time.perf_counter()
            found = self.call()
            synchronize(self.device)
            times.append(1e3 * (time.perf_counter() - begun))
            if len(times) == 1 and found is not None and not found.isfinite().all():
                raise ValueError("outputs are not finite")
        return times[1:] or times

    def _prepare(self, batch: int, length: int) -> None:
        generator = torch.Generator().manual_seed(batch * 1000 + length)
        ids = torch.randint(1000, VOCABULARY, (batch, length), generator=generator).to(self.device)
        mask = torch.ones_like(ids)
        self.call, self.shape = lambda: self.run(ids, mask), (batch, length)
        if self.runtime.kind == "graph":
            if not self.run(ids, None).isfinite().all():
                raise ValueError("outputs are not finite")
            self.call = captured(lambda: self.run(ids, None))
        _forget_peak(self.device)

    def memory(self) -> dict:
        """Bytes at the peak since the shape changed, and what the process held before there was a model."""
        if self.device.type == "cuda":
            return {"peak_memory": torch.cuda.max_memory_allocated(), "memory_without_model": 0}
        peak = _resident("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory": peak, "memory_without_model": self.before}


def _resident(field: str) -> int | None:
    """Bytes of this process by /proc, None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


def _forget_peak(device: torch.device) -> None:
    """Elsewhere than on Linux the peak is that of the whole process: shapes grow, so it is the largest one's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


class Worker:
    """The process of a model in a runtime; `compiled`: its first call at a shape may be long.

    Every method raises ValueError, one line, where the process could not.
    """

    def __init__(self, name: str, runtime: str, small: bool, threads: int, folder: Path):
        context = _processes()
        self.compiled = RUNTIMES[runtime].kind == "compiled"
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, runtime, small, threads, folder), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def timed(self, batch: int, length: int, seconds: float) -> list[float]:
        """`Contender.timed`."""
        self.pipe.send(("timed", batch, length, seconds))
        return self._answer()

    def memory(self) -> dict:
        """`Contender.memory`."""
        self.pipe.send(("memory",))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(5)
        self.process.kill()

    def _answer(self):
        try:
            found = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            raise ValueError(f"its process died, exit status {self.process.exitcode}") from None
        if isinstance(found, Exception):
            raise found
        return found


def _serve(pipe, name: str, runtime: str, small: bool, threads: int, folder: Path) -> None:
    """Answer until the other end is closed; Ctrl-C is the other end's affair."""
    _ignore_interrupts()
    torch.set_num_threads(threads)
    contender = None
    while True:
        try:
            if contender is None:
                contender, answer = Contender(name, runtime, small, folder), None
            else:
                method, *arguments = pipe.recv()
                answer = getattr(contender, method)(*arguments)
        except EOFError:
            return
        except Exception as error:  # whatever a runtime raises is the row's reason
            if os.environ.get("EFFBERT_TRACEBACK"):
                traceback.print_exc()
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            answer = ValueError(kind + first_line(error))
        pipe.send(answer)
        if contender is None:
            return


def writer() -> ProcessPoolExecutor:
    """A process for `write_files`, so that writing costs no other one memory."""
    return ProcessPoolExecutor(1, _processes(), initializer=_ignore_interrupts)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _processes():
    """Where there is a fork server, processes begin with the libraries in memory, seconds earlier."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["effbert.bench.contenders", "transformers.models.bert.modeling_bert"])
    return context
