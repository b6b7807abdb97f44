"""Let vLLM's model loaders build models whose attention layers follow the policy."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader import BaseModelLoader

from sparse_compile.masks.optional_packages import needed
from sparse_compile.vllm.balance import HeadOrders
from sparse_compile.vllm.refusals import check_config
from sparse_compile.vllm.settings import read_settings

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

        def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            settings = read_settings(vllm_config.additional_config)
            if settings is not None:
                with needed("a policy inside vLLM", "vllm"):  # here, so that an older vLLM can run without a policy
                    from sparse_compile.vllm.split import split_model

                check_config(vllm_config)
                # vLLM's compile cache is keyed by this config, so it needs to hold the policy itself and not a file's name.
                vllm_config.additional_config = {**vllm_config.additional_config, **settings.to_config()}
            model = super().create_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            if settings is not None:
                plan = split_model(model, vllm_config, settings.policy, balance=settings.balance)
                if plan.orders is not None:
                    model.head_orders = _head_orders(plan.orders, loader, vllm_config)
                names = ", ".join(part.name for part in plan.parts(0, 0))
                logger.info("sparse_compile: %d KV cache groups; layer 0 has the parts %s", plan.groups(), names)
            return model

    class MovingLoader(PolicyLoader):
        def get_all_weights(self, model_config: Any, model: nn.Module) -> Any:
            # vLLM also reads weights anew for a running model, so the orders are kept there and not here.
            weights = super().get_all_weights(model_config, model)
            orders = getattr(model, "head_orders", None)
            return weights if orders is None else orders.moved(weights)

    found = MovingLoader if hasattr(loader, "get_all_weights") else PolicyLoader
    found.__name__ = found.__qualname__ = loader.__name__
    return found


def _head_orders(orders: tuple[tuple[int, ...], ...], loader: type[BaseModelLoader], vllm_config: Any) -> HeadOrders:
    if not hasattr(loader, "get_all_weights"):
        raise ValueError(
            f"balance moves heads in the weights, which {loader.__name__} does not hand out: use --load-format auto"
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "balance moves heads in the weights, but not in adapters, and LoRA is enabled: leave --enable-lora out"
        )
    config = vllm_config.model_config
    group = config.model_arch_config.total_num_attention_heads // config.get_total_num_kv_heads()
    return HeadOrders(orders, group, config.get_head_size())
