"""Peaks of devices by their exact names."""

from __future__ import annotations

import types

import pytest

from train.parallel.hardware import PEAK_GIGABYTES, PEAK_TFLOPS, peak_bandwidth, peak_flops, utilization


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "listed"),
    [
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"), ("NVIDIA A100-PCIE-40GB", "NVIDIA A100"), ("NVIDIA A10", "NVIDIA A10"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"), ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H100 NVL", "NVIDIA H100 NVL"),
        ("NVIDIA L4", "NVIDIA L4"), ("NVIDIA L40S", "NVIDIA L40S"), ("TPU v5 lite", "TPU v5 lite"), ("TPU v5", "TPU v5"),
        ("Tesla V100-SXM2-16GB", "Tesla V100"), ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA A10G", "NVIDIA A10G"), ("NVIDIA GB200", "NVIDIA GB200"), ("TPU7x", "TPU7x"),
    ],
)  # fmt: skip
def test_a_board_and_its_memory_do_not_matter(kind, listed):
    for dtype, tflops in PEAK_TFLOPS[listed].items():
        assert peak_flops(device(kind), dtype) == tflops * 1e12
    assert peak_flops(device(kind), "float8") is None
    assert peak_bandwidth(device(kind)) == PEAK_GIGABYTES[listed] * 1e9


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA A10M", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "cpu", "TPU v7",
     "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100X"],
)  # fmt: skip
def test_another_device_has_no_peak(kind):
    assert peak_bandwidth(device(kind)) is None
    assert peak_flops(device(kind), "bfloat16") is None and utilization(1.0, [device(kind)], "bfloat16") is None


def test_both_tables_list_the_same_devices():
    assert PEAK_GIGABYTES.keys() == PEAK_TFLOPS.keys()
