"""Texts in a script that the tokenizer was not made for are recognised; other languages of a known script are not."""

import pytest
from transformers import PreTrainedTokenizerFast

from sparse_ft.backbone.coverage import misfit
from sparse_ft.resources import packaged_minilm_dir

ENGLISH = "The committee approved the new budget yesterday after a long discussion about schools and hospitals."
FITTING = {
    "en": ENGLISH,
    "de": "Der Ausschuss genehmigte gestern nach langer Diskussion über Schulen den neuen Haushalt.",
    "fi": "Valiokunta hyväksyi eilen uuden talousarvion pitkän kouluja koskevan keskustelun jälkeen.",
    "pl": "Komitet zatwierdził wczoraj nowy budżet po długiej dyskusji na temat szkół i szpitali.",
    "tr": "Komite, okullar ve hastaneler hakkındaki uzun tartışmanın ardından dün yeni bütçeyi onayladı.",
    "mixed": f"{ENGLISH} Привет. {ENGLISH} 你好。",
    "codes": "SKU-48213 ref 77x19 A4 B2 err 0x1f q9 z8 kk1 v2 77 31 15:40 ok 😂😂 lol omg ur sooo right",
    "few": "委员会",
}
UNKNOWN = {
    "zh": "委员会昨天在就学校和医院进行长时间讨论后批准了新预算。这家餐厅的服务态度很差，菜也凉了。",
    "ja": "委員会は昨日、学校と病院についての長い議論の末、新しい予算を承認しました。",
    "ko": "위원회는 학교와 병원에 대한 긴 논의 끝에 어제 새 예산을 승인했습니다.",
    "th": "คณะกรรมการอนุมัติงบประมาณใหม่เมื่อวานนี้หลังจากการอภิปรายเรื่องโรงเรียนและโรงพยาบาล",
}
CUT = {
    "ru": "Вчера комитет утвердил новый бюджет после долгого обсуждения школ и больниц.",
    "el": "Η επιτροπή ενέκρινε χθες τον νέο προϋπολογισμό μετά από μακρά συζήτηση για σχολεία.",
    "ar": "وافقت اللجنة أمس على الميزانية الجديدة بعد نقاش طويل حول المدارس والمستشفيات.",
}


@pytest.fixture(scope="module")
def minilm():
    file = packaged_minilm_dir() / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), unk_token="[UNK]")


@pytest.mark.parametrize("language", FITTING)
def test_scripts_that_the_tokenizer_knows(minilm, language):
    assert misfit(minilm, [FITTING[language]] * (1 if language == "few" else 5)) is None


@pytest.mark.parametrize("language", [*UNKNOWN, *CUT])
def test_scripts_that_it_does_not_know(minilm, language):
    reason = misfit(minilm, [{**UNKNOWN, **CUT}[language]] * 5)
    assert ("does not know" if language in UNKNOWN else "single letters") in (reason or "")


def test_no_text_is_no_misfit(minilm):
    assert misfit(minilm, []) is None
