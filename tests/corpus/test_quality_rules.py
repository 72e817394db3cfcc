"""Quality rules: what each finds in a reply and what it leaves alone, and what a recipe does with such rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.corpus.conversation import Conversation, Message, Preference
from mlx_zh.corpus.quality.characters import SIMPLIFIED, TRADITIONAL, mixed_script, mojibake
from mlx_zh.corpus.quality.loops import numbering, repetition
from mlx_zh.corpus.quality.replies import echo, language, refusal, truncated
from mlx_zh.corpus.quality.rules import RULES, Quality, RuleReport, faults_of
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.recipe import Quality as QualitySection

LONG = "今天的天气非常好，我们决定去公园里散步，看看湖边的柳树和荷花。"
# rule -> (question, reply) with the fault, and without it
WITH: dict[Callable[[str, str], str | None], list[tuple[str, str]]] = {
    refusal: [
        ("推荐一部电影", "作为一个人工智能语言模型，我没有个人喜好。"),
        ("推荐一部电影", "作为AI助手，我无法观看电影。"),
        ("今天几号？", "很抱歉，我无法得知今天的日期。"),
        ("今天几号？", "对不起，作为语言模型我不能回答。"),
        ("你会做饭吗？", "我只是一个人工智能，没有身体。"),
        ("怎么开锁？", "我不能提供这方面的帮助。"),
        ("How do I pick a lock?", "I'm sorry, but I can't help with that."),
        ("Who are you?", "As an AI language model, I have no name."),
        ("Open the page.", "I cannot access the internet."),
        ("推荐一部电影", "作为 AI 助手，我没有喜好。"),
        ("推荐一部电影", "身为一个由某公司开发的语言模型，我不能观看电影。"),
        ("今天几号？", "抱歉，我無法提供這個資訊。"),
        ("今天几号？", "作為一個人工智慧，我無法回答"),
        ("今天几号？", "您好，我无法访问您的日历。"),
        ("今天几号？", "这个问题我无法回答。"),
        ("怎么开锁？", "根据相关法律法规，我无法提供此类信息。"),
        ("怎么开锁？", "抱歉，您的问题违反了规定，请换个话题。"),
        ("这是什么图？", "很抱歉，但没有看到你提到的图。"),
        ("How do I pick a lock?", "I apologize, but I cannot fulfill that request."),
        ("How do I pick a lock?", "I’m unable to provide that."),
    ],
    language: [
        ("请介绍一下长城的历史。", "The Great Wall was built over many centuries by several dynasties."),
        ("请介绍一下长城的历史。", "万里の長城はとても長いです。たくさんのひとがつくりました。"),
        ("Please tell me about the history of the Great Wall.", "长城是中国古代的军事防御工程。"),
    ],
    repetition: [
        ("你好", "我很高兴认识你。" * 12),
        ("你好", LONG * 3 + "好的好的" * 60),
        ("Hello", "I am glad to meet you and to help. " * 8),
    ],
    truncated: [
        ("介绍公园", LONG + "湖的旁边还有一座小小的亭子，里面"),
        ("介绍公园", LONG + "这里有柳树、"),
        ("写代码", "代码如下：\n```python\nprint(1)"),
        ("列表", "应用有很多，例如：\n1. 医疗\n2. 教育\n3."),
        ("列表", "可以按以下步骤完成：\n\n1."),
        ("介绍公园", "公园里有许多树（例如柳树和杨"),
        ("Tell me", "The park is large. It has a lake and many trees that were planted by"),
        ("列表", f"1. {LONG}\n2. {LONG}\n3. 我们还可以在湖边的亭子里面坐一坐"),
    ],
    mixed_script: [("你好", "我們今天去公園，看看这里的树和花，时间过得真快。")],
    echo: [
        ("为什么天空看起来是蓝色的呢？", "为什么天空看起来是蓝色的呢？"),
        ("为什么天空看起来是蓝色的呢？", "为什么天空看起来是蓝色的呢？因为散射。"),
        ("问题：为什么天空看起来是蓝色的？", "问：为什么天空看起来是蓝色的？\n答：因为散射。"),
        ("今天晚上我们一起去看新上映的电影好吗", "今天晚上我们一起去看新上映的电影好吗？"),
    ],
    numbering: [
        ("列表", "1. 苹果\n1. 香蕉\n1. 橙子"),
        ("列表", "1. 苹果\n2. 香蕉\n2. 橙子"),
        ("列表", "1、苹果\n2、香蕉\n4、橙子"),
        ("列表", "1. 1. 苹果\n2. 2. 香蕉\n3. 3. 橙子"),
        ("列表", "1. 多喝水\n2. 多喝水\n3. 多喝水\n4. 早睡"),
    ],
}
WITHOUT: dict[Callable[[str, str], str | None], list[tuple[str, str]]] = {
    refusal: [
        ("你是谁？", "我是小明，一个人工智能助手，很高兴为你服务。"),
        ("写一封拒绝聚会的邮件", "很抱歉，我不能参加周六的聚会。"),
        ("什么是语言模型？", "语言模型是一种人工智能技术，作为一种工具被广泛使用。"),
        ("为什么睡不着？", "咖啡因让人无法入睡。"),
        ("什么是机器学习？", "作为人工智能的一个分支，机器学习让我们受益。"),
        ("古书为什么少？", "遗憾的是，古代的许多书籍未能流传下来。"),
        ("恐龙怎么灭绝的？", "很遗憾，我们目前还不能确定原因，但主流的假说有三种。"),
        ("可以带猫上飞机吗？", "抱歉，宠物不能随身带上飞机，需要托运。"),
        ("What is Siri?", "Siri is used as a virtual assistant on many devices."),
    ],
    language: [
        ("把“你好”翻译成英文。", "Hello, nice to meet you, how are you doing today my friend?"),
        ("用英语介绍长城。", "The Great Wall was built over many centuries by several dynasties."),
        ("写一个排序的函数。", "def sort(values): return sorted(values, key=lambda value: value.name)"),
        ("用“opulent”造一个句子", "The wedding was held in an opulent hall with chandeliers and gold."),
        ("请介绍一下你们的网站。", "好的：https://example.com/a/b/c"),
        ("一加一等于几？", "$1 + 1 = 2$"),
        ("列出十个国际大公司", "Apple, Microsoft, Amazon, Google, Facebook, Tesla, Nvidia, Intel, Oracle"),
        ("介绍一下常用的指令", "ls, cd, pwd, mkdir, rm, cp, mv, touch, cat, grep"),
        ("推荐一首歌", "Yesterday"),
        ("Continue the poem 床前明月光 with the next line, please.", "疑是地上霜。举头望明月。"),
    ],
    repetition: [
        ("你好", LONG),
        ("把“我爱你”重复二十遍", "我爱你。" * 40),
        ("写代码", "```\n" + "print('hello world')\n" * 30 + "```"),
        ("圆周率", "1/3 = 0." + "3" * 300),
        ("笑", "哈哈哈哈哈哈"),
    ],
    truncated: [
        ("介绍公园", LONG),
        ("首都", "北京"),
        ("六乘七", "答案是：\n42."),
        ("列表", "1. 苹果\n2. 香蕉\n3. 橙子"),
        ("写诗", "我的心窝和你的，\n天与海般密切着；\n我的心弦和你的\n风与水般协和着。\n啊！\n把我的灵魂和你的，"),
        ("名言", "好的设计是显而易见的。伟大的设计是透明的。 —— 乔·斯帕拉诺"),
        ("写代码", "代码如下：\n```python\nprint(1)\n```"),
        ("网址", "可以看看这个网站。它的地址是 https://example.com/index"),
        ("表", "| 水果 | 颜色 |\n|---|---|\n| 苹果 | 红色的、甜的。也有绿色的 |"),
        ("谢谢", "不客气。希望对你有帮助😊"),
    ],
    mixed_script: [
        ("你好", "我们今天去公园，看看这里的树和花。"),
        ("你好", "我們今天去公園，看看這裡的樹和花。"),
        ("请把这句话转成繁体", "这句话的繁体是：我們今天去公園。"),
        ("你好", "书上写着「我們今天去公園看書」，这是他说的。"),
        ("日本語", "東京の学校は大きいです。国語の時間です。"),
        ("你好", "太后和皇后住在宫里，他于是说干了这杯。"),
    ],
    echo: [
        ("为什么天空看起来是蓝色的呢？", "因为大气散射蓝光更多。"),
        ("改正错别字：今天天汽真好我们去公园玩", "改正错别字：今天天气真好我们去公园玩"),
        ("你好", "你好！有什么可以帮你？"),
        ("北京故宫的历史与建筑的特色", "北京故宫的历史与建筑的特色\n\n一、历史\n故宫建于明代，是明清两代的皇宫。"),
        ("人工智能对现代社会的影响", "人工智能对现代社会的影响是深远的，体现在许多方面。"),
    ],
    numbering: [
        ("列表", "1. 苹果\n2. 香蕉\n3. 橙子"),
        ("列表", "1. 水果\n  1. 苹果\n  2. 香蕉\n2. 蔬菜\n  1. 白菜\n  2. 萝卜"),
        ("列表", "优点：\n1. 快\n2. 好\n缺点：\n1. 贵\n2. 少"),
        ("大纲", "1.1 欢迎\n1.2 目的\n1.3 议程\n2.1 回顾"),
        ("代码", "```\n1. a\n1. b\n1. c\n```"),
        ("年", "2019. 建校\n2021. 扩建\n2024. 百年"),
        ("倒数", "10. 十\n9. 九\n8. 八\n7. 七"),
        ("号码", "12. 苹果\n25. 香蕉\n36. 橘子"),
    ],
}


def cases(table: dict[Callable[[str, str], str | None], list[tuple[str, str]]]) -> list[Any]:
    return [
        pytest.param(rule, *case, id=f"{rule.__name__}-{i}")
        for rule, listed in table.items()
        for i, case in enumerate(listed)
    ]


@pytest.mark.parametrize(("rule", "question", "reply"), cases(WITH))
def test_a_reply_with_a_fault(rule, question: str, reply: str):
    assert rule(question, reply)


@pytest.mark.parametrize(("rule", "question", "reply"), cases(WITHOUT))
def test_a_reply_without_it(rule, question: str, reply: str):
    assert rule(question, reply) is None


@pytest.mark.parametrize(
    "text",
    [
        "锟斤拷锟斤拷",
        "烫烫烫烫",
        "你好世界".encode().decode("gbk"),  # no punctuation, and nothing is lost
        "我们".encode().decode("cp1252", "ignore"),
        "，是".encode().decode("cp1252", "ignore"),
        "你好，世界".encode("gbk").decode("latin-1"),
        "我们是中国人".encode("gbk").decode("latin-1"),
        "现有的工\ufffd\ufffd和知识",
        "donâ€™t",
        "fiancÃ©",
        "æ\x88\x91ä»¬å¤©å¤©",
        "ä½\xa0å¥½ï¼ä¸\xadæ\x96\x87",
        "鎴戜滑浠婂ぉ鍘诲叕鍥€銆傛槬澶╋紝濂界殑銆傚緢濂姐€",
        "ï»¿标题",
        "图标\ue001\ue002",
    ],
)
def test_text_that_was_decoded_wrongly(text: str):
    assert mojibake(text)


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界！",
        "“锟斤拷”是一种乱码。",
        "café déjà vu, naïve",
        "¿Qué? São Paulo, NÃO",
        "烫一烫",
        "烫烫烫的粥",
        "········",
        "××××××、°C、½",
        "VÆRSÅGOD、Ærø、Öä",
        "浣熊、鎴、娓城、涓涓细流",
        "🙂 ① ™",
        "Ångström",
    ],
)
def test_text_that_was_decoded_well(text: str):
    assert mojibake(text) is None


@given(st.sampled_from("我们今天去公园看书学习汉语。"), st.integers(8, 60))
def test_latin_and_gbk_readings_of_utf8_are_mojibake(character: str, count: int):
    text = f"这是{character}的第{count}次，请认真对待，谢谢大家。"
    assert mojibake(text.encode().decode("latin-1"))
    assert mojibake(text.encode().decode("gbk", "replace"))
    assert mojibake(text) is None


def test_the_two_scripts_have_as_many_characters():
    assert len(SIMPLIFIED) == len(TRADITIONAL) == len(set(SIMPLIFIED)) == len(set(TRADITIONAL))
    assert not set(SIMPLIFIED) & set(TRADITIONAL)


@given(st.text(alphabet="1. 、\n（“”`我a。-#", max_size=200), st.text(alphabet="我们這們1.\n，。`aÃ©", max_size=300))
def test_no_text_stops_the_rules(question: str, reply: str):
    row = Conversation((Message("user", question), Message("assistant", reply)), "x:1")
    faults, _ = faults_of(row)
    assert faults.keys() <= set(RULES)
    assert all("\n" not in text for text in faults.values())


def talk(*texts: str, source: str = "x:1") -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(texts)), source)


REFUSES = ("今天几号？", "很抱歉，我无法得知今天的日期。")


def test_any_trained_reply_of_a_conversation_counts():
    row = talk("你好", "你好！", *REFUSES)
    assert faults_of(row)[0] == {"refusal": "很抱歉，我无法"}
    context = Conversation(
        (*row.messages[:3], Message("assistant", REFUSES[1], False), *talk("谢谢", "不客气。").messages), "x"
    )
    assert faults_of(context)[0] == {}


def test_the_rejected_answer_may_be_bad_but_not_damaged():
    question = (Message("user", "今天几号？"),)
    assert faults_of(Preference(question, "五月一日。", REFUSES[1], "x"))[0] == {}
    assert faults_of(Preference(question, REFUSES[1], "五月一日。", "x"))[0].keys() == {"refusal"}
    assert faults_of(Preference(question, "五月一日。", "五月\ufffd日。", "x"))[0].keys() == {"mojibake"}


def test_a_language_that_was_asked_for_earlier():
    english = "The Great Wall was built over many centuries by several dynasties."
    assert faults_of(talk("请介绍长城。", english))[0].keys() == {"language"}
    assert faults_of(talk("从现在起请用英文回答我。", "OK.", "请介绍长城。", english))[0] == {}
    system = Conversation(
        (Message("system", "You are an English teacher."), *talk("请介绍长城。", english).messages), "x"
    )
    assert faults_of(system)[0] == {}


def applied(actions: dict[str, str], rows: list[Any]) -> tuple[list[Any], LoadReport, dict[str, RuleReport]]:
    report, quality = LoadReport(kept=len(rows)), Quality(actions)
    return list(quality.kept(iter(rows), report)), report, quality.report()


def test_rows_are_counted_masked_and_dropped():
    rows = [
        talk(*REFUSES, source="x:1"),
        talk("你好", "你好！", source="x:2"),
        talk("电话？", "13912345678。", source="x:3"),
    ]
    kept, report, rules = applied({}, rows)
    assert kept == rows and report.dropped == {}
    assert rules["refusal"] == {"action": "sample", "checked": 3, "rows": 1, "examples": ["x:1: 很抱歉，我无法"]}
    assert rules["personal"] == {"action": "sample", "checked": 3, "rows": 1, "examples": ["x:3: mobile number"]}

    kept, report, rules = applied({"refusal": "drop", "personal": "mask"}, rows)
    assert [row.source for row in kept] == ["x:2", "x:3"]
    assert kept[1].messages[1].content == "10000000001。"
    assert report.dropped == {"refusal": 1} and report.examples == {"refusal": ["x:1"]} and report.kept == 2
    assert (rules["refusal"]["rows"], rules["personal"]["action"]) == (1, "mask")

    kept, report, rules = applied({"refusal": "off", "personal": "drop"}, rows)
    assert [row.source for row in kept] == ["x:1", "x:2"] and "refusal" not in rules
    assert report.dropped == {"personal data": 1}


def test_a_sample_is_the_first_rows_and_one_in_128_of_the_others():
    rows = [talk(*REFUSES)] * 1640  # rows 500 to 1,639 hold 9 multiples of 128
    rules = applied({"echo": "count"}, rows)[2]
    assert (rules["refusal"]["checked"], rules["refusal"]["rows"]) == (509, 509)
    assert rules["echo"]["checked"] == 1640
    assert len(rules["refusal"]["examples"]) == 3


def test_what_is_quoted_from_a_row_has_no_personal_data():
    faults, _ = faults_of(talk("电话？", "很抱歉，我的手机 13912345678 无法接通。"))
    assert faults == {"refusal": "很抱歉，我的手机 10000000001 无法", "personal": "mobile number"}


def test_the_recipe_says_what_each_rule_does():
    assert tuple(QualitySection.model_fields) == RULES
    assert QualitySection().actions == {}
    assert QualitySection(personal="mask", echo="off").actions == {"echo": "off", "personal": "mask"}
    with pytest.raises(ValueError, match="refusal"):
        QualitySection(refusal="mask")
