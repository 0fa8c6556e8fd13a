"""What `extract` and `Trainer` take as images, beside packs and float tensors."""

from __future__ import annotations

import importlib
import logging
import pickle

import numpy as np
import pytest
import torch
from images_case import SIZE, pixels, quiet_pack
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastphi
from fastphi.config import UNetConfig
from fastphi.data import PackedImages, open_images
from fastphi.data.memory import DatasetImages
from fastphi.train import TrainConfig, Trainer

N = 6


@pytest.fixture
def packed(tmp_path) -> PackedImages:
    np.save(tmp_path / "x.npy", levels())
    return quiet_pack(tmp_path / "x.npy", tmp_path / "pack")


def levels() -> np.ndarray:
    return np.stack([pixels(i) for i in range(N)])


class Counted(torch.utils.data.Dataset):
    """(PIL image, class), counting how often each item was asked for."""

    classes = ("a", "b", "c")

    def __init__(self):
        self.asked = np.zeros(N, int)

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.asked[i] += 1
        return Image.fromarray(pixels(i)), i % 3


def forms():
    x = levels()
    pictures = [Image.fromarray(image) for image in x]
    chw = torch.from_numpy(x).permute(0, 3, 1, 2)
    return {
        "uint8 array": x,
        "uint8 array, channels first": x.transpose(0, 3, 1, 2),
        "uint8 tensor": chw,
        "uint8 tensor, channels last": torch.from_numpy(x),
        "list of PIL": pictures,
        "pairs": [(image, i) for i, image in enumerate(pictures)],
        "dicts": [{"image": image, "label": i} for i, image in enumerate(pictures)],
        "list of arrays": [*x],
        "tensors": TensorDataset(chw),
        "data set": Counted(),
        "loader": DataLoader(Counted(), batch_size=4, shuffle=True, drop_last=True),
    }


@pytest.mark.parametrize("form", forms())
def test_the_same_images_in_any_form_are_the_same_data(packed, form):
    """Pixels, identity and mean as a pack's: what is begun with one goes on with the other."""
    opened = open_images(forms()[form])
    order = [5, 0, 3, 5]
    assert len(opened) == N and opened.shape == packed.shape and opened.size == SIZE
    assert torch.equal(opened.batch(order), packed.batch(order))
    assert torch.equal(opened.stored(order), packed.stored(order))
    assert opened.sha256 == packed.sha256 and opened.mean == packed.mean
    again = pickle.loads(pickle.dumps(opened))
    assert torch.equal(again.batch(order), packed.batch(order)) and again.sha256 == packed.sha256
    assert opened.batch([]).shape == (0, 3, SIZE, SIZE)


def test_float_items_are_the_tensor_they_make():
    x = torch.rand(N, 3, SIZE, SIZE)
    memory = open_images(x)
    for source in ([*x], [*x.numpy()], TensorDataset(x, torch.arange(N)), [*x.permute(0, 2, 3, 1)]):
        opened = open_images(source)
        assert torch.equal(opened.batch([4, 1]), x[[4, 1]]) and opened.sha256 == memory.sha256
        assert torch.equal(opened.stored([4, 1]), x[[4, 1]])
        assert opened.mean == pytest.approx(memory.mean, rel=1e-6)


def test_a_data_set_is_decoded_on_demand(caplog):
    source = Counted()
    opened = open_images(source)
    assert source.asked.tolist() == [2, 0, 0, 0, 0, 0]  # for size and kind, and whether it changes
    opened.batch([3, 3])
    assert source.asked.tolist() == [2, 0, 0, 2, 0, 0]
    with caplog.at_level(logging.INFO):
        assert opened.sha256 and opened.mean and opened.sha256
    assert "6 images of a Counted are read once for their SHA-256" in caplog.text
    assert source.asked.tolist() == [3, 1, 1, 3, 1, 1]
    assert opened.labels.tolist() == [0, 1, 2, 0, 1, 2] and opened.class_names == ["a", "b", "c"]


