"""Commands that are killed at random moments; tests/bench/kills.py does two hundred of them."""

import random

import killing
import pytest
import torch


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield killing.make_suite_to_work_on(tmp_path_factory.mktemp("suite"))
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "index", "data rows", "suite convert", "save"])
def test_killed_at_random_moments_a_command_loses_nothing(tmp_path, suite, name):
    told = killing.kill_at_random(killing.CASES[name], 2, tmp_path, suite, random.Random(name))
    assert told.problems == []
    assert told.kills >= 2
