"""What PyTorch's files hold, and that they can do nothing but hold it."""

from __future__ import annotations

import collections
import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_files import (
    STORAGE_NAMES,
    Call,
    Global,
    Member,
    Raw,
    Storage,
    Tensor,
    archive,
    error_of,
    legacy_file,
    legacy_of,
    parameter,
    put,
    save,
    tensor,
    zip_file,
    zip_of,
)  # fmt: skip

from elm_mlx.errors import InputError
from elm_mlx_convert.tensors import LazyTensor, numpy_dtype
from elm_mlx_convert.torch_files import Symbol, load

LAYOUTS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
CLASSICS = Path(__file__).parents[3] / "shared/data/classics/checkpoint_average.pt"


def read(value: Any) -> Any:
    """`value` with its tensors read."""
    if isinstance(value, LazyTensor):
        return value.read()
    if isinstance(value, dict):
        return {key: read(part) for key, part in value.items()}
    return [read(part) for part in value] if isinstance(value, list) else value


# Sound files


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", STORAGE_NAMES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str, protocol: int, legacy: bool) -> None:
    carrier = numpy_dtype(dtype)
    bits = np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 256, 35 * carrier.itemsize, np.uint8)
    array = bits.view(carrier).reshape(5, 7)
    path = save(tmp_path / "a.pt", {"a": tensor(array, dtype)}, legacy=legacy, protocol=protocol)
    lazy = load(path)["a"]
    assert (lazy.shape, lazy.dtype, lazy.nbytes) == ((5, 7), dtype, array.nbytes)
    assert lazy.read().dtype == carrier and lazy.read().tobytes() == array.tobytes()
    assert lazy.read_rows(2, 4).tobytes() == array[2:4].tobytes()


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_training_checkpoint(tmp_path: Path, protocol: int, legacy: bool) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    state: Any = collections.OrderedDict(w=tensor(weight), b=tensor(weight[0]))
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    adam = {"step": tensor(np.float32(3)), "exp_avg": tensor(weight), "exp_avg_sq": tensor(weight * 2)}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "foreach": None, "params": [0, 1]}
    value = {
        "iterations": 2**40, "epoch": 0, "model_state_dict": state, "ema_state_dict": state,
        "optim_state_dict": {"state": {0: adam}, "param_groups": [group]},
        "best_metric": float("inf"), "is_interval_ckpt": True,
        "gradient_scaler_state_dict": {"scale": 65536.0, "growth_interval": 2000, "_growth_tracker": 0},
    }  # fmt: skip
    loaded = load(save(tmp_path / "a.pt", value, legacy=legacy, protocol=protocol))
    assert loaded.pop("ema_state_dict") is loaded["model_state_dict"]
    moments = read(loaded.pop("optim_state_dict"))
    assert moments["param_groups"] == [group] and moments["state"][0]["step"] == 3
    assert moments["state"][0]["exp_avg_sq"].tolist() == (weight * 2).tolist()
    assert read(loaded.pop("model_state_dict"))["w"].tolist() == weight.tolist()
    assert loaded == {key: value[key] for key in loaded} and len(loaded) == 5


@LAYOUTS
def test_shared_storages_views_and_parameters(tmp_path: Path, legacy: bool) -> None:
    base = np.arange(24, dtype=np.float16).reshape(4, 6)
    whole = tensor(base)
    value = {
        "whole": whole, "tied": whole, "transposed": whole.part(0, (6, 4), (1, 6)),
        "slice": whole.part(7, (2, 3), (12, 2)), "parameter": parameter(whole),
        "with state": parameter(whole.part(3, (2,), (1,)), {"note": 1}),
        "old": Tensor(whole.storage, 2, (), (), "_rebuild_tensor"), "empty": whole.part(24, (0, 6), (6, 1)),
    }  # fmt: skip
    path = save(tmp_path / "a.pt", value, legacy=legacy)
    assert path.stat().st_size < 3000
    loaded = load(path)
    assert loaded["tied"] is loaded["whole"]
    expected = {
        "whole": base, "tied": base, "transposed": base.T, "slice": base[1::2, 1::2], "parameter": base,
        "with state": base.reshape(-1)[3:5], "old": base[0, 2], "empty": base[4:],
    }  # fmt: skip
    for name, array in expected.items():
        assert loaded[name].shape == array.shape
        assert np.array_equal(loaded[name].read(), array), name


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values(tmp_path: Path, protocol: int, legacy: bool) -> None:
    value = {
        "none": None, "flags": [True, False], "text": "é𝄞" * 200, "bytes": b"\x00\xff",
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "numbers": [0, 255, 256, 65536, -1, 2**31, -(2**62), 2**200, 1.5, float("-inf")], 7: {}, None: [], True: 0,
    }  # fmt: skip
    value["many"] = list(range(3000))
    assert load(save(tmp_path / "a.pt", value, legacy=legacy, protocol=protocol)) == value


