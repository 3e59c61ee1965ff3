"""Every layout is read as specified; every wrong one is refused in one line."""

import os

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from data import layouts
from data.errors import DataError
from data.files import FileList
from tests.data.fakes import class_folder, imagenet22k, read, save, tiny_imagenet


def entries(source) -> list[tuple[str, int]]:
    return [(source.name(i), int(source.labels[i])) for i in range(len(source))]


def refused(match: str, function, *arguments, **options) -> str:
    with pytest.raises(DataError, match=match) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_list_returns_names_of_any_characters_and_holds_no_strings():
    pairs = [("a/b c.jpg", 3), ("", 0), ("ä/ü.png", 1), ("x\udcff.jpg", 2)]
    files = FileList(pairs)
    assert [(files[i], int(files.labels[i])) for i in range(4)] == pairs
    assert all(isinstance(value, (bytes, np.ndarray)) for value in vars(files).values())


def test_a_class_folder_is_read_in_the_order_of_torchvision(tmp_path):
    root = class_folder(tmp_path)
    save(root / "train" / "bee" / "deeper" / "z.png", 77)
    save(root / "train" / "bee" / "a.JPEG", 78, format="JPEG")
    sources = layouts.folder(root)
    assert entries(sources.train) == ImageFolder(root / "train").samples
    assert entries(sources.val) == ImageFolder(root / "val").samples
    assert sources.classes == ["ant", "bee", "cat"]


def test_hidden_folders_and_other_files_are_no_data(tmp_path):
    root = class_folder(tmp_path)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("x")
    (root / "train" / "ant" / "._000.jpg").write_text("x")
    assert len(layouts.folder(root).train) == 15


def test_files_that_are_left_out_are_counted_and_told_once(tmp_path, caplog):
    root = class_folder(tmp_path)
    for split in ("train", "val"):
        for name in ("ant/1.jfif", "ant/2.JFIF", "bee/3.gif", "bee/deeper/4.avif", "5.jpg"):
            (root / split / name).parent.mkdir(exist_ok=True)
            (root / split / name).write_bytes(b"x")
    layouts.folder(root)
    left = [line for line in caplog.messages if "left out" in line]
    assert len(left) == 2 and "5 file(s) (" in left[0] and ".jfif is .jpg" in left[0]
    for kind in (".jfif 2", ".gif 1", ".avif 1", ".jpg beside the class folders 1"):
        assert kind in left[0] and kind in left[1]


def test_empty_validation_classes_are_told(tmp_path, caplog):
    root = class_folder(tmp_path)
    for image in (root / "val" / "bee").iterdir():
        image.unlink()
    layouts.folder(root)
    assert "val': 1 of 3 classes have no image, first 'bee'" in caplog.text


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_a_link_to_a_folder_around_it_shows_no_image_twice(tmp_path, target):
    root = class_folder(tmp_path)
    expected = entries(layouts.folder(root).train)
    (root / "train" / "bee" / "loop").symlink_to(target)
    assert entries(layouts.folder(root).train) == expected


def test_linked_folders_are_followed_but_give_one_label(tmp_path):
    root = class_folder(tmp_path / "a")
    expected = [label for _, label in entries(layouts.folder(root).train)]
    elsewhere = (root / "train" / "bee").rename(tmp_path / "elsewhere")
    (root / "train" / "bee").symlink_to(elsewhere)
    (root / "train" / "cat" / "again").symlink_to(".")
    assert [label for _, label in entries(layouts.folder(root).train)] == expected
    more = tmp_path / "more"
    save(more / "x.jpg", 7)
    (root / "train" / "cat" / "more").symlink_to(more)
    (root / "train" / "cat" / "twice").symlink_to(more)
    assert len(layouts.folder(root).train) == len(expected) + 1
    (root / "train" / "cat" / "bees").symlink_to("../bee")
    refused("'bee' and 'cat/bees' are the same folder.*two labels", layouts.folder, root)
    (root / "train" / "cat" / "bees").unlink()
    for split in ("train", "val"):
        (root / split / "wasp").symlink_to("bee")
    refused("'bee' and 'wasp' are the same folder", layouts.folder, root)


def test_pipes_and_sockets_are_no_images_and_lost_files_stay_in_the_list(tmp_path, caplog):
    root = class_folder(tmp_path)
    os.mkfifo(root / "val" / "ant" / "pipe.jpg")
    (root / "val" / "ant" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "val" / "ant" / "self.jpg").symlink_to("self.jpg")
    assert len(layouts.folder(root, train=False).val) == 11
    assert ".jpg pipe, socket or device 1" in caplog.text


def test_names_that_are_not_utf8_are_read_and_told_in_escapes(tmp_path):
    root = class_folder(tmp_path, classes=("ant", os.fsdecode(b"b\xe9e")))
    victim = os.path.join(root, "val", os.fsdecode(b"b\xe9e"), os.fsdecode(b"\xff.jpg"))
    with open(victim, "wb"):
        pass
    sources = layouts.folder(root)
    assert sources.classes == ["ant", "b\\xe9e"] and len(sources.val) == 7
    assert sources.val.name(6).endswith("b\\xe9e/\\xff.jpg") and sources.val.path(6) == victim
    assert sources.val.read(3).mode == "RGB"


