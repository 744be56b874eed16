import pytest
import torch


@pytest.fixture(params=[1, 2, 3])
def num_threads(request):
    """Run with so many threads: torch and MKL cut their work by it, and the cuts must not show."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
