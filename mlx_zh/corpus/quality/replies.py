"""What a reply does wrong: it refuses, answers in another language, breaks off, or repeats the question."""

from __future__ import annotations

import re

from mlx_zh.corpus.quality.characters import simplified

_HEAD = 300  # characters at the beginning of a reply in which it refuses
_ENDS = 4000  # characters at each end of a text in which its language is looked for
_EXCERPT = 40

_AI = (
    r"(?:人工智能|人工智慧|AI|大?型?语言模型|大模型|聊天机器人|机器人|虚拟助手|智能助手|智能助理)"
    r"(?:语言模型|模型|助手|助理|程序|系统)?"
)
_ONE = r"(?:一个|一名|一款|一种|一位|个)?(?:由[^，。！？\n]{1,20}(?:开发|训练|创建|研发)的)?"
_AS_AI = re.compile(
    rf"(?:作为|身为)\s?{_ONE}\s?{_AI}(?![的在之中与和领])[^。！？\n]{{0,20}}?[，,]?\s?(?:我(?!们|国)|本人)"
    rf"|我(?:只|仅仅)?是\s?{_ONE}\s?{_AI}[^。！？\n]{{0,20}}"
    r"(?:没有|不能|无法|不会|不具备|不具有|并不|不可以)"
    r"|(?:^|[.!?,\n] ?|but |that )\s*as an? (?:\w+ ){0,2}(?:AI|artificial intelligence|language model|chatbot"
    r"|virtual assistant)\b",
    re.IGNORECASE,
)
_SORRY = r"(?:很|非常|十分|真的|实在)?(?:感到)?(?:抱歉|对不起|遗憾(?!的是)|不好意思|请原谅)"
_CANNOT = (
    r"(?:无法|不能|没有办法|没办法|没法|不便|不可以|拒绝|无权|不具备|没有能力|没有权限|不提供|不支持|不知道|未能"
    r"|(?:还|尚)?没有?学会)"
)
_DO = (
    r"(?:回答|提供|协助|帮助|帮你|帮您|完成|满足|生成|访问|浏览|执行|参与|支持|讨论|处理|继续|给出|为您|为你|查看|查询|告诉|写出|创建|展示"
    r"|分享|透露|判断)"
)
_I = r"(?:我(?!们)|本(?:助手|模型|AI)|(?:作为|身为)[^，。！？\n]{1,15})"
_SORRY_EN = r"(?:i(?:'m|’m| am) (?:very |so |really |truly )?sorry|(?:i )?apologi[sz]e|my apologies|sorry)"
_NOT_EN = r"(?:can't|can’t|cannot|can not|unable|not able|won't|won’t|don't have|don’t have)"
_REFUSED = re.compile(
    rf"(?i:\s*(?:(?:您好|你好)[，,！!。]?\s?)?(?:"
    rf"{_SORRY}[^。！？\n]{{0,30}}?{_I}[^。！？\n]{{0,20}}?{_CANNOT}"
    rf"|{_SORRY}[^。！？\n]{{0,20}}?{_CANNOT}(?:直接|继续|为您|为你|给您|给你|向您)?{_DO}"
    rf"|{_SORRY}[^。！？\n]{{0,20}}(?:看不到|没有?看到|没有?收到)"
    rf"|{_SORRY}[^。！？\n]{{0,20}}(?:违反|违背|不符合)[^。！？\n]{{0,10}}(?:规定|法律|法规|准则|政策|规范)"
    rf"|我(?:目前|暂时|现在|还)?(?:无法|不能|没法|没有办法){_DO}"
    rf"|(?:这个|该|此|您的|你的)(?:问题|请求|要求|内容)[，,]?我(?:目前|暂时|现在)?(?:无法|不能|没法|没有办法){_DO}"
    rf"|(?:根据|按照|依据)[^。！？\n]{{2,20}}[，,]我(?:无法|不能)(?:向您|向你|为您|为你)?{_DO}"
    rf"|(?:unfortunately, )?{_SORRY_EN},? [^.!?\n]{{0,40}}{_NOT_EN}"
    r"|(?:sorry, |unfortunately, )?"
    r"i(?: (?:can't|can’t|cannot|am unable to|am not able to|won't|won’t)|(?:'|’)m (?:unable|not able) to) "
    r"(?:help|assist|provide|answer|fulfill|comply|engage|create|generate|access|browse|do that"
    r"|write|discuss|support)))"
)
_SPEAKS_FOR_OTHERS = re.compile(
    r"翻译|译成|译为|改写|润色|邮件|书信|道歉|写一[封段]|对话|台词|角色|扮演|假装|故事|剧本|文案|回复.{0,4}(?:客户|顾客)|造句"
    r"|translate|rewrite|rephrase|e-?mail|letter|dialogue|story|role-?play|apolog",
    re.IGNORECASE,
)

