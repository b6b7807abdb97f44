"""Read the policy that vLLM's ``additional_config`` names, holds or points to."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_compile import policies
from sparse_compile.head_profile import Profile
from sparse_compile.masks import Mask
from sparse_compile.policy import Policy
from sparse_compile.policy_argument import policy_of, read_policy

KEY = "sparse_compile"
NAMED: dict[str, Callable[..., Policy]] = {
    "dense": policies.dense,
    "streaming_llm": policies.streaming_llm,
    "duo_attention": policies.duo_attention,
    "lserve_static": policies.lserve_static,
    "quest": policies.quest,
    "lserve": policies.lserve,
    "block_topk": policies.block_topk,
}


@dataclass(frozen=True)
class Settings:
    """What a user set: the policy, and whether KV heads may change places so that all ranks hold equally many of a kind."""

    policy: Policy
    balance: bool = False

    def to_config(self) -> dict[str, Any]:
        """Return an ``additional_config`` that holds the policy itself and reads no file."""
        return {KEY: {"policy": json.loads(self.policy.to_json()), "balance": self.balance}}


def read_settings(additional: Any) -> Settings | None:
    """Read the settings of an ``additional_config``, or return None if it does not mention sparse_compile.

    ``policy`` is a name of ``sparse_compile.policies`` with its arguments beside it, the path of a file, or the content of such
    a file. A file holds a policy, a mask or a profile.

        >>> read_settings({"sparse_compile": {"policy": "streaming_llm", "sink": 4, "recent": 28}})
        Settings(policy=Policy(causal & (sink(4) | sliding_window(28))), balance=False)

    Raises ``ValueError`` for anything else.
    """
    content = additional.get(KEY) if isinstance(additional, Mapping) else None
    if content is None:
        return None
    if not isinstance(content, Mapping) or "policy" not in content:
        raise ValueError(
            f"additional_config[{KEY!r}] needs an object with a policy, got {content!r}: "
            'write {"sparse_compile": {"policy": "streaming_llm"}}'
        )
    arguments = {name: value for name, value in content.items() if name not in ("policy", "balance")}
    balance = content.get("balance", False)
    if not isinstance(balance, bool):
        raise ValueError(f"balance of additional_config[{KEY!r}] needs true or false, got {balance!r}")
    return Settings(_policy(content["policy"], arguments), balance)


def _policy(given: Any, arguments: dict[str, Any]) -> Policy:
    if isinstance(given, str) and given in NAMED:
        return _named(given, arguments)
    if arguments:
        raise ValueError(
            f"additional_config[{KEY!r}] has {', '.join(sorted(arguments))}, which only a named policy takes, "
            f"but the policy is {given!r}: name one of {', '.join(NAMED)}, or leave the arguments out"
        )
    if isinstance(given, Mapping):
        text = json.dumps(given)
        return Policy(Mask.from_json(text)) if "mask" in given else Policy.from_json(text)
    if not isinstance(given, str) or not Path(given).exists():
        raise ValueError(
            f"policy of additional_config[{KEY!r}] needs one of {', '.join(NAMED)}, a file, or the content of a policy file, "
            f"got {given!r}: there is no such name and no such file"
        )
    read = read_policy(given)
    return policy_of(read)[0] if isinstance(read, Profile) else read


def _named(name: str, arguments: dict[str, Any]) -> Policy:
    build = NAMED[name]
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as wrong:
        raise ValueError(
            f"the policy {name} takes {', '.join(inspect.signature(build).parameters)}, "
            f"got {', '.join(arguments) or 'no arguments'}: {wrong}"
        ) from wrong
    return build(**arguments)
