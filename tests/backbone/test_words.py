import pytest

from sparse_ft.backbone.words import Word, cut_words, split_words

TEXTS = [
    "",
    "   ",
    "It didn't cost $3.50, did it?!",
    "Mother-in-law's AT&T bill (U.S.) of 1996-08-22 … O'Neil",
    "我在Lisbon住了3年。\u2028两行\tかな 한국어 한",
    "e\u0301clair 👩‍👩‍👧 a@b.org\u00a0x\n\nnaïve",
    "((((--___--))))",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_words_are_slices_in_order_and_cover_all_but_white_space(text, language):
    words = split_words(text, language)
    covered = set()
    for word in words:
        assert text[word.start : word.end] == word.text
        assert not any(character.isspace() for character in word.text)
        covered.update(range(word.start, word.end))
    assert sum(word.end - word.start for word in words) == len(covered)
    assert [word.start for word in words] == sorted(word.start for word in words)
    assert covered == {index for index, character in enumerate(text) if not character.isspace()}


@pytest.mark.parametrize(("text", "words"), [
    ("It didn't work.", "It did n't work ."),
    ("Ada's U.S. trip", "Ada 's U.S. trip"),
    ("on 1996-08-22, 3.5km", "on 1996-08-22 , 3.5km"),
    ("AT&T (mother-in-law)", "AT&T ( mother-in-law )"),
    ("wait... what?!", "wait ... what ? !"),
    ("在Rome玩", "在 Rome 玩"),
    ("नमस्ते, दुनिया!", "नमस्ते , दुनिया !"),
    ("שָׁלוֹם עוֹלָם", "שָׁלוֹם עוֹלָם"),
    ("สวัสดี ครับ", "สวัสดี ครับ"),
    ("وَلَد", "وَلَد"),
    ("క్‌షణం", "క్‌షణం"),
    ("☀️ (☀️)", "☀ ️ ( ☀ ️ )"),
    ("\ufeffMarta\u200b Lind\u00adqvist, Gothen\u200bburg", "\ufeffMarta\u200b Lind\u00adqvist , Gothen\u200bburg"),
    ("去\u200b吧", "去\u200b 吧"),
])  # fmt: skip
def test_english_words_are_split_as_the_corpora_are(text, words):
    assert [word.text for word in split_words(text)] == words.split()


def test_every_chinese_character_is_a_word():
    assert [word.text for word in split_words("去 Rome玩", "zh")] == ["去", "R", "o", "m", "e", "玩"]


@pytest.mark.parametrize("language", ["zh-CN", "zh-Hant-TW", "ZH"])
def test_chinese_has_regions_and_scripts(language):
    assert split_words("2024年IBM在上海", language) == split_words("2024年IBM在上海", "zh")


def test_cut_words():
    words = [Word("Müller-Meier", 4, 16), Word(",", 16, 17)]
    assert cut_words(words, {0, 4, 10, 11, 17}) == [
        Word("Müller", 4, 10),
        Word("-", 10, 11),
        Word("Meier", 11, 16),
        Word(",", 16, 17),
    ]
    assert cut_words(words, set()) == words
