"""Duplicates: exact ones by their text, near ones against Jaccard similarities counted with Python's sets."""

import itertools
import math
import random
import re

import numpy as np
import pytest

from oarsmith.data.corpus.dedup import Dedup, Signer, find_duplicates, words_of

WORDS = [f"w{n}" for n in range(4000)]


def gone(texts, dedup, *, parts=3):
    """Numbers of the texts that go, signed in some parts."""
    bounds = np.linspace(0, len(texts), parts + 1).astype(int)
    signatures = [Signer(dedup)(texts[a:b]) for a, b in itertools.pairwise(bounds)]
    return np.flatnonzero(find_duplicates(signatures, dedup)).tolist()


def jaccard(a, b):
    """Similarity of the sets of runs of 5 words, counted without hashes."""
    sets = []
    for text in (a, b):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def changed(words, share, randomly):
    """The words with a share of them replaced at the end: a similarity of about (1 - share) / (1 + share)."""
    num = round(len(words) * share)
    return [*words[: len(words) - num], *(randomly.choice(WORDS) for _ in range(num))]


def test_exact_keeps_the_first_of_each():
    texts = ["a b", "c", "A  B\n", "d", " a b", "C!", "c"]
    assert gone(texts, Dedup("exact")) == [2, 4, 6]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_do_not_matter(parts):
    texts = [f"text {n % 7} with some more words behind it" for n in range(40)]
    for dedup in (Dedup("exact"), Dedup("minhash")):
        assert gone(texts, dedup, parts=parts) == list(range(7, 40))


def test_signatures_estimate_the_similarity():
    """The mean error over many pairs is that of num_perm independent draws: sqrt(J (1 - J) / num_perm)."""
    randomly, dedup = random.Random(1), Dedup("minhash", num_perm=128)
    signer, deviations = Signer(dedup), []
    for _ in range(150):
        words = [randomly.choice(WORDS) for _ in range(300)]
        other = changed(words, randomly.uniform(0.05, 0.6), randomly)
        a, b = " ".join(words), " ".join(other)
        signatures, j = signer([a, b]), jaccard(a, b)
        deviations.append((float(np.mean(signatures[0] == signatures[1])) - j) / math.sqrt(j * (1 - j) / 128))
    # Standardised errors: mean 0 with deviation 1 / sqrt(150) = 0.08 and root mean square 1 +- 0.06; four of these.
    assert abs(np.mean(deviations)) < 0.33
    assert 0.75 < math.sqrt(np.mean(np.square(deviations))) < 1.25


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_near_duplicates_go_and_others_stay(threshold):
    """Beyond three deviations of the estimate on either side of the threshold."""
    randomly, dedup = random.Random(2), Dedup("minhash", threshold=threshold, num_perm=256)
    texts, similar = [], []
    for _ in range(60):
        words = [randomly.choice(WORDS) for _ in range(400)]
        other = changed(words, randomly.uniform(0.0, 0.5), randomly)
        texts += [" ".join(words), " ".join(other)]
        similar.append(jaccard(*texts[-2:]))
    margin = 3 * math.sqrt(threshold * (1 - threshold) / 256)
    found = set(gone(texts, dedup))
    assert not any(number % 2 == 0 for number in found), "the first of a pair never goes"
    sure = [(number, j) for number, j in enumerate(similar) if abs(j - threshold) > margin]
    assert len(sure) > 30
    for number, j in sure:
        assert (2 * number + 1 in found) == (j > threshold), (number, j)


def test_every_document_that_goes_has_a_twin_that_stays():
    """A chain a ~ b ~ c in which a and c are not similar: b goes because of a, and c stays."""
    randomly = random.Random(3)
    a = [randomly.choice(WORDS) for _ in range(500)]
    b, c = a[100:] + WORDS[:100], a[200:] + WORDS[:200]
    texts = [" ".join(words) for words in (a, b, c)]
    assert jaccard(texts[0], texts[1]) > 0.6 and jaccard(texts[1], texts[2]) > 0.6 and jaccard(texts[0], texts[2]) < 0.5
    assert gone(texts, Dedup("minhash", threshold=0.58, num_perm=512)) == [1]


def test_short_texts_and_scripts_without_spaces():
    texts = [
        "hi",
        "hi",
        "ho",
        "",
        "",
        "今天天气很好我们去公园玩吧",
        "今天天气很好我们去公园玩吧！",
        "明天下雨所以我们在家看书",
    ]
    assert gone(texts, Dedup("minhash")) == [1, 4, 6]
    assert words_of("Ab 今天x1、y天") == ["ab", "今", "天", "x1", "y", "天"]


def test_candidates_at_the_threshold_are_found():
    for num_perm in (16, 64, 128, 256):
        for threshold in (0.3, 0.5, 0.8, 0.95, 1.0):
            dedup = Dedup("minhash", threshold, num_perm)
            bands = num_perm // dedup.rows
            assert 1 - (1 - threshold**dedup.rows) ** bands >= 0.99 or dedup.rows == 1


def test_signatures_do_not_change():
    """Work folders outlive processes and versions: these numbers were computed when the code was written."""
    signature = Signer(Dedup("minhash", num_perm=16))(["The quick brown fox jumps over the lazy dog"])
    assert signature[0, :3].tolist() == [1404486185, 595620660, 108775479]
    assert Signer(Dedup("exact"))(["a"]).tolist() == [[9189440641721877287, 9099881824081077545]]
