"""The encoding of a text, told from its bytes: UTF-8, UTF-16 with a mark, or the Chinese GB18030 (GBK)."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from mlx_zh.corpus.text_files import (
    MARK_BYTES,
    MARKED,
    WrongEncoding,
    check_file,
    convert,
    encoding_of,
    open_bytes,
    open_text,
    wrong_encoding,
)
from mlx_zh.errors import DataError

_CHUNK = 1 << 20  # bytes decoded at once
_COMMON = 0.75  # in Chinese text, at least this share of the characters beyond ASCII is in GB2312
_FEW_MARKS = 0.1  # bytes that are no text, for each character
# Korean and Japanese in their old encodings decode as GB18030, to other Chinese characters than Chinese texts have:
# of those, these hundred are more than a third.
_FREQUENT = re.compile(
    "[的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学"
    "么之都好看起发当没成只如事把还用第样道想作种开美总从无情己面最女但现前些所同日手又行意动方期它头经长儿回位分爱老因很给名法间斯知世什两次使身者被高已亲其进此话常与活正感]"
)
_HANZI = re.compile("[\u4e00-\u9fff]")
_KANA = re.compile("[\u3041-\u30fe]")
_FEW_LETTERS = 8  # Chinese characters that hardly come by chance
_JUDGED, _FREQUENT_SHARE, _KANA_SHARE = 200, 0.06, 0.2  # Chinese characters that tell enough; shares of them


def file_encoding(path: Path) -> tuple[str, bool]:
    """The file's encoding, and whether some bytes are no text in it: UTF-8, UTF-16 with a mark, or Chinese GB18030.

    Raises DataError if it is none of these. A few wrong bytes do not count.
    """
    if encoding_of(check_file(path)) == "utf-16":
        return "utf-16", False
    marked, right, _ = _census(path, "utf-8")
    if marked <= right:
        return "utf-8-sig", marked > 0
    # Nearly any bytes can be decoded as GB18030, so there most characters must also be common ones.
    marked, right, common = _census(path, "gb18030")
    if marked <= _FEW_MARKS * right and common >= _COMMON * right:
        _check_chinese(path)
        return "gb18030", marked > 0
    if _is_big5(path):
        raise WrongEncoding(
            f"{path}: the text is not UTF-8, it looks like Big5; convert it: {convert(path, 'BIG5-HKSCS')}"
        )
    raise wrong_encoding(path)


def _census(path: Path, encoding: str) -> tuple[int, int, int]:
    """The bytes that are no text in this encoding, the characters beyond ASCII, and those of them in GB2312."""
    decoder = codecs.getincrementaldecoder(encoding)(MARK_BYTES)
    marked = right = common = 0
    with open_bytes(path) as file:
        chunk = b"-"
        while chunk:
            chunk = file.read(_CHUNK)
            text = decoder.decode(chunk, final=not chunk)
            if text.isascii():
                continue
            beyond = len(text) - len(text.encode("ascii", "ignore"))
            marks = 0 if _is_right(text) else len(MARKED.findall(text))
            marked += marks
            right += beyond - marks
            if encoding == "gb18030":
                common += (len(text.encode("gb2312", "ignore")) - (len(text) - beyond)) // 2
    return marked, right, common


def _is_right(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_big5(path: Path) -> bool:
    """Whether the start of a text is traditional Chinese in its old encoding: some letters, and usual ones."""
    with open_bytes(path) as file:
        head = file.read(_CHUNK)
    try:
        text = codecs.getincrementaldecoder("big5hkscs")().decode(head)
    except UnicodeDecodeError:
        return False
    letters = len(_HANZI.findall(text))
    return letters >= _FEW_LETTERS and len(_FREQUENT.findall(text)) >= _FREQUENT_SHARE * letters


def _check_chinese(path: Path) -> None:
    """Raise DataError if the start of a text that GB18030 decodes is hardly Chinese, but Korean or Japanese."""
    with open_text(path, "gb18030", errors=MARK_BYTES) as file:
        text = file.read(_CHUNK)
    letters, kana = len(_HANZI.findall(text)), len(_KANA.findall(text))
    if letters + kana < _JUDGED:
        return
    if kana > _KANA_SHARE * letters or len(_FREQUENT.findall(text)) < _FREQUENT_SHARE * letters:
        raise DataError(
            f"{path}: the text is not UTF-8, and as GB18030 it is hardly Chinese. Convert it from its own encoding, "
            f"which may be EUC-KR (Korean) or EUC-JP (Japanese), to UTF-8: {convert(path, 'EUC-KR')}"
        )
