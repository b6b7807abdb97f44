"""Let vLLM's model loaders build models whose attention layers follow the policy."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader import BaseModelLoader

from sparse_compile.vllm.refusals import check_config
from sparse_compile.vllm.settings import read_settings
from sparse_compile.vllm.split import split_model

logger = init_logger(f"vllm.{__name__}")


def register_loaders() -> None:
    """Put a loader that follows policies in the place of every loader of vLLM. A second call changes nothing.

    ``register_model_loader`` does the same, but it logs a warning for each format in every process of vLLM.
    """
    loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    loaders.update({name: following_policies(loader) for name, loader in loaders.items()})


@cache
def following_policies(loader: type[BaseModelLoader]) -> type[BaseModelLoader]:
    """Return a subclass of a loader that splits the attention layers of a model after it built the model.

    Without a policy in ``additional_config`` it does what ``loader`` does.
    """
    if getattr(loader, "follows_policies", False):
        return loader

    class PolicyLoader(loader):
        follows_policies = True

        def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
            settings = read_settings(vllm_config.additional_config)
            if settings is not None:
                check_config(vllm_config)
                # vLLM's compile cache is keyed by this config, so it needs to hold the policy itself and not a file's name.
                vllm_config.additional_config = {**vllm_config.additional_config, **settings.to_config()}
            model: nn.Module = super().create_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            if settings is not None:
                plan = split_model(model, vllm_config, settings.policy)
                logger.info("sparse_compile: %s", plan)
            return model

    PolicyLoader.__name__ = PolicyLoader.__qualname__ = loader.__name__
    return PolicyLoader
