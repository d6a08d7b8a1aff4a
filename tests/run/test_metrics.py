"""Measures against values worked out by hand, and what must hold of them whatever the text."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from peft_run.metrics import answers, bleu, classes, resample, spans, units
from peft_run.metrics.rouge import longest_common, rouge_l, rouge_n
from peft_run.metrics.table import METRICS, entity_f1, mean, perplexity


def sentences(count=30, seed=0):
    rng = random.Random(seed)
    return [[rng.choice("abcd") for _ in range(rng.randrange(1, 12))] for _ in range(count)]


# -- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain", "folded"),
    [
        ("你好，World!", ["你", "好", "，", "World", "!"], ["你", "好", "world"]),
        ("don't  stop-it", ["don't", "stop", "-", "it"], ["don't", "stop", "it"]),
        ("ＡＢＣ１２３", ["ＡＢＣ１２３"], ["abc123"]),
        ("カタカナとGPU3号", [*"カタカナと", "GPU3", "号"], [*"カタカナと", "gpu3", "号"]),
        ("𠮷野家 étude", ["𠮷", "野", "家", "étude"], ["𠮷", "野", "家", "étude"]),
        ("…", ["…"], []),
        ("", [], []),
    ],
)
def test_chinese_counts_in_characters_and_the_rest_in_words(text, plain, folded):
    assert units.characters(text) == plain
    assert units.characters(text, fold=True) == folded


# -- rouge ----------------------------------------------------------------------------------------------------------


def test_rouge_by_hand():
    """police kill the gunman / police killed the gunman: 3 of 4 words, 1 of 3 pairs, 3 in order."""
    answer, reference = ["police", "kill", "the", "gunman"], ["police", "killed", "the", "gunman"]
    assert rouge_n(answer, reference, 1) == pytest.approx(3 / 4)
    assert rouge_n(answer, reference, 2) == pytest.approx(1 / 3)
    assert rouge_l(answer, reference) == pytest.approx(3 / 4)
    # the gunman kill police: two in order, of 4 and 4
    assert rouge_l(["the", "gunman", "kill", "police"], reference) == pytest.approx(2 / 4)
    # 的 counts as often as it is in both: 1; lengths 3 and 2
    assert rouge_n(list("的的的"), list("的我"), 1) == pytest.approx(2 * 1 / 5)


def test_the_longest_common_subsequence_is_the_one_of_the_table():
    def by_table(a, b):
        row = [0] * (len(b) + 1)
        for x in a:
            above = row[:]
            for j, y in enumerate(b, 1):
                row[j] = above[j - 1] + 1 if x == y else max(above[j], row[j - 1])
        return row[-1]

    for a, b in itertools.product(sentences(20), sentences(20, 1)):
        assert longest_common(a, b) == by_table(a, b)
    assert longest_common([], "ab") == longest_common("ab", []) == 0


def test_rouge_is_one_for_equals_zero_for_strangers_and_symmetric():
    for a, b in itertools.pairwise(sentences()):
        for measure in (rouge_l, lambda x, y: rouge_n(x, y, 1), lambda x, y: rouge_n(x, y, 2)):
            assert measure(a, a) == 1
            assert measure(a, ["x", "y", "z"]) == 0 or len(a) == 1
            assert measure(a, b) == pytest.approx(measure(b, a))
            assert 0 <= measure(a, b) <= 1


# -- bleu -----------------------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    """the cat sat on the mat / the cat is on the mat: 5/6, 3/5, 1/4, 0/3 -> 0; without the last order a fourth root."""
    answer, reference = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "is", "on", "the", "mat"]
    stats = bleu.statistics(answer, reference)
    assert stats == [6, 6, 5, 6, 3, 5, 1, 4, 0, 3]
    assert bleu.value(np.array(stats, float)) == 0
    # a second, perfect sentence of 7 words: 12/13, 9/11, 6/9, 4/7
    more = ["it", "was", "all", "over", "by", "noon", "yesterday"]
    sums = np.array(stats, float) + bleu.statistics(more, more)
    assert bleu.value(sums) == pytest.approx((12 / 13 * 9 / 11 * 6 / 9 * 4 / 7) ** 0.25)


def test_bleu_punishes_short_answers_and_leaves_out_orders_that_nothing_has():
    short = np.array(bleu.statistics(list("abcde"), list("abcdefgh")), float)
    assert bleu.value(short) == pytest.approx(math.exp(1 - 8 / 5))
    long = np.array(bleu.statistics(list("abcdefgh"), list("abcde")), float)
    assert bleu.value(long) == pytest.approx((5 / 8 * 4 / 7 * 3 / 6 * 2 / 5) ** 0.25)
    assert bleu.value(np.array(bleu.statistics(["好"], ["好"]), float)) == 1
    assert bleu.value(np.array(bleu.statistics([], ["好"]), float)) == 0


# -- short answers --------------------------------------------------------------------------------------------------


def test_answers_by_hand():
    assert answers.exact("The  Eiffel Tower.", "eiffel tower") == 1
    assert answers.exact("１９９８年，", "1998年") == 1
    assert answers.exact("北京", "北京市") == 0
    assert answers.f1("北京", "北京市") == pytest.approx(2 * 2 / 5)
    assert answers.f1("in Paris", "Paris, France") == pytest.approx(2 * 1 / 4)
    assert answers.f1("", "Paris") == 0
    assert answers.exact("!", "?") == 0


# -- entities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "scheme", "found"),
    [
        ("B-PER I-PER O B-LOC", "BIO", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER I-LOC", "BIO", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER O", "BIO", set()),
        ("B-PER O I-PER", "BIO", {("PER", 0, 0)}),
        ("B-PER I-PER", "BIO", {("PER", 0, 1)}),
        ("B-PER I-PER E-PER S-LOC", "BIOES", {("PER", 0, 2), ("LOC", 3, 3)}),
        ("B-PER I-PER O E-PER", "BIOES", set()),
        ("B_PER M_PER E_PER U-LOC", "BIOES", {("PER", 0, 2), ("LOC", 3, 3)}),
        ("I-PER I-PER I-LOC O I-LOC", "IO", {("PER", 0, 1), ("LOC", 2, 2), ("LOC", 4, 4)}),
    ],
)
def test_an_entity_counts_only_as_a_whole(tags, scheme, found):
    assert spans.entities(tags.split(), scheme) == found


def test_entity_f1_by_hand():
    """One of two right, three wanted: 2 · 1 / (2 + 3)."""
    stats = spans.statistics(["B-A", "I-A", "O", "B-B", "O"], ["B-A", "I-A", "O", "B-C", "B-B"], "BIO")
    assert stats == [1, 2, 3]
    assert entity_f1(np.array(stats, float)) == pytest.approx(2 / 5)
    assert math.isnan(entity_f1(np.zeros(3)))


def test_the_scheme_follows_from_the_labels():
    assert spans.scheme(["O", "B-X", "I-X"]) == "BIO"
    assert spans.scheme(["O", "B-X", "M-X", "E-X", "S-X"]) == "BIOES"
    assert spans.scheme(["O", "I-X"]) == "IO"
    assert not spans.has_entities(["n", "v", "O"])


# -- labels ---------------------------------------------------------------------------------------------------------


def test_labels_by_hand():
    """a: 2 right of 3 given and 2 wanted, F1 4/5; b: 1 of 1 and 3, 1/2; c never occurs; one answer is no label."""
    given, true = ["a", "a", "a", "b", "x"], ["a", "a", "b", "b", "b"]
    sums = sum(np.array(classes.statistics([g], [t], "abc")) for g, t in zip(given, true))
    assert classes.accuracy(sums) == pytest.approx(3 / 5)
    assert classes.macro_f1(sums) == pytest.approx((4 / 5 + 1 / 2) / 2)
    assert classes.confusion(given, true, "abc") == [[2, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]


# -- intervals ------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_textbooks():
    """1,000 coin flips: mean ± 1.96 standard errors."""
    rng = np.random.default_rng(3)
    stats = np.stack([rng.integers(0, 2, 1000).astype(float), np.ones(1000)], 1)
    value = float(mean(stats.sum(0)))
    error = 1.96 * math.sqrt(value * (1 - value) / 1000)
    low, high = resample.interval(stats, mean)
    assert low == pytest.approx(value - error, abs=0.004) and high == pytest.approx(value + error, abs=0.004)
    assert resample.interval(stats, mean) == (low, high)
    assert resample.interval(stats[:1], mean) is None


def test_chance_is_exact_where_it_can_be_counted():
    """5 samples that all got better: of 32 ways to exchange, 2 differ as much. Equal answers: always."""
    base = np.array([[0.0, 1.0]] * 5)
    tuned = np.array([[1.0, 1.0]] * 5)
    assert resample.chance(base, tuned, mean) == pytest.approx(2 / 32, abs=0.015)
    assert resample.chance(base, base, mean) == 1
    assert resample.difference(base, tuned, mean) == (1, 1)


@pytest.mark.parametrize("name", METRICS)
def test_every_measure_is_computed_for_many_sums_at_once(name):
    """Resampling hands over (rounds, k): each row must give what it gives alone."""
    width = {"classes": 9, "entities": 3, "bleu": 10, "bleu_word": 10}.get(METRICS[name].stats, 2)
    sums = np.sort(np.random.default_rng(0).integers(1, 9, (6, width)).astype(float))
    together = METRICS[name].value(sums)
    assert together.shape == (6,)
    np.testing.assert_allclose(together, [METRICS[name].value(row) for row in sums])
    assert not METRICS[name].better(0.0)


def test_perplexity_is_of_all_tokens():
    sums = np.array([[2 * math.log(2), 2.0], [math.log(8), 1.0]])
    assert perplexity(sums.sum(0)) == pytest.approx(32 ** (1 / 3))


def test_chinese_in_words_where_something_splits_it(monkeypatch):
    """A stand-in for jieba, which cuts after two characters."""
    import sys
    from types import ModuleType

    from peft_run.config.schema import Eval
    from peft_run.console import Console
    from peft_run.judges.writing import Writing

    splitter = ModuleType("jieba")
    splitter.lcut = lambda text: [text[i : i + 2] for i in range(0, len(text), 2)]
    splitter.setLogLevel = lambda level: None
    monkeypatch.setitem(sys.modules, "jieba", splitter)
    assert units.words("我们喜欢GPU编程!") == ["我们", "喜欢", "GPU", "编程", "!"]
    references, console = ["我们喜欢它", "你好世界", "ok"], Console("en", quiet=True)
    monkeypatch.setattr(units, "has_words", lambda: True)
    found = Writing(references, Eval(tokenizer="word"), console).statistics("我们热爱它", references[0])
    assert found["rouge1"][0] == pytest.approx(3 / 5) and found["rouge1_word"][0] == pytest.approx(2 / 3)
    assert found["bleu_word"][:4] == [3, 3, 2, 3]
    assert "rouge1_word" not in Writing(references, Eval(), console).measures
    assert "rouge1_word" not in Writing(["only", "English"], Eval(tokenizer="word"), console).measures
    monkeypatch.setattr(units, "has_words", lambda: False)
    assert "rouge1_word" not in Writing(references, Eval(tokenizer="word"), console).measures
    assert "peft[zh]" in console.warnings[0]
