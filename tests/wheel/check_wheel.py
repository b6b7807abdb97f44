"""What must hold of the installed wheel. Run by tests/wheel/run, in an environment and a folder where the checkout is not."""

import importlib.util
import sysconfig
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import sparse_compile
import sparse_compile.masks
import sparse_compile.passes
from sparse_compile.masks import causal, sink, sliding_window

site = Path(sysconfig.get_path("purelib"))
for package in (sparse_compile, sparse_compile.masks, sparse_compile.passes):
    assert package.__file__ and Path(package.__file__).is_relative_to(site), package
for package_name in ("masks", "passes", "tests", "bench"):
    assert importlib.util.find_spec(package_name) is None, f"the wheel installs {package_name!r} at the top level"
assert files(sparse_compile).joinpath("py.typed").is_file()
assert version("sparse-compile") == sparse_compile.__version__

streaming = causal & (sink(1) | sliding_window(2))
assert streaming.draw(4, 4).split() == ["█···", "██··", "███·", "█·██"]

(entry_point,) = entry_points(group="torch_dynamo_backends", name="sparse_compile")
assert entry_point.load() is sparse_compile.backend
assert "sparse_compile" in torch._dynamo.list_backends()

(plug_in,) = entry_points(group="vllm.general_plugins", name="sparse_compile")
assert callable(plug_in.load())  # importing it needs no vLLM


class SelfAttention(torch.nn.Module):
    def __init__(self, mask: torch.Tensor | None = None) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-2, 1).unbind(-2)  # [B, heads, tokens, 4]
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None)


x = torch.randn(1, 16, 8)
stock, oracle = SelfAttention(), SelfAttention(streaming.dense(16, 16))
oracle.load_state_dict(stock.state_dict())
exact = torch.compile(stock, backend="sparse_compile", options={"inner": "aot_eager"})
torch.testing.assert_close(exact(x), stock(x))
sparse = torch.compile(stock, backend="sparse_compile", options={"inner": "aot_eager", "policy": streaming})
torch.testing.assert_close(sparse(x), oracle(x))
print("the wheel holds")
