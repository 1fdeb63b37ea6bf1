"""What training loops save beside the weights: names that do nothing, and the weights as they are."""

from __future__ import annotations

import argparse
import re
import sys
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
from torch_files import Call, Global, error_of, put, tensor, zip_file, zip_of

from elm_mlx.errors import InputError
from elm_mlx_convert.sources import open_source
from elm_mlx_convert.torch_files import Symbol, load

RANDOM = np.random.RandomState(7)
OBJECTS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace(lr=0.1, out=Path("x"), nested=argparse.Namespace(a={1})),
    "types.SimpleNamespace": types.SimpleNamespace(a=1),
    "datetime": [datetime(2024, 1, 2, 3, tzinfo=timezone.utc), date(2024, 1, 2), timedelta(3, 4)],
    "paths": [Path("a/b"), PurePosixPath("/c"), PureWindowsPath("d")],
    "sets": [{1, "a", (2, 3)}, frozenset({1}), set()],
    "collections": [deque([1, {2}], 3), Counter("abca"), defaultdict(list, {"a": [1]}), defaultdict(int, {(1, 2): 3})],
    "numbers": [Decimal("1.5"), Fraction(1, 3), 1 + 2j, bytearray(b"ab")],
    "uuid": uuid.UUID(int=7),
    "arrays": [np.zeros((2, 3)), np.arange(3, dtype=">i4")[:0], np.array(["a"]), np.array([{1}], object)],
    "random": [RANDOM, RANDOM.get_state(), np.random.default_rng(7), np.random.PCG64(3)],
    "types": [int, dict, np.float32, np.ndarray],
    "cycle": argparse.Namespace(),
}
OBJECTS["cycle"].parent = OBJECTS["cycle"]
OBJECTS["arrays"].pop(1)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", OBJECTS)
def test_the_weights_are_read_beside_it(name: str, protocol: int, tmp_path: Path) -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {"hyper": OBJECTS[name], "state_dict": OrderedDict(w=tensor(weights)), "again": OBJECTS[name]}
    found = load(put(tmp_path, zip_file(content, protocol)))
    np.testing.assert_array_equal(found["state_dict"]["w"].read(), weights)
    for value in found["hyper"] if type(found["hyper"]) is list else [found["hyper"]]:
        assert type(value) in (Symbol, tuple, bytes)
    assert list(open_source(put(tmp_path, zip_file(content, protocol))).tensors) == ["w"]


LIBRARIES = [
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
    "omegaconf.nodes.AnyNode", "pytorch_lightning.utilities.parsing.AttributeDict", "yacs.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict", "easydict.EasyDict", "torch.optim.adamw.AdamW",
    "torch.optim.lr_scheduler.OneCycleLR", "typing.Any", "torch.complex64", "torch.strided",
]  # fmt: skip


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    "opcodes", [b")\x81}b", b")R}b", b")}\x92(K\x01K\x02u", b")\x81(K\x01K\x02e", b"", b"(]tRK\x01a"]
)
def test_a_librarys_object_becomes_its_name(name: str, opcodes: bytes, tmp_path: Path) -> None:
    """However it is made and filled; nothing of it is imported."""
    before = set(sys.modules)
    module, _, attribute = name.rpartition(".")
    pickle = b"\x80\x02" + f"c{module}\n{attribute}\n".encode() + opcodes + b"."
    assert load(put(tmp_path, zip_of(pickle))) == Symbol(name)
    assert set(sys.modules) == before
    with pytest.raises(InputError, match=f"holds a {re.escape(name)}, not a state dict"):
        open_source(tmp_path / "file.pt")


REFUSED = [
    "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__", "builtins.open", "builtins.type",
    "builtins.set.add", "functools.partial", "operator.attrgetter", "os.system", "posix.system", "subprocess.Popen",
    "pathlib.Path.home", "pathlib.os.system", "datetime.sys.exit", "collections.abc.Callable", "collections.namedtuple",
    "numpy.load", "numpy.random._pickle.eval", "numpy.core.multiarray.fromfile", "torch.load", "torch.optim.Adam.step",
    "torch.hub.load", "torch._C._jit", "omegaconf.OmegaConf", "omegaconf.dictconfig.DictConfig.update", "argparse.open",
    "copyreg.__newobj__", "types.FunctionType", "types.CodeType", "random.Random.seed", "uuid.os",
    "typing.get_type_hints",
    "", ".", "builtins.", ".set", "builtins set", "Builtins.set", "mine.Config",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stacked", [False, True])
def test_everything_off_the_list_is_refused_by_name(stacked: bool, name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    if stacked:
        asked = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)) + b"\x93"
    else:
        asked = f"c{module}\n{attribute}\n".encode()
    for use in (b".", b")R.", b")\x81.", b")\x81}b."):
        assert f"asks for the global {name if '.' in name else '.' + name}, which is" in error_of(
            tmp_path, zip_of(b"\x80\x04" + asked + use)
        )


@pytest.mark.parametrize(
    ("opcodes", "says"),
    [
        (b"ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        (b"ctorch\nFloatStorage\n)\x81.", "opcode NEWOBJ"),
        (b"K\x01)\x81.", "opcode NEWOBJ"),
        (b"cargparse\nNamespace\nK\x01\x81.", "with arguments that are not a tuple"),
        (b"cargparse\nNamespace\n)K\x01\x92.", "opcode NEWOBJ_EX"),
        (b"cargparse\nNamespace\n\x81.", "takes a value where there is none"),
        (b"K\x01(K\x02\x90.", "fills a set where there is none"),
        (b"(K\x02\x90.", "fills a set where there is none"),
        (b"\x90.", "goes back to a mark that it never set"),
        (b"ctorch\nFloatStorage\n}b.", "sets attributes of something that has none"),
        (b"ctorch\nfloat32\n)R.", "calls something that cannot be called"),
        (b"}cargparse\nNamespace\nK\x01s.", "a key that is neither"),
    ],
)
def test_what_is_no_inert_object_is_used_as_before(opcodes: bytes, says: str, tmp_path: Path) -> None:
    assert says in error_of(tmp_path, zip_of(b"\x80\x04" + opcodes))


def test_a_symbol_passes_for_no_function(tmp_path: Path) -> None:
    """Its name comes from the list, never from the file: nothing in a file makes one that is called."""
    made = Call("argparse.Namespace", ("torch._utils._rebuild_tensor_v2",), {"name": "torch._utils._rebuild_tensor_v2"})
    assert load(put(tmp_path, zip_file({"a": made, "b": Global("builtins.list")}))) == {
        "a": Symbol("argparse.Namespace"), "b": Symbol("builtins.list"),
    }  # fmt: skip
