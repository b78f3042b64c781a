import pytest
import torch

from attention import compiled_flex


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and torch sees none on this machine"))


@pytest.fixture
def fresh_compiler():
    """As in a new process: what is compiled counts towards torch's limits, and towards what attention.py allows."""
    torch._dynamo.reset()
    compiled_flex.cache_clear()
    yield
    torch._dynamo.reset()
    compiled_flex.cache_clear()
