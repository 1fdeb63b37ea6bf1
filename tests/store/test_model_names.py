"""MODEL as a directory, a repository in the hub's cache, one to be downloaded, and one to be converted."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_hub
from hub_server import HubServer

import elm_mlx
import elm_mlx_convert
from elm_mlx import hub as hub_module
from elm_mlx.errors import ElmError, InputError
from elm_mlx.store.cached_models import cached_models, chosen
from elm_mlx.store.model_names import conversions, directory_of, name_of

LLAMA = "small/Llama"


@pytest.fixture
def llama(hub: HubServer, family_dirs: dict[str, Path]) -> str:
    """A Llama on the hub, among files that nobody needs. Returns its commit."""
    commit = hub.add(LLAMA, family_dirs["llama"])
    more = {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"again",
            "onnx/model.onnx": b"", "README.md": b"#", "chat_templates/tools.jinja": b"{{ messages }}"}  # fmt: skip
    hub.repositories[LLAMA] |= more
    return commit and hub.commit(LLAMA)


def test_a_repository_is_downloaded_once_and_only_what_is_needed(hub: HubServer, llama: str) -> None:
    notes: list[str] = []
    bytes_: list[tuple[int, int]] = []
    directory = directory_of(LLAMA, lambda what, done=0, total=0, /: bytes_.append((done, total)), notes.append)
    fetched = hub.fetched()
    assert fetched[0] == "config.json" and fetched[-1].endswith(".safetensors")  # what is checked, and what is large
    assert {*fetched} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "chat_templates/tools.jinja",
        "generation_config.json", "README.md",
    } & {*hub.repositories[LLAMA]}  # fmt: skip
    assert directory.name == llama and name_of(directory) == LLAMA
    assert len(notes) == 1 and "are downloaded" in notes[0]
    size = len(hub.repositories[LLAMA]["model.safetensors"])
    assert bytes_[-1] == (size, size) and bytes_ == sorted(bytes_)
    asked = len(hub.asked)
    for name in (LLAMA, f"{LLAMA}@main", f"{LLAMA}@{llama}", Path(LLAMA)):
        assert directory_of(name) == directory
    assert len(hub.asked) == asked  # from the cache, and the hub is left alone


def test_a_named_model_loads_as_its_directory_does(llama: str, family_dirs: dict[str, Path]) -> None:
    import mlx.core as mx

    ids = mx.array([[1, 5, 9, 3]])
    model, tokenizer = elm_mlx.load(LLAMA)
    assert mx.array_equal(model(ids), elm_mlx.load_model(family_dirs["llama"])(ids))
    assert tokenizer.decode(tokenizer.encode("the fox")) == elm_mlx.load(family_dirs["llama"])[1].decode(
        tokenizer.encode("the fox")
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_from_python_a_terminal_shows_a_bar(llama: str, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    elm_mlx.load_model(LLAMA)
    assert (LLAMA in screen.getvalue()) == ("100%" in screen.getvalue()) == terminal


def test_offline_the_cache_is_all_there_is(hub: HubServer, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ElmError, match=f"^{LLAMA}: no such directory, it is not in the hub's cache, and HF_HUB_OFFLINE"
    ):
        directory_of(LLAMA)
    assert not hub.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    directory = directory_of(LLAMA)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert directory_of(LLAMA) == directory
    (directory / "model.safetensors").unlink()
    with pytest.raises(ElmError, match="only a part of it is in the hub's cache"):
        directory_of(LLAMA)


def test_a_name_that_was_fetched_by_its_commit_is_known_offline(
    hub: HubServer, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    directory = directory_of(f"{LLAMA}@{llama}")
    assert directory_of(LLAMA) == directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert directory_of(LLAMA) == directory
    written: list[Path] = []
    monkeypatch.setattr(hub_module.files, "write_text", lambda path, text: written.append(path))
    assert directory_of(LLAMA) == directory and not written, "a cache that others share is left as it is"


def test_a_directory_wins_over_the_hub(
    hub: HubServer, llama: str, family_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(family_dirs["llama"], tmp_path / LLAMA)
    assert directory_of(LLAMA) == Path(LLAMA)
    with pytest.raises(
        InputError, match=r"^small/Lama: no such directory, .*; did you mean the directory small/Llama\?$"
    ):
        directory_of("small/Lama")
    hub.asked.clear()
    assert directory_of("elsewhere") == Path("elsewhere") and directory_of("a/b/c") == Path("a/b/c")
    assert directory_of("./small/Other") == Path("small/Other") and not hub.asked


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a kilobyte count as large, and nobody waits between tries."""
    monkeypatch.setattr(hub_module, "_LARGE", 1000)
    monkeypatch.setattr(hub_module, "_PIECE", 1000)
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)


