"""Whether a text is in one of thirty languages: by its script, and where several share one, by the commonest words of each."""

import unicodedata
from collections import Counter
from functools import cache

COMMON = {
    "Latin": {
        "en": """the of and to a in is that it for as with was on are be this by at or from you have not an which we they but
            can his her your my i if so what when will all their there our one more no do how who its has he she up out about
            me""",
        "es": """el la los las de del y en que un una es por con para se su no al lo como más pero sus le ya o este sí porque
            esta son entre está cuando muy sin sobre ser también me hasta hay donde todo nos uno ni mi si tu te puede están
            fue ha""",
        "pt": """o a os as de da do das dos e em um uma é que para com não por se na no nas nos ao mais como mas foi seu sua
            ou ser quando muito já eu também só pelo pela até isso ela ele entre era depois sem mesmo aos ter são você está há
            meu""",
        "fr": """le la les des de du et en un une est que qui dans pour pas sur ce il elle au aux par plus avec son sa ses se
            ne je vous nous on mais ou cette être sont comme tout leur si à d l s c n j y ces même très sans fait été où peut
            votre""",
        "de": """der die das und in den von zu mit sich des auf für ist im dem nicht ein eine als auch es an er werden aus sie
            nach bei wie einen oder um am zum war haben nur ich wir hat einer einem so über bis mehr durch man sein wird kann
            ihr""",
        "it": """il lo la i gli le di del della dei che e è in un una per con non si da al dal nel come più ma anche sono alla
            delle se o ci questo mi suo sua ha ho cosa quando essere su tra dell l tutti nella hanno molto può c degli stato
            ti""",
        "pl": """i w na z do się nie że to jest o jak po co ale za od przez czy dla tak już jego tylko ich być lub oraz może
            go przy który która które są był była jej pod ten ta te tego we ze ma mnie gdy tym sobie każdy bardzo jako""",
        "vi": """và của là có không được cho các một trong với để những người này khi từ đã về như ra đến theo ở cũng bị tôi
            bạn sẽ nhưng vì trên mình hay làm phải thì con chúng ta lại nào anh em rất mà nên""",
        "sw": """na ya wa kwa ni za katika la cha kama kuwa au yake hii hiyo lakini pia kutoka ili bila hata watu mtu kila yao
            wake si vya hivyo sana baada wakati zaidi ambao ambayo ana hakuna huu hilo yeye wao wote kwamba moja wetu yangu
            kati chini juu ndio zote yote kwenye""",
        "fi": """ja on ei se että joka oli ovat mutta myös kun hän niin tai kuin sen ole ne sekä jos vain mitä jotka voi hänen
            mukaan olla kanssa nyt minä sitä siitä kaikki sinä me he te tämä tämän jo joita eikä mikä hyvin koska siis tässä
            jälkeen ilman niiden olet sinun minun heidän""",
    },
    "Cyrillic": {
        "ru": """и в не на что с по как это но к у из за от то он она я мы вы они так все его для было или бы только же ее был
            еще если уже быть чтобы этот может при о""",
        "uk": """і в не на що з та як це але до у із за від то він вона я ми ви вони так все його для було або би тільки ж її
            був ще якщо вже бути щоб цей може при про й є""",
        "bg": """и в не на че с по как това но към за от той тя аз ние вие те така всичко му е да се ще са си които който
            която или само беше още ако може при като със във най ли ги й бъде има""",
    },
    "Devanagari": {
        "hi": """है के में की को का से और हैं पर यह कि नहीं भी एक हो ने तो था थी थे लिए कर या इस वह जो हम आप मैं अपने अपनी ही
            कोई किया गया जा रहा रहे साथ उस क्या बहुत""",
        "mr": """आहे आणि आहेत च्या या व हे ते ही तो ती नाही होते होता मध्ये साठी करण्यात केली केले झाली एक पण मी आम्ही तुम्ही
            त्या त्याच्या असे असून किंवा सर्व मला आपल्या काय म्हणून त्यांच्या यांच्या अशा तसेच करून झाले केला माझ्या तुमच्या
            कारण परंतु जर तर खूप आज असते करा हा ज्या अथवा करणे असेल पाहिजे नये""",
        "ne": """छ र को मा हो पनि यो छन् लाई गर्न भएको गरेको गर्ने हुन्छ थियो छैन तर एक वा सबै म हामी तपाईं तपाईंको उनी त्यो
            भने हरू हुने गर्नु आफ्नो लागि सक्नुहुन्छ गर्नुहोस् तथा यस कुनै भए पर्छ हुन नै के यी ती उनको""",
    },
    "Arabic": {
        "ar": """في من على أن إلى التي الذي عن مع هذا هذه ما لا أو كان كل بين ذلك قد لم بعد ثم هو هي كما عند كانت إن و حتى له
            لها به فيه غير لكل""",
        "fa": """و در به از که این را با است آن برای هم تا یک خود شد بر ها می شود کرد دارد او ما یا اما باید هر کند ای نیز بود
            شما من نمی هستند بی کنید""",
        "ur": """کے کی میں ہے اور سے کو کا پر کہ اس نے ہیں یہ ایک نہیں بھی تھا جو ہو کر گیا تو ان ہر یا کسی اپنے لیے ہم آپ وہ
            تھے جائے گا""",
    },
}  # fmt: skip
"""The commonest words of the languages that share a script."""
LETTERS = {
    "vi": "ơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ", "pl": "ąęłśźż",
    "uk": "іїєґ", "ru": "ыэё", "ur": "ٹڈڑںے", "ar": "ةى",
}  # fmt: skip
"""Letters that of the languages of their script only one has; a word with one of them counts as one of its commonest."""
ALONE = {
    "bn": "Bengali", "gu": "Gujarati", "he": "Hebrew", "kn": "Kannada", "ko": "Hangul", "ml": "Malayalam", "pa": "Gurmukhi",
    "ta": "Tamil", "te": "Telugu", "th": "Thai",
}  # fmt: skip
"""Languages that here have their script to themselves."""


