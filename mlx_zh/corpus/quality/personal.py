"""Personal data in texts: where it stands, and the same texts with placeholders for it.

A placeholder has the shape of what it stands for, and no pattern here finds it: what is masked once stays as it is.
Within a row, one value always gets one placeholder, so "call 139… again" still means the number said before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

# A text without any of these has no personal data. The check costs less than the nine patterns.
_SUSPECT = re.compile(r"\d{4}|\d\D\d{3}|@|\d[号號栋幢]|[A-HJ-NP-Z][·• -]?[A-Z\d]{5}|\d\.\d{1,3}\.\d")
_DIGITS = re.compile(r"\d")
_SEPARATORS = re.compile(r"^(?:\+|00)?86(?=[- ]?1)|[\s()（）+.·•-]")  # two spellings of one number differ in these
_NOT_IN_SUM = r"(?<![\d.,+*/×÷=^%A-Za-z_-])"  # no part of a longer number, of a sum, or of a name
_SUM_ENDS = r"(?![\d*/×÷=^%A-Za-z_]|[.,+-]\d)"
_NAMED = "".join(f"(?<={name}[=_])|" for name in ("phone", "mobile", "tel", "PHONE", "wx", "vx", "id", "card"))
_NAMED += "(?<=[wv]x)|(?<=WX)|(?<=VX)"  # what a number may follow although it is a letter or a sign
_PHONE_BEFORE = r"(?<=1[3-9]\d{9}/)"  # "139…/138…"
_PHONE_BEGINS = f"(?:{_NOT_IN_SUM}|{_NAMED}|{_PHONE_BEFORE})"
_PHONE_ENDS = rf"(?:(?=/1[3-9]\d{{9}}(?!\d))|{_SUM_ENDS})"
# What is counted or computed is no telephone.
_NOT_COUNTED = (
    r"(?!\s?(?:[万亿]|美?元|人(?![民工力])|个(?!人)|[千毫厘]?米|公里|字节|[毫微]?秒|年|光年|次|条|吨|千?克"
    r"|除以|乘以|[加减乘]\s?\d|等于|是[不否]?是?[质素合奇偶]数|能否被|能被))"
)


@dataclass
class Masks:
    """The placeholders of a row. `kinds` names what was replaced, in order."""

    kinds: list[str] = field(default_factory=list)
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)  # (kind, value) -> number of its placeholder

    def mask(self, text: str) -> str:
        """The text with a placeholder for each piece of personal data. Time is linear in the text's length."""
        if _SUSPECT.search(text) is None:
            return text
        for kind in KINDS:
            text = self._replace(kind, text)
        return text

    def _replace(self, kind: Kind, text: str) -> str:
        pieces: list[str] = []
        end = 0
        for match in kind.pattern.finditer(text):
            start = kind.start(match, end)
            if start is None:
                continue
            if kind.name not in self.kinds:
                self.kinds.append(kind.name)
            value = text[start : match.end()]
            key = (kind.name, _SEPARATORS.sub("", value).casefold())
            number = self._numbers.setdefault(key, len(self._numbers) + 1)
            pieces += text[end:start], kind.placeholder(value, number)
            end = match.end()
        return "".join([*pieces, text[end:]]) if pieces else text


@dataclass(frozen=True)
class Kind:
    """One kind of personal data.

    `start(match, end)` is where the value begins, at `end` or after it, or None if the match is no such data.
    """

    name: str
    pattern: re.Pattern[str]
    placeholder: Callable[[str, int], str]  # of a value, with the placeholder's number in the row
    start: Callable[[re.Match[str], int], int | None] = lambda match, _: match.start()


def _if(valid: Callable[[str], bool]) -> Callable[[re.Match[str], int], int | None]:
    return lambda match, _: match.start() if valid(match.group()) else None


def has_id_checksum(number: str) -> bool:
    """Whether the last of 18 characters is the check character of a Chinese ID number (GB 11643-1999)."""
    weighted = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(number[:17]))
    return "10X98765432"[weighted % 11] == number[17].upper()


