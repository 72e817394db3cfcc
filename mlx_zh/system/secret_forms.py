"""The forms of secrets in a text, as patterns with what replaces them.

Every pattern takes time in proportion to the text: it begins at a fixed word, and what may follow is bounded or
cannot contain that word.
"""

from __future__ import annotations

import re
from collections.abc import Callable

HIDDEN = "•••"
Replacement = str | Callable[[re.Match[str]], str]

_A = re.ASCII | re.IGNORECASE  # a Chinese character before or after a token is no part of it
_START = r"(?<![A-Za-z0-9])"
_NAME_START = r"(?:(?<![A-Za-z0-9])|(?-i:(?<=[a-z0-9])(?=[A-Z])))"  # of a word, also in `myPassword`
_WIDE_MARKS = r"\u2010-\u206f\u3000-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uffef"
_VALUE = rf"[^\s&'\",;<>{_WIDE_MARKS}]"  # a character of a value

# What may stand after a name such as `password` and is no secret.
# Program code that gets a secret from elsewhere: a call, an index, a type, a variable of a shell.
_CODE = (
    r"(?!(?:[A-Za-z_]{1,60}\.){0,4}[A-Za-z_]{1,60}[(\[]|\$\{|\$[A-Z_]"
    r"|(?:str|bytes|bool|int|None|string|Optional)(?![A-Za-z0-9_]))"
)
_PROSE = r"(?![\s<{\[•\u2010-\u206f\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef])"
_ENDS = r"(?![A-Za-z0-9_+/=~@#$%^*-]|[.:!?][A-Za-z0-9])"
_PLACEHOLDER = (
    r"(?!(?:required|optional|none|null|true|false|text|passw(?:or)?d|passphrase|secret|token|invalid|incorrect|wrong"
    rf"|missing|expired|empty|hidden|your[_-][a-z_-]{{1,40}}|(?:[a-z]{{2,4}}[_-])?[x*.]{{3,60}}){_ENDS})"
)
_WORD = rf"(?!(?-i:[A-Za-z][a-z]{{0,11}}(?:[_-][a-z]{{1,12}}){{0,3}}){_ENDS})"  # a short word without digits
_NOT_TEXT = _PROSE + _CODE + _PLACEHOLDER


def _after(name: str, value: str = rf"{_VALUE}+", flags: int = _A) -> tuple[re.Pattern[str], str]:
    """Hide a value, and keep the name before it."""
    return re.compile(f"({name}){value}", flags), rf"\g<1>{HIDDEN}"


_IS = r"['\"]?\s{0,9}[=:：]\s{0,9}['\"]?"  # between a name and its value: in a recipe, JSON, a header or a sentence
_NAMED = (
    _after(
        _NAME_START
        + r"(?:password|passwd|passphrase|(?:api|access|secret|private|account|sharedaccess|shared-access)"
        rf"[_-]?key(?:[_-]?secret)?|(?:client|app)[_-]?secret){_IS}{_NOT_TEXT}"
    ),
    _after(_NAME_START + rf"secret{_IS}{_NOT_TEXT}{_WORD}"),  # also a word of prose, as `token` is
    # After `token` and a space, only a value that holds a digit, or a long one, is a secret.
    _after(
        _NAME_START + r"(?:(?:hf|auth|access|refresh|bearer|api)[_-]?)?(?:token|signature)['\"]?"
        r"(?:[=：]|\s{0,9}[=:：]['\"]|\s{0,9}[=:：]\s{0,9}['\"]?"
        r"(?=[^\s&'\",;<>]{12}|[^\s&'\",;<>0-9]{0,16}[0-9][^\s&'\",;<>]{5}))"
        r"(?![0-9.]{1,7}(?![0-9A-Za-z]))" + _NOT_TEXT + _WORD,
        rf"{_VALUE}{{3,}}",
    ),
    _after(rf"(?:密码|密钥)\s{{0,9}}(?:[=:：]|是|为)\s{{0,9}}['\"“「]?{_NOT_TEXT}", "[!-~]{6,}"),
    _after(rf"(?:口令|令牌)\s{{0,9}}(?:[=:：]|是|为)\s{{0,9}}['\"“「]?{_NOT_TEXT}{_WORD}", "[!-~]{6,}"),
    _after(
        r"(?<![A-Za-z0-9_])(?:[A-Z][A-Z0-9_]{0,60}(?:_KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|PWD|_PAT|_PASS)|SSHPASS)="
        r"['\"]?(?-i:" + _PROSE + _CODE + rf")(?i:{_PLACEHOLDER})",
        rf"{_VALUE}{{6,}}",
        re.ASCII,
    ),
    _after(rf"--?(?:hf-)?(?:token|secret)\s{{1,9}}{_NOT_TEXT}{_WORD}", r"\S+"),
    _after(rf"--?(?:password|passwd|api-key|oauth2-bearer|pass|proxy-pass)\s{{1,9}}{_NOT_TEXT}", r"\S+"),
    _after(r";\s{0,3}pwd\s{0,3}=\s{0,3}(?!•)", r"[^\s;'\"]+"),  # of a connection to a database
    _after(r"(?<![A-Za-z0-9])machine\s\S{1,200}\slogin\s\S{1,200}\spassword\s(?!•)", r"\S+"),  # .netrc
)

