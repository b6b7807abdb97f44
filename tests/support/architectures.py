"""Tiny random models of many architectures of transformers, each with inputs, for tests that read their graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from support.models import VOCABULARY

LENGTH = 16
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
XLM: dict[str, Any] = {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "n_words": VOCABULARY}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
SIDES = {
    f"{side}_{name}": n
    for side in ("encoder", "decoder")
    for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))
}
BART: dict[str, Any] = {"d_model": 32, "decoder_start_token_id": 1, **SIDES}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_channels": 3}
SPEECH: dict[str, Any] = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


def text() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)}


def both() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": text()["input_ids"][:, :7]}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def speech() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Architecture:
    """A model: its name in transformers, its configuration beside ``SIZES`` and its inputs.

    ``left`` is a part of the reason of every call that stays as it is; without it, all calls are rewritten.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Tensor]] = text
    attention: str | None = None
    without: tuple[str, ...] = ()
    left: str = ""

    def build(self) -> Any:
        """The model in eval mode, with the same weights every time."""
        torch.manual_seed(0)
        sizes = {name: size for name, size in SIZES.items() if name not in self.without}
        config = AutoConfig.for_model(self.name, **{**sizes, **self.config})
        factory: Any = AutoModel
        return factory.from_config(config, attn_implementation=self.attention).eval()

    def __str__(self) -> str:
        return f"{self.name} {self.attention or ''}".strip().replace(" ", "-")


KV = {"num_key_value_heads": 2}
ARCHITECTURES = [
    # decoders
    Architecture("bloom", GPT),
    Architecture("llama", KV),
    Architecture("openai-gpt", GPT, left="mul multiplies each score by another number"),
    Architecture("gptj", {**GPT, "rotary_dim": 4}),
    Architecture("codegen", {**GPT, "rotary_dim": 4}),
    Architecture("gpt_bigcode", GPT),
    Architecture("gpt_neo", {"num_layers": 1, "num_heads": 4, "attention_types": [[["local"], 1]], "window_size": 8}),
    Architecture("gpt_neox", attention="eager"),
    Architecture("gpt_neox_japanese"),
    Architecture("ctrl", {**GPT, "dff": 64}),
    Architecture("xglm", {"d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 64}),
    Architecture("biogpt"),
    Architecture("cohere", KV),
    Architecture("cohere2", KV),
    Architecture("olmo", KV),
    Architecture("olmo2", KV),
    Architecture("olmo3", KV),
    Architecture("granite", KV),
    Architecture("starcoder2", KV),
    Architecture("persimmon"),
    Architecture("stablelm", {"num_key_value_heads": 4}),
    Architecture("nemotron", {**KV, "head_dim": 8}),
    Architecture("glm", {**KV, "head_dim": 8}),
    Architecture("diffllama", KV),
    Architecture("falcon", {"new_decoder_architecture": True}),
    Architecture("deepseek_v2", {**MLA, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    Architecture("deepseek_v3", {**MLA, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    Architecture("qwen2_moe", {**KV, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}),
    Architecture("phimoe", {**KV, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Architecture("smollm3", KV),
    Architecture("exaone4", KV),
    # encoders
    Architecture("bert", attention="eager"),
    Architecture("albert", {"embedding_size": 32}),
    Architecture("roberta"),
    Architecture("electra", {"embedding_size": 32}),
    Architecture("distilbert", {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}),
    Architecture("mobilebert", {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    Architecture("convbert", {"embedding_size": 32}),
    Architecture("roformer", {"embedding_size": 32}),
    Architecture("rembert", {"input_embedding_size": 32}),
    Architecture("ibert"),
    Architecture("megatron-bert"),
    Architecture("mpnet"),
    Architecture("squeezebert", {"embedding_size": 32}),
    Architecture("esm", {"mask_token_id": 4}),
    Architecture("nomic_bert"),
    Architecture("eurobert"),
    Architecture("canine"),
    Architecture("xlm", XLM),
    Architecture("flaubert", XLM),
    Architecture("deberta-v2", {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}),
    Architecture("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64}, without=("max_position_embeddings",)),
    Architecture("longformer", {"attention_window": 8}, left="pass through"),
    Architecture(
        "reformer",
        {
            "attn_layers": ["local", "lsh"],
            "axial_pos_embds": False,
            "attention_head_size": 8,
            "num_buckets": 4,
            "lsh_attn_chunk_length": 8,
            "local_attn_chunk_length": 8,
            "is_decoder": False,
        },
        left="written with exp",
    ),
    # encoders and decoders
    Architecture("bart", BART, both),
    Architecture("bart", BART, both, attention="eager"),
    Architecture("marian", BART, both),
    Architecture("pegasus", BART, both),
    Architecture("m2m_100", BART, both),
    Architecture("blenderbot", BART, both),
    Architecture("fsmt", {**BART, "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["a", "b"]}, both),
    Architecture("t5", T5, both),
    Architecture("umt5", T5, both),
    Architecture("longt5", {**T5, "encoder_attention_type": "local", "local_radius": 4}, both, left="also used by output"),
    # images and speech
    Architecture("vit", IMAGE, image),
    Architecture("deit", IMAGE, image),
    Architecture("beit", IMAGE, image),
    Architecture("dinov2", IMAGE, image),
    Architecture("clip_vision_model", IMAGE, image),
    Architecture("siglip_vision_model", IMAGE, image),
    Architecture("yolos", {**IMAGE, "image_size": [16, 16], "num_detection_tokens": 2}, image),
    Architecture(
        "swin",
        {**IMAGE, "embed_dim": 16, "depths": [1], "num_heads": [4], "window_size": 4},
        image,
        without=("num_hidden_layers", "num_attention_heads"),
    ),
    Architecture(
        "swinv2",
        {**IMAGE, "embed_dim": 16, "depths": [1], "num_heads": [4], "window_size": 4},
        image,
        without=("num_hidden_layers", "num_attention_heads"),
    ),
    Architecture("wav2vec2", SPEECH, speech),
    Architecture("hubert", SPEECH, speech),
    Architecture("wavlm", SPEECH, speech, left="nn.MultiheadAttention"),
    Architecture("unispeech", SPEECH, speech),
]
