"""Clusters: figures by hand and by their definitions, and pictures by each method."""

import builtins

import numpy as np
import pandas as pd
import pytest
from tests.probing import worlds

from latentlm import InputError
from latentlm.probing import Texts
from latentlm.probing.probes.clusters import METHODS, clusters, project, purity, silhouette
from latentlm.probing.probes.neighbours import nearest
from latentlm.probing.texts import UNKNOWN


def slow_silhouette(codes, values):
    """Rousseeuw 1987: (b − a) / max(a, b), a the mean distance to one's own group, b to the nearest other one."""
    found = []
    for one, value in enumerate(values):
        means = {}
        for group in set(values):
            others = [row for row in range(len(codes)) if values[row] == group and row != one]
            if others:
                means[group] = np.mean([np.linalg.norm(codes[one] - codes[row]) for row in others])
        if value not in means:
            found.append(0.0)  # alone in its group
            continue
        own = means.pop(value)
        found.append((min(means.values()) - own) / max(min(means.values()), own))
    return np.mean(found)


def test_silhouette_is_its_definition():
    generator = np.random.default_rng(0)
    values = np.array([0] * 7 + [1] * 5 + [2] * 3 + [3])
    codes = generator.standard_normal((16, 3)) + values[:, None]
    assert silhouette(codes, values) == pytest.approx(slow_silhouette(codes, values.tolist()), abs=1e-9)


def test_silhouette_leaves_out_what_is_unknown():
    codes = np.random.default_rng(0).standard_normal((9, 2))
    values = np.array([0, 0, 0, 1, 1, 1, UNKNOWN, UNKNOWN, UNKNOWN])
    assert silhouette(codes, values) == pytest.approx(silhouette(codes[:6], values[:6]))


@pytest.mark.parametrize("values", [[0, 0, 0], [0, 1, 2], [UNKNOWN] * 3])
def test_silhouette_of_what_has_none(values):
    assert np.isnan(silhouette(np.eye(3), np.array(values)))


def test_purity_by_hand():
    near = np.array([[1, 2], [0, 3], [0, 1], [4, 5], [3, 2], [3, 4]])
    values = np.array([0, 0, 1, 1, 1, UNKNOWN])
    # text 0: its own and another; 1: own, other; 2: both others; 3: own, and one that does not count; 4: both own
    assert purity(values, near) == pytest.approx((0.5 + 0.5 + 0 + 1 + 1) / 5)
    assert np.isnan(purity(np.array([UNKNOWN] * 6), near))


def test_purity_does_not_depend_on_how_many_are_unknown():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2, 4000)
    near = generator.integers(0, 4000, (4000, 10))
    some = np.where(generator.random(4000) < 0.9, UNKNOWN, values)
    assert purity(values, near) == pytest.approx(0.5, abs=0.01) == purity(some, near)


def separated(generator, texts=60):
    values = generator.integers(0, 3, texts)
    codes = 10 * np.eye(3)[values] + generator.standard_normal((texts, 3))
    return codes, {"f": [f"v{value}" for value in values], "noise": generator.choice(["a", "b"], texts).tolist()}


def test_separated_groups_and_the_floor():
    codes, factors = separated(np.random.default_rng(0))
    result = clusters(*worlds.given(codes, factors), method="pca", k=5)
    f, noise = result.table.to_dict("records")
    assert f["purity"] == 1 and f["silhouette"] > 0.6 and f["values"] == 3 and f["texts"] == 60
    assert f["purity, shuffled"] < 0.5 and abs(f["silhouette, shuffled"]) < 0.1
    assert noise["purity"] == pytest.approx(0.5, abs=0.12)
    assert [scatter.title for scatter in result.scatters] == ["f, pca", "noise, pca"]
    near, _ = nearest(codes, 5)
    assert f["purity"] == purity(np.array([int(value[1]) for value in factors["f"]]), near)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("texts", "numbers"), [(4, 1), (4, 3), (40, 2), (40, 8)])
def test_pictures_by_each_method(method, texts, numbers):
    if method == "umap":
        pytest.importorskip("umap")
    codes = np.random.default_rng(0).standard_normal((texts, numbers))
    plane = project(codes, method)
    assert plane.shape == (texts, 2) and np.isfinite(plane).all()
    np.testing.assert_allclose(project(codes, method), plane)  # by its seed


def test_pca_keeps_distances_in_a_plane():
    generator = np.random.default_rng(0)
    flat = generator.standard_normal((10, 2)) @ np.linalg.qr(generator.standard_normal((5, 2)))[0].T
    plane = project(flat, "pca")

    def distances(rows):
        return np.linalg.norm(rows[:, None] - rows[None], axis=-1)

    np.testing.assert_allclose(distances(plane), distances(flat), atol=1e-9)


def test_umap_that_is_not_installed(monkeypatch):
    imported = builtins.__import__

    def without(name, *arguments, **options):
        if name == "umap":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError) as error:
        project(np.eye(5), "umap")
    assert str(error.value) == "UMAP needs the package umap-learn: pip install 'latentlm[umap]', or take tsne."


@pytest.mark.parametrize("family", worlds.KINDS)
def test_each_kind_of_latent(family):
    texts = Texts(worlds.words(14))
    factors = {"length": ["long" if len(text.split()) > 4 else "short" for text in texts.texts]}
    result = clusters(worlds.space(family), Texts(texts.texts, factors=pd.DataFrame(factors)), k=3)
    assert result.table["factor"].tolist() == ["length"]
    assert 0 <= result.table["purity"][0] <= 1 and -1 <= result.table["silhouette"][0] <= 1
    assert len(result.scatters) == 1 and list(result.scatters[0].texts) == list(texts.texts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "k must be from 1 to 4 for 5 texts, not 10"),
        ({"k": 2, "method": "mds"}, "method must be one of pca, tsne, umap, not 'mds'"),
        ({"k": 2, "factors": ["g"]}, "the factor 'g' has a single value"),
        ({"k": 2, "factors": ["h"]}, "there is no factor 'h': there are f, g"),
        ({"k": 0}, "k must be from 1 to 4 for 5 texts, not 0"),
        ({"pictures": -1, "k": 2}, "pictures must be 0 or more, not -1"),
    ],
)
def test_what_cannot_be_asked(options, words):
    space, texts = worlds.given(np.eye(5), {"f": list("aabbb"), "g": list("ccccc")})
    with pytest.raises(InputError, match=words):
        clusters(space, texts, **options)


def test_a_picture_needs_four_texts():
    with pytest.raises(InputError, match="needs at least 4 texts, not 3"):
        clusters(*worlds.given(np.eye(3), {"f": list("aab")}), k=1)