_HEADERS = (
    _after(rf"authorization{_IS}(?:bearer|basic|token)\s{{1,9}}{_NOT_TEXT}", r"[^\s'\",<>]+"),
    _after(
        rf"authorization{_IS}(?:digest|negotiate|ntlm|hawk|[a-z0-9-]{{3,30}}-sha256)\s{{1,9}}(?![\s•])", r"[^\n]+"
    ),
    _after(rf"authorization{_IS}{_NOT_TEXT}(?=[A-Za-z_.-]{{0,60}}[0-9])", r"[^\s'\",<>]{8,}"),
    _after(
        _START + r"(?:bearer|basic)\s{1,9}(?=[A-Za-z._~/-]{0,60}[0-9+=]|[A-Za-z._~/-]{20})",
        r"[A-Za-z0-9._~+/=-]{8,}",
    ),
    _after(r"cookie['\"]?\s{0,9}:\s{0,9}['\"]?(?=[A-Za-z0-9_.-]{1,64}=)", r"[^\n'\"]+"),
)

# Addresses: signed ones, and webhooks, which whoever knows the address may write to.
_REST = r"[^\s\"'<>)\]]+"  # of an address
_ADDRESSES = (
    _after(
        r"(?:[?&]|&amp;|sharedaccesssignature[= ]|(?<=[a-z])[?&])(?:sig|signature|access_token|(?:oss)?accesskeyid"
        r"|googleaccessid|q-ak|q-signature|x-[a-z]{2,6}-(?:credential|signature|security-token))=(?!•)",
        r"[^\s&'\"<>]{6,}",
    ),
    _after(r"(?:[?&]|&amp;)key=(?=[A-Za-z_-]{0,60}[0-9])", r"[A-Za-z0-9_-]{16,}"),
    _after(
        r"(?:hooks\.slack\.com/(?:services|workflows|triggers)|hooks\.zapier\.com/hooks|maker\.ifttt\.com/trigger"
        r"|/open-apis/bot/(?:v\d/)?hook|discord(?:app)?\.com/api/(?:v\d{1,2}/)?webhooks"
        r"|office\.com/webhookb?2?|(?:sctapi|sc)\.ftqq\.com|api\.day\.app)/(?!•)",
        _REST,
    ),
    _after(r"/(?:web)?hooks?/(?=[A-Za-z_-]{0,60}[0-9])", r"[A-Za-z0-9_-]{20,}[^\s\"'<>)\]]*"),
    # Credentials in a URL. A password may hold a slash or an @ that should have been percent-encoded.
    (
        re.compile(
            r"(://)[^\s/\"<>@:]{0,256}:(?![0-9]{1,5}/)[^\s\"<>]{1,256}@(?=[^\s/@]{1,256}(?:[/\s\"'<>?#,;)]|$))", _A
        ),
        rf"\g<1>{HIDDEN}@",
    ),
    (re.compile(r"(://)[^\s/\"<>]*@", _A), rf"\g<1>{HIDDEN}@"),
)

