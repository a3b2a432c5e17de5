"""Where records go is tried before there is one, and they tell the machine."""

import pytest
import torch

from effbert.bench import compile_report, kernels, predict, samplers, step
from effbert.bench.measure import cpu_name, machine, output_file


@pytest.mark.parametrize(
    "main",
    [kernels.main, step.main, predict.main, samplers.main, lambda more: compile_report.main(["--reduced", *more])],
)
def test_a_folder_for_an_output_file_is_refused_before_anything_is_measured(main, tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        main(["--output", str(tmp_path)])


def test_a_folder_is_made_for_the_output_file_and_the_file_left_alone(tmp_path):
    path = tmp_path / "deep" / "record.json"
    assert output_file(path) == path and path.parent.is_dir() and not path.exists()
    path.write_text("old")
    assert output_file(path).read_text() == "old"


def test_a_record_names_the_cpu():
    assert machine(torch.device("cpu"))["device"] == cpu_name()
    assert cpu_name()