_WORDS = re.compile(r"[A-Za-z]{2,}(?:['’-][A-Za-z]+)*")
_HAN = re.compile(r"[\u3400-\u9fff]")
_OTHER = re.compile(
    r"[\u3040-\u30ff\uac00-\ud7af\u0400-\u04ff\u0600-\u06ff\u0e00-\u0e7f]"
)  # kana, Hangul, Cyrillic, …
_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|https?://\S+|<[^<>\n]{1,200}>|\{\{[^{}\n]*\}\}",
    re.DOTALL,
)
_NAMES_LANGUAGE = re.compile(
    r"[英法德日韩俄西汉中粤拉葡意阿泰外母]\s?[语文]|双语|西班牙|葡萄牙|意大利|阿拉伯|越南|翻译|译[成为出文]|单词|词汇|拼音|字母|缩写|首字母"
    r"|english|chinese|mandarin|translat|language|japanese|korean|french|german|spanish|russian"
    r"|代码|编程|程序|函数|脚本|正则|命令|查询|算法|网页|公式|方程|code|python|java|sql|html|css|json|xml|shell|bash|latex|regex",
    re.IGNORECASE,
)
# Words that a sentence has and a list of names or commands has not.
_SENTENCE_WORDS = re.compile(
    r"\b(?:the|an?|of|and|or|is|are|was|were|to|in|it|you|your|for|from|by|as|at|that|this|which|with|on|over|be|can|not|has"
    r"|have|we|they|I|de|la|les?|el|los|que|en|es|et|und|der|die|das|ist|il|che|di)\b"
)
_FEWEST_SENTENCE_WORDS = 2
_QUOTES_LATIN = re.compile(r"[“\"‘'「《][A-Za-z]")  # a Chinese prompt for a sentence with an English word
# Both begin in Chinese and say nothing in Latin letters for a while: the usual case, found at little cost.
_ALIKE_START = re.compile(r"[^A-Za-z\u3040-\u30ff]{0,20}[\u3400-\u9fff]{4}")
_FEWEST_HAN, _FEWEST_WORDS, _FEWEST_OTHER = 4, 8, 15

_CLOSED = tuple("。！？!?.…~～”’」』）)】]》〉}>|`*_#=-—:：;；\"'♪$")
_STOPS = re.compile(r"[。！？!?]|(?<=[a-z]{2})[.](?=\s)")
_INLINE_ITEM = re.compile(r"(?:^|\s)\d{1,2}[.、)]")
_LETTER = re.compile(r"[\u3400-\u9fffA-Za-z]")
_CUT_MARKS = tuple("，、,（([【《“「")
_ITEM_MARK = re.compile(r"\s*(?:[-*•·]|\d{1,3}[.、．)）]|[（(]?[一二三四五六七八九十\d]{1,3}[)）、])")
_EMPTY_ITEM = re.compile(r"\n[ \t]*(\d{1,2})([.、．)）])$")
_TITLE = re.compile(r"\s*(?:#|\||>|https?://|\S+@\S+|[-=*]{3})")
_SIGNED = re.compile(r"[-—–―]\s?\S[^。！？\n]{0,30}$|\w://\S+$")
_PAIRS = (("（", "）"), ("【", "】"), ("《", "》"), ("“", "”"), ("「", "」"))
_VERSE, _VERSE_LINES = 25, 12  # characters of a line, and lines that are looked at
_TAIL, _LINE = 200, 15  # characters at the end in which a bracket is open, and of a line of prose

_NO_LETTERS = re.compile(r"[\W_]+")
_EDITS = re.compile(
    r"改|翻译|译|润色|纠|校|提取|抽取|复述|重写|重复|转换|转化|排序|标点|续写|填|补全|格式|拼写|朗读|删除|替换|简化|默写|背诵|逆序|大写|小写"
    r"|edit|correct|rewrite|translat|repeat|sort|convert|fix|rephrase|format|extract|copy|complete|punctuat|grammar|summar",
    re.IGNORECASE,
)
_LABEL = re.compile(r"^(?:问题|提问|问|question|q(?![a-z]))", re.IGNORECASE)
# Without any of these, a text is a topic, and a reply may begin with it as a title or as its subject.
_ASKS = re.compile(
    r"[?？吗呢]|什么|怎么|怎样|如何|为何|哪|谁|多少|几|是否|请|帮|给|写|列|介绍|解释|描述|分析|说|讲|设计|创建|生成|制作|提供|告诉|推荐|比较|总结"
    r"|[a-z]{2}",
    re.IGNORECASE,
)
_ECHO, _GRAM, _ALIKE = (
    12,
    4,
    0.8,
)  # letters of a Chinese question, of an n-gram, and the similarity of question and reply


def refusal(prompt: str, reply: str) -> str | None:
    """Where a reply refuses, or speaks "as an AI"; None in others, and in replies that speak for somebody else."""
    head = simplified(reply[:_HEAD])
    match = _REFUSED.match(head) or _AS_AI.search(head)
    if match is None or _SPEAKS_FOR_OTHERS.search(prompt):
        return None
    return reply[match.start() : match.end()].strip()[:_EXCERPT]