LANGUAGES = tuple(sorted([*ALONE, "ja", *(language for each in COMMON.values() for language in each)]))
"""Codes of ISO 639-1."""
SPARSE = 80
"""A text with more letters than this for each common word of a language is in another one."""


def speaks(text: str, language: str) -> bool:
    """Whether most letters are of the language's script, and no other language of this script has more of its words among them.

    In doubt it is the one that is asked for, but Latin letters are English. Japanese is known by its kana.
    """
    import regex

    letters = len(regex.findall(r"\p{L}", text))
    if language == "ja":
        return len(regex.findall(r"[\p{Hiragana}\p{Katakana}]", text)) > 0.3 * letters
    script = ALONE.get(language) or next(script for script, languages in COMMON.items() if language in languages)
    if len(regex.findall(rf"\p{{Script={script}}}", text)) * 2 <= letters:
        return False
    if script not in COMMON:
        return True
    found = _common_words(text, script)
    ahead = language == "en" or script != "Latin" or found[language] > found["en"]
    return ahead and found[language] == max(found.values()) >= letters // SPARSE


def _common_words(text: str, script: str) -> dict[str, int]:
    """How many words of a text are common ones of each of the languages of a script."""
    import regex

    words = Counter(regex.findall(r"[\p{L}\p{M}]+", unicodedata.normalize("NFC", text).lower()))
    marks = {language: (_words(script, language), set(LETTERS.get(language, ""))) for language in COMMON[script]}
    return {
        language: sum(times for word, times in words.items() if word in common or not own.isdisjoint(word))
        for language, (common, own) in marks.items()
    }


@cache
def _words(script: str, language: str) -> frozenset[str]:
    return frozenset(COMMON[script][language].split())
