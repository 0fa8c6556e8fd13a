from __future__ import annotations

import argparse
import builtins
import collections
import copy
import fractions
import io
import json
import logging
import os
import pickle
import struct
import zipfile

import golden_case
import numpy as np
import pytest
import safetensors.torch
import torch

import fastphi
from fastphi import checkpoint
from fastphi.checkpoint import fingerprint, load, load_authors_checkpoint, save
from fastphi.config import TrainingInfo, UNetConfig
from fastphi.unet import UNet

# --- our own format -------------------------------------------------------------------------------


@pytest.fixture
def model(make_model):
    model = make_model(dec_layers=(3, 2), upsample_bias=True)
    model.training_info = TrainingInfo(1 / 255, 3.0, (0.1, 0.5, 1.0), "pack", 12)
    return model


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"norm": "layer", "residual": True, "eps": 1e-3},
        {"channels": (3, 5), "image_channels": 1, "bias": False},
        {"enc_layers": (1, 3), "mid_layers": 1, "dec_layers": (2, 4), "upsample_bias": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_was_saved_is_what_is_loaded(make_model, tmp_path, config, dtype):
    model = make_model(dtype=dtype, **config)
    model.training_info = TrainingInfo(0.1, 0.9, None, "φ", 3)
    save(model, tmp_path / "a.safetensors")
    state = torch.get_rng_state()
    loaded = load(tmp_path / "a.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.config == model.config and loaded.training_info == model.training_info
    assert fingerprint(loaded) == fingerprint(model)
    for name, parameter in model.named_parameters():
        found = loaded.get_parameter(name)
        assert torch.equal(found, parameter) and found.dtype == dtype and found.requires_grad
    assert not loaded.training


def test_folder_dtype_and_backend(model, tmp_path):
    save(model, tmp_path / "model.safetensors")
    loaded = load(str(tmp_path), dtype=torch.float64, backend="reference")
    assert loaded.backend == "reference"
    assert all(p.dtype == torch.float64 for p in loaded.parameters())
    for options, match in (
        ({"dtype": torch.int64}, "dtype"),
        ({"dtype": "float32"}, "dtype"),
        ({"device": "warp"}, "device: 'warp'"),
        ({"backend": "warp"}, "backend"),
    ):
        with pytest.raises(ValueError, match=match):
            load(tmp_path, **options)


def test_log_line_tells_name_hash_and_source(model, tmp_path, caplog):
    save(model, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "fastphi"):
        load(tmp_path)
    (line,) = (r.message for r in caplog.records)
    for part in ("model.safetensors", "4-6-8", fingerprint(model)[:16], "12 steps on pack"):
        assert part in line
    assert str(tmp_path.resolve()) in line


def test_loaded_parameters_do_not_hang_on_the_file(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save(model, path)
    loaded = load(path)
    before = fingerprint(loaded)
    with open(path, "r+b") as f:  # in place, not replaced
        f.write(bytes(path.stat().st_size))
    assert fingerprint(loaded) == before == fingerprint(model)


def test_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(model, path)
    content = path.read_bytes()
    with torch.no_grad():
        model.mid[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="mid.0.weight.*NaN"):
        save(model, path)
    with torch.no_grad():
        model.mid[0].weight.zero_()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            save(model, path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError, match="UNet"):
        save(torch.nn.Linear(1, 1), path)


def test_fingerprint_sees_every_parameter_and_the_configuration(model, make_model):
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == first and len(first) == 64
    seen = {first}
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-3
        seen.add(fingerprint(other))
    for change in ({"eps": 1e-4}, {"residual": True}):
        other = make_model(dec_layers=(3, 2), upsample_bias=True, **change)
        seen.add(fingerprint(other))
    seen.add(fingerprint(copy.deepcopy(model).double()))
    assert len(seen) == 1 + len(list(model.parameters())) + 3
    info = copy.deepcopy(model)
    info.training_info = TrainingInfo()
    assert fingerprint(info) == first


def rewrite(path, change_tensors=None, **change):
    """Change a saved file: `config`, `training_info`, `format` or the tensors."""
    with safetensors.safe_open(path, "pt") as f:
        metadata = f.metadata()
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    description = json.loads(metadata["fastphi"])
    for key, value in change.items():
        description[key] = description[key] | value if isinstance(value, dict) else value
    if change_tensors:
        change_tensors(tensors)
    safetensors.torch.save_file(tensors, path, {"fastphi": json.dumps(description)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, "format 2, this version of fastphi reads 1; a newer"),
        ({"config": {"sparkle": 3}}, "config: unknown sparkle"),
        ({"config": {"channels": "abc"}}, "config: channels"),
        ({"config": {"channels": [4, 6, 1.5]}}, "config: channels"),
        ({"config": {"norm": "batch"}}, "config: norm"),
        ({"config": 3}, "config: expected an object"),
        ({"config": {"mid_layers": 10**9}}, "1000000009 layers in the configuration"),
        ({"config": {"channels": [4, 6, 2**62]}}, "impossible configuration"),
        ({"config": {"channels": [4, 6, 10]}}, r"mid\.0\.weight has shape \(8, 6, 3, 3\)"),
        ({"config": {"mid_layers": 4}}, r"lacks mid\.3\.bias, mid\.3\.gamma, mid\.3\.weight"),
        ({"config": {"upsample_bias": False}}, r"has unknown up2\.bias"),
        ({"training_info": {"sigma_max": 0.0}}, "training_info: sigma_max"),
        ({"training_info": {"mean": [0.5]}}, "training_info: mean: expected 3 numbers"),
        ({"training_info": {"mean": [0.5, 0.5, "a"]}}, "training_info: mean"),
        ({"training_info": {"epochs": 1}}, "training_info: unknown epochs"),
        ({"change_tensors": lambda t: t.pop("enc1.0.bias")}, r"lacks enc1\.0\.bias"),
        ({"change_tensors": lambda t: t.update(x=torch.ones(1))}, "has unknown x"),
        ({"change_tensors": lambda t: t["mid.0.bias"].fill_(torch.inf)}, r"mid\.0\.bias: 8 values"),
        (
            {
                "change_tensors": lambda t: t.update(
                    {"mid.0.bias": torch.ones(8, dtype=torch.int32)}
                )
            },
            r"mid\.0\.bias is torch\.int32",
        ),
        (
            {"change_tensors": lambda t: t.update({"mid.0.bias": torch.ones(8).double()})},
            "several types",
        ),
    ],
)
def test_wrong_content_is_named(model, tmp_path, change, match):
    path = tmp_path / "model.safetensors"
    save(model, path)
    rewrite(path, **change)
    with pytest.raises(ValueError, match=match) as error:
        load(path)
    assert str(path) in str(error.value)


def test_damaged_files_are_named(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save(model, path)
    content = path.read_bytes()
    for damaged in (b"", content[:4], content[:100], content[:-1], b"\xff" * 64, b"hello" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole safetensors file") as error:
            load(path)
        assert str(path) in str(error.value)
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="without a configuration"):
        load(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"fastphi": "{"})
    with pytest.raises(ValueError, match="configuration is damaged"):
        load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no model: .*model\.safetensors"):
        load(tmp_path / "empty")


# --- the authors' format --------------------------------------------------------------------------


def authors_folder(folder, name="public_small", prefix="", state=None, **change):
    """What the authors' program writes, from the golden weights; change: arguments (...: none)."""
    folder.mkdir(exist_ok=True)
    arguments = golden_case.authors_arguments(name)
    del arguments["eps"]
    arguments |= {
        "arch_name": "UNet_flex",
        "NormType": "LayerNorm",
        "inter_skip": True,
        "skip": False,
        "kernel_size": 3,
        "padding": 1,
        "dilations": None,
        "noise_level_range": [1, 765],
        "data_name": "texture",
        "lr": 1e-3,
        "device": torch.device("cuda", 0),
        **change,
    }
    arguments = {k: v for k, v in arguments.items() if v is not ...}
    (folder / "exp_arguments.pkl").write_bytes(pickle.dumps(arguments))
    state = golden_case.authors_state(name) if state is None else state
    torch.save(
        collections.OrderedDict((prefix + k, v) for k, v in state.items()), folder / "model.pt"
    )
    return folder


@pytest.mark.parametrize("name", golden_case.NAMES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_checkpoint(tmp_path, name, prefix):
    folder = authors_folder(tmp_path, name, prefix)
    model = load_authors_checkpoint(folder)
    with torch.no_grad():
        a = golden_case.load_golden(name)[1]
        torch.testing.assert_close(model(a["x"]), a["denoised"], rtol=0, atol=1e-5)
    assert model.training_info == TrainingInfo(1 / 255, 3.0, None, "texture", 0)
    assert fingerprint(load(folder, backend="reference")) == fingerprint(model)
    save(model, tmp_path / "ours.safetensors")
    assert fingerprint(load(tmp_path / "ours.safetensors")) == fingerprint(model)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_authors_arguments_of_every_pickle_protocol(tmp_path, protocol):
    folder = authors_folder(tmp_path)
    path = folder / "exp_arguments.pkl"
    values = pickle.loads(path.read_bytes()) | {
        "empty": (),
        "deep": {"a": [1.5, (None, "é", -(2**70))]},
    }
    path.write_bytes(pickle.dumps(collections.OrderedDict(values), protocol))
    assert load_authors_checkpoint(folder).config.channels == (8, 16, 32, 64)
    found = fastphi.checkpoint.authors.read_arguments(path)
    assert found == values | {"device": "cuda:0"}


def test_authors_old_tensor_file(tmp_path):
    folder = authors_folder(tmp_path)
    expected = fingerprint(load(folder))
    state = golden_case.authors_state("public_small")
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=False)
    assert fingerprint(load(folder)) == expected


def test_authors_counts_may_be_one_number(tmp_path):
    one = {"num_enc_conv": 2, "num_mid_conv": 3, "num_dec_conv": 6}
    assert load(authors_folder(tmp_path, **one)).config.dec_layers == (6, 6, 6)


def test_authors_upsampling_bias_absent_means_bias(tmp_path):
    up = load(authors_folder(tmp_path / "a", "public_upbias", upsample_with_bias=...))
    assert up.config.upsample_bias and up.up2.bias is not None and up.up1.bias is None
    with pytest.raises(ValueError, match=r"lacks upsample\.1\.bias, upsample\.2\.bias"):
        load(authors_folder(tmp_path / "b", "public_small", upsample_with_bias=...))


def test_authors_residual(tmp_path):
    """skip=True: the network's output is the residual, so the denoised image is x minus it."""
    plain = load(authors_folder(tmp_path / "a"))
    residual = load(authors_folder(tmp_path / "b", skip=True))
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(residual(x), x - plain(x))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"NormType": "BatchNorm"}, "NormType = 'BatchNorm' is not supported"),
        ({"NormType": "InstanceNorm"}, "NormType = 'InstanceNorm' is not supported"),
        ({"NormType": ...}, "lacks NormType"),
        ({"inter_skip": False}, "inter_skip = False is not supported"),
        ({"dilations": [2, 4]}, r"dilations = \[2, 4\] is not supported"),
        ({"kernel_size": 5}, "kernel_size = 5 is not supported"),
        ({"num_kernels": ..., "bias": ...}, "lacks num_kernels, bias"),
        ({"num_kernels": 64}, "channels"),
        ({"num_kernels": [8, 16, 32, 65]}, r"mid\.0\.weight has shape \(64, 32, 3, 3\)"),
        ({"num_channels": 1}, r"encoder\.0\.0\.weight has shape \(8, 3, 3, 3\)"),
        ({"num_mid_conv": 4}, r"lacks mid\.10\.gammas, mid\.9\.bias, mid\.9\.weight"),
        ({"num_mid_conv": 2}, r"has mid\.6\.bias, mid\.6\.weight, mid\.7\.gammas"),
        ({"num_mid_conv": 10**9}, "layers in the configuration"),
        ({"num_dec_conv": [6, 6]}, "dec_layers"),
        ({"bias": "yes"}, "bias"),
        ({"skip": 1}, "residual"),
        ({"noise_level_range": [5]}, "noise_level_range"),
        ({"noise_level_range": "ab"}, "noise_level_range"),
    ],
)
def test_authors_what_is_not_supported_is_named(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        load(authors_folder(tmp_path, **change))


def test_authors_missing_files(tmp_path):
    folder = authors_folder(tmp_path)
    (folder / "model.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.pt"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_authors_checkpoint(tmp_path / "nowhere")


def test_authors_strange_state_dicts(tmp_path):
    good = golden_case.authors_state("public_small")
    flat = good | {"mid.1.gammas": good["mid.1.gammas"].reshape(-1)}
    for state, match in (
        (good | {"running": torch.ones(1)}, "has running"),
        (good | {"mid.0.bias": 3}, "mid.0.bias is not a plain tensor but int"),
        (good | {"mid.0.bias": good["mid.0.bias"].to_sparse()}, "not a plain tensor"),
        (good | {"module.mid.0.bias": good["mid.0.bias"]}, r"two tensors for mid\.0\.bias"),
        (flat, r"mid\.1\.gammas has shape \(64,\), .* \(1, 64, 1, 1\)"),
        (good | {"mid.0.bias": good["mid.0.bias"] * torch.nan}, "NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            load(authors_folder(tmp_path, state=state))
    torch.save([1, 2], tmp_path / "model.pt")
    with pytest.raises(ValueError, match="readable state dict .*expected a dict, got list"):
        load(tmp_path)


def test_authors_damaged_files(tmp_path):
    folder = authors_folder(tmp_path)
    for name in ("exp_arguments.pkl", "model.pt"):
        content = (folder / name).read_bytes()
        for damaged in (b"", content[:1], content[: len(content) // 2], b"\x80\xff", b"hello"):
            (folder / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=name):
                load(folder)
        (folder / name).write_bytes(content)
    (folder / "exp_arguments.pkl").write_bytes(pickle.dumps("x" * 2_000_000))
    with pytest.raises(ValueError, match="2000"):
        load(folder)


# --- hostile files: refused, and nothing in them runs ---------------------------------------------


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Builds:
    """An object whose pickle sets attributes of another."""

    def __reduce__(self):
        return torch.device, ("cpu",), {"type": "cuda"}


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def hostile(trap: str) -> dict:
    """Pickles that would make the file `trap`, or try to get hold of what could."""
    touch, line = f"touch {trap}", f"open({trap!r}, 'w')"
    system = short("os") + short("system") + b"\x93"
    dumped = {
        "system": {"lr": Runs(os.system, touch)},
        "eval": [Runs(eval, line)],
        "exec as a key": {Runs(builtins.exec, line): 1},
        "nested": {"a": [({"b": (Runs(os.system, touch),)},)]},
        "within a device": {"device": Runs(torch.device, Runs(os.system, touch))},
        "getattr": {"a": Runs(getattr, Runs(__import__, "os"), "system")},
        "import": {"a": Runs(__import__, "antigravity")},
        "torch.load": {"a": Runs(torch.load, trap)},
        "ordered dict with state": Runs(collections.OrderedDict, [["a", Runs(os.system, touch)]]),
        "build": {"device": Builds()},
        "namespace": argparse.Namespace(num_channels=3),
        "fraction": {"a": fractions.Fraction(1, 2)},
        "numpy": {"a": np.float64(3)},
        "set": {"a": {1, 2}},
        "bytearray": {"a": bytearray(b"x")},
        "device of a number": {"device": Runs(torch.device, 0)},
        "device of nothing": {"device": Runs(torch.device)},
        "device of three": {"device": Runs(torch.device, "cuda", 0, 1)},
        "device of a list": {"device": Runs(torch.device, ["cuda"])},
        "device function": {"device": torch.device},
        "list": [1, 2],
        "number as a key": {1: 2},
    }
    found = {name: pickle.dumps(value, 4) for name, value in dumped.items()}
    found |= {f"{name}, protocol 0": pickle.dumps(dumped[name], 0) for name in ("system", "nested")}
    argument = b"S" + repr(touch).encode() + b"\n"
    return found | {
        "GLOBAL": b"cos\nsystem\n(" + argument + b"tR.",
        "GLOBAL posix": b"cposix\nsystem\n(" + argument + b"tR.",
        "GLOBAL dotted": b"\x80\x04" + short("torch") + short("device.__class__") + b"\x93.",
        "INST": b"(" + argument + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + argument + b"o.",
        "OBJ popen": b"(csubprocess\nPopen\n" + argument + b"o.",
        "STACK_GLOBAL": b"\x80\x04" + system + short(touch) + b"\x85R.",
        "NEWOBJ": b"\x80\x04" + short("subprocess") + short("Popen") + b"\x93)\x81.",
        "BUILD on a device": b"ctorch\ndevice\n}(S'__code__'\nI1\nsb.",
        "persistent": b"P" + touch.encode() + b"\n.",
        "binary persistent": b"\x80\x02" + b"X\x01\x00\x00\x00aQ.",
        "extension": b"\x80\x02\x82\x01.",
        "memo bomb": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
        "long string": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
        "discarded": b"\x80\x04" + system + short(touch) + b"\x85R0}.",
        "a key that takes for ever to hash": b"\x80\x02}" + doubled("a") + b"K\x01s.",
        "a value that takes for ever to print": pickle.dumps({"skip": doubled_list()}, 2),
    }


def doubled(leaf: str) -> bytes:
    """Protocol 2: a tuple of one tuple twice, of one tuple twice, ...: 2^60 leaves to walk."""
    t: tuple = (leaf,)
    for _ in range(60):
        t = (t, t)
    return pickle.dumps(t, 2)[2:-1]


def doubled_list() -> list:
    t: list = []
    for _ in range(60):
        t = [t, t]
    return t


CASES = sorted(hostile("trap"))


@pytest.mark.parametrize("case", CASES)
def test_hostile_arguments(tmp_path, case):
    folder, trap = authors_folder(tmp_path / "model"), tmp_path / "trap"
    (folder / "exp_arguments.pkl").write_bytes(hostile(str(trap))[case])
    with pytest.raises(ValueError, match=r"exp_arguments\.pkl( is not|: )") as error:
        load(folder)
    assert not trap.exists() and "\n" not in str(error.value)


def test_hostile_cases_are_hostile(tmp_path):
    """The plain unpickler does make the file: so the test above can fail."""
    fired = []
    for case, content in hostile(str(tmp_path / "trap")).items():
        if case.split(",")[0] in (
            "system",
            "nested",
            "GLOBAL",
            "INST",
            "STACK_GLOBAL",
            "discarded",
        ):
            pickle.loads(content)
            assert (tmp_path / "trap").exists(), case
            (tmp_path / "trap").unlink()
            fired.append(case)
    assert len(fired) == 8


def zipped(content: bytes) -> bytes:
    """A model.pt whose pickle is this."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("model/data.pkl", content)
        z.writestr("model/version", "3\n")
        z.writestr("model/byteorder", "little")
    return out.getvalue()


@pytest.mark.parametrize("wrap", [zipped, bytes], ids=["zip", "plain"])
def test_hostile_weights(tmp_path, wrap):
    folder, trap = authors_folder(tmp_path / "model"), tmp_path / "trap"
    for case, content in hostile(str(trap)).items():
        if case == "memo bomb" or "takes for ever" in case:
            continue  # torch's own reader has no memo to fill, and does not guard against the others
        (folder / "model.pt").write_bytes(wrap(content))
        with pytest.raises(ValueError, match=r"model\.pt") as error:
            load(folder)
        assert not trap.exists() and "\n" not in str(error.value), case
        assert "weights_only" not in str(error.value), case  # no advice to switch protection off


@pytest.mark.parametrize("new", [True, False])
def test_hostile_weights_saved_by_torch(tmp_path, new):
    folder, trap = authors_folder(tmp_path / "model"), tmp_path / "trap"
    state = golden_case.authors_state("public_small")
    for value in (Runs(os.system, f"touch {trap}"), UNet(UNetConfig(channels=(2, 2)))):
        torch.save(
            state | {"mid.0.bias": value}, folder / "model.pt", _use_new_zipfile_serialization=new
        )
        with pytest.raises(
            ValueError, match=r"model\.pt is not .*more than tensors and plain values"
        ):
            load(folder)
        assert not trap.exists()


def test_public_names():
    assert fastphi.load is checkpoint.load and fastphi.save is checkpoint.save
    assert fastphi.load_authors_checkpoint is checkpoint.load_authors_checkpoint
