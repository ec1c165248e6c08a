"""One model on the devices of several processes, as of several hosts: the tokens of one, and an end for all."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from jaxserve import LLM
from jaxserve.cli.main import main
from jaxserve.config import DEMO_MODEL
from tests.adapter_files import write_adapter
from tests.several_processes import ENDLESS, MIXED, OF_A_JOB, answers, ends, scripts

SMALL = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "page_size": 16}
TWO = SMALL | {"tensor_parallel_size": 2}


@pytest.mark.parametrize(("devices", "adapters"), [(1, False), (2, True)])  # 4 devices repeat its 2 KV heads
def test_two_processes_answer_as_one(devices: int, adapters: bool, tmp_path: Path) -> None:
    settings = SMALL | {"tensor_parallel_size": 2 * devices}
    if adapters:
        settings["lora_modules"] = [f"own={write_adapter(tmp_path / 'own', DEMO_MODEL)}"]
    with LLM(progress=False, **settings) as llm:
        expected = json.loads(json.dumps(answers(llm)))
    with scripts(MIXED, devices=devices, **settings) as processes:
        (status, printed, errors), (others_status, others_printed, others_errors) = ends(processes)
    assert (status, others_status) == (0, 0), errors + others_errors
    assert json.loads(printed) == expected
    assert not re.match(r"\[[\[\d]", others_printed)  # the first alone answers


def test_each_process_of_a_job_that_names_no_first_one_has_an_engine_of_its_own() -> None:
    with LLM(progress=False, **TWO) as llm:
        expected = json.loads(json.dumps(answers(llm)))
    with scripts(OF_A_JOB, devices=2, **TWO) as processes:
        for status, printed, errors in ends(processes):
            assert status == 0, errors
            assert json.loads(printed) == expected


def test_an_orbax_checkpoint_is_restored_by_each_process(tmp_path: Path) -> None:
    assert main(["convert", str(DEMO_MODEL), str(tmp_path / "orbax")]) == 0
    with LLM(progress=False, **TWO) as llm:
        expected = json.loads(json.dumps(answers(llm)))
    with scripts(MIXED, model=str(tmp_path / "orbax"), **TWO) as processes:
        (status, printed, errors), (others_status, _, others_errors) = ends(processes)
    assert (status, others_status) == (0, 0), errors + others_errors
    assert json.loads(printed) == expected


@pytest.mark.parametrize("killed", [0, 1])
def test_all_end_soon_after_one_is_killed(killed: int) -> None:
    with scripts(ENDLESS, **(TWO | {"max_model_len": 2048})) as processes:
        while not re.match(r"\[\d", processes[0].stdout.readline()):  # until there are tokens
            assert processes[0].poll() is None
        os.kill(processes[killed].pid, signal.SIGKILL)
        start = time.monotonic()
        assert processes[1 - killed].wait(timeout=200) != 0
        assert time.monotonic() - start < 60  # JAX itself takes longer to notice
        errors = processes[1 - killed].stderr.read()
    assert f"process {killed} has ended without a word" in errors


def test_what_one_cannot_load_all_say(tmp_path: Path) -> None:
    with scripts(MIXED, model=str(tmp_path), **TWO) as processes:
        found = ends(processes)
    for status, _, errors in found:
        assert status == 1
        assert "has no config.json; give a HuggingFace model directory" in errors


def test_a_process_without_a_device_of_the_mesh_is_refused() -> None:
    with scripts(MIXED, **(TWO | {"tensor_parallel_size": 1})) as processes:
        found = ends(processes)
    for status, _, errors in found:
        assert status == 1
        assert "tensor_parallel_size=1 leaves process 1 without work" in errors
