"""What a search of the published size would take on a GPU that is not here, with data that is not here either.

    effbert bench forecast --gpu H200
    effbert bench forecast --gpu H200 --output forecast.json

The one idea: `effbert search --dry_run` with declared sizes. Corpus and GLUE are counted, not read; the rates are the
GPU's data sheet times two assumed shares, the same for every preset. So nothing here is measured: the hours rest on
the shares, the ratio of the presets does not, and kWh are at most, as if the board drew all that its data sheet
allows. Preset `paper` is the published procedure (fp32, everything padded, one candidate at a time), `paper-fast`
ours (bf16, buckets, shared teacher passes, halving).
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from effbert.architecture import Dimensions
from effbert.bench.hardware import GPUS, Gpu, gpu_named
from effbert.config import GLUE_TASKS, PAPER_CORPUS_TOKENS, PRESETS, SearchConfig, SearchStage
from effbert.search import forecast
from effbert.search.population import room_in
from effbert.step import mixed_counts

# Rows of the official training sets, and tokens a row in batches of 64 padded to buckets, up to 128: counted with
# BERT's uncased vocabulary on 2,000 to 60,000 of those rows.
GLUE = {
    "mnli": (392_702, 47.4),
    "qqp": (363_846, 38.4),
    "qnli": (104_743, 55.7),
    "sst2": (67_349, 20.9),
    "cola": (8_551, 17.8),
    "stsb": (5_749, 34.5),
    "mrpc": (3_668, 60.1),
    "rte": (2_490, 73.6),
}
MNLI_VALIDATION = 9_815  # rows of the matched half
WIKIPEDIA_SHARE = 2_500 / 3_300  # of the corpus, as of its words (Devlin et al. 2018, section 3.1)


@dataclass(frozen=True)
class Assumptions:
    """Shares of a data sheet's matrix rate in the type of the preset: that of the teacher's forward pass in inference,
    and that of the students' forward and backward."""

    teaching: float = 0.4
    training: float = 0.15


class Declared:
    """Tokens of data that is only declared: the published corpus and all of GLUE. Corpus sequences are full."""

    def __init__(self, config: SearchConfig):
        self.config = config

    def general(self, share: float, batch_size: int, of_candidates: bool = False) -> int:
        """A share of the corpus, or of the one that candidates learn from: Wikipedia where that is another."""
        own = of_candidates and self.config.candidate_corpus
        return round(share * PAPER_CORPUS_TOKENS * (WIKIPEDIA_SHARE if own else 1))

    def task(self, share: float, batch_size: int) -> int:
        """A share of the main task's training rows that do not rank."""
        return round(share * (1 - self.config.validation_share) * self._tokens(self.config.task))

    def batches(self, share: float, batch_size: int) -> int:
        """Batches of a share of the main task's training rows that do not rank."""
        return -(-round(share * (1 - self.config.validation_share) * GLUE[self.config.task][0]) // batch_size)

    def ranking(self, share: float) -> int:
        """A share of the rows that rank candidates."""
        return round(share * self.config.validation_share * self._tokens(self.config.task))

    def held_out(self) -> int:
        """The matched validation rows of MNLI, the main task of the presets."""
        return round(MNLI_VALIDATION / GLUE["mnli"][0] * self._tokens("mnli"))

    def mixed(self, settings: SearchStage) -> float:
        """Stage 3's pass over all tasks."""
        size, share = settings.task_phase.per_device_train_batch_size, settings.task_share
        batches = {task: -(-round(share * GLUE[task][0]) // size) for task in GLUE_TASKS}
        counts = mixed_counts(batches, self.config.task_temperature)
        return sum(counts[task] * size * self._tokens(task) / GLUE[task][0] for task in GLUE_TASKS)

    def _tokens(self, task: str) -> float:
        rows, each = GLUE[task]
        return rows * (self.config.max_length if self.config.pad_to_max_length else each)


def main(arguments: list[str] | None = None) -> int:
    """Print the forecast of both presets, write it where --output says. ValueError for an unknown GPU."""
    parser = argparse.ArgumentParser(prog="effbert bench forecast", allow_abbrev=False)
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
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"gpu": gpu.name, "assumptions": asdict(assumptions), "presets": found}
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def declared(name: str) -> SearchConfig:
    """A preset with the corpora that it is meant for: the published candidates learn from Wikipedia alone."""
    first = {"candidate_corpus": ("Wikipedia",)} if name == "paper" else {}
    return replace(PRESETS[name](), corpus=("Wikipedia", "BooksCorpus"), **first)


def of_preset(config: SearchConfig, gpu: Gpu, assumptions: Assumptions) -> tuple[list[forecast.Part], list[str]]:
    """The parts of a preset's search under BERT-base, and its forecast as text."""
    from transformers import BertConfig

    peak = gpu.ceilings.flops_per_second["bf16" if config.supernet.bf16 else "fp32"]
    dims, teacher = Dimensions(), BertConfig()
    rates = forecast.assume(config, dims, teacher, assumptions.teaching * peak, assumptions.training * peak)
    rates = replace(rates, power=board_power(gpu))
    largest = forecast.largest_candidate(config, dims)
    together = room_in(gpu.memory, largest, config.population)
    parts = forecast.forecast(config, Declared(config), rates, together)
    return parts, forecast.lines(parts, rates, config, together, largest)


def board_power(gpu: Gpu) -> forecast.Power:
    """What the GPU draws at most."""
    return forecast.Power(gpu.watts, "the most that its data sheet allows", at_most=True)