def test_a_shuffling_loader_changes_no_row(packed, caplog):
    loader = DataLoader(Counted(), shuffle=True)
    opened = open_images(loader)
    assert "not its RandomSampler" in caplog.text
    assert torch.equal(opened.batch(range(N)), packed.batch(range(N)))


def test_kinds_of_pictures():
    grey = open_images([Image.fromarray(pixels(i, channels=1)) for i in range(2)])
    assert grey.shape == (1, SIZE, SIZE)
    sixteen = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    deep = open_images([Image.fromarray(sixteen)])
    assert np.abs(deep.stored([0])[0, ..., 0].numpy() - sixteen / 257).max() <= 0.5 + 1e-6
    both = open_images([Image.fromarray(pixels(0)), Image.fromarray(pixels(1, channels=1))])
    assert torch.equal(both.batch([1])[0, 0], both.batch([1])[0, 2])
    assert open_images([np.zeros((4, 5))]).shape == (1, 4, 5)
    rgba = Image.fromarray(pixels(0, channels=4))
    assert open_images([rgba]).shape == (3, SIZE, SIZE) and rgba.mode == "RGBA"


class Streamed(IterableDataset):
    def __iter__(self):
        yield from [0, 1]


class Noisy(Counted):
    def __getitem__(self, i):
        return torch.rand(3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "images: the list has no items"),
        ([3], TypeError, "images: item 0 of a list: expected a PIL image, .* got int"),
        (["a.png"], TypeError, "images: item 0 of a list: expected a PIL image, .* got str"),
        ([{"x": 1}], ValueError, "images: item 0 of a list: no image or img in an item, .* has x"),
        ({"train": []}, TypeError, "images: expected a data set, got a dict; choose .* 'train'"),
        (Streamed(), TypeError, "images: expected images, or a data set with __len__"),
        (iter([]), TypeError, "images: expected the path of a pack"),
        ([np.full((4, 4), 7.0)], ValueError, r"item 0 of a list: expected floats in \[0, 1\], got"),
        ([np.full((4, 4), 7)], ValueError, "expected uint8, or float in .0, 1., got int64"),
        ([np.zeros((2, 4, 5))], ValueError, r"expected .*with 1 or 3 channels, got \(2, 4, 5\)"),
        (np.zeros((2, 4, 5, 6), np.uint8), ValueError, "images: expected .*, got .2, 4, 5, 6"),
        (np.zeros((4, 5, 3), np.uint8), ValueError, "images: expected .N, C, H, W. or .N, H, W"),
    ],
)
def test_what_is_no_images(source, error, message):
    with pytest.raises(error, match=message):
        open_images(source)


def test_images_of_several_sizes_are_for_pack():
    odd = [Image.fromarray(pixels(0)), Image.fromarray(pixels(1, 20, 24))]
    with pytest.raises(ValueError, match=r"item 1 of a list is uint8 \(20, 24, 3\).*fastphi\.pack"):
        _ = open_images(odd).sha256


def test_a_random_transform_is_told(caplog):
    open_images(Noisy())
    assert "another each time that it is read" in caplog.text


CONFIG = UNetConfig(channels=(2, 3), enc_layers=1, mid_layers=1, dec_layers=2)


def test_extract_takes_them_all_and_resumes_across_them(packed, tmp_path, make_model):
    model = make_model(channels=(2, 3), enc_layers=1, mid_layers=1, dec_layers=2)
    options = {"sigmas": [0.1], "draws": 2}
    expected = fastphi.extract(model, packed, **options).phi(0.1)
    for name, source in forms().items():
        np.testing.assert_array_equal(
            fastphi.extract(model, source, **options).phi(0.1), expected, name
        )
    store = fastphi.extract(model, Counted(), tmp_path / "store", workers=2, **options)
    np.testing.assert_array_equal(store.phi(0.1), expected)
    fastphi.extract(model, packed, tmp_path / "store", **options)  # the same data
    with pytest.raises(ValueError, match="data"):
        fastphi.extract(model, [*levels()[::-1]], tmp_path / "store", **options)
    with pytest.raises(ValueError, match="images: height and width .* fastphi.pack crops"):
        fastphi.extract(model, np.zeros((1, 5, 5, 3), np.uint8), **options)


