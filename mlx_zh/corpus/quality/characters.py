"""Damaged and mixed characters: texts that were decoded wrongly, and replies half traditional and half simplified."""

from __future__ import annotations

import re

_EXCERPT = 20  # characters around what was found
_ABOUT_ENCODINGS = re.compile(r"乱码|亂碼|编码|編碼|mojibake|encoding|unicode|utf-?8", re.IGNORECASE)
# UTF-8 read as Latin-1 or Windows-1252, with or without the control characters that normalisation removes.
_LATIN = r"Ã[¡-¿\x80-\x9f€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|Â[£©®°·»«±¡¿]|â€[\x80-\x9f™œ˜“”¦¢žš]|ï¿½|ï»¿"
_HIGH = "\x80-¿€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_LATIN_CHINESE = rf"(?:[ãä-éï][{_HIGH} ]{{1,2}}){{3}}|(?:[ãäåæçèï][{_HIGH}]{{2}}){{2}}|ã€[‚\x81]|ï¼Œ"
_GBK_BYTES = r"锟斤|烫{4}|屯{4}|(?:[銆锛鈥][\u3400-\u9fff€].{0,200}?){2}"  # UTF-8 read as GBK, or the reverse
# GBK read as Latin-1: three pairs of bytes in a row, four of the six letters with accents.
_GBK_AS_LATIN = r"(?=[À-ÖØ-öø-þ¡-¿]{6})(?=(?:[¡-¿]{0,2}[À-ÖØ-öø-þ]){4})(?:[°-÷][¡-þ]){3}"
_PRIVATE = r"[\ue000-\uf8ff\U000f0000-\U0010fffd]{2}"
_MOJIBAKE = re.compile(f"\ufffd|{_LATIN}|{_LATIN_CHINESE}|{_GBK_BYTES}|{_GBK_AS_LATIN}|{_PRIVATE}")
_SUSPECT = re.compile("[\ufffd°-÷锟烫屯銆锛鈥\ue000-\uf8ff\U000f0000-\U0010fffd]")  # what all of these begin with


def _gbk_letters(first: range) -> str:
    """The characters of GBK whose first byte is in `first`, and whose second byte can continue UTF-8."""
    pairs = (bytes([lead, second]) for lead in first for second in range(0x80, 0xC0))
    return "".join(pair.decode("gbk", "ignore") for pair in pairs)


# UTF-8 read as GBK: the first two bytes of a Chinese character become one of these, and every third letter is such.
_UTF8_HEADS = re.compile(f"[{_gbk_letters(range(0xE4, 0xEA))}]..[{_gbk_letters(range(0xE4, 0xEA))}].?.?")

