"""Text normalization: no invisible control characters, and one code point for each character."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable

from mlx_zh.errors import DataError
from mlx_zh.system.environment import pip_install

# NFKC is applied to these characters only. Others would change their meaning or Chinese typography: NFKC turns the
# full-width comma into an ASCII one, m² into m2, ½ into 1⁄2, ① into 1, … into three dots.
_COMPATIBLE = [
    *range(0xFF10, 0xFF1A),  # full-width digits
    *range(0xFF21, 0xFF3B),  # full-width capital letters
    *range(0xFF41, 0xFF5B),  # full-width small letters
    *range(0x2E80, 0x2FD6),  # radicals that look like ordinary characters
    *range(0xFB00, 0xFB07),  # Latin ligatures
]
_REMOVED = [
    *(code for code in range(0x20) if code not in (0x09, 0x0A, 0x0D)),  # C0 controls except tab and line ends
    *range(0x7F, 0xA0),  # C1 controls
    0x00AD,  # soft hyphen
    0x200B,  # zero-width space
    0x200E,  # left-to-right mark
    0x200F,  # right-to-left mark
    *range(0x202A, 0x202F),  # directional embeddings and overrides
    *range(0x2060, 0x2065),  # word joiner and invisible operators
    *range(0x2066, 0x206A),  # directional isolates
    0xFEFF,  # byte-order mark
]
_TABLE: dict[int, str | None] = {
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in _COMPATIBLE},
    **dict.fromkeys(_REMOVED),
    0x0085: "\n",  # next line
    0x00A0: " ",  # no-break space
    0x2028: "\n",  # line separator
    0x2029: "\n",  # paragraph separator
}
# Sorting a long run of combining marks takes time that grows with its square, and in C, where Ctrl-C does not end it.
# So runs are cut as Unicode's stream-safe text format says (UAX #15, section 13): after 30 marks stands U+034F. No
# text of any language has so many.
_JOINER, _LONGEST_RUN = "\u034f", 30
_MARK_CLASS = "".join(re.escape(chr(code)) for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code)))
_RUN = re.compile(f".?[{_MARK_CLASS}]{{{_LONGEST_RUN // 4},}}", re.DOTALL)  # one mark can stand for several
_SUSPECT = re.compile("[\r" + "".join(map(re.escape, map(chr, sorted(_TABLE)))) + "]")


def normalize(text: str) -> str:
    """The text in NFC, with ASCII letters and digits for full-width ones, no invisible characters, and \\n line ends.

    Punctuation, superscripts and everything else that NFKC would change stay as they are. In a text that is not in
    NFC, a run of more than 30 combining marks gets a U+034F after every 30.
    """
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", _RUN.sub(_shorter_runs, text))
    if _SUSPECT.search(text) is None:
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_TABLE)


def _shorter_runs(match: re.Match[str]) -> str:
    """A run of combining marks, with a joiner after every 30; a shorter one stays as it is."""
    decomposed = "".join(unicodedata.normalize("NFD", character) for character in match.group())
    pieces: list[str] = []
    length = 0
    for character in decomposed:
        length = length + 1 if unicodedata.combining(character) else 0
        if length > _LONGEST_RUN:
            pieces.append(_JOINER)
            length = 1
        pieces.append(character)
    return "".join(pieces) if len(pieces) > len(decomposed) else match.group()


def simplifier() -> Callable[[str], str]:
    """A function from traditional to simplified characters, by OpenCC's phrase tables.

    Raises DataError if OpenCC is not installed.
    """
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise DataError(
            f"data.simplify needs OpenCC, which is not installed: run `{pip_install('mlx-zh[opencc]')}`, or leave "
            "data.simplify out."
        ) from error
    convert: Callable[[str], str] = OpenCC("t2s").convert
    return convert
