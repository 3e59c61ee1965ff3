"""Zip mode: the same images as the folder, however the archive was made, whatever the cache."""

import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from data import archives, layouts
from data.errors import DataError
from data.images import UnreadableImage
from tests.data.fakes import class_folder, map_files, zipped
from tools import make_zip


@pytest.fixture
def folders(tmp_path):
    return class_folder(tmp_path / "folders")


def pixels(source) -> list[np.ndarray]:
    return [np.asarray(source.read(i)) for i in range(len(source))]


def assert_same_images(one, other):
    assert one.labels.tolist() == other.labels.tolist()
    for left, right in zip(pixels(one), pixels(other), strict=True):
        assert np.array_equal(left, right)


@pytest.mark.parametrize("cache", ["no", "part", "full"])
@pytest.mark.parametrize("maps", [True, False], ids=["maps", "generated"])
def test_zip_equals_folder(tmp_path, folders, cache, maps):
    root = zipped(folders, tmp_path / "zip")
    if maps:
        map_files(folders, root)
    plain, packed = (
        layouts.folder(folders),
        layouts.zip_folder(root, cache=cache, rank=1, world_size=2),
    )
    assert_same_images(packed.train, plain.train)
    assert_same_images(packed.val, plain.val)
    assert packed.classes == plain.classes == ["ant", "bee", "cat"]


def test_an_enclosing_folder_and_compression_change_nothing(tmp_path, folders):
    packed = layouts.zip_folder(
        zipped(folders, tmp_path / "zip", prefix=True, compression=zipfile.ZIP_DEFLATED)
    )
    assert packed.classes == ["ant", "bee", "cat"]
    assert_same_images(packed.train, layouts.folder(folders).train)


@pytest.mark.parametrize("cache, held", [("no", 0), ("part", 7), ("full", 15)])
def test_the_cache_holds_its_share_and_reads_the_rest(tmp_path, folders, cache, held):
    source = layouts.zip_folder(
        zipped(folders, tmp_path / "zip"), cache=cache, rank=1, world_size=2
    ).train
    assert (source._place >= 0).sum() == held
    source = pickle.loads(pickle.dumps(source))  # drops the open file
    os.remove(tmp_path / "zip" / "train.zip")
    readable = 0
    for index in range(15):
        try:
            source.read(index)
            readable += 1
        except UnreadableImage:
            pass
    assert readable == held


def test_a_forked_process_opens_its_own_handle(tmp_path, folders):
    source = layouts.zip_folder(zipped(folders, tmp_path / "zip")).train
    before = pixels(source)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(a, b) for a, b in zip(before, pixels(source)))
        os.write(writer, b"1" if same else b"0")
        os._exit(0)
    after = pixels(source)  # at the same time as the child
    assert os.read(reader, 1) == b"1" and all(np.array_equal(a, b) for a, b in zip(before, after))
    os.waitpid(child, 0)


def test_a_source_survives_pickling_as_spawned_workers_need(tmp_path, folders):
    source = layouts.zip_folder(
        zipped(folders, tmp_path / "zip"), cache="part", rank=0, world_size=2
    ).train
    assert_same_images(pickle.loads(pickle.dumps(source)), source)


def test_a_flipped_bit_inside_the_archive_is_noticed(tmp_path, folders):
    root = zipped(folders, tmp_path / "zip")
    content = bytearray((root / "train.zip").read_bytes())
    content[400] ^= 1
    (root / "train.zip").write_bytes(content)
    with pytest.raises(UnreadableImage, match="checksum differs"):
        layouts.zip_folder(root).train.read(0)


def refused(match: str, root, **options):
    with pytest.raises(DataError, match=match) as caught:
        layouts.zip_folder(root, **options)
    assert "\n" not in str(caught.value)


def test_wrong_archives_are_refused_in_one_line(tmp_path, folders):
    refused("must hold train.zip and val.zip", tmp_path)
    root = zipped(folders, tmp_path / "zip")
    refused("CACHE_MODE 'all' is unknown; allowed: no, full, part", root, cache="all")
    (root / "train_map.txt").write_text("ant/000.jpg 0\n")
    refused("line 1 must be 'relative/path<TAB>label'", root)
    (root / "train_map.txt").write_text("ant/nothing.jpg\t0\n")
    refused("map file for one of train.zip and val.zip only", root)
    map_files(folders, root)
    (root / "train_map.txt").write_text("ant/nothing.jpg\t0\n")
    refused("has no member 'ant/nothing.jpg'", root)
    (root / "val.zip").write_bytes((root / "val.zip").read_bytes()[:-30])
    (root / "val_map.txt").unlink()
    (root / "train_map.txt").unlink()
    refused("val.zip' is not a complete zip archive", root)


def test_an_archive_of_loose_images_is_refused(tmp_path, folders):
    root = zipped(folders, tmp_path / "zip")
    with zipfile.ZipFile(root / "val.zip", "a") as archive:
        archive.writestr("loose.jpg", b"x")
    refused("must hold <class>/<image>, found loose.jpg", root)
    with zipfile.ZipFile(root / "val.zip", "w") as archive:
        archive.writestr("val.zip", (root / "train.zip").read_bytes())
    refused(r"found no image at all, 1 file.s. \(.zip 1\).*an archive inside is not opened", root)


def test_maps_of_labels_alone_give_classes_by_number(tmp_path, folders):
    root = zipped(folders, tmp_path / "zip")
    map_files(folders, root)
    maps = [root / "train_map.txt", root / "val_map.txt"]
    for path in maps:
        path.write_text(path.read_text().replace("cat", "ant", 1).replace("\t2", "\t1", 1))
    lines = (root / "train_map.txt").read_text()
    assert "ant/010.jpg" in lines
    for path, split in zip(maps, ("train", "val")):  # every second image is of class 1
        names = sorted(f"{p.parent.name}/{p.name}" for p in (folders / split).rglob("*.jpg"))
        path.write_text("".join(f"{name}\t{i % 2}\n" for i, name in enumerate(names)))
    assert layouts.zip_folder(root).classes == ["0", "1"]


