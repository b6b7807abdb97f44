"""Invalid JSON masks raise errors that say what is wrong."""

from __future__ import annotations

import json

import pytest

from sparse_compile.masks import (
    Mask,
)


@pytest.mark.parametrize("text", ["", "{", "causal", '{"version": 1, "mask": {"causal": {}}'], ids=repr)
def test_broken_json_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read a mask, because the text is not valid JSON"):
        Mask.from_json(text)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"version": 2, "mask": {"causal": {}}}, "got version 2"),
        ({"version": "1", "mask": {"causal": {}}}, "got version '1'"),
        ({"mask": {"causal": {}}}, "got version None"),
        ({"version": 1}, "got version 1"),
        ({"causal": {}}, "got version None"),
        ([1, 2], r"got version \[1, 2\]"),
    ],
    ids=str,
)
def test_another_version_is_refused(content: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"a mask file needs version 1 and a mask, {got}"):
        Mask.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        ({"moonlight": {}}, "unknown mask 'moonlight': this version supports causal, chunked"),
        ("causal", "a mask in JSON must be an object with one key, the pattern, got 'causal'"),
        ({}, "a mask in JSON must be an object with one key"),
        ({"causal": {}, "full": {}}, "a mask in JSON must be an object with one key"),
        ({"and": []}, "'and' in JSON needs a list of masks"),
        ({"or": {"causal": {}}}, "'or' in JSON needs a list of masks"),
        ({"not": []}, "a mask in JSON must be an object with one key"),
        ({"and": [{"causal": {}}, 3]}, "a mask in JSON must be an object with one key, the pattern, got 3"),
        ({"sink": [3]}, "the arguments of 'sink' in JSON must be an object"),
        ({"sink": {}}, "cannot build 'sink'"),
        ({"sink": {"size": 3, "colour": 2}}, "cannot build 'sink'.*colour"),
        ({"sink": {"size": "3"}}, "cannot build 'sink'.*sink size needs an integer, got '3'"),
        ({"sink": {"size": None}}, "cannot build 'sink'.*needs an integer, got None"),
        ({"sink": {"size": 0}}, "sink size needs to be at least 1, got 0"),
        ({"causal": {"size": 3}}, "cannot build 'causal'"),
        ({"document": {"ids": {"dtype": "int65", "tensor": [[0]]}}}, "unknown tensor dtype 'int65'"),
        ({"document": {"ids": {"dtype": "int64", "tensor": "x"}}}, "cannot build 'document'"),
        ({"document": {"ids": {"colour": 3}}}, "cannot build 'document'"),
        ({"document": {"ids": [{"causal": {}}]}}, "cannot build 'document'"),
        ({"document": {"ids": {"dtype": "int64", "tensor": [0]}}}, "document needs ids of shape"),
        ({"document": {"ids": {"dtype": "int64", "tensor": [[0], [0, 1]]}}}, "expected sequence of length 1"),
        ({"per_head": {"masks": 3}}, "cannot build 'per_head'"),
        ({"per_head": {"masks": [3]}}, "cannot build 'per_head'.*needs a list of masks"),
        ({"per_head": {"masks": []}}, "per_head needs at least one mask"),
        ({"neighborhood": {"grid": [8], "kernel": [9]}}, "needs to fit the grid"),
    ],
    ids=lambda value: json.dumps(value) if not isinstance(value, str) else "",
)
def test_a_wrong_mask_in_json_says_what_is_wrong(mask: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Mask.from_json(json.dumps({"version": 1, "mask": mask}))
