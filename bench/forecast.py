"""What a search of the published size would take on a GPU that is not here, with data that is not here either.

    effbert bench forecast --gpu H200
    effbert bench forecast --gpu H200 --output forecast.json

The one idea: `effbert search --dry_run` with declared sizes. Corpus and GLUE are counted, not read; the rates are the
GPU's data sheet times two assumed shares, the same for every preset. So nothing here is measured: the hours rest on
the shares, the ratio of the presets does not, and kWh are at most, as if the board drew all that its data sheet
allows. Preset `paper` is the published procedure (fp32, everything padded, one candidate at a time), `paper-fast`
ours (bf16, buckets, shared teacher passes, halving). Left out, beside what a dry run leaves out: the compilation of
kernels, which is said beside the hours; training waits for each, on one core.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from effbert.architecture import Dimensions
from effbert.bench.hardware import GPUS, Gpu, gpu_named
from effbert.config import GLUE_TASKS, PAPER_CORPUS_TOKENS, PRESETS, SearchConfig, SearchStage
from effbert.flags import Parser
from effbert.search import forecast
from effbert.search.population import room_in
from effbert.step import mixed_counts


class Sizes(NamedTuple):
    """A task: rows of its official training and validation sets (MNLI's matched half), tokens a row in batches of 64
    padded to buckets, up to 128, counted with BERT's uncased vocabulary on 2,000 to 60,000 of the training rows."""

    rows: int
    validation: int
    tokens: float


GLUE = {
    "mnli": Sizes(392_702, 9_815, 47.4),
    "qqp": Sizes(363_846, 40_430, 38.4),
    "qnli": Sizes(104_743, 5_463, 55.7),
    "sst2": Sizes(67_349, 872, 20.9),
    "cola": Sizes(8_551, 1_043, 17.8),
    "stsb": Sizes(5_749, 1_500, 34.5),
    "mrpc": Sizes(3_668, 408, 60.1),
    "rte": Sizes(2_490, 277, 73.6),
}
COMPILATIONS, COMPILATION_SECONDS = 3_248, 1.1  # for 1,000 random candidates: effbert bench compile-report --candidates
WIKIPEDIA_SHARE = 2_500 / 3_300  # of the corpus, as of its words (Devlin et al. 2018, section 3.1)


@dataclass(frozen=True)
class Assumptions:
    """Shares of a data sheet's matrix rate in the type of the preset: that of the teacher's forward pass in inference,
    and that of forward and backward, of students and of the teacher itself."""

    teaching: float = 0.4
    training: float = 0.15


class Declared:
    """Tokens of data that is only declared: the published corpus and all of GLUE. Corpus sequences are full, and the
    teacher has a head for none of the tasks."""

    def __init__(self, config: SearchConfig):
        self.config, self.main, self.tuned = config, config.task, (config.task, *config.tasks)

    def general(self, share: float, batch_size: int, of_candidates: bool = False) -> int:
        """A share of the corpus, or of the one that candidates learn from: Wikipedia where that is another."""
        own = of_candidates and self.config.other_corpus
        return round(share * PAPER_CORPUS_TOKENS * (WIKIPEDIA_SHARE if own else 1))

    def of_candidates(self, share: float, batch_size: int) -> int:
        """A share of the main task's training rows that do not rank."""
        return round(share * (1 - self.config.validation_share) * self._tokens(self.main))

    def ranking(self, share: float) -> int:
        """A share of the rows that rank candidates."""
        return round(share * self.config.validation_share * self._tokens(self.main))

    def task(self, name: str, share: float, batch_size: int) -> int:
        """A share of a task's rows that teachers and final rows train on."""
        return round(share * self._learnt() * self._tokens(name))

    def batches(self, name: str, share: float, batch_size: int) -> int:
        """How many batches these make."""
        return -(-round(share * self._learnt() * GLUE[name].rows) // batch_size)

    def held_out(self, name: str) -> int:
        """A task's official validation rows."""
        return round(GLUE[name].validation * self._each(name))

    def mixed(self, settings: SearchStage) -> float:
        """Stage 3's pass over all tasks."""
        size, share = settings.task_phase.per_device_train_batch_size, settings.task_share
        share *= 1 - self.config.validation_share
        batches = {task: -(-round(share * GLUE[task].rows) // size) for task in GLUE_TASKS}
        counts = mixed_counts(batches, self.config.task_temperature)
        return sum(counts[task] * size * self._each(task) for task in GLUE_TASKS)

    def _learnt(self) -> float:
        return 1.0 if self.config.ranking_rows == "released" else 1 - self.config.validation_share

    def _tokens(self, task: str) -> float:
        return GLUE[task].rows * self._each(task)

    def _each(self, task: str) -> float:
        return self.config.max_length if self.config.pad_to_max_length else GLUE[task].tokens


def main(arguments: list[str] | None = None) -> int:
    """Print the forecast of both presets, write it where --output says. ValueError for an unknown GPU."""
    parser = Parser(prog="effbert bench forecast", allow_abbrev=False)
    parser.add_argument("--gpu", default="H200", help=f"one of {', '.join(gpu.name for gpu in GPUS)}")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    gpu, assumptions, found = gpu_named(options.gpu), Assumptions(), {}
    print(f"Forecast, not measured: {gpu.name}, {assumptions}, {PAPER_CORPUS_TOKENS:.3g} tokens of text, all of GLUE")
    for name in ("paper", "paper-fast"):
        parts, text = of_preset(declared(name), gpu, assumptions)
        print(f"\n{name}\n" + "\n".join(text))
        hours = forecast.search_hours(parts)
        kwh = board_power(gpu).kwh(3600 * hours)
        found[name] = {"search_hours": hours, "search_kwh_at_most": kwh, "parts": [asdict(part) for part in parts]}
    print(f"\npaper / paper-fast: {found['paper']['search_hours'] / found['paper-fast']['search_hours']:.1f}")
    compiling = COMPILATIONS * COMPILATION_SECONDS
    print(
        f"left out of both: about {forecast.duration(compiling)} of compiling kernels, {COMPILATIONS:,} times "
        f"{COMPILATION_SECONDS} s for 1,000 random candidates, while training waits; Triton keeps them"
    )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        left_out = {"compiling_kernels_hours": compiling / 3600}
        result = {"gpu": gpu.name, "assumptions": asdict(assumptions), "left_out": left_out, "presets": found}
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def declared(name: str) -> SearchConfig:
    """A preset with the corpora that it is meant for: the published candidates learn from Wikipedia alone."""
    first = {"candidate_corpus": ("Wikipedia",)} if name == "paper" else {}
    return replace(PRESETS[name](), teacher="BERT-base", corpus=("Wikipedia", "BooksCorpus"), **first)


def of_preset(config: SearchConfig, gpu: Gpu, assumptions: Assumptions) -> tuple[list[forecast.Part], list[str]]:
    """The parts of a preset's search under BERT-base, and its forecast as text."""
    from transformers import BertConfig

    phases = config.supernet, config.teacher_model.finetuning
    peak, tuning = (gpu.ceilings.flops_per_second["bf16" if phase.bf16 else "fp32"] for phase in phases)
    dims, teacher = Dimensions(), BertConfig()
    shares = assumptions.teaching * peak, assumptions.training * peak, assumptions.training * tuning
    rates = forecast.assume(config, dims, teacher, *shares)
    rates = replace(rates, power=board_power(gpu))
    largest = forecast.largest_candidate(config, dims)
    together = room_in(gpu.memory, largest, config.population)
    parts = forecast.forecast(config, Declared(config), rates, together)
    return parts, forecast.lines(parts, rates, config, together, largest)


def board_power(gpu: Gpu) -> forecast.Power:
    """What the GPU draws at most."""
    return forecast.Power(gpu.watts, "the most that its data sheet allows", at_most=True)