def test_names_without_data_become_inert(tmp_path: Path) -> None:
    value = [Global("torch.bfloat16"), Call("torch.device", ("cuda", 0)), Call("torch.Size", ((2, 3),))]
    assert load(save(tmp_path / "a.pt", value)) == [Symbol("torch.bfloat16"), Symbol("torch.device"), (2, 3)]


@pytest.mark.parametrize("value", [np.float64(3.25), np.float32(0.5), np.int64(-7), np.uint8(200), np.bool_(True)])
@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_scalars_become_numbers(tmp_path: Path, value: np.generic, protocol: int) -> None:
    assert load(put(tmp_path, zip_file({"best_metric": value}, protocol))) == {"best_metric": value.item()}


def test_other_numpy_values_are_refused(tmp_path: Path) -> None:
    assert "numpy value" in error_of(tmp_path, zip_file(np.datetime64(0, "s"), 2))
    assert "little-endian" in error_of(tmp_path, zip_file(Call("numpy.dtype", ("f8", False, True), (3, ">", None))))
    assert "numpy.datetime64" in error_of(tmp_path, zip_file({"kind": np.datetime64}, 2))


def test_what_python_2_wrote(tmp_path: Path) -> None:
    # Keys as SHORT_BINSTRING, an OrderedDict from a list of lists, storages on a GPU, PUTs in between.
    opcodes = (
        b"\x80\x02ccollections\nOrderedDict\nq\x00]q\x01]q\x02(U\x01wq\x03ctorch._utils\n_rebuild_tensor\nq\x04"
        b"((U\x07storageq\x05ctorch.cuda\nFloatStorage\nq\x06U\x0294q\x07U\x06cuda:0q\x08\x8a\x01\x02Ntq\tQ"
        b"K\x00(\x8a\x01\x02tq\n(\x8a\x01\x01tq\x0btq\x0cRq\reaq\x0e\x85q\x0fRq\x10."
    )
    data = legacy_of(opcodes, {"94": (2, struct.pack("<2f", 1.5, -2))})
    assert read(load(put(tmp_path, data)))["w"].tolist() == [1.5, -2]


def test_storage_views_of_the_legacy_layout(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.int64)
    view = Storage(values, "int64", key="1", view=("2", 4, 3))
    path = save(tmp_path / "a.pt", Tensor(view, 1, (2,), (1,)), legacy=True)
    assert load(path).read().tolist() == [5, 6]
    for lie in (("2", 4, 7), ("2", -1, 3), ("2", 4, -1), ("2", 4), [4, 7], ("2", 4, True)):
        view.view = lie
        assert "view" in error_of(tmp_path, legacy_file(Tensor(view, 0, (1,), (1,))))
    view.view = ("2", 4, 3)
    assert "needs 4 values of a storage of 3" in error_of(tmp_path, legacy_file(Tensor(view, 1, (3,), (1,))))


def test_any_folder_name_and_no_byteorder(tmp_path: Path) -> None:
    data = zip_file({"a": tensor(np.ones(3))}, top="pytorch_model-é", byteorder=None)
    assert load(put(tmp_path, data))["a"].read().tolist() == [1, 1, 1]


def test_an_untyped_storage_is_of_bytes(tmp_path: Path) -> None:
    kinds = ["torch.storage.UntypedStorage", "torch._UntypedStorage", "torch.storage._UntypedStorage"]
    storages = [Storage(np.arange(4, dtype=np.uint8), "uint8", kind) for kind in kinds]
    loaded = load(put(tmp_path, zip_file([Tensor(storage, 0, (4,), (1,)) for storage in storages])))
    assert [tensor.read().tolist() for tensor in loaded] == [[0, 1, 2, 3]] * 3