def test_an_evaluation_needs_no_training_images_but_refuses_other_classes(tmp_path):
    root = class_folder(tmp_path / "a", train=0)
    assert layouts.folder(root, train=False).train is None
    (root / "train" / "dog").mkdir(parents=True)
    refused("same class folders; train has 1, val 3", layouts.folder, root, train=False)


def test_wrong_class_folders_are_refused_with_what_was_found(tmp_path):
    refused(
        r"DATASET imagenet: DATA.DATA_PATH '.*gone' must hold train/<class>.*found.*: no such"
        r" folder",
        layouts.folder,
        tmp_path / "gone",
        dataset="imagenet",
    )
    root = class_folder(tmp_path / "a")
    refused("DATA.DATA_PATH should be the folder above", layouts.folder, root / "train")
    (root / "val" / "dog").mkdir()
    refused("only in val: dog", layouts.folder, root)
    (root / "val" / "dog").rmdir()
    (root / "train" / "dog").mkdir()
    (root / "val" / "dog").mkdir()
    refused("no image in 1 class folder.*first 'dog'.*extensions: .jpg", layouts.folder, root)


def test_flat_validation_images_are_refused_with_a_hint(tmp_path):
    root = class_folder(tmp_path, val=0)
    save(root / "val" / "ILSVRC2012_val_00000001.JPEG", 1, format="JPEG")
    message = refused("must hold train/<class>/<image>", layouts.folder, root)
    assert "ILSVRC2012_val_00000001.JPEG" in message and "one folder per class" in message


def test_imagenet22k_lists_are_read_as_json_and_paths_are_relative_to_the_root(tmp_path):
    sources = read("imagenet22K", imagenet22k(tmp_path))
    assert entries(sources.train)[1] == (str(tmp_path / "fall11_whole/n1/train_1.JPEG"), 21839)
    assert len(sources.train) == len(sources.val) == 6 and len(sources.classes) == 21841


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "must be a JSON list"),
        ("[]", "must be a JSON list"),
        ("a\t1\n", "must be a JSON list"),
        ('[["a.jpg", 1], ["b.jpg"]]', r"found ', \[\"b.jpg\"\]\]'"),
        ('[["a.jpg", 21841]]', r"labels 0..21840.*21841"),
        ('[["gone.jpg", 1]]', "lists 'gone.jpg', but there is no file"),
        ('[["a.jpg", 99999999999999999999]]', "must be a JSON list"),
        (f'[["a.jpg", {"9" * 5000}]]', "must be a JSON list"),
        (r'[["\x.jpg", 1]]', "must be a JSON list"),
        (r'[["\ud800.jpg", 1]]', r"lists '\\ud800.jpg', but there is no file"),
    ],
)
def test_a_wrong_imagenet22k_list_is_refused(tmp_path, text, match):
    imagenet22k(tmp_path)
    (tmp_path / "ILSVRC2011fall_whole_map_train.txt").write_text(text)
    refused(match, read, "imagenet22K", tmp_path)


def test_imagenet22k_names_with_quotes_and_unicode_are_decoded_as_json(tmp_path):
    imagenet22k(tmp_path)
    save(tmp_path / 'a"ü.jpg', 0)
    (tmp_path / "ILSVRC2011fall_whole_map_val.txt").write_text('[ [ "a\\"\\u00fc.jpg" , 5 ] ]\n')
    assert entries(read("imagenet22K", tmp_path, train=False).val) == [
        (str(tmp_path / 'a"ü.jpg'), 5)
    ]


@pytest.mark.parametrize("inner", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_takes_validation_labels_from_the_annotations(tmp_path, inner, caplog):
    tiny_imagenet(tmp_path / inner)
    boxes = tmp_path / inner / "train" / "n02124075" / "n02124075_boxes.txt"
    boxes.write_text("n02124075_0.JPEG\t0\t0\t1\t1\n")
    sources = read("tiny_imagenet", tmp_path)
    assert "left out" not in caplog.text  # the lists of boxes belong there
    assert sources.classes == ["n01443537", "n02124075", "n04067472"]
    assert sources.val.labels.tolist() == [1, 0, 2] and sources.train.labels.tolist() == [0, 1, 2]


def test_tiny_imagenet_in_another_layout_is_refused(tmp_path):
    root = class_folder(tmp_path / "a")
    (root / "wnids.txt").write_text("ant\nbee\ncat\n")
    assert "DATA.DATASET folder" in refused("val_annotations.txt", read, "tiny_imagenet", root)
    root = tiny_imagenet(tmp_path / "b")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99999999\t0\n")
    refused("line 1 must be .*wnid of wnids.txt", read, "tiny_imagenet", root)
