"""Read the policy that a command line names: a published policy, or a file of a policy, a mask or a profile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparse_compile import policies
from sparse_compile.head_profile import Profile
from sparse_compile.masks import Mask
from sparse_compile.masks.json_format import parse_json
from sparse_compile.policy import Policy

NAMED: dict[str, Callable[[], Policy]] = {
    "dense": policies.dense,
    "streaming_llm": policies.streaming_llm,
    "quest": policies.quest,
    "lserve": policies.lserve,
    "block_topk": policies.block_topk,
}
OF_A_PROFILE = ("duo_attention", "lserve_static")  # these also need the scores of the model's heads
RETRIEVAL, SINK, RECENT = 0.5, 64, 256  # for profiles that record no sizes


def read_policy(given: str) -> Policy | Profile:
    """Read the policy of a name, or of a file by what it holds. A name goes before a file; write ``./quest`` for that file.

        >>> read_policy("streaming_llm")
        Policy(causal & (sink(4) | sliding_window(1020)))

    A folder or a tsv file is a published DuoAttention pattern. Raises ``ValueError`` where neither a name nor a file fits, and
    for files that hold something else.
    """
    if given in NAMED:
        return NAMED[given]()
    path = Path(given)
    if not path.exists():
        raise ValueError(f"--policy needs {_accepted()}, got {given!r}: {_remedy(given)}")
    if path.is_dir() or path.suffix == ".tsv":
        return Profile.read(path)
    text = path.read_text(encoding="utf-8")
    content = parse_json(text, "policy")
    kinds = content.keys() if isinstance(content, dict) else ()
    if "profile" in kinds:
        return Profile.from_json(text)
    return Policy(Mask.from_json(text)) if "mask" in kinds else Policy.from_json(text)


def policy_of(profile: Profile) -> tuple[Policy, str]:
    """Build a policy under which half of the KV heads see everything, and say what the others see.

    Others see the sink and the window with which the profile was trained, if it records them.
    """
    found = (profile.numbers.get(name) for name in ("sink", "recent"))
    sink, recent = (size if isinstance(size, int) else usual for size, usual in zip(found, (SINK, RECENT), strict=True))
    note = (
        f"the policy is made of a profile by {profile.method}: half of the KV heads see everything, the others the first "
        f"{sink} and the last {recent} tokens. Save another one with Profile.load(file).policy(...).save(file)"
    )
    return profile.policy(RETRIEVAL, sink=sink, recent=recent), note


def _accepted() -> str:
    return f"one of {', '.join(NAMED)}, or a file of a policy, a mask or a profile"


def _remedy(given: str) -> str:
    if given in OF_A_PROFILE:
        return "this one is made of a profile, so pass the file that calibrate wrote"
    return "there is no such name and no such file"
