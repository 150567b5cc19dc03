"""The models, batches and meshes by which predictions are compared with measurements."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.workload import OPTIMIZER, packed, padded, random_batch
from train.config import RunConfig
from train.objectives.masked import Masked
from train.objectives.span_corruption import SpanCorruption
from train.parallel.mesh import MeshConfig
from transformer.layers.feed_forward import DenseConfig
from transformer.layers.mixture_of_experts import ExpertsConfig
from transformer.layers.position import RelativeConfig, RotaryConfig
from transformer.mixers.softmax import SoftmaxConfig
from transformer.models.bert import BertConfig
from transformer.models.encoder_decoder import T5Config
from transformer.models.gpt import GPTConfig

VOCAB_SIZE = 2048
"""Of the cases on a CPU."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, on how many devices, and whether rows end in padding."""

    title: str
    config: RunConfig
    devices: int = 1
    padding: bool = False

    def batch(self) -> dict[str, np.ndarray]:
        """A batch of random tokens."""
        batch = random_batch(self.config)
        return padded(batch) if self.padding else batch


def cases(platform: str, devices: int) -> list[Case]:
    """Those for a platform: small on a CPU, where meshes are of virtual devices; GPT-2's sizes on an accelerator.

    Args:
        devices: that there are; on a CPU any number can be made.
    """
    return _on_cpu() if platform == "cpu" else [case for case in _on_accelerator() if case.devices <= devices]


def regret_cases(platform: str, devices: int) -> list[Case]:
    """Models and numbers of devices for which a plan's pick is compared with all other layouts.

    Args:
        devices: that there are; on a CPU any number can be made.
    """
    if platform != "cpu":
        return [case for case in _to_plan_on_accelerator() if case.devices <= devices]
    return _to_plan_on_cpu()


