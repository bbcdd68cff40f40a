"""The file of a prepared context: what it holds, and what is said of bad ones."""

import json
import struct

import pytest
import torch

from sparse_attn.squeezed import SqueezedContext
from sparse_attn.squeezed import file as files
from tests.test_squeezed_context import build, tensors

pytest.importorskip("safetensors")


@pytest.mark.parametrize("options", [{}, {"coarse": 0.01, "shared": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_holds_all_of_it(tmp_path, options, dtype):
    context = build(*tensors(dtype=dtype), tokens=torch.arange(700), model="small", **options)
    path = tmp_path / "context.safetensors"
    context.save(path)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    loaded = SqueezedContext.load(path)
    assert loaded.parameters == context.parameters
    assert torch.equal(loaded.tokens, context.tokens)
    for a, b in zip(loaded.layers, context.layers, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["sparse_attn"])
    assert header["parameters"]["model"] == "small" and header["length"] == 700
    assert header["dtype"] == str(dtype).removeprefix("torch.")


def spoil(path, what):
    raw = bytearray(path.read_bytes())
    if what == "cut":
        raw = raw[:-100]
    elif what == "a bit":
        raw[-50] ^= 4
    elif what == "empty":
        raw = bytearray()
    elif what == "text":
        raw = bytearray(b"hello, this is no such file")
    elif what == "header":
        raw[200:210] = b"\xff" * 10
    path.write_bytes(raw)


@pytest.mark.parametrize("what", ["cut", "a bit", "empty", "text", "header"])
def test_a_damaged_file_says_so(tmp_path, what):
    path = tmp_path / "context.safetensors"
    build(*tensors()).save(path)
    spoil(path, what)
    with pytest.raises(ValueError, match=f"{path.name}: .*damaged"):
        SqueezedContext.load(path)


def rewrite(path, change, resum=True):
    """The file with another header, its checksum right or left as it was."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["sparse_attn"])
    tensors = load_file(path)
    change(header, tensors)
    if resum:
        header["header_crc32"] = files._header_sum(header)
    save_file(tensors, path, {"sparse_attn": json.dumps(header)})


def as_double(header, tensors):
    tensors["layers.1.log_counts"] = tensors["layers.1.log_counts"].double()
    header["crc32"]["layers.1.log_counts"] = files._checksum(tensors["layers.1.log_counts"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, t: h.pop("crc32"), "damaged.*KeyError: 'crc32'"),
        (lambda h, t: h.pop("fingerprint"), "damaged.*KeyError: 'fingerprint'"),
        (lambda h, t: h.update(parameters=3), "damaged.*TypeError"),
        (lambda h, t: h.update(clusters_per_layer=[34]), "damaged.*IndexError"),
        (lambda h, t: h["parameters"].update(window="a"), "damaged, its parameters.*window"),
        (lambda h, t: h.update(threshold=float("nan")), "damaged, threshold is nan"),
        (lambda h, t: h.update(threshold=None), "damaged.*TypeError"),
        (as_double, "layer 1: log_counts is torch.float64, expected torch.float32"),
    ],
)
def test_a_bad_header_says_so(tmp_path, change, message):
    path = tmp_path / "context.safetensors"
    build(*tensors()).save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
        SqueezedContext.load(path)


def test_the_header_has_a_checksum(tmp_path):
    path = tmp_path / "context.safetensors"
    build(*tensors()).save(path)
    rewrite(path, lambda h, t: None, resum=False)
    SqueezedContext.load(path)
    rewrite(path, lambda h, t: h.update(threshold=h["threshold"] / 2), resum=False)
    with pytest.raises(ValueError, match="damaged, the checksum of its header"):
        SqueezedContext.load(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a file of SqueezedContext.save"):
        SqueezedContext.load(path)
    save_file({"a": torch.ones(3)}, path, {"sparse_attn": '{"format": "x", "version": 7}'})
    with pytest.raises(ValueError, match="format 'x' version 7, this sparse_attn reads"):
        SqueezedContext.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SqueezedContext.load(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "context.safetensors"
    context = build(*tensors())
    context.save(path)
    before = path.read_bytes()

    def fail(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        context.with_sparsity(0.5).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
