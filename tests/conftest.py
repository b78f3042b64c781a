import pytest
import torch

from kernels.attention import forget_compiled


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and torch sees none on this machine"))


@pytest.fixture
def fresh_compiler():
    """As in a new process: what is compiled counts towards torch's limits and those of kernels/."""
    forget_compiled()
    yield
    forget_compiled()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
