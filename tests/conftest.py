import pytest
import torch

# The models and tensors here are tiny: waking other threads costs more than they bring. Tests of threads ask for them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded_and_without_grad():
    """Every test starts from the same random state, and in inference's mode; tests of backward turn grad on."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _outside_the_repository(tmp_path, monkeypatch):
    """Processes that tests start import the installed package, not the repository's folder of that name."""
    monkeypatch.chdir(tmp_path)


_KERNEL_CASES: dict[str, int] = {}


@pytest.fixture
def record_kernel_cases():
    """Where tests note how many kernel cases they compared; the closing summary prints it."""
    return _KERNEL_CASES


def pytest_terminal_summary(terminalreporter):
    for mode, count in _KERNEL_CASES.items():
        terminalreporter.write_line(f"CUDA kernels, {mode}: {count} cases compared with the reference")