def test_the_real_checkpoint() -> None:
    if not CLASSICS.exists():
        pytest.skip(f"{CLASSICS} is not here")
    digest = hashlib.sha256()
    for name, lazy in sorted(load(CLASSICS).items()):
        digest.update(f"{name} {lazy.shape} {lazy.dtype}".encode() + lazy.read().tobytes())
    # The same over what torch.load gives.
    assert digest.hexdigest() == "1e5f3d9b0e27f37237429cb2b2e3ba25e0f55dc4620ef5b4808cf71950255b44"


# Laziness


@LAYOUTS
def test_data_is_read_late_and_a_changed_file_is_noticed(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "a.pt", {"a": tensor(np.arange(5000.0))}, legacy=legacy)
    lazy = load(path)["a"]
    at = path.read_bytes().index(np.arange(5000.0).tobytes())
    stamp = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<d", 42))
    os.utime(path, ns=(stamp, stamp))
    assert lazy.read_rows(0, 2).tolist() == [42, 1]
    os.utime(path, ns=(stamp, stamp + 1))
    with pytest.raises(InputError, match="changed while"):
        lazy.read_rows(0, 2)


@LAYOUTS
def test_a_file_truncated_after_loading(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "a.pt", {"a": tensor(np.arange(5000.0))}, legacy=legacy)
    lazy = load(path)["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match="changed while"):
        lazy.read()


def test_a_file_that_is_replaced_or_removed_is_still_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": tensor(np.arange(5.0))})
    lazy = load(path)["a"]
    save(tmp_path / "b.pt", {}).replace(path)
    path.unlink()
    assert lazy.read().tolist() == [0, 1, 2, 3, 4]


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_the_file_is_closed_with_the_last_tensor(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": tensor(np.arange(5.0))})
    before = open_files()
    loaded = [load(path) for _ in range(5)]
    assert open_files() == before + 5
    del loaded
    assert open_files() == before


# References and tensors that lie


@LAYOUTS
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"numel": 5}, "storage"), ({"numel": 3}, "storage"), ({"numel": -1}, "negative"),
        ({"numel": 2**70}, "storage"), ({"numel": True}, "describes a storage"),
        ({"numel": "4"}, "describes a storage"), ({"kind": "torch.float32"}, "not a storage"),
        ({"kind": "collections.OrderedDict"}, "not a storage"),
        ({"kind": "torch.ComplexFloatStorage"}, "the global torch.ComplexFloatStorage"),
        ({"kind": "torch.DoubleStorage"}, "storage"), ({"key": 0}, "describes a storage"),
        ({"location": 1}, "describes a storage"),
    ],
)  # fmt: skip
def test_references_that_lie(tmp_path: Path, lie: dict[str, Any], words: str, legacy: bool) -> None:
    storage = Storage(np.arange(4, dtype=np.float32), "float32", **lie)
    make = legacy_file if legacy else zip_file
    assert words in error_of(tmp_path, make({"a": Tensor(storage, 0, (2,), (1,))}))


def test_a_key_is_no_path(tmp_path: Path) -> None:
    storage = Storage(np.zeros(4), "float64", key="../data.pkl")
    data = zip_file(Tensor(storage, 0, (4,), (1,))).replace(b"data/../data.pkl", b"data/---data.pkl")
    assert "storage ../data.pkl is missing" in error_of(tmp_path, data)


def test_references_of_another_form(tmp_path: Path) -> None:
    kind = Global("torch.FloatStorage")
    references: list[Any] = ["0", 0, (), ("storage",), ("other", kind, "0", "cpu", 1)]
    for reference in [*references, ("storage", kind, "0", "cpu", 1, None)]:
        assert "its pickle" in error_of(tmp_path, zip_file(Raw(opcodes_of(reference) + b"Q")))
    module = opcodes_of(("module", kind, "a.py", "class A: ..."))
    assert "whole module" in error_of(tmp_path, zip_file(Raw(module + b"Q")))


def opcodes_of(value: Any) -> bytes:
    """What pushes `value`, without what opens and ends a pickle."""
    data = zip_file(value)
    return data[data.index(b"\x80\x02") + 2 : data.index(b"PK\7\x08") - 1]


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    storage = Storage(np.zeros(4), "float64")
    data = zip_file(Tensor(storage, 0, (4,), (1,)))
    assert "storage 0 is missing" in error_of(tmp_path, data.replace(b"archive/data/0", b"archive/data/9"))


