"""Photographs in folders: found, refused, decoded, cropped; the same batches however often a run was interrupted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from koala_lab import data
from koala_lab import notebook as nb
from koala_lab.config import RunConfig
from koala_lab.data import DATASETS
from koala_lab.data.folders import Photographs, RandomArea, centre_crop, listing, random_crop
from koala_lab.runs.training import train

SIZE, TRAIN, TEST = 16, 15, 6
CONFIG = RunConfig(
    dataset="imagenet",
    model="resnet8",
    optimizer="sgd",
    optimizer_args={"lr": 0.1},
    augment=True,
    epochs=2,
    batch_size=4,
)


def write_photograph(path: Path, *, seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "CMYK": 4}[mode]
    coarse = np.random.RandomState(seed).randint(0, 256, (6, 8, channels)).astype(np.uint8)
    Image.fromarray(coarse, mode).resize(size).save(path, "JPEG")


@pytest.fixture
def photographs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of five and two small photographs, with the row of the registry that fits them."""
    listing.cache_clear()
    root = folder / "imagenet"
    for part, count in (("train", TRAIN // 3), ("val", TEST // 3)):
        for label, name in enumerate(("n01", "n02", "n10")):
            for k in range(count):
                path = root / part / name / f"{name}_{k}.JPEG"
                write_photograph(path, seed=100 * label + k + 50 * (part == "val"))
    row = dataclasses.replace(DATASETS["imagenet"], num_classes=3, counts=(TRAIN, TEST), size=SIZE, short_side=20)
    monkeypatch.setitem(DATASETS, "imagenet", row)
    return root


def batches(
    loaded: data.ImageData, *, epoch: int = 0, start: int = 0, augment: bool = True
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(
        data.batches(
            loaded.train_images,
            loaded.train_labels,
            4,
            mean=loaded.mean,
            std=loaded.std,
            generator=data.epoch_generator(0, epoch),
            augment=loaded.augmentation if augment else None,
            drop_last=True,
            start=start,
        )
    )


# --- found, and refused -----------------------------------------------------------------------------------------------


def test_the_registry_has_the_official_numbers() -> None:
    row = DATASETS["imagenet"]
    assert (row.num_classes, row.counts, row.shape) == (1000, (1_281_167, 50_000), (3, 224, 224))


def test_folders_are_loaded_without_decoding(photographs: Path) -> None:
    (photographs / "train" / "notes.txt").touch()
    (photographs / "train" / "n01" / "notes.txt").touch()
    loaded = data.load("imagenet")
    assert loaded.train_images.shape == (TRAIN, 3, SIZE, SIZE)
    assert loaded.test_images.shape == (TEST, 3, SIZE, SIZE)
    assert loaded.train_labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert loaded.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (loaded.num_classes, loaded.tag) == (3, "")
    assert loaded.identity == data.identity("imagenet")


def test_a_subset_is_class_balanced(photographs: Path) -> None:
    loaded = data.load("imagenet", train_size=6)
    assert loaded.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert isinstance(loaded.train_images, Photographs)
    assert [file.split(b"/")[0] for file in loaded.train_images.files] == [b"n01"] * 2 + [b"n02"] * 2 + [b"n10"] * 2
    with pytest.raises(ValueError, match="train_size must be between 1 and 15"):
        data.load("imagenet", train_size=16)


def test_identity_is_of_names_and_sizes(photographs: Path) -> None:
    before = data.identity("imagenet")
    listing.cache_clear()
    assert data.identity("imagenet") == before
    write_photograph(photographs / "train" / "n01" / "n01_0.JPEG", seed=1, size=(50, 50))
    listing.cache_clear()
    resized = data.identity("imagenet")
    (photographs / "train" / "n01" / "n01_0.JPEG").rename(photographs / "train" / "n01" / "n01_9.JPEG")
    listing.cache_clear()
    assert len({before, resized, data.identity("imagenet")}) == 3


def test_another_number_of_images_is_refused_unless_allowed(photographs: Path) -> None:
    complete = data.identity("imagenet")
    (photographs / "train" / "n02" / "n02_3.JPEG").unlink()
    listing.cache_clear()
    with pytest.raises(data.DataError, match=r"train has 14 images in 3 folders, expected 15 in 3: .*--allow-unverif"):
        data.load("imagenet")
    loaded = data.load("imagenet", allow_unverified=True)
    assert loaded.tag == f"unverified: content {loaded.identity[:8]}"
    assert len(loaded.train_images) == len(loaded.train_labels) == 14
    # What is refused decides no key: a grid can be listed while the folders are being filled.
    assert len({complete, loaded.identity, data.identity("imagenet")}) == 3


def test_a_class_in_one_part_only_is_refused(photographs: Path) -> None:
    (photographs / "val" / "n02").rename(photographs / "val" / "n03")
    with pytest.raises(data.DataError, match="a folder n02: each class needs both"):
        data.load("imagenet")


def test_an_empty_part_is_refused(photographs: Path) -> None:
    for file in (photographs / "val").rglob("*.JPEG"):
        file.unlink()
    with pytest.raises(data.DataError, match="val cannot be read: it has no folders with images"):
        data.load("imagenet")


def test_absent_folders_say_what_to_do(folder: Path) -> None:
    with pytest.raises(data.DataError) as caught:
        train(CONFIG)
    message = str(caught.value)
    for part in ("ImageNet", str(folder), "image-net.org", "imagenet/train/CLASS/*.JPEG", "KOALA_DATA"):
        assert part in message
    assert "\n" not in message
    assert len(CONFIG.key) == 16, "a run has a key without its data"


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_epoch(photographs: Path) -> None:
    loaded = data.load("imagenet")
    first, again, other = batches(loaded), batches(loaded), batches(loaded, epoch=1)
    assert [x.shape for x, _ in first] == [(4, 3, SIZE, SIZE)] * 3
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(first, again, strict=True))
    crops, others = ({image.numpy().tobytes() for x, _ in epoch for image in x} for epoch in (first, other))
    assert len(crops) == len(others) == 12
    assert not crops & others, "each epoch has crops of its own"


def test_an_epoch_goes_on_with_the_same_batches_and_draws_nothing_from_the_networks_generator(
    photographs: Path,
) -> None:
    loaded = data.load("imagenet")
    state = torch.get_rng_state()
    whole, rest = batches(loaded), batches(loaded, start=2)
    assert len(rest) == 1
    assert torch.equal(whole[2][0], rest[0][0])
    assert torch.equal(whole[2][1], rest[0][1])
    assert batches(loaded, start=3) == []
    assert torch.equal(state, torch.get_rng_state())


def test_without_augmentation_an_image_is_its_centre_whatever_the_order(photographs: Path) -> None:
    loaded = data.load("imagenet")
    [(x, y)] = data.batches(loaded.test_images, loaded.test_labels, TEST, mean=loaded.mean, std=loaded.std)
    assert torch.equal(y, loaded.test_labels)
    with Image.open(photographs / "val" / "n02" / "n02_1.JPEG") as image:
        scaled = np.asarray(image.resize((26, 20), Image.Resampling.BILINEAR))  # 40x30, the shorter side at 20
    expected = torch.from_numpy(scaled[2:18, 5:21].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(x[3], (expected - loaded.mean[:, None, None]) / loaded.std[:, None, None])
    plain = {image.numpy().tobytes() for x, _ in batches(loaded, augment=False) for image in x}
    assert plain == {image.numpy().tobytes() for x, _ in batches(loaded, augment=False) for image in x}
    again = {image.numpy().tobytes() for x, _ in batches(loaded, epoch=1, augment=False) for image in x}
    assert len(plain & again) >= 9, "two epochs of twelve of fifteen images share nine"


def test_labels_stay_with_their_images(photographs: Path) -> None:
    loaded = data.load("imagenet")
    in_order = data.batches(loaded.train_images, loaded.train_labels, 5, mean=loaded.mean, std=loaded.std)
    label_of = {image.numpy().tobytes(): int(y) for x, ys in in_order for image, y in zip(x, ys, strict=True)}
    assert len(label_of) == TRAIN
    for x, ys in batches(loaded, augment=False):
        assert [label_of[image.numpy().tobytes()] for image in x] == ys.tolist()


def test_augmentation_is_that_of_the_kind_of_images(photographs: Path) -> None:
    loaded = data.load("imagenet")
    for images, augment in (
        (loaded.train_images, data.Augmentation(2, True)),
        (torch.zeros(15, 3, 8, 8), RandomArea()),
    ):
        with pytest.raises(ValueError, match="cannot be augmented by"):
            data.batches(
                images,
                loaded.train_labels,
                4,
                mean=loaded.mean,
                std=loaded.std,
                generator=data.epoch_generator(0, 0),
                augment=augment,
            )


# --- crops ------------------------------------------------------------------------------------------------------------


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8), "RGB")


def test_random_crops_have_the_area_and_ratio_asked_for() -> None:
    image, shares, ratios, mirrored = ramp(200, 150), [], [], 0
    for seed in range(400):
        red, green, _ = np.asarray(random_crop(image, 32, RandomArea(), seed=seed)).astype(float).transpose(2, 0, 1)
        mirrored += int(red[0, 0] > red[0, -1])
        width = abs(red[:, -2] - red[:, 1]).mean() * 32 / 29  # from the second to the last but one of 32 pixels
        height = abs(green[-2] - green[1]).mean() * 32 / 29
        shares.append(width * height / (200 * 150))
        ratios.append(width / height)
    assert 0.06 < min(shares) < 0.12
    assert 0.85 < max(shares) < 1.05
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.42
    assert abs(mirrored - 200) < 50  # five standard deviations


def test_an_image_too_narrow_for_a_crop_gives_its_centre() -> None:
    crop = np.asarray(random_crop(ramp(8, 200), 8, RandomArea(area=(0.9, 1.0)), seed=0)).astype(int)
    assert sorted(crop[0, :, 0].tolist()) == list(range(8))
    assert 94 <= crop[..., 1].min() <= crop[..., 1].max() <= 106  # 8 by round(8 / (3 / 4)) = 11 pixels


@pytest.mark.parametrize("sides", [(300, 500), (500, 300), (100, 100), (257, 256)])
def test_the_centre_of_any_shape(sides: tuple[int, int]) -> None:
    image = centre_crop(Image.new("RGB", sides, (10, 20, 30)), 224, 256)
    assert image.size == (224, 224)
    assert image.getextrema() == ((10, 10), (20, 20), (30, 30)), "nothing is cut out beyond the border"


def test_a_photograph_in_other_colours_is_read_too(photographs: Path) -> None:
    write_photograph(photographs / "val" / "n01" / "n01_0.JPEG", seed=3, mode="CMYK")
    loaded = data.load("imagenet")
    [(x, _)] = data.batches(loaded.test_images, loaded.test_labels, TEST, mean=loaded.mean, std=loaded.std)
    assert x.shape == (TEST, 3, SIZE, SIZE)


@pytest.mark.parametrize("damage", ["truncated", "text", "gone"])
def test_a_damaged_photograph_is_named_in_one_sentence(photographs: Path, damage: str) -> None:
    loaded = data.load("imagenet")
    path = photographs / "train" / "n02" / "n02_1.JPEG"
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-300])
        case "text":
            path.write_text("not a picture")
        case "gone":
            path.unlink()
    with pytest.raises(data.DataError, match=r"n02_1\.JPEG cannot be read") as caught:
        list(data.batches(loaded.train_images, loaded.train_labels, TRAIN, mean=loaded.mean, std=loaded.std))
    assert "\n" not in str(caught.value)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_with_the_same_weights(photographs: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 4:  # in the second epoch, after the checkpoint of step 4 was due
            raise Stopped

    whole = train(CONFIG)
    assert whole.status == "done"
    assert set(whole.final) >= {"train_loss", "test_loss", "test_error", "test_error_top5"}
    assert whole.provenance["data"]["title"] == "ImageNet (ILSVRC 2012)"
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        train(CONFIG, checkpoint=checkpoint, checkpoint_seconds=0, on_step=stop)
    resumed = train(CONFIG, checkpoint=checkpoint)
    assert resumed.epochs == whole.epochs
    assert resumed.provenance["weights_sha256"] == whole.provenance["weights_sha256"]


def test_resnext50_trains_two_steps_with_images_held_out(photographs: Path) -> None:
    result = train(
        CONFIG.but(model="resnext50", epochs=1, train_size=8, task_args={"validation_size": 3, "landscape_size": 2})
    )
    assert result.status == "done"
    assert "validation_error" in result.final


# --- Table 1 of the APOLLO paper --------------------------------------------------------------------------------------


def test_table1_trains_imagenet_as_released() -> None:
    """README of the released code: ResNeXt-50, 120 epochs, batches of 256, a tenth after 40 and 80 or a cosine."""
    grid = nb.grid_of(nb.all_notebooks()["apollo/20_table1_image_classification"], "paper")
    runs = [c for c in grid if c.dataset == "imagenet"]
    assert len(runs) == 80  # six methods, APOLLO without curvature and SGD at APOLLO's rate; two schedules, five seeds
    assert {(c.model, c.epochs, c.batch_size, c.augment, c.train_size) for c in runs} == {
        ("resnext50", 120, 256, True, None)
    }
    assert Counter((c.milestones, c.final_lr is None) for c in runs) == {((40, 80), True): 40, ((), False): 40}
    rates = {(c.optimizer, dict(c.optimizer_args)["lr"], dict(c.optimizer_args)["weight_decay"]) for c in runs}
    assert rates == {
        ("sgd", 0.1, 1e-4),
        ("adam", 1e-3, 0.1),
        ("radam", 1e-3, 0.1),
        ("adabelief", 1e-3, 0.1),
        ("adahessian", 0.15, 1e-3),
        ("apollo", 0.01, 1e-4),
    }
    assert {(c.optimizer, c.final_lr) for c in runs if not c.milestones} == {(o, lr / 1000) for o, lr, _ in rates}
    assert {c.dataset: (c.model, c.batch_size) for c in grid if c.dataset != "imagenet"} == {
        "cifar10": ("resnet110", 128)
    }