def test_maps_that_contradict_each_other_or_number_no_classes_are_refused(tmp_path, folders):
    root = zipped(folders, tmp_path / "zip")
    map_files(folders, root)
    listing = root / "val_map.txt"
    good = listing.read_text()
    listing.write_text(good.replace("\t0", "\t9").replace("\t1", "\t0").replace("\t9", "\t1"))
    refused("contradict each other: the images of 'ant' have label 0 in one and 1", root)
    for label in ("4294967296", "9" * 5000, "1048576"):
        listing.write_text(good.replace("\t2", f"\t{label}"))
        refused("val_map.txt' line 7: label [0-9]+ is too large", root)
    listing.write_text(good.replace("\t2", "\t1048575"))
    refused("give 4 different labels up to 1048575; number the classes from 0", root)
    listing.write_text(good.replace("\t2", "\t\u0662"))
    refused("line 7 must be 'relative/path<TAB>label'", root)


def test_what_an_archive_holds_beside_the_images_is_counted_once(tmp_path, folders, caplog):
    root = zipped(folders, tmp_path / "zip")
    for split in ("train", "val"):
        with zipfile.ZipFile(root / f"{split}.zip", "a") as archive:
            for name in ("ant/x.jfif", "ant/y.GIF", "bee/z.heic", "__MACOSX/ant/x.gif"):
                archive.writestr(name, b"x")
    layouts.zip_folder(root)
    left = [line for line in caplog.messages if "left out" in line]
    assert len(left) == 2 and "val.zip': 3 file(s) (" in left[0]
    assert all(f"{kind} 1" in left[0] for kind in (".jfif", ".gif", ".heic"))
    map_files(folders, root)
    shorter = (root / "val_map.txt").read_text().splitlines()[:-2]
    (root / "val_map.txt").write_text("\n".join(shorter))
    caplog.clear()
    layouts.zip_folder(root, train=False)
    assert "val.zip': 2 file(s) (not in val_map.txt 2) left out" in caplog.text


def test_an_empty_class_folder_of_an_archive_is_told_or_refused(tmp_path, folders, caplog):
    root = zipped(folders, tmp_path / "zip")
    for split in ("train", "val"):
        with zipfile.ZipFile(root / f"{split}.zip", "a") as archive:
            archive.writestr("dog/", b"")
    refused("no image in 1 class folder.s. of .*train.zip', first 'dog'", root)
    assert layouts.zip_folder(root, train=False).classes == ["ant", "bee", "cat", "dog"]
    assert "val.zip': 1 of 4 classes have no image, first 'dog'" in caplog.text


def test_a_member_is_unpacked_no_further_than_it_announces(tmp_path, folders):
    root = zipped(folders, tmp_path / "zip")
    with zipfile.ZipFile(root / "val.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ant/bomb.jpg", bytes(2**24))
    content = bytearray((root / "val.zip").read_bytes())
    entry = content.rindex(b"PK\1\2")
    content[entry + 24 : entry + 28] = (100).to_bytes(4, "little")  # unpacked size
    (root / "val.zip").write_bytes(content)
    source = layouts.zip_folder(root, train=False).val
    packed = source.archive.raw(0)
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match="length differs"):
        source.archive.unpack(0, packed)
    assert tracemalloc.get_traced_memory()[1] < 2**16
    tracemalloc.stop()
    content[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    (root / "val.zip").write_bytes(content)
    with pytest.raises(UnreadableImage, match="2147483648 bytes, more than"):
        layouts.zip_folder(root, train=False).val.read(0)


@pytest.mark.parametrize("cache", ["no", "full"])
def test_a_directory_that_points_outside_the_archive_damages_that_image_alone(
    tmp_path, folders, cache
):
    root = zipped(folders, tmp_path / "zip")
    content = bytearray((root / "val.zip").read_bytes())
    first = content.index(b"PK\1\2")
    for offset, at in ((2**31, first), (3, content.index(b"PK\1\2", first + 4))):
        content[at + 42 : at + 46] = offset.to_bytes(4, "little")  # where the member begins
    (root / "val.zip").write_bytes(content)
    source = layouts.zip_folder(root, train=False, cache=cache).val
    for index, reason in ((0, "lies outside"), (1, "no member where its directory says")):
        with pytest.raises(UnreadableImage, match=reason):
            source.read(index)
    assert source.read(2).mode == "RGB"


def test_a_cache_beyond_the_machine_is_refused(tmp_path):
    with pytest.raises(DataError, match="CACHE_MODE would hold .* GB"):
        archives._check_memory(2**60, "train.zip")


def test_the_tool_packs_what_zip_mode_reads_and_its_check_finds_damage(tmp_path, folders, capsys):
    target = tmp_path / "zip"
    assert make_zip.main(["pack", str(folders), str(target)]) == 0
    assert_same_images(layouts.zip_folder(target).val, layouts.folder(folders).val)
    assert (
        make_zip.main(["check", str(target)]) == 0
        and "24 images, 0 unreadable" in capsys.readouterr().out
    )
    content = bytearray((target / "train.zip").read_bytes())
    content[400] ^= 1
    (target / "train.zip").write_bytes(content)
    assert make_zip.main(["check", str(target)]) == 1 and "ant/000.jpg" in capsys.readouterr().out
    assert make_zip.main(["check", str(tmp_path)]) == 2