def ranges(hub: HubServer, file: str) -> list[str | None]:
    return [asked for method, path, asked in hub.asked if method == "GET" and path.endswith(f"/{file}")]


def test_a_broken_connection_goes_on_where_it_broke(hub: HubServer, llama: str, large: None) -> None:
    data = hub.repositories[LLAMA]["model.safetensors"]
    hub.breaks["model.safetensors"] = [5000, 3000]
    assert (directory_of(LLAMA) / "model.safetensors").read_bytes() == data
    assert ranges(hub, "model.safetensors") == ["bytes=0-", "bytes=5000-", "bytes=8000-"]


def test_an_interrupted_download_resumes_in_the_next_run(
    hub: HubServer, llama: str, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = hub.repositories[LLAMA]["model.safetensors"]

    def interrupt(what: str, done: int = 0, total: int = 0, /) -> None:
        if done >= 7000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        directory_of(LLAMA, interrupt)
    (part,) = Path(hub_module.repository(LLAMA).folder).glob("blobs/*.incomplete")  # type: ignore[union-attr]
    came = part.stat().st_size
    assert 0 < came < len(data) and part.read_bytes() == data[:came]
    hub.asked.clear()
    assert (directory_of(LLAMA) / "model.safetensors").read_bytes() == data
    assert ranges(hub, "model.safetensors") == [f"bytes={came}-"]
    assert not part.exists() and "tokenizer.json" not in hub.fetched()


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_what_came_damaged_is_not_kept(hub: HubServer, llama: str, large: None, knows_ranges: bool) -> None:
    hub.knows_ranges = knows_ranges
    data = hub.repositories[LLAMA]["model.safetensors"]
    hub.breaks["model.safetensors"] = [5000] * 5
    if knows_ranges:
        hub.breaks["model.safetensors"] = [5000] + [0] * 5
    with pytest.raises(ElmError, match="cannot be reached"):
        directory_of(LLAMA)
    (part,) = Path(hub_module.repository(LLAMA).folder).glob("blobs/*.incomplete")  # type: ignore[union-attr]
    assert part.read_bytes() == data[:5000]
    part.write_bytes(b"x" * 5000)
    with pytest.raises(ElmError, match=r"model.safetensors came damaged, and is not kept: the same command"):
        directory_of(LLAMA)
    assert (directory_of(LLAMA) / "model.safetensors").read_bytes() == data


def test_shards_are_those_of_the_index(hub: HubServer, family_dirs: dict[str, Path], tmp_path: Path) -> None:
    import mlx.core as mx

    source = tmp_path / "source"
    shutil.copytree(family_dirs["llama"], source)
    weights: Any = mx.load(str(source / "model.safetensors"))
    names = sorted(weights)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, own in parts.items():
        mx.save_safetensors(str(source / file), {name: weights[name] for name in own})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("small/Shards", source)  # with all weights in one file, too
    directory = directory_of("small/Shards")
    assert sorted(path.name for path in directory.glob("*.safetensors")) == sorted(parts)
    (directory / "model-2-of-2.safetensors").unlink()  # as where a download was stopped
    hub.asked.clear()
    assert directory_of("small/Shards") == directory and "model-2-of-2.safetensors" not in hub.fetched()
    assert elm_mlx.load_model(directory).config.num_layers > 0


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "is gated: accept its terms at http.*/small/Llama, and log in by `hf auth login`$"),
        (401, "", "the hub refuses access \\(401\\): `hf auth login`"),
        (403, "", "the hub refuses access \\(403\\)"),
        (501, "", "not in the hub's cache, and http.* cannot be reached \\(it answers 501\\)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: HubServer, llama: str, status: int, code: str, message: str) -> None:
    hub.refuses[LLAMA] = (status, code)
    with pytest.raises(ElmError, match=f"^{LLAMA}: {message}") as caught:
        directory_of(LLAMA)
    assert "\n" not in str(caught.value)


def test_what_is_not_on_the_hub(hub: HubServer, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^small/Lama: no such directory, nor is it in the hub's cache, and http"):
        directory_of("small/Lama")
    with pytest.raises(InputError, match=f"^{LLAMA}@v2: the hub has no such revision of {LLAMA}$"):
        directory_of(f"{LLAMA}@v2")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ElmError, match=f"^{LLAMA}: not in the hub's cache, and http://127.0.0.1:9 cannot be reached"):
        directory_of(LLAMA)


def test_a_full_disk_is_said_before_the_download(
    hub: HubServer, llama: str, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module.files, "free_bytes", lambda path: 17 << 20)
    with pytest.raises(ElmError, match=r"needs .* MB, and .* are free there"):
        hub.repositories[LLAMA]["model.safetensors"] += b"\0" * (3 << 20)
        directory_of(LLAMA)
    monkeypatch.undo()


def test_a_disk_that_fills_up_meanwhile(
    hub: HubServer, llama: str, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = hub_module._stream

    def filling(url: str, start: int) -> Iterator[bytes]:
        yield next(stream(url, start))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_module, "_stream", filling)
    with pytest.raises(ElmError, match=r"the disk is full; what has come is kept, and the same command"):
        directory_of(LLAMA)
    monkeypatch.setattr(hub_module, "_stream", stream)
    directory_of(LLAMA)
    assert ranges(hub, "tokenizer.json") == ["bytes=0-", "bytes=1000-"]  # the first that counts as large


def test_what_holds_no_model_that_is_read(hub: HubServer, llama: str) -> None:
    files = hub.repositories[LLAMA]
    config = files["config.json"]
    for held, message in (
        ({"a.Q8_0.gguf": b"", "a.F16.GGUF": b""}, "a/B: holds 'F16', 'Q8_0' as GGUF: name one, as a/B:F16$"),
        ({"a-00001-of-00002.gguf": b"", "a-00002-of-00002.gguf": b""}, "a/B: a.gguf is in parts: download them by `hf"),
        ({"adapter_config.json": b"{}"}, "an adapter, not a model: `hf download a/B"),
        ({"config.json": config, "pytorch_model.bin": b""}, "holds weights in PyTorch's files alone"),
        ({"train.parquet": b""}, "holds no model in safetensors; it holds 'train.parquet'"),
        ({"config.json": b'{"model_type": "t5"}', "model.safetensors": b""}, "model_type is 't5'; supported are"),
    ):
        hub.repositories["a/B"] = held
        hub.asked.clear()
        with pytest.raises(InputError, match=message):
            directory_of("a/B")
        assert not {*hub.fetched()} & {"model.safetensors", "pytorch_model.bin"}  # which may be large


def test_apples_checkpoint_is_converted_once(
    hub: HubServer, tmp_path: Path, tiny_config: Any, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx
    import numpy as np
    import tiny
    from mlx.utils import tree_flatten

    from elm_mlx.text.tokenizer import has_chat_template

    model = tiny.random_model(tiny_config)
    weights = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    hub.add("apple/OpenELM-tiny-Instruct", save_hub(tmp_path / "apple", tiny_config, weights))
    with pytest.raises(InputError, match=r"has no tokenizer of its own, and Llama 2's, .* `elm-mlx convert apple/"):
        directory_of("apple/OpenELM-tiny-Instruct")
    hub.repositories["meta-llama/Llama-2-7b-hf"] = {"tokenizer.model": tiny_tokenizer_file.read_bytes()}
    notes: list[str] = []
    made = directory_of("apple/OpenELM-tiny-Instruct", on_note=notes.append)
    assert made.parent.parent == conversions() and name_of(made) == "apple/OpenELM-tiny-Instruct"
    assert [note.startswith("apple/OpenELM-tiny-Instruct: is converted, once, into") for note in notes] == [True]
    assert has_chat_template(made)  # as the repository's name says
    loaded, tokenizer = elm_mlx.load("apple/OpenELM-tiny-Instruct")
    ids = mx.array([tokenizer.encode("the fox")])
    assert mx.allclose(loaded(ids), model(ids), atol=0.3)  # bfloat16
    asked = len(hub.asked)
    assert directory_of("apple/OpenELM-tiny-Instruct", on_note=notes.append) == made and len(notes) == 1
    shutil.rmtree(tmp_path / "hub")
    assert directory_of("apple/OpenELM-tiny-Instruct") == made and len(hub.asked) == asked


def test_an_openelm_with_another_tokenizer_of_its_own_does_not_get_llamas(
    hub: HubServer, tiny_model_dir: Path, tiny_tokenizer_file: Path
) -> None:
    hub.add("me/OpenELM", tiny_model_dir)
    del hub.repositories["me/OpenELM"]["tokenizer.model"]
    hub.repositories["me/OpenELM"]["tokenizer.json"] = b"{}"
    hub.repositories["meta-llama/Llama-2-7b-hf"] = {"tokenizer.model": tiny_tokenizer_file.read_bytes()}
    with pytest.raises(
        InputError, match=r"has a tokenizer\.json of its own and no tokenizer\.model.* --tokenizer FILE"
    ):
        directory_of("me/OpenELM")
    assert not conversions().exists()


@pytest.fixture
def gguf(hub: HubServer, family_dirs: dict[str, Path], tmp_path: Path) -> dict[str, bytes]:
    """Two GGUF files on the hub, as their makers call them: the repository's files."""
    held = {"config.json": b"{}", "README.md": b"", "mmproj-tiny-F16.gguf": b""}
    for kind in ("f32", "q8_0"):
        done = elm_mlx_convert.export_gguf(family_dirs["mistral"], tmp_path / "a.gguf", kind=kind, overwrite=True)
        held[f"tiny-{kind.upper()}.gguf"] = done.path.read_bytes()
    hub.repositories["a/Tiny-GGUF"] = held
    return held


def test_a_gguf_file_is_named_and_converted_once(
    hub: HubServer, gguf: dict[str, bytes], family_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx
    from huggingface_hub import constants

    with pytest.raises(InputError, match=r"^a/Tiny-GGUF: holds 'F32', 'Q8_0' as GGUF: name one, as a/Tiny-GGUF:F32$"):
        directory_of("a/Tiny-GGUF")
    with pytest.raises(InputError, match=r"^a/Tiny-GGUF:Q4_K: holds 'F32', 'Q8_0' as GGUF: Q4_K is none of them; name"):
        directory_of("a/Tiny-GGUF:Q4_K")
    assert not hub.fetched()
    notes: list[str] = []
    made = directory_of("a/Tiny-GGUF:f32", on_note=notes.append)
    assert [("are downloaded" in note, "tiny-F32.gguf is converted, once" in note) for note in notes] == [
        (True, False), (False, True)
    ]  # fmt: skip
    assert {*hub.fetched()} == {"tiny-F32.gguf"} and name_of(made) == "a/Tiny-GGUF"
    ids = mx.array([[1, 5, 9, 3]])
    expected = elm_mlx.load_model(family_dirs["mistral"])(ids)
    assert mx.allclose(elm_mlx.load_model("a/Tiny-GGUF:tiny-F32.gguf")(ids), expected, atol=0.1)  # bfloat16
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("a/Tiny-GGUF:F32", "a/Tiny-GGUF@main:TINY-F32.gguf", f"a/Tiny-GGUF@{hub.commit('a/Tiny-GGUF')}:F32"):
        assert directory_of(name) == made
    with pytest.raises(ElmError, match="only a part of it is in the hub's cache"):
        directory_of("a/Tiny-GGUF:Q8_0")
    assert len(hub.asked) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    other = directory_of("a/Tiny-GGUF:q8_0")
    assert other.parent == made.parent and other != made
    listed = cached_models()
    assert {(each.name, each.file, each.runs) for each in listed} == {
        ("a/Tiny-GGUF", "tiny-F32.gguf", True), ("a/Tiny-GGUF", "tiny-Q8_0.gguf", True), ("a/Tiny-GGUF", "", True)
    }  # fmt: skip
    assert [each.directory for each in chosen(listed, "a/Tiny-GGUF:Q8_0")] == [other]
    with pytest.raises(InputError, match="a/Tiny-GGUF:Q8: not in the hub's cache"):
        chosen(listed, "a/Tiny-GGUF:Q8")


def test_the_only_gguf_file_needs_no_name(hub: HubServer, gguf: dict[str, bytes], tmp_path: Path) -> None:
    del gguf["tiny-F32.gguf"]
    made = directory_of("a/Tiny-GGUF")
    assert (made / "config.json").exists() and made.name == hub.commit("a/Tiny-GGUF")
    for source in ("a/Tiny-GGUF", "a/Tiny-GGUF:Q8_0"):
        elm_mlx_convert.convert(source, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_names_that_are_none() -> None:
    for name in (
        "OpenELM",
        "a/b/c",
        "./a/b",
        "/a",
        "a/",
        "~/a",
        "a/b.pt",
        "a/b.safetensors",
        "a b/c",
        "a/b@",
        "a/-b",
        "a/b:",
        "C:/a",
    ):
        assert hub_module.repository(name) is None, name
    for name in ("a/b@refs/pr/1", "a/b:Q4_K_M", "a/b@v1:sub/x.gguf"):
        assert str(hub_module.repository(name)) == name


def test_what_a_directory_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of(Path()) == tmp_path.name and name_of(Path("a/b")) == "b"
    assert name_of(Path("models--a--b--c/snapshots/0123")) == "a/b--c"
    Path("link").symlink_to("elsewhere")
    assert name_of(Path("link")) == "link"
