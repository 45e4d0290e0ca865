import pytest

from sparse_ft.backbone.words import Word, cut_words, line_starts, split_words

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
    ("\ufeffMarta\u200b Lind\u00adqvist, Gothen\u200bburg", "Marta Lind\u00adqvist , Gothen\u200bburg"),
    ("去\u200b吧", "去 吧"),
    ("\u202aVolvo\u202c \x02M\ufffdller\u200f, Go\x1eten\x00", "Volvo M\ufffdller , Go\x1eten"),
    ("\ufeff \x00\u200f", ""),
    ("liked it.Jonas Berg", "liked it . Jonas Berg"),
    ("in Göteborg.Åsa, USA.She, COVID-19.She", "in Göteborg . Åsa , USA . She , COVID-19 . She"),
    ("좋았다.요나스 गया.मार्ता د.أحمد", "좋았다 . 요나스 गया . मार्ता د.أحمد"),
    ("U.S.Army ASP.NET J.Berg 3.5 e.g. e.V example.org", "U.S. Army ASP.NET J.Berg 3.5 e.g. e.V example.org"),
    ("Jonas.Berg@Volvo.com www.Volvo.Com at 10:30", "Jonas.Berg@Volvo.com www.Volvo.Com at 10:30"),
    ("O'Brien's rock'n'roll don’t l'Oréal", "O'Brien 's rock'n'roll do n’t l'Oréal"),
])  # fmt: skip
def test_english_words_are_split_as_the_corpora_are(text, words):
    assert [word.text for word in split_words(text)] == (words.split(" ") if words else [])


def test_every_chinese_character_is_a_word():
    assert [word.text for word in split_words("去 Rome\u200b玩\x02", "zh")] == ["去", "R", "o", "m", "e", "玩"]


@pytest.mark.parametrize(("language", "text", "words"), [
    ("fr", "l'Allemagne, qu’il d'Émile aujourd'hui", "l' Allemagne , qu’ il d' Émile aujourd'hui"),
    ("fr-CA", "l'U.E. vu O'Brien.L'eau", "l' U.E. vu O'Brien . L' eau"),
    ("fr", "McDonald's n'est-ce l'11", "McDonald 's n' est-ce l' 11"),
    ("it", "dell'Italia c'è D'Annunzio", "dell' Italia c' è D' Annunzio"),
    ("ca", "l'Estat d’Espanya", "l' Estat d’ Espanya"),
    ("tr", "Ankara'da İstanbul’a TBMM'nin", "Ankara 'da İstanbul ’a TBMM 'nin"),
    ("tr", "O'Brien'ın 1996'da 'Ankara' ABD'DE", "O'Brien 'ın 1996 'da ' Ankara ' ABD 'DE"),
    ("fi", "Bordeaux'n EU:n", "Bordeaux 'n EU : n"),
    ("uk", "п'ять м’яч", "п'ять м’яч"),
])  # fmt: skip
def test_apostrophes_divide_words_as_the_language_does(language, text, words):
    assert [word.text for word in split_words(text, language)] == words.split()


def test_words_that_begin_a_line():
    text = "\n\nHelen Marsh\nBristol \r\n\x02 12 May\u2028x\ty"
    assert line_starts(split_words(text), text) == {2, 3, 5}
    assert line_starts([], "\n") == set()


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