def _gpt(layers: int, width: int, length: int, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size, max_length=length, num_layers=layers, embed_dim=width,
        attention=SoftmaxConfig(num_heads=width // 64),
    )  # fmt: skip


def _small_bert() -> BertConfig:
    return BertConfig(
        vocab_size=VOCAB_SIZE, max_length=128, num_layers=4, embed_dim=256, attention=SoftmaxConfig(num_heads=4),
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def _small_t5(layers: int) -> T5Config:
    return T5Config(
        vocab_size=VOCAB_SIZE, num_layers=layers, embed_dim=256,
        attention=SoftmaxConfig(num_heads=4, head_dim=64, bias=False, scale=1.0, position=RelativeConfig()),
    )  # fmt: skip


def _large_gpt(layers: int, width: int, length: int, batch_size: int, **fields: Any) -> RunConfig:
    return _run(dataclasses.replace(_gpt(layers, width, length, 50304), dtype="bfloat16", **fields), batch_size)


def _bert_base(batch_size: int, length: int) -> RunConfig:
    model = BertConfig(vocab_size=30592, dtype="bfloat16", dropout=0.0, attention_dropout=0.0)
    return _run(model, batch_size, length=length, objective=Masked())


def _run(model: Any, batch_size: int, **fields: Any) -> RunConfig:
    return RunConfig(name="case", batch_size=batch_size, model=model, optimizer=OPTIMIZER, **fields)


def _on_cpu() -> list[Case]:
    small = _gpt(4, 256, 128, VOCAB_SIZE)
    experts = ExpertsConfig(num_experts=4, experts_per_token=2, dim=512, capacity_factor=1.25)

    def with_(**fields: Any) -> GPTConfig:
        return dataclasses.replace(small, **fields)

    def on(mesh: MeshConfig) -> RunConfig:
        return _run(small, 8, mesh=mesh)

    return [
        Case("GPT, scanned", _run(small, 8)),
        Case("GPT, unrolled", _run(with_(scan_layers=False), 8)),
        Case("GPT, remat light", _run(with_(remat="light"), 8)),
        Case("GPT, remat full", _run(with_(remat="full"), 8)),
        Case("GPT, 2 microbatches", _run(small, 16, microbatches=2)),
        Case("GPT, 384 wide, 256 long", _run(_gpt(3, 384, 256, VOCAB_SIZE), 4)),
        Case("GPT, 128 wide, 64 long", _run(_gpt(6, 128, 64, VOCAB_SIZE), 16)),
        Case("GPT, packed documents", packed(_run(small, 8))),
        Case("GPT, experts", _run(with_(mlp=experts), 8)),
        Case("BERT with padding", _run(_small_bert(), 8, objective=Masked()), padding=True),
        Case("T5", _run(_small_t5(3), 8, length=64, objective=SpanCorruption(source_length=128))),
        Case("GPT, data 2", on(MeshConfig(strategy="dp")), devices=2),
        Case("GPT, fsdp 4", on(MeshConfig(strategy="fsdp")), devices=4),
        Case("GPT, fsdp 4 × tensor 2", on(MeshConfig(strategy="fsdp_tensor", fsdp=4, tensor=2)), devices=8),
    ]


def _to_plan_on_cpu() -> list[Case]:
    small, wide, deep = _gpt(4, 256, 128, VOCAB_SIZE), _gpt(2, 512, 128, VOCAB_SIZE), _gpt(8, 128, 64, VOCAB_SIZE)
    modern = dataclasses.replace(
        small, norm="rms_norm", mlp=DenseConfig(activation="swiglu"),
        attention=SoftmaxConfig(num_heads=4, num_kv_heads=2, position=RotaryConfig()),
    )  # fmt: skip
    experts = dataclasses.replace(small, mlp=ExpertsConfig(num_experts=4, experts_per_token=2, dim=512))
    words = _gpt(2, 128, 128, 16384)
    return [
        Case("GPT on one", _run(small, 8), devices=1),
        Case("modern GPT on one", _run(modern, 8), devices=1),
        Case("GPT on two", _run(small, 16), devices=2),
        Case("wide GPT on two", _run(wide, 8), devices=2),
        Case("BERT on two", _run(_small_bert(), 16, objective=Masked()), devices=2),
        Case("large vocabulary on two", _run(words, 8), devices=2),
        Case("deep GPT on four", _run(deep, 16), devices=4),
        Case("experts on four", _run(experts, 16), devices=4),
        Case("T5 on four", _run(_small_t5(2), 16, length=64, objective=SpanCorruption(source_length=128)), devices=4),
        Case("modern GPT on eight", _run(modern, 16), devices=8),
        Case("wide GPT on eight", _run(wide, 16), devices=8),
    ]


def _to_plan_on_accelerator() -> list[Case]:
    found = [
        Case("GPT-2 124M, 8 × 1024", _large_gpt(12, 768, 1024, 8)),
        Case("GPT-2 124M, 32 × 1024", _large_gpt(12, 768, 1024, 32)),
        Case("GPT-2 124M, 64 × 512", _large_gpt(12, 768, 512, 64)),
        Case("GPT 350M, 16 × 1024", _large_gpt(24, 1024, 1024, 16)),
        Case("GPT 350M, 4 × 4096", _large_gpt(24, 1024, 4096, 4)),
        Case("GPT 1.3B, 4 × 2048", _large_gpt(24, 2048, 2048, 4)),
        Case("GPT 25M, 128 × 256", _large_gpt(6, 512, 256, 128)),
        Case("BERT-base, 32 × 128", _bert_base(32, 128)),
        Case("BERT-base, 64 × 512", _bert_base(64, 512)),
        Case("packed GPT-2 124M, 32 × 1024", packed(_large_gpt(12, 768, 1024, 32))),
    ]
    meshes = [
        Case(f"GPT-2 124M on {count}", _large_gpt(12, 768, 1024, 8 * count), devices=count) for count in (2, 4, 8)
    ]
    return [*found, *meshes]


def _on_accelerator() -> list[Case]:
    found = [
        Case("GPT-2 124M, 8 × 1024", _large_gpt(12, 768, 1024, 8)),
        Case("GPT-2 124M, 32 × 1024", _large_gpt(12, 768, 1024, 32)),
        Case("GPT-2 124M, 32 × 1024, unrolled", _large_gpt(12, 768, 1024, 32, scan_layers=False)),
        Case("GPT-2 124M, 64 × 1024, remat full", _large_gpt(12, 768, 1024, 64, remat="full")),
        Case("GPT-2 124M, packed documents", packed(_large_gpt(12, 768, 1024, 32))),
        Case("GPT 350M, 16 × 1024, remat light", _large_gpt(24, 1024, 1024, 16, remat="light")),
        Case("BERT-base, 32 × 128", _bert_base(32, 128), padding=True),
    ]
    for devices in (2, 4, 8):
        config = _large_gpt(12, 768, 1024, 8 * devices)
        mesh = MeshConfig(strategy="fsdp")
        found.append(Case(f"GPT-2 124M, fsdp {devices}", dataclasses.replace(config, mesh=mesh), devices=devices))
    return found
