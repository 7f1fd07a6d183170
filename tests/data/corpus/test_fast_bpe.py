"""Fast encoding gives the ids of the tokenizer itself, or leaves the text to it; without a proof there is no plan."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import oarsmith
from oarsmith.data.corpus.fast_bpe import _KNOWN_PATTERNS, FastPlan, plan_fast
from oarsmith.data.corpus.tokenize import Encoder, Encoding, disagreement

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tokenizers"
PROSE = Path(oarsmith.__file__).with_name("demo").joinpath("unrelated.txt").read_text(encoding="utf-8")
ODD = [
    "",
    " ",
    "a",
    "\n\n\n a  b\t\tc \r\n d\u00a0\u2003e\u0085f ",
    "I'm you're THEY'LL 'S ’s it'd''ve 'ſ",
    "1234567890 3.14159 x2y ½ ² ٣٤ 五 Ⅷ",
    "中文没有空格，日本語のテキスト、한국어 ไทย हिन्दी עברית العربية",
    "🙂👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 é ﬁ ß İi \u200d\u200b\ufeff",
    "\x00\x01\x04\x06\x13\x1d\x7f",
    "\U00011de0 \U00016ff4 \U0001e4f0",  # digits of the newest versions of Unicode
    "\U00040000 \U000f0000 \U0010ffff",
    "<|endoftext|> a <|im_start|>user<|im_end|>",
    "def f(x):\n    return x  # ___---===>>>\n\n\n\tif x != 1e-10: pass",
    "x" * 3000 + "abcdefghij" * 300,
]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def spaces(n):
    return "begin" + " " * n + "end" + "\n " * n + "."


def random_texts(seed, count):
    """Texts over all of Unicode, with white space and digits between."""
    randomly = random.Random(seed)
    found = []
    for _ in range(count):
        highest = randomly.choices([0x7F, 0x3000, 0x110000], k=randomly.randrange(1, 60))
        letters = [chr(randomly.randrange(32, bound)) for bound in highest]
        text = "".join(randomly.choice(["", "", " ", "\n", "7", "'s"]) + c for c in letters)
        found.append(text.encode("utf-8", "ignore").decode("utf-8"))
    return found


def trained(folder, pre_tokenizer, *, normalizer=None, specials=("<|endoftext|>",), alphabet=True, bos=None, size=900):
    """A tokenizer directory, trained on prose."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE, *ODD], trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {bos}", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits_first():
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def check_same(path, texts, *, special=True):
    tokenizer = oarsmith.load_tokenizer(path)
    plan = plan_fast(tokenizer, add_special_tokens=special)
    assert isinstance(plan, FastPlan), plan
    encoder = Encoder(Encoding(tokenizer=str(path), dtype="<i4", eos=None, add_special_tokens=special, fast=plan))
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text, special), repr(text[:200])
    return encoder


@pytest.mark.parametrize("number", range(len(_KNOWN_PATTERNS)))
def test_known_patterns_on_odd_and_random_text(tmp_path, number):
    path = trained(tmp_path, split(_KNOWN_PATTERNS[number]))
    encoder = check_same(path, [*ODD, PROSE, *random_texts(number, 300)])
    assert 0 < encoder.num_slow < 314, "some texts must be left to the tokenizer, most must not"


def test_gpt2s_own_pattern_and_digits_first(tmp_path):
    for name, pre_tokenizer in (("gpt2", pre_tokenizers.ByteLevel(add_prefix_space=False)), ("digits", digits_first())):
        check_same(trained(tmp_path / name, pre_tokenizer), [*ODD, PROSE, *random_texts(7, 300)])


@pytest.mark.parametrize("name", ["qwen25_bpe_json", "gpt2_vocab_merges"])
def test_tokenizers_of_real_models(name):
    """Cut down to some thousand ids: that leaves tokens which no merge makes any more."""
    check_same(FIXTURES / name, [*ODD, PROSE, *random_texts(3, 200)])


def test_a_vocabulary_without_some_bytes(tmp_path):
    path = trained(tmp_path, digits_first(), alphabet=False)
    missing = "\u0e01\u1e00\U0001f9ff"
    encoder = check_same(path, [*ODD, PROSE, missing, *random_texts(5, 100)])
    assert encoder.num_slow > 0