# Common characters that only one of the two scripts has, in the same order. Those of both (后, 里, 干) are left
# out.
SIMPLIFIED = (
    "这个们来时说为对会过还没样点问题开关长两现实见经应进动种头学国东车马鱼鸟龙门间闻听读写书话语请谢"
    "识认让议论设计记讲许访证评词译试诗该详调课谁谈谓买卖贵费资质赛财责败货贸钱铁银错锁镇镜纸级线组细"
    "终结给络统继续维综绿红约纪纯纳热爱亲观规视觉览飞风饭饮馆难离欢农边达运远连迟适选递乡医严丽举义乐"
    "习亚产亿仅从仓仪价众优传伤伟体倾债偿儿兰兴养军决况减击创删别刘刚剧劝办务励劳势区单卢卫厂厅历压厌"
    "县参双变号叶员响哑团园围图圆场块坏坚坛垒声处备复夺奖妇妈娱婴孙宁宝审宪宽宾导寻尔尘尝层属岁岛岗币"
    "师帐帮带庆库庙广张弹归当录忆态怀怜总恋恶恼悬惊惧惯戏战户扑执扩扫扬抚抢护报担拟拥择挡挥损换摆敌数"
    "断无旧显晓暂术机杀杂权条构枪柜标树桥检楼欧毕汇汉汤沟泽洁济浅测湾湿满灭灯灵炉烦烧爷状犹独狮猫献环"
    "电画疗监盘盖础确积称稳穷笔签简类粮紧网罗罚职联聪肤胜脏脑脸节苏药营虑虽装补袭输辆转轮软轻载较辩辞"
    "邓郑阳阴阵阶际陆陈险随隐雾静韩页顶项顺须顾顿预领频颗颜额驱验骑骗鸡麦黄齐齿"
)
TRADITIONAL = (
    "這個們來時說為對會過還沒樣點問題開關長兩現實見經應進動種頭學國東車馬魚鳥龍門間聞聽讀寫書話語請謝"
    "識認讓議論設計記講許訪證評詞譯試詩該詳調課誰談謂買賣貴費資質賽財責敗貨貿錢鐵銀錯鎖鎮鏡紙級線組細"
    "終結給絡統繼續維綜綠紅約紀純納熱愛親觀規視覺覽飛風飯飲館難離歡農邊達運遠連遲適選遞鄉醫嚴麗舉義樂"
    "習亞產億僅從倉儀價眾優傳傷偉體傾債償兒蘭興養軍決況減擊創刪別劉剛劇勸辦務勵勞勢區單盧衛廠廳歷壓厭"
    "縣參雙變號葉員響啞團園圍圖圓場塊壞堅壇壘聲處備復奪獎婦媽娛嬰孫寧寶審憲寬賓導尋爾塵嘗層屬歲島崗幣"
    "師帳幫帶慶庫廟廣張彈歸當錄憶態懷憐總戀惡惱懸驚懼慣戲戰戶撲執擴掃揚撫搶護報擔擬擁擇擋揮損換擺敵數"
    "斷無舊顯曉暫術機殺雜權條構槍櫃標樹橋檢樓歐畢匯漢湯溝澤潔濟淺測灣濕滿滅燈靈爐煩燒爺狀猶獨獅貓獻環"
    "電畫療監盤蓋礎確積稱穩窮筆簽簡類糧緊網羅罰職聯聰膚勝髒腦臉節蘇藥營慮雖裝補襲輸輛轉輪軟輕載較辯辭"
    "鄧鄭陽陰陣階際陸陳險隨隱霧靜韓頁頂項順須顧頓預領頻顆顏額驅驗騎騙雞麥黃齊齒"
)
_TO_SIMPLIFIED = str.maketrans(TRADITIONAL, SIMPLIFIED)
_SIMPLIFIED, _TRADITIONAL = re.compile(f"[{SIMPLIFIED}]"), re.compile(f"[{TRADITIONAL}]")
_ABOUT_SCRIPTS = re.compile(
    r"[简繁簡]体|[简繁簡]體|繁简|简繁|异体字|異體字|书法|書法|台湾|台灣|香港|粤语|粵語|甲骨|traditional|simplified"
)
_QUOTED = re.compile(r"[「『《〈“‘][^」』》〉”’]{0,200}[」』》〉”’]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_MIXED, _MIXED_SHARE = 2, 0.02  # different characters of the rarer script, and their share of both


def mojibake(text: str) -> str | None:
    """The text around the first character that was decoded wrongly; None without any, or if they are the topic."""
    match = _MOJIBAKE.search(text) if _SUSPECT.search(text) else None
    match = match or next(filter(_is_utf8_as_gbk, _UTF8_HEADS.finditer(text)), None)
    if match is None or _ABOUT_ENCODINGS.search(text):
        return None
    return text[max(match.start() - _EXCERPT, 0) : match.end() + _EXCERPT]


def _is_utf8_as_gbk(match: re.Match[str]) -> bool:
    """Whether the bytes of six letters in GBK are four Chinese characters in UTF-8, or three at the end of a text."""
    try:
        read = match.group().encode("gbk").decode("utf-8")
    except UnicodeError:
        return False
    return len(read) >= 3 and all("\u3000" <= letter <= "\uffef" for letter in read)


def simplified(text: str) -> str:
    """The text with its commonest traditional characters as simplified ones, at the same places."""
    return text if _TRADITIONAL.search(text) is None else text.translate(_TO_SIMPLIFIED)


def is_about_scripts(text: str) -> bool:
    """Whether a text speaks of traditional and simplified characters, or of where the former are written."""
    return _ABOUT_SCRIPTS.search(text) is not None


def mixed_script(prompt: str, reply: str) -> str | None:
    """The characters of the rarer script in a reply that mixes simplified and traditional ones; None in others.

    Quotations and titles do not count, nor replies with Japanese kana, nor questions about the scripts themselves.
    """
    if _TRADITIONAL.search(reply) is None or _SIMPLIFIED.search(reply) is None:
        return None
    if _KANA.search(reply) or is_about_scripts(prompt):
        return None
    reply = _QUOTED.sub("", reply)
    simplified, traditional = _SIMPLIFIED.findall(reply), _TRADITIONAL.findall(reply)
    rarer = min(simplified, traditional, key=len)
    different = dict.fromkeys(rarer)
    if len(different) < _MIXED or len(rarer) < _MIXED_SHARE * (len(simplified) + len(traditional)):
        return None
    return "".join(different)[:_EXCERPT]