def test_tensors_made_of_other_things(tmp_path: Path) -> None:
    honest = tensor(np.zeros(4))
    assert "negated" in error_of(tmp_path, zip_file(Tensor(honest.storage, 0, (4,), (1,), metadata={"neg": True})))
    assert "describes a tensor" in error_of(tmp_path, zip_file(Call("torch._utils._rebuild_tensor_v2", (1, 2, 3))))
    assert "describes a parameter" in error_of(
        tmp_path, zip_file(Call("torch._utils._rebuild_parameter", ({}, True, {})))
    )
    assert "torch.Size" in error_of(tmp_path, zip_file(Call("torch.Size", (3,))))
    assert "other than pairs" in error_of(tmp_path, zip_file(Call("collections.OrderedDict", ([1, 2],))))
    assert "neither a string" in error_of(tmp_path, zip_file(Call("collections.OrderedDict", ([[(), 2]],))))
    assert "spells bytes" in error_of(tmp_path, zip_file(Call("_codecs.encode", ("é", "utf-8"))))


# The legacy layout's own lies


def test_legacy_storages_that_lie(tmp_path: Path) -> None:
    storage = Storage(np.arange(4, dtype=np.float32), "float32", key="7")
    data = legacy_file(Tensor(storage, 0, (4,), (1,)))
    raw = struct.pack("<q", 4) + storage.values.tobytes()
    assert data.endswith(raw)
    head = data.removesuffix(raw)
    assert "truncated" in error_of(tmp_path, data[:-1])
    assert "truncated" in error_of(tmp_path, head + raw[:7])
    assert "1 bytes after" in error_of(tmp_path, data + b"x")
    for count in (-1, 0, 3, 5, 2**62):
        assert f"has {count:,} values" in error_of(tmp_path, head + struct.pack("<q", count) + raw[8:])
    main = head[: head.rindex(b"\x80\x02")]
    for keys in ([], ["7", "7"], ["8"], [7], "7", {"7": 1}, ["7", "8"]):
        assert "list of storages" in error_of(tmp_path, main + pickle.dumps(keys, 2) + raw)
    assert "cut short" in error_of(tmp_path, main)


def test_byte_order_and_version(tmp_path: Path) -> None:
    assert "big-endian" in error_of(tmp_path, zip_file({}, byteorder="big"))
    assert "big-endian" in error_of(tmp_path, zip_file({}, byteorder=""))
    assert "big-endian" in error_of(tmp_path, legacy_file({}, little_endian=False))
    assert "unknown layout" in error_of(tmp_path, legacy_file({}).replace(b"M\xe9\x03", b"M\xea\x03", 1))


# Files of another kind


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"), (b"\2" + b"\0" * 7 + b"{}", "safetensors"), (b"GGUF\3", "GGUF"), (b"hello", "unknown kind"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (pickle.dumps({}), "pickle of something"),
        (b"\0" * 257 + b"ustar\0", "tar archive"), (b"PK\5\6" + b"\0" * 18, "unknown kind"),
    ],
)  # fmt: skip
def test_other_files_are_named(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in error_of(tmp_path, data)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in [(tmp_path, "directory"), (tmp_path / "none", "No such file"), (tmp_path / "pipe", "not a reg")]:
        with pytest.raises(InputError, match=words):
            load(path)


def test_torchscript_and_foreign_archives(tmp_path: Path) -> None:
    data_pkl = Member("m/data.pkl", b"\x80\x02}.")
    assert "TorchScript" in error_of(tmp_path, archive([data_pkl, Member("m/constants.pkl", b"\x80\x02).")]))
    assert "TorchScript" in error_of(tmp_path, archive([data_pkl, Member("m/code/__torch__.py", b"")]))
    assert "without a data.pkl" in error_of(tmp_path, archive([Member("readme.txt", b"hi")]))
    assert "without a data.pkl" in error_of(tmp_path, archive([Member("a/b/data.pkl", b"\x80\x02}.")]))
    assert "more than one data.pkl" in error_of(tmp_path, archive([data_pkl, Member("n/data.pkl", b"\x80\x02}.")]))
    assert "goes on after" in error_of(tmp_path, zip_of(b"\x80\x02}.}."))
