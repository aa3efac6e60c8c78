"""Image data: the splits, the IDX reader, and where files are looked for."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatopt.tasks import Images, load_images
from flatopt.tasks.images import DATA_VARIABLE, MNIST_VARIABLE, read_idx, resize

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx_bytes(values: Tensor) -> bytes:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files with 10,006 training images and 5 test images of 2x2 pixels; pixels count the images."""
    folder = tmp_path_factory.mktemp("idx")
    for part, count in (("train", 10_006), ("t10k", 5)):
        pixels = torch.arange(count).view(-1, 1, 1).expand(-1, 2, 2) % 251
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pixels), 1))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.arange(count) % 10))
    return folder


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_are_split_in_three_disjoint_parts_that_cover_the_data() -> None:
    from sklearn.datasets import load_digits

    splits = load_images("digits", 8)
    assert [len(split.targets) for split in splits] == [1097, 300, 400]
    pixels, labels = load_digits(return_X_y=True)
    seen = torch.cat([split.inputs.flatten(1) * 16 for split in splits])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, pixels.tolist()))
    of = {tuple(image): label for image, label in zip(pixels.tolist(), labels.tolist(), strict=True)}
    assert all(
        of[tuple(image)] == label
        for split in splits
        for image, label in zip((split.inputs.flatten(1) * 16).tolist(), split.targets.tolist(), strict=True)
    )
    assert all(not rows(a.inputs) & rows(b.inputs) for a, b in [splits[:2], splits[1:], splits[::2]])


@pytest.mark.parametrize("size", [8, 14, 28])
def test_sizes_keep_mean_and_range(size: int) -> None:
    images = load_images("digits", size).train.inputs
    assert images.shape == (1097, size, size)
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.mean().item() == pytest.approx(load_images("digits", 8).train.inputs.mean().item(), rel=0.02)


def test_shrinking_averages_areas() -> None:
    images = torch.arange(2 * 28 * 28, dtype=torch.float32).view(2, 28, 28)
    expected = images.view(2, 14, 2, 14, 2).mean((2, 4))
    torch.testing.assert_close(resize(images, 14), expected)


def test_standardized_training_pixels_have_mean_zero_and_std_one() -> None:
    plain, standard = load_images("digits", 8), load_images("digits", 8, standardize=True)
    std, mean = torch.std_mean(standard.train.inputs)
    assert abs(mean) < 1e-5 and abs(std - 1) < 1e-5
    shift, scale = plain.train.inputs.mean(), plain.train.inputs.std()
    torch.testing.assert_close(standard.test.inputs * scale + shift, plain.test.inputs, rtol=1e-4, atol=1e-5)


def test_loading_twice_gives_the_same_tensors() -> None:
    assert load_images("digits", 8).train.inputs is load_images("digits", 8).train.inputs


@pytest.mark.parametrize("through_variable", [False, True])
def test_idx_files_are_split_by_position(folder: Path, through_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if through_variable:
        monkeypatch.setenv(DATA_VARIABLE, str(folder))
    splits = load_images("fashion-mnist", 8, None if through_variable else str(folder))
    assert [len(split.targets) for split in splits] == [6, 10_000, 5]
    first_pixels = [(split.inputs[:, 0, 0] * 255).round().long() for split in splits]
    numbers = [torch.arange(6), torch.arange(6, 10_006), torch.arange(5)]
    for split, pixels, number in zip(splits, first_pixels, numbers, strict=True):
        torch.testing.assert_close(pixels, number % 251)
        torch.testing.assert_close(split.targets, number % 10)


def test_an_explicit_root_wins_over_the_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, "/nowhere")
    assert len(load_images("fashion-mnist", 8, str(folder)).test.targets) == 5


def test_a_hub_root_downloads_the_four_files_of_one_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def download(repo_id: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        calls.append((repo_id, filename, repo_type, revision))
        content = (folder / filename).read_bytes() if (folder / filename).exists() else None
        target = folder / "hub" / filename
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content or gzip.compress((folder / filename.removesuffix(".gz")).read_bytes()))
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    splits = load_images("fashion-mnist", 8, "hf://org/name@abc")
    assert calls == [("org/name", f"{name}.gz", "dataset", "abc") for name in NAMES]
    torch.testing.assert_close(splits.meta.inputs, load_images("fashion-mnist", 8, str(folder)).meta.inputs)


def test_mnist_has_a_folder_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setenv(MNIST_VARIABLE, str(folder))
    assert [len(split.targets) for split in load_images("mnist", 8)] == [6, 10_000, 5]
    monkeypatch.setenv(MNIST_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=f"^MNIST: no train-images.*{MNIST_VARIABLE}"):
        load_images("mnist", 8)


def test_missing_files_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*dataset-fashion-mnist.*{DATA_VARIABLE}.*hf://"):
        load_images("fashion-mnist", 8, str(tmp_path))


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    from flatopt.tasks.images import _digits

    with pytest.raises(ImportError, match="pip install scikit-learn"):
        _digits()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08", "not an IDX file"),
        (bytes([0, 0, 8, 1]) + (4).to_bytes(4, "big") + b"abcd", "not an IDX file of 3-dimensional"),
        (b"\x89PNG" + bytes(100), "not an IDX file"),
        (idx_bytes(torch.ones(2, 3, 3))[:-1], "header says 18 bytes of data, the file has 17"),
        (idx_bytes(torch.ones(2, 3, 3)) + b"x", "header says 18 bytes of data, the file has 19"),
        (idx_bytes(torch.ones(2, 3, 3))[:10], "not an IDX file"),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_a_bad_idx_file_is_named(content: bytes, message: str, compress: bool, tmp_path: Path) -> None:
    path = tmp_path / ("images.gz" if compress else "images")
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_idx(path, 3)


@pytest.mark.parametrize("damage", ["cut", "header", "body"])
def test_a_damaged_gzip_file_is_named(damage: str, tmp_path: Path) -> None:
    good = bytearray(gzip.compress(idx_bytes(torch.arange(64).view(4, 4, 4))))
    if damage == "cut":
        good = good[:-12]
    else:
        good[0 if damage == "header" else 14] ^= 0xFF
    path = tmp_path / "images.gz"
    path.write_bytes(good)
    with pytest.raises(ValueError, match=f"{path}: damaged gzip file"):
        read_idx(path, 3)


def test_read_idx_returns_what_was_written(tmp_path: Path) -> None:
    values = torch.arange(24).view(2, 3, 4).to(torch.uint8)
    (tmp_path / "plain").write_bytes(idx_bytes(values))
    torch.testing.assert_close(read_idx(tmp_path / "plain", 3), values, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "size", "message"), [("cifar", 8, "name must be"), ("digits", 9, "size must be")])
def test_unknown_data_are_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_images(name, size)


def test_unknown_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="source must be one of .* not 'cifar'"):
        Images(sources=(("cifar", 1.0),))


def test_autoencoders_get_the_images_as_targets() -> None:
    data = Images(sources=(("digits", 1.0),), reconstruct=True)
    batch = data.gather(data.table(), torch.tensor([[3, 1], [0, 2]]))
    assert batch.inputs.shape == (2, 2, 64)
    assert torch.equal(batch.inputs, batch.targets)
    assert rows(batch.inputs.flatten(0, 1)) <= rows(load_images("digits", 8).train.inputs.flatten(1))