# Tokens with a known beginning: of Hugging Face, GitHub, GitLab, OpenAI and similar services, Slack, Google,
# ModelScope, AWS, Alibaba Cloud, Tencent Cloud, Baidu, Zhipu, package registries, and JSON web tokens.
_MIXED = r"(?=[a-z_-]{0,60}[A-Z0-9])"  # names of settings and programs, such as npm_config_cache, have only letters
_TOKENS = tuple(
    (re.compile(_START + form, re.ASCII), HIDDEN)
    for form in (
        r"(?:hf_|api_org_)[A-Za-z0-9]{16,}",
        rf"(?:gh[opsur]|github_pat|gl[a-z]{{2,6}}|npm|gsk|nvapi|dop_v1|r8|pypi)[_-]{_MIXED}[A-Za-z0-9_-]{{20,}}",
        rf"(?:tvly|xai|pplx|fc|dckr_(?:pat|oat)|lsv2_[ps][tk]|jina|whsec|ntn|tgp_v1|fw|e2b|sntry[su])[_-]{_MIXED}"
        r"[A-Za-z0-9_-]{16,}",
        r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
        r"(?:pat|secret)_[A-Za-z0-9]{40,}",
        r"app-(?=[a-z]{0,30}[A-Z0-9])[A-Za-z0-9]{24}(?![A-Za-z0-9])",
        r"(?:sk|pk|rk)[-_](?:(?:proj|ant|live|test|or|svcacct)[-_]){0,3}[A-Za-z0-9]{16,}[A-Za-z0-9_-]*",
        r"sk-(?=[a-z_-]{0,60}[A-Z0-9])[A-Za-z0-9_-]{16,}",
        r"xox[abeprs]-[A-Za-z0-9-]{10,}",
        r"xapp-[0-9]-[A-Za-z0-9-]{10,}",
        r"AIza[A-Za-z0-9_-]{35,}",
        r"ya29\.[A-Za-z0-9._-]{16,}",
        r"GOCSPX-[A-Za-z0-9_-]{16,}",
        r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
        r"hv[sbr]\.[A-Za-z0-9_-]{16,}",
        r"dapi[0-9a-f]{32}(?![0-9a-z])",
        r"AGE-SECRET-KEY-1[A-Z0-9]{20,}",
        r"ATATT[A-Za-z0-9_=-]{16,}",
        r"ms-[0-9A-Fa-f]{8}-[0-9A-Za-z-]{20,}",
        r"bce-v3/[A-Za-z0-9_-]{8,}/[0-9A-Za-z]{16,}",
        r"[0-9a-f]{32}\.[A-Za-z0-9]{16}(?![A-Za-z0-9])",
        r"(?:bot)?[0-9]{8,10}:AA[A-Za-z0-9_-]{30,}",
        r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        r"(?:LTAI|AKID)[A-Za-z0-9]{12,60}(?![A-Za-z0-9])",
        r"(?<![_-])eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]++(?:\.[A-Za-z0-9_-]*+)?",
    )
)

# Options that hold a password, of some programs only: `-u` is also an option of others.
_OPTION = re.compile(
    r"(?<![A-Za-z0-9_-])(?P<option>-[uUbpa]|--user|--proxy-user|--cookie|--auth)(?P<space>(?:\s|\\\n){1,9}|=)?"
    r"(?:(?P<quote>['\"])(?P<inner>[^'\"\n]{1,512})|(?P<plain>[^\s'\"]{1,512}))",
    re.ASCII,
)
_OPTIONS = {
    "curl ": ("-u", "-U", "--user", "--proxy-user", "-b", "--cookie"),
    "http ": ("-a", "--auth"),
    "https ": ("-a", "--auth"),
    "redis-cli ": ("-a",),
    "sshpass ": ("-p",),
    "mysql ": ("-p",),
    "mysqldump ": ("-p",),
    "mariadb ": ("-p",),
}
_WINDOW = 400  # characters between a program and its option


def _without_password(match: re.Match[str]) -> str:
    """An option of a program in `_OPTIONS`, its password hidden: of `user:password`, what follows the colon."""
    option, value = match["option"], match["inner"] or match["plain"]
    before = match.string[max(0, match.start() - _WINDOW) : match.start()].replace("\\\n", "  ")
    command = before[before.rfind("\n") + 1 :]
    at, program = max((command.rfind(name), name) for name in _OPTIONS)
    if at < 0 or option not in _OPTIONS[program] or value.startswith(HIDDEN):
        return match[0]
    if program.startswith(("mysql", "mariadb")) and match["space"]:
        return match[0]  # what follows `-p` and a space is the name of a database
    mark = "=" if option in ("-b", "--cookie") else ":" if program in ("curl ", "http ", "https ") else ""
    user, _, password = value.partition(mark) if mark else ("", "", value)
    if not password or password.startswith(HIDDEN):
        return match[0]  # a name without a password, or of a file
    return f"{option}{match['space'] or ''}{match['quote'] or ''}{user}{mark}{HIDDEN}"


FORMS: tuple[tuple[re.Pattern[str], Replacement], ...] = (
    (_OPTION, _without_password),
    *_HEADERS[-1:],
    *_ADDRESSES,
    *_NAMED,
    *_HEADERS[:-1],
    *_TOKENS,
)
# A quick look at whether any of the patterns above can match.
TRIGGER = re.compile(
    r"token|secret|passw|passphrase|signature|key|密码|口令|密钥|令牌|[=@]|bearer|basic|authorization|cookie|://|hook"
    r"|curl|redis-cli|sshpass|mysql|mariadb|http|machine|hf_|api_org_|gh[opsur]_|github_pat|gl[a-z]{2,6}-|npm_|gsk_"
    r"|nvapi|dop_v1|r8_|pypi-|[spr]k[-_]|xox|xapp|AIza|ms-|AKIA|ASIA|LTAI|AKID|eyJ|--BEGIN|tvly|xai-|pplx|fc-|dckr"
    r"|lsv2|jina|whsec|ntn_|tgp_|fw_|e2b_|sntry|shp|pat_|app-|ya29|GOCSPX|SG\.|hv[sbr]\.|dapi|ATATT|bce-v3|ftqq"
    r"|api\.day\.app|:AA|[0-9a-f]{32}\.",
    _A,
)
