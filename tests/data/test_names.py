"""Names of classes."""

import logging

from data import names


def test_wnids_become_words_and_other_names_stay():
    assert names.words(["n01440764", "my class"]) == ["tench, Tinca tinca", "my class"]


def test_imagenet_has_1000_names_in_label_order_and_warns_of_another_order(caplog):
    wnids = names.imagenet_wnids()
    with caplog.at_level(logging.WARNING):
        plain = names.imagenet_classes(wnids)
        assert not caplog.records
        assert names.imagenet_classes([str(label) for label in range(1000)]) == plain
        assert names.imagenet_classes(["a_cat", *wnids[1:]])[0] == "a_cat"
    assert (
        len(plain) == 1000
        and plain[0] == "tench, Tinca tinca"
        and "class folder 0 is 'a_cat'" in caplog.text
    )


def test_22k_names_fill_the_two_gaps_from_the_end_of_the_list():
    wnids = names.imagenet22k_wnids()
    assert len(wnids) == len(set(wnids)) == 21841
    google = names._imagenet("imagenet-21k-goog").label_names()
    assert (wnids[9205], wnids[15027], wnids[5564]) == (google[21841], google[21842], "n03013580")
    assert len(google) == 21843 and names.words(wnids[5564:5565]) == [
        "chemise, shimmy, shift, slip, teddy"
    ]