def test_trainer_takes_a_data_set(packed, tmp_path):
    runs = {}
    for name, source in (("of pack", packed), ("of data set", Counted())):
        config = TrainConfig(out=tmp_path / name, model=CONFIG, batch=2, max_steps=2, holdout=2)
        runs[name] = Trainer(config, source).run(progress=False).state_dict()
    assert all(
        torch.equal(runs["of pack"][key], runs["of data set"][key]) for key in runs["of pack"]
    )
    config = TrainConfig(out=tmp_path / "of pack", model=CONFIG, batch=2, max_steps=4, holdout=2)
    Trainer(config, DataLoader(Counted())).run(progress=False)  # goes on


# --- the libraries' own ----------------------------------------------------------------------------


@pytest.fixture
def torchvision():
    """Without a matching binary torchvision lacks its operators; to import it needs their names alone."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms", "roi_align", "roi_pool"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor boxes) -> Tensor")
    return importlib.import_module("torchvision")


@pytest.mark.filterwarnings("ignore")  # of the other library
def test_torchvision(torchvision, tmp_path):
    for i in range(N):
        folder = tmp_path / "photos" / "pq"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(folder / f"{i}.png")
    plain = torchvision.datasets.ImageFolder(tmp_path / "photos")
    tensors = torchvision.datasets.ImageFolder(
        tmp_path / "photos", torchvision.transforms.ToTensor()
    )
    packed = quiet_pack(tmp_path / "photos", tmp_path / "folder")
    for k, source in enumerate((plain, tensors)):
        again = quiet_pack(source, tmp_path / f"pack{k}", workers=2)
        assert again.sha256 == packed.sha256 and again.class_names == packed.class_names
        assert again.labels.tolist() == packed.labels.tolist()
        opened = open_images(source)
        assert torch.equal(opened.batch(range(N)), packed.batch(range(N)))
        assert opened.labels.tolist() == packed.labels.tolist()
    fake = torchvision.datasets.FakeData(4, (3, SIZE, SIZE))
    assert open_images(fake).shape == (3, SIZE, SIZE)


@pytest.mark.filterwarnings("ignore")  # of the other library
def test_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    hf = pytest.importorskip("datasets", reason="datasets is not installed")
    hf.disable_progress_bars()
    pictures = [Image.fromarray(pixels(i)) for i in range(N)]
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["p", "q"])})
    table = {"image": pictures, "label": [i % 2 for i in range(N)]}
    found = hf.Dataset.from_dict(table, features=features)
    np.save(tmp_path / "x.npy", levels())
    packed = quiet_pack(tmp_path / "x.npy", tmp_path / "pack")
    for source in (found, found.with_format("torch"), found.with_format("numpy")):
        opened = open_images(source)
        assert isinstance(opened, DatasetImages) and opened.sha256 == packed.sha256
        assert opened.labels.tolist() == [0, 1] * 3 and opened.class_names == ["p", "q"]
    own = quiet_pack(found, tmp_path / "own", workers=2)
    assert own.sha256 == packed.sha256 and own.class_names == ["p", "q"]
    with pytest.raises(TypeError, match="images: expected a data set, got a DatasetDict.*'train'"):
        open_images(hf.DatasetDict({"train": found}))
    with pytest.raises(TypeError, match="images: expected .*got IterableDataset"):
        open_images(found.to_iterable_dataset())
    found.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    read = quiet_pack(tmp_path / "train-00000-of-00001.parquet", tmp_path / "parquet")
    assert read.sha256 == packed.sha256 and read.class_names == ["p", "q"]
    assert read.labels.tolist() == [0, 1] * 3