def has_luhn_checksum(number: str) -> bool:
    """Whether the digits of a card number pass Luhn's check (ISO/IEC 7812-1, annex B)."""
    doubled = [int(digit) * 2 for digit in number[-2::-2]]
    return (sum(map(int, number[-1::-2])) + sum(value // 10 + value % 10 for value in doubled)) % 10 == 0


def _numbered(value: str, number: int) -> str:
    """The value with zeros for its digits, and the number in the last of them: `0000 0000 0000 0001`."""
    count = len(_DIGITS.findall(value))
    digits = iter(str(number % 10**count).zfill(count))
    return _DIGITS.sub(lambda _: next(digits), value)


def _id(value: str, number: int) -> str:
    return f"{number:018d}"


def _mobile(value: str, number: int) -> str:
    """`100 0000 0001`: no mobile number begins with 10. A country code stays."""
    head = re.match(r"(?:\+|00)?(?:86(?=[- ]?1)|886|852)[- ]?", value) if len(_DIGITS.findall(value)) > 10 else None
    prefix = head.group() if head else ""
    return f"{prefix}1{_numbered(value[len(prefix) + 1 :], number)}"


def _passport(value: str, number: int) -> str:
    return f"{value.rstrip('0123456789')}{number:0{len(_DIGITS.findall(value))}d}"  # `E00000001`


def _email(value: str, number: int) -> str:
    return f"user{number}@example.com"  # RFC 2606: no one's


def _ip(value: str, number: int) -> str:
    return f"192.0.2.{number % 255}"  # RFC 5737: for documentation


def _plate(value: str, number: int) -> str:
    """`京A·00001`: the letters of the place stay."""
    head = re.match(r"..[·• -]?", value)
    assert head is not None
    count = len(value) - head.end()
    return f"{head.group()}{number % 10 ** (count - 3):0{count}d}"


def _address(value: str, number: int) -> str:
    return f"某市某区某路{number}号"


def _postcode(value: str, number: int) -> str:
    return _DIGITS.sub("0", value)


_BIRTHDAY = r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_LIKE_ID = re.compile(rf"[1-8]\d{{5}}{_BIRTHDAY}\d{{4}}")
_CARD = re.compile(r"62\d{14,17}|4\d{15}|5[1-5]\d{14}|3[47]\d{13}|35\d{14}")
_PUBLIC_MAIL = re.compile(
    r"@(?:[\w-]+\.)*(?:example|test|invalid|localhost|xxx+|email|domain)(?:\.|$)", re.IGNORECASE
)
_RESERVED_IP = re.compile(
    r"(?:0|10|127|169\.254|192\.168|172\.(?:1[6-9]|2\d|3[01])|192\.0\.[02]|198\.51\.100|203\.0\.113|22[4-9]|23\d|24\d|25\d"
    r"|8\.8\.[48]\.[48]|1\.[01]\.[01]\.1|114\.114\.114\.11[0-9]|223\.[56]\.[56]\.[56]|119\.29\.29\.29)(?:\.|$)"
)
_PROVINCE = re.compile(
    "北京|天津|上海|重庆|河北|山西|辽宁|吉林|黑龙江|江苏|浙江|安徽|福建|江西|山东|河南|湖北|湖南|广东|海南|四川|贵州|云南|"
    "陕西|甘肃|青海|台湾|内蒙古|广西|西藏|宁夏|新疆|香港|澳门"
)
_PLACES = re.compile(r"[省市区县镇乡州盟旗區縣鎮鄉]")
_STREETS = re.compile(r"路|街|大道|巷|弄|胡同|村|庄|小区|花园|家园|苑|公寓")
_BEFORE_PLACE = re.compile(r".*[在于住是址为到从自去往]", re.DOTALL)  # what ends before an address begins
_NO_ADDRESS = re.compile(r"[^\u4e00-\u9fffA-Za-z\d]")
_ADDRESS_REACH, _PLACE_NAME = 40, 3  # characters before the house number, and of a town's name without province


def _is_card(value: str) -> bool:
    digits = "".join(_DIGITS.findall(value))
    return bool(_CARD.fullmatch(digits)) and not _LIKE_ID.fullmatch(digits) and has_luhn_checksum(digits)


def _is_public_ip(value: str) -> bool:
    parts = value.split(".")
    long_parts = sum(int(part) > 31 for part in parts)  # few numbers of a version or a section are as large
    return all(int(part) < 256 for part in parts) and long_parts >= 2 and not _RESERVED_IP.match(value)


def _is_personal_mail(value: str) -> bool:
    return _PUBLIC_MAIL.search(value) is None and not value.startswith("git@")


def _is_plate(value: str) -> bool:
    return len(_DIGITS.findall(value[2:])) >= 3


def _address_start(match: re.Match[str], end: int) -> int | None:
    """Where the address begins whose house number is the match: at its province, else at its first town or district.

    None if no street comes after that, or if it is a placeholder's.
    """
    first = max(end, match.start() - _ADDRESS_REACH)
    before = match.string[first : match.start()]
    breaks = [gap.end() for gap in _NO_ADDRESS.finditer(before)]
    begin = breaks[-1] if breaks else 0
    place = _PLACES.search(before, begin)
    province = _PROVINCE.search(before, begin)
    if province is not None:
        begin, named = province.start(), province.end()
    elif place is not None:
        words = _BEFORE_PLACE.match(before, begin, place.start())
        begin, named = max(words.end() if words else begin, place.start() - _PLACE_NAME), place.end()
    else:
        return None
    return first + begin if _STREETS.search(before, named) and "某" not in before[begin:] else None


_AREA = "0(?:10|2\\d|[3-9]\\d\\d)"
_NO_HOUSE = "线|線|公路|国道|省道|高速|台风|文件|令|选手|航站|检票|[出入]口|机组|会议|开会|决定"
_HOUSE = (
    r"(?:院|楼|\d{1,4}(?:号楼|号院|号|单元|楼|层|室|栋|幢|座|房)"
    r"|[A-Z一二三四五六七八九十]{1,2}(?:单元|座|栋|楼|层))"
)
_PLATE_PLACES = "京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼"
KINDS = (
    Kind(
        "e-mail",
        re.compile(
            r"(?<![\w.+-])[A-Za-z\d][\w.+-]{0,63}@(?:[A-Za-z\d-]{1,63}\.){1,4}[A-Za-z]{2,12}(?![\w-])", re.ASCII
        ),
        _email,
        _if(_is_personal_mail),
    ),
    Kind(
        "ID number",
        re.compile(rf"(?:{_NOT_IN_SUM}|{_NAMED})[1-8]\d{{5}}([ -]?){_BIRTHDAY}\1\d{{3}}[\dXx](?![\dA-Za-z])"),
        _id,
        _if(lambda value: has_id_checksum(re.sub("[ -]", "", value))),
    ),
    Kind(  # what a text calls such a number, even if its check digit is wrong; 15 digits until 1999
        "ID number",
        re.compile(
            r"(?:身份证|身分證|身份證)(?:号码?|號碼?)?(?:是|为|為)?[:： ]{0,2}(?!0)"
            r"(\d{17}[\dXx]|\d{15})(?![\dA-Za-z])"
        ),
        _id,
        lambda match, _: match.start(1),
    ),
    Kind(
        "passport",
        re.compile(
            r"(?:护照|護照|通行证|通行證)(?:号码?|號碼?)?(?:是|为|為)?[:： ]{0,2}"
            r"([A-Z]{1,2}(?!000)\d{7,8})(?![\dA-Za-z])"
        ),
        _passport,
        lambda match, _: match.start(1),
    ),
    Kind(
        "bank card",
        re.compile(rf"{_NOT_IN_SUM}\d{{4}}(?:\d{{11,15}}|(?:[ -]\d{{4}}){{3}}(?:[ -]\d{{3}})?){_SUM_ENDS}"),
        _numbered,
        _if(_is_card),
    ),
    Kind(
        "mobile number",
        re.compile(
            rf"{_PHONE_BEGINS}(?:(?:\+|00)?86[- ]?)?1[3-9]\d(?:[-. ]?\d{{4}}){{2}}{_PHONE_ENDS}{_NOT_COUNTED}"
            rf"|{_NOT_IN_SUM}(?:(?:\+|00)?886[- ]?|0)9\d\d([- ]?)\d{{3}}\1\d{{3}}{_SUM_ENDS}{_NOT_COUNTED}"  # Taiwan
            rf"|{_NOT_IN_SUM}(?:\+|00)852[- ]?[4-9]\d{{3}}[- ]?\d{{4}}{_SUM_ENDS}"  # Hong Kong
        ),
        _mobile,
        _if(lambda value: not value.endswith("000000")),  # a round number
    ),
    Kind(
        "landline",
        re.compile(
            rf"(?<![\d.-])(?:{_AREA}[-－ ]|[(（]{_AREA}[)）] ?)[2-8]\d{{2,3}}[- ]?\d{{4}}(?:-\d{{1,5}})?(?!-?\d)"
        ),
        _numbered,
    ),
    Kind(
        "IP address",
        re.compile(r"(?<![\d.A-Za-z])(?:\d{1,3}\.){3}\d{1,3}(?!\.?[\dA-Za-z])"),
        _ip,
        _if(_is_public_ip),
    ),
    Kind(
        "number plate",
        re.compile(
            rf"[{_PLATE_PLACES}][A-HJ-NP-Z][·• -]?(?!000)[A-HJ-NP-Z\d]{{4,5}}[A-HJ-NP-Z\d学警港澳](?![A-Za-z\d])"
        ),
        _plate,
        _if(_is_plate),
    ),
    Kind(
        "address",
        re.compile(rf"(?<![\d月年于在第是])\d{{1,5}}(?:-\d{{1,4}})?(?:[号號](?!{_NO_HOUSE})|栋|幢){_HOUSE}{{0,6}}"),
        _address,
        _address_start,
    ),
    Kind("postcode", re.compile(r"邮(?:政)?编(?:码)?(?:是|为)?[:： ]{0,2}(?!000000)\d{6}(?!\d)"), _postcode),
)
