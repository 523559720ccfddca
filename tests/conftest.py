"""Fixtures of more than one test file, which name them in their `pytestmark`."""

import pytest
import torch


@pytest.fixture
def same_random_numbers_in_every_order_of_tests():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    # tensors here are small: a thread that waits for a core which others use costs more than it gives
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
