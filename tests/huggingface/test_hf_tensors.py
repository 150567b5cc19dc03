"""Files of tensors: every type, in one file or several, and what is wrong with damaged ones."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from transformer.errors import UserError
from transformer.huggingface.tensors import INDEX, open_folder, write_folder

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.arange(5, dtype=np.float16),
    "c": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "d.double": np.arange(2, dtype=np.float64),
    "scalar": np.array(3, np.float32),
}


def test_what_is_written_is_read(tmp_path):
    write_folder(tmp_path, TENSORS, iter(TENSORS.items()), limit=10**9)
    read = open_folder(tmp_path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and np.array_equal(read[name], tensor)
    assert np.array_equal(load_file(tmp_path / "model.safetensors")["a.weight"], TENSORS["a.weight"])


def test_several_files_with_an_index(tmp_path):
    parts = {f"layer.{n}": np.full((4, 4), n, np.float32) for n in range(5)}
    write_folder(tmp_path, parts, iter(parts.items()), limit=160)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 5 * 64
    assert all(np.array_equal(open_folder(tmp_path)[name], part) for name, part in parts.items())
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=f"1 of 3 files of the index are missing: {names[1]}"):
        open_folder(tmp_path)


def test_of_what_is_no_weight_the_shape_is_known(tmp_path):
    save_file({"position_ids": np.arange(7)[None], "w": np.ones(2, np.float32)}, str(tmp_path / "model.safetensors"))
    assert open_folder(tmp_path)["position_ids"].shape == (1, 7)


@pytest.mark.parametrize("keep", [0, 4, 60, 200, -1])
def test_a_file_that_is_cut_off(tmp_path, keep):
    save_file(TENSORS, str(tmp_path / "whole.safetensors"))
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "whole.safetensors").write_bytes(whole[:keep])
    with pytest.raises(UserError, match="whole.safetensors: not a whole safetensors file: .*; get it again"):
        open_folder(tmp_path)


def test_a_header_that_is_damaged(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((20).to_bytes(8, "little") + b"{not JSON at all....." + bytes(40))
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_folder(tmp_path)
    header = json.dumps({"w": {"dtype": "F8_E9", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(UserError, match="F8_E9"):
        open_folder(tmp_path)


def test_types_that_are_no_weights_and_an_index_of_another_kind(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UserError, match="tensor x is of type F8_E4M3; supported: F32, F16, BF16, F64"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_folder(tmp_path)
    for index in ("[]", '{"weight_map": {"a": 1, "b": "c"}}', '{"weight_map": {"a": ["b"]}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match="no index of tensors"):
            open_folder(tmp_path)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (([0, 8], [2]), ([4, 12], [2]), "'b' begins at byte 4, and the tensor before it ends at 8"),
        (([0, 8], [2]), ([12, 16], [1]), "'b' begins at byte 12, and the tensor before it ends at 8"),
        (([0, 8], [2]), ([8, 12], [1]), "its tensors end at byte 12 of 16"),
        (([0, 8], [2]), ([8, 24], [4]), "should be at bytes 8 to 24 of 16"),
        (([0, 8], [2]), ([-8, 0], [2]), "'b' has no dtype, shape and data_offsets"),
        (([0, 8], [2]), ([8, 16, 0], [2]), "'b' has no dtype, shape and data_offsets"),
        (([0, 8], [2]), (8, [2]), "'b' has no dtype, shape and data_offsets"),
        (([0, 8], [2]), ([8, 16], [2.0]), "'b' has no dtype, shape and data_offsets"),
        (([0, 8], [2]), ([8, 16], [2**32, 2**32]), "should be at bytes 8 to 16 of 16"),
    ],
)
def test_tensors_that_are_not_where_the_format_has_them(tmp_path, a, b, message):
    header = {name: {"dtype": "F32", "shape": one[1], "data_offsets": one[0]} for name, one in (("a", a), ("b", b))}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(UserError, match=f"not a whole safetensors file: .*{message}"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..\\\\b", "C:x", ""])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"index\.json: names the file .*, which is not inside its folder"):
        open_folder(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"pytorch_model.bin, and such files can run code .* safe_serialization=True"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors in this folder"):
        open_folder(tmp_path)