def language(prompt: str, reply: str) -> str | None:
    """The beginning of a reply in another language than the prompt's; None if both agree or the prompt names one.

    Code, formulas and links have no language. A prompt that asks for code, or holds two languages, takes any reply.
    """
    if _ALIKE_START.match(reply) and _ALIKE_START.match(prompt):
        return None
    said = _letters(reply)
    if said is None or names_language(prompt):
        return None
    asked = _letters(prompt)
    if said == "Latin" and len(_SENTENCE_WORDS.findall(_ends(reply))) < _FEWEST_SENTENCE_WORDS:
        return None
    if asked is None or asked == said or _QUOTES_LATIN.search(_ends(prompt)):
        return None
    return reply.strip()[:_EXCERPT]


def names_language(text: str) -> bool:
    """Whether a text names a language, or asks for code or a formula."""
    return _NAMES_LANGUAGE.search(_ends(text)) is not None


def _ends(text: str) -> str:
    return text if len(text) <= 2 * _ENDS else f"{text[:_ENDS]}\n{text[-_ENDS:]}"


def _letters(text: str) -> str | None:
    """Chinese, Latin or another script, if nearly all of a text is in it; None for short and mixed texts."""
    text = _NO_WORDS.sub(" ", _ends(text))
    han, words, other = len(_HAN.findall(text)), len(_WORDS.findall(text)), len(_OTHER.findall(text))
    if other >= _FEWEST_OTHER and other * 3 > han + words:
        return "other"
    if han >= _FEWEST_HAN and han > 4 * words:
        return "Chinese"
    if words >= _FEWEST_WORDS and words > 4 * han:
        return "Latin"
    return None


def truncated(prompt: str, reply: str) -> str | None:
    """The end of a reply that was cut in a code block, in brackets or in the middle of a sentence; None in others."""
    del prompt
    text = reply.rstrip()
    if text.count("```") % 2 or (text.endswith(_CUT_MARKS) and not _is_verse(text.split("\n"))):
        return text[-_EXCERPT:]
    if _ends_before_item(text):
        return text[-_EXCERPT:]
    if text.endswith(_CLOSED) or text.endswith("```"):
        return None
    tail = text[-_TAIL:]
    if any(tail.rfind(opening) > tail.rfind(closing) for opening, closing in _PAIRS):
        return text[-_EXCERPT:]
    return text[-_EXCERPT:] if _breaks_off(text) else None


def _ends_before_item(text: str) -> bool:
    """Whether a text ends with the number of a list's next item, which has no content."""
    match = _EMPTY_ITEM.search(text[-_LINE:])
    if match is None:
        return False
    before = text[: text.rindex("\n")].rstrip()
    earlier = re.search(rf"^[ \t]*{int(match[1]) - 1}{re.escape(match[2])}", before, re.MULTILINE)
    return before.endswith(("：", ":")) if int(match[1]) == 1 else earlier is not None


def _breaks_off(text: str) -> bool:
    """Whether the last line has no stop at its end, although it has one inside, or all lines before it have one."""
    *before, line = text.split("\n")
    if len(line) < _LINE or _TITLE.match(line) or not _LETTER.match(line[-1]):
        return False
    if _SIGNED.search(line[-_TAIL:]) or _is_verse(before) or len(_INLINE_ITEM.findall(line)) > 2:
        return False
    body = _ITEM_MARK.sub("", line, count=1)
    if _STOPS.search(body):
        return True
    lines = [other for other in before[-20:] if len(other.strip()) >= _LINE]
    is_item = _ITEM_MARK.match(line) is not None
    alike = [other for other in lines if (_ITEM_MARK.match(other) is not None) == is_item]
    return len(alike) >= 2 and all(other.rstrip().endswith(_CLOSED[:6]) for other in alike)


def _is_verse(lines: list[str]) -> bool:
    """Whether most of the last lines are too short for prose. Verse ends as it likes."""
    lengths = [len(line.strip()) for line in lines[-_VERSE_LINES:] if line.strip()]
    return len(lengths) >= 3 and sorted(lengths)[len(lengths) // 2] < _VERSE


def echo(prompt: str, reply: str) -> str | None:
    """The question that a reply repeats at its beginning, or is nearly the same as; None for other replies."""
    asked = _NO_LETTERS.sub("", _ends(prompt)).casefold()
    if len(asked) < (_ECHO if _HAN.search(asked) else 3 * _ECHO):
        return None
    said = _NO_LETTERS.sub("", reply[: 2 * len(prompt) + _ENDS]).casefold()
    asked, said = _LABEL.sub("", asked), _LABEL.sub("", said)
    begins = said.startswith(asked) and _ASKS.search(_ends(prompt)) is not None
    if not (begins or (len(said) < 1.5 * len(asked) and _similarity(asked, said) >= _ALIKE)):
        return None
    return None if _EDITS.search(_ends(prompt)) else reply.strip()[:_EXCERPT]


def _similarity(one: str, other: str) -> float:
    """Jaccard similarity of the n-grams of two texts."""
    grams = [{text[i : i + _GRAM] for i in range(len(text) - _GRAM + 1)} for text in (one, other)]
    return len(grams[0] & grams[1]) / max(len(grams[0] | grams[1]), 1)
