"""What all tests share: one deterministic hypothesis profile, and ``gpu`` tests run only where CUDA is."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("sparse_compile", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("sparse_compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
