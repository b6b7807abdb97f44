"""What all tests share: one deterministic hypothesis profile, a fresh start, and ``gpu`` tests run only where CUDA is."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("sparse_compile", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("sparse_compile")


@pytest.fixture
def fresh() -> None:
    """Nothing compiled before is there, and fp32 is not rounded to tf32."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.backends.cuda.matmul.allow_tf32 = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
