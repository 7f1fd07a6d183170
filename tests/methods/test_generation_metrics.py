"""BLEU and ROUGE: the libraries' own defaults for English, and formulas by hand for Chinese."""

import math
import subprocess
import sys
from collections import Counter

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from oarsmith.methods.generation_metrics import Words, bleu_tokenizer, score_answers
from tiny import environment

ANSWERS = ["the cat sat on the mat today", "It's 42, isn't it?", "no"]
REFERENCES = ["the cat is on the mat today", "It is 42, is it not?", "yes, of course"]
CHINESE_ANSWERS = ["今天天气很好。", "北京是中国的首都，人口很多"]
CHINESE_REFERENCES = ["今天的天气很好！", "北京是中国的首都"]


def test_english_as_the_libraries_have_it():
    scores = score_answers(ANSWERS, REFERENCES)
    assert scores.bleu4 == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score / 100)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name, value in (("rouge1", scores.rouge1), ("rouge2", scores.rouge2), ("rougeL", scores.rougel)):
        rows = [scorer.score(r, a)[name].fmeasure for a, r in zip(ANSWERS, REFERENCES, strict=True)]
        assert value == pytest.approx(sum(rows) / 3), name
    assert scores.count == 3
    assert 0 < scores.bleu4 < scores.rouge1 < 1


def f1(answer, reference, n):
    """ROUGE-N of sequences, as Lin 2004 defines it."""
    a, r = (Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (answer, reference))
    overlap = sum((a & r).values())
    precision, recall = overlap / sum(a.values()), overlap / sum(r.values())
    return 2 * precision * recall / (precision + recall)


def bleu(answers, references):
    """Corpus BLEU-4 of lists of tokens, as Papineni et al. 2002 define it; no smoothing is needed here."""
    logs = 0.0
    for n in range(1, 5):
        right = total = 0
        for answer, reference in zip(answers, references, strict=True):
            a, r = (Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (answer, reference))
            right, total = right + sum((a & r).values()), total + sum(a.values())
        logs += math.log(right / total) / 4
    longer, length = sum(map(len, references)), sum(map(len, answers))
    return math.exp(logs + min(0.0, 1 - longer / length))


def test_chinese_is_compared_by_characters():
    scores = score_answers(CHINESE_ANSWERS, CHINESE_REFERENCES)
    pairs = list(zip(CHINESE_ANSWERS, CHINESE_REFERENCES, strict=True))
    assert scores.bleu4 == pytest.approx(bleu([list(a) for a, _ in pairs], [list(r) for _, r in pairs]))
    plain = [[[c for c in text if c not in "。！，"] for text in pair] for pair in pairs]  # ROUGE has no punctuation
    assert scores.rouge1 == pytest.approx(sum(f1(a, r, 1) for a, r in plain) / 2)
    assert scores.rouge2 == pytest.approx(sum(f1(a, r, 2) for a, r in plain) / 2)
    assert 0.5 < scores.rougel <= scores.rouge1
    assert RougeScorer(["rouge1"]).score(*reversed(pairs[0]))["rouge1"].fmeasure == 0, "its own tokenizer drops it all"


@pytest.mark.parametrize("text", ["Hello, World! It's 3.5 o'clock", "a-b_c 10%", "", "  \n"])
def test_words_of_english_are_rouge_scores_own(text):
    assert Words().tokenize(text) == DefaultTokenizer().tokenize(text)


def test_words_of_other_scripts():
    assert Words().tokenize("我有2只Cat。") == ["我", "有", "2", "只", "cat"]
    assert Words().tokenize("Привет, мир") == ["привет", "мир"]
    assert Words().tokenize("한국어 텍스트") == ["한국어", "텍스트"]
    assert Words().tokenize("ねこが好き") == list("ねこが好き")


def test_the_kind_of_most_references_decides():
    assert bleu_tokenizer(REFERENCES) == "13a"
    assert bleu_tokenizer(CHINESE_REFERENCES) == "zh"
    assert bleu_tokenizer(["今日は天気がいい"]) == "char"
    assert bleu_tokenizer(["Привет, мир"]) == "13a"
    assert bleu_tokenizer([*REFERENCES, *CHINESE_REFERENCES]) == "13a"
    assert bleu_tokenizer(["The character 中 means middle"]) == "13a"


def test_the_same_and_nothing():
    same = score_answers(REFERENCES, REFERENCES)
    assert (same.bleu4, same.rouge1, same.rouge2, same.rougel) == pytest.approx((1, 1, 1, 1))
    nothing = score_answers(["", "", ""], REFERENCES)
    assert (nothing.bleu4, nothing.rouge1, nothing.rouge2, nothing.rougel) == (0, 0, 0, 0)
    assert set(same.record()) == {"eval_bleu4", "eval_rouge1", "eval_rouge2", "eval_rougel"}


@pytest.mark.parametrize("module", ["sacrebleu", "rouge_score"])
def test_a_missing_package_names_its_extra(module):
    code = (
        f"import sys\nsys.modules[{module!r}] = None\n"
        "from oarsmith.methods.generation_metrics import require_metrics\n"
        "try:\n    require_metrics('this')\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert module in done.stdout and "oarsmith[eval]" in done.stdout
