import pytest

from vit_jax import pretrained


def test_imagenet_classes_returns_1000_unique_names_in_wordnet_id_order():
    classes = pretrained.imagenet_classes()
    wordnet_ids, names = zip(*classes, strict=True)
    assert len(set(wordnet_ids)) == len(set(names)) == 1000 and list(wordnet_ids) == sorted(wordnet_ids)
    expected = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 985: "daisy"}
    assert {i: names[i] for i in expected} == expected
    assert {names[134], names[517]} == {"crane, wading bird", "crane, lifting device"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tench", "n01440764"),
        ("golden_retriever", "n02099601"),
        ("n01440764", "n01440764"),
        ("my cat", "my cat"),
        ("my_cat", "my_cat"),
    ],
)
def test_canonical_name_returns_wordnet_id_of_imagenet_classes_only(name, expected):
    assert pretrained.canonical_name(name) == expected
