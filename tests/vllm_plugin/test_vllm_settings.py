"""The policy of vLLM's ``additional_config`` is a name, a file or the policy itself. Anything else is one clear error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import sparse_compile as sc
from sparse_compile.masks import causal, sink, sliding_window
from sparse_compile.vllm.settings import Settings, read_settings

STREAMING = causal & (sink(4) | sliding_window(28))
GATES = [[0.9, 0.1], [0.2, 0.3]]


def settings(**content: Any) -> Settings | None:
    return read_settings({"sparse_compile": content})


@pytest.mark.parametrize("additional", [None, {}, {"another_plugin": 1}])
def test_without_the_key_there_are_no_settings(additional: Any) -> None:
    assert read_settings(additional) is None


def test_a_name_takes_its_arguments() -> None:
    assert settings(policy="streaming_llm", sink=4, recent=28) == Settings(sc.Policy(STREAMING))
    assert settings(policy="streaming_llm") == Settings(sc.policies.streaming_llm())


def test_duo_attention_takes_a_pattern() -> None:
    found = settings(policy="duo_attention", pattern=GATES, sink=2, recent=4)
    assert found == Settings(sc.policies.duo_attention(GATES, sink=2, recent=4))


def test_a_file_holds_a_policy_a_mask_or_a_profile(tmp_path: Path) -> None:
    policy, mask, profile = (tmp_path / f"{name}.json" for name in ("policy", "mask", "profile"))
    sc.Policy(STREAMING).save(policy)
    mask.write_text(STREAMING.to_json())
    sc.Profile(GATES).save(profile)
    assert settings(policy=str(policy)) == settings(policy=str(mask)) == Settings(sc.Policy(STREAMING))
    found = settings(policy=str(profile))
    assert found is not None and found.policy == sc.Profile(GATES).policy(0.5, sink=64, recent=256)


def test_the_content_of_a_file_may_stand_inline() -> None:
    assert settings(policy=json.loads(sc.Policy(STREAMING).to_json())) == Settings(sc.Policy(STREAMING))
    assert settings(policy=json.loads(STREAMING.to_json()), balance=True) == Settings(sc.Policy(STREAMING), balance=True)


def test_settings_go_through_a_config() -> None:
    found = Settings(sc.policies.duo_attention(GATES), balance=True)
    assert read_settings(json.loads(json.dumps(found.to_config()))) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("streaming_llm", "needs an object with a policy, got 'streaming_llm': write"),
        ({}, "needs an object with a policy, got {}: write"),
        ({"policy": "no_such"}, "got 'no_such': there is no such name and no such file"),
        ({"policy": 3}, "got 3: there is no such name and no such file"),
        ({"policy": "streaming_llm", "window": 3}, "streaming_llm takes sink, recent, got window: .*unexpected"),
        ({"policy": "duo_attention"}, "duo_attention takes pattern, .*, got no arguments: missing"),
        ({"policy": {"version": 1, "policy": {}}, "sink": 3}, "has sink, which only a named policy takes"),
        ({"policy": "streaming_llm", "balance": "yes"}, "balance of .* needs true or false, got 'yes'"),
        ({"policy": {"version": 99, "policy": {}}}, "a policy file needs version 1, got version 99"),
        ({"policy": {"version": 1, "profile": {}}}, "a policy file is needed, but this is a profile file"),
    ],
)
def test_anything_else_is_an_error(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings({"sparse_compile": content})


def test_importing_the_package_does_not_import_vllm() -> None:
    """The entry point is loaded by vLLM, and nothing else of sparse_compile imports this folder."""
    root = Path(sc.__file__).parent
    users = [path for path in root.rglob("*.py") if re.search(r"sparse_compile\.vllm\b", path.read_text("utf-8"))]
    assert {path.parent.name for path in users} == {"vllm"}
