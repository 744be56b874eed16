import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def device():
    """Where the kernels run; tests/conftest.py asks for the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """The interpreter gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