def test_a_tokenizer_that_composes(tmp_path):
    path = trained(tmp_path, split(_KNOWN_PATTERNS[1]), normalizer=normalizers.NFC())
    decomposed = [unicodedata.normalize("NFD", text) for text in ("Ångström café", "각 한국어", "ệ")]
    check_same(path, [*decomposed, *ODD, PROSE, *random_texts(11, 200)])


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_around_a_text(tmp_path, special):
    path = trained(tmp_path, digits_first(), specials=("<|endoftext|>", "<s>"), bos="<s>")
    check_same(path, [*ODD, PROSE, "before <s> after"], special=special)


def test_white_space_by_the_million_is_left_to_the_tokenizer(tmp_path):
    path = trained(tmp_path, digits_first())
    check_same(path, [spaces(50_000), spaces(600_000)])


def test_added_tokens_that_swallow_white_space(tmp_path):
    path = trained(tmp_path, digits_first())
    whole = Tokenizer.from_file(str(path / "tokenizer.json"))
    whole.add_tokens([AddedToken("Skiff", lstrip=True, rstrip=True), AddedToken("  ", normalized=False)])
    whole.save(str(path / "tokenizer.json"))
    check_same(path, ["a Skiff b", "a  b", "a b", *ODD, PROSE])


def change(path, function):
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    function(content)
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return plan_fast(oarsmith.load_tokenizer(path), add_special_tokens=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "changes texts"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "not one known regular expression"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "not one known regular expression"),
        (lambda c: c["model"].update(dropout=0.1), "not plain BPE"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "affixes"),
    ],
)
def test_what_is_not_proven_has_no_plan(tmp_path, function, reason):
    path = trained(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False))
    found = change(path, function)
    assert isinstance(found, str) and reason in found


def merges_of(pairs, extra=()):
    """A BPE whose merges are `pairs` over the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate([*alphabet, *dict.fromkeys(a + b for a, b in pairs), *extra])
    }
    return vocabulary, pairs


@pytest.mark.parametrize(
    "pairs",
    [
        # "abc" is made of ab and c, but b and c merge first: no word ever becomes abc, though tiktoken would make it.
        [("b", "c"), ("a", "b"), ("ab", "c")],
        # The order of merges is not that of the tokens' lengths, and a token is part of another by a later merge.
        [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "d"), ("abc", "d"), ("bc", "d")],
    ],
)
def test_every_word_over_a_small_alphabet(tmp_path, pairs):
    vocabulary, merges = merges_of(pairs)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = [""]
    for _ in range(6):
        words += [word + letter for word in words if len(word) == len(words[-1]) for letter in "abcd"]
    check_same(tmp_path, words)


def test_a_token_with_two_places_in_the_order_of_merges(tmp_path):
    vocabulary, merges = merges_of([("a", "b"), ("ab", "c"), ("b", "c"), ("c", "d"), ("a", "bc")])
    Tokenizer(models.BPE(vocab=vocabulary, merges=merges)).save(str(tmp_path / "tokenizer.json"))
    found = change(tmp_path, lambda c: c.update(pre_tokenizer=BYTE_LEVEL))
    assert found == "its merges make a token at several places of their order"


def test_whole_words_that_merges_do_not_make(tmp_path):
    """With ignore_merges a word of the vocabulary is taken whole: two pieces in the end would be merged by tiktoken."""
    vocabulary, merges = merges_of([("b", "c"), ("a", "b"), ("ab", "c")])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = plan_fast(oarsmith.load_tokenizer(tmp_path), add_special_tokens=True)
    assert found == "it has words that its merges do not make"


def test_the_check_on_real_text_finds_a_wrong_plan(tmp_path):
    path = trained(tmp_path, digits_first())
    tokenizer = oarsmith.load_tokenizer(path)
    plan = plan_fast(tokenizer, add_special_tokens=True)
    assert isinstance(plan, FastPlan)
    right = Encoding(tokenizer=str(path), dtype="<i4", eos=0, add_special_tokens=True, fast=plan)
    assert disagreement(right, tokenizer, [PROSE]) is None
    swapped = FastPlan(**{**vars(plan), "ids": (*plan.ids[:32], plan.ids[33], plan.ids[32], *plan.ids[34:])})
    wrong = Encoding(tokenizer=str(path), dtype="<i4", eos=0, add_special_tokens=True, fast=swapped)
    assert disagreement(wrong, tokenizer, ["fine", PROSE]) is not None
