"""The kinds of secrets, each with texts in which it is hidden, and with harmless texts that stay as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.system.redaction import redact
from mlx_zh.system.secret_forms import HIDDEN

A, B = "q7Rk2mZx9LwT4vBn", "0a1b2c3d4e5f60718293a4b5c6d7e8f9"  # parts of tokens, of letters and digits, and in hex
UUID = "0a1b2c3d-1111-2222-3333-444455556666"

# kind -> (text before the secret, secret, text after it), …; harmless texts, …
KINDS: dict[str, tuple[list[tuple[str, str, str]], list[str]]] = {
    "options of programs": (
        [
            ("curl -u alice:", "pw0rdX", " https://host/x"),
            ('curl -s -u "alice:', "pw0rd X", '" https://host'),
            ("curl -ualice:", "geheim", " https://host"),
            ("curl https://host \\\n  --user alice:", "geheim", ""),
            ("curl --proxy-user 'bob:", "geheim", "'"),
            ("curl --user=bob:", "geheim", ""),
            ("curl --oauth2-bearer ", "geheim", ""),
            ("curl -b 'session=", "geheim", "'"),
            ("http -a alice:", "geheim", " host"),
            ("sshpass -p ", "geheim", " ssh host"),
            ("mysql -ualice -p", "geheim", " shop"),
            ("redis-cli -a ", "geheim", ""),
        ],
        [
            "docker run -u 1000:1000 image",
            "docker run --user node:node image",
            "curl -u alice https://host",
            "curl -b cookies.txt https://host",
            "mysql -p shop",
            "ls -a -p folder; du -b",
            "--token 参数，--password <密码>",
        ],
    ),
    "named values": (
        [
            ("password: ", "hunter2", ""),
            ("password=", "swordfish", "&x=1"),
            ("myPassword=", "geheim", ""),
            ("密码：", "Abc12345", "，好"),
            ("口令是", "tiger-9x", "。"),
            ("令牌为", "Zx81Zx81", ""),
            ("secret=", "t1ger", ""),
            ("token: ", "abcdef123456", "，好"),
            ("HF_TOKEN=", "geheimnis", ""),
            ("AccountKey=", "Zm9vYmFyYmF6cXV4Zm9vYg==", ";EndpointSuffix=core"),
            ("SharedAccessKey=", "Zm9vYmFyYmF6cXV4Zm9vYg==", ""),
            ("AccessKeySecret: ", "abcdefghijklmn", ""),
            ("Server=x;Uid=sa;Pwd=", "geheim9", ";"),
            ("machine host login alice password ", "geheim", ""),
        ],
        [
            "password: 请输入密码",
            "password=请输入6位以上的密码",
            "password: required",
            'password="密码"',
            "Wrong password: none.",
            "口令：请输入口令",
            "口令：芝麻开门",
            "口令：login",
            "密码：至少八位",
            "密钥：由双方协商",
            "令牌：assistant",
            "token=word",
            "token=词元",
            "token: assistant",
            "token=end-of-text",
            "access_token=word",
            "The secret: never give up.",
            "secret=今天天气很好",
            "api_key=你的密钥",
            "api_key=YOUR_API_KEY",
            "HF_TOKEN=hf_xxxxxx",
            "HF_TOKEN=$HF_TOKEN",
            "signature=def",
        ],
    ),
    "addresses": (
        [
            ("https://x.blob.core.windows.net/c/f?sv=2022&sig=", "Qm9iQm9i%2Fxx%3D", "&se=2"),
            ("SharedAccessSignature sr=x&sig=", "Qm9iQm9i%2Fxx%3D", "&se=2"),
            ("https://b.s3.amazonaws.com/k?X-Amz-Credential=", "ABCDEFGH%2F2024", "&X-Amz-Date=1"),
            ("https://b.s3.amazonaws.com/k?x=1&X-Amz-Signature=", "abcdefabcdef", ""),
            ("https://b.oss-cn-hangzhou.aliyuncs.com/k?Expires=1700000000&Signature=", "abcdefg%3D", ""),
            ("https://b.oss-cn-hangzhou.aliyuncs.com/k?OSSAccessKeyId=", "TMP.abcdefgh", "&Expires=1700000000"),
            ("https://b.cos.ap.myqcloud.com/k?q-ak=", "abcdefghijk", "&q-key-time=1;2"),
            ("https://b.cos.ap.myqcloud.com/k?q-header-list=host&q-signature=", "abcdefabcdef", ""),
            ("https://storage.googleapis.com/b/k?GoogleAccessId=", "me@x.iam", "&Expires=17"),
            ("https://storage.googleapis.com/b/k?x=1&X-Goog-Signature=", "abcdefabcdef", ""),
            ("https://hooks.slack.com/services/", "T00000000/B00000000/abcdefGHIJ", " 通知"),
            ("https://oapi.dingtalk.com/robot/send?access_token=", "abcdefghijkl", ""),
            ("https://open.feishu.cn/open-apis/bot/v2/hook/", UUID, "，好"),
            ("https://open.larksuite.com/open-apis/bot/v2/hook/", UUID, ""),
            ("https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=", UUID, ""),
            ("https://discord.com/api/webhooks/", f"123456789012345678/{A}", ""),
            ("https://ptb.discordapp.com/api/v10/webhooks/", f"123456789012345678/{A}", ""),
            ("https://example.webhook.office.com/webhookb2/", f"{UUID}@{UUID}/IncomingWebhook/{B}", ""),
            ("https://chat.example.com/hooks/", B, ""),
            ("https://sctapi.ftqq.com/", f"SCT1{A}.send", ""),
            ("https://alice:", "geheim", "@host/x"),
            ("postgres://u:", "geheim", "@host/db"),
        ],
        [
            "https://host/?page=2&sort=key&key=value",
            "https://open.feishu.cn/document/home/introduction",
            "https://discord.com/channels/123456789012345678/1",
            "https://docs.example.com/webhooks/events-and-payloads-of-webhooks",
            "Expires=1700000000, sig=0.5",
            "http://host:8080/@scope/name",
        ],
    ),
    "headers": (
        [
            ("Authorization: Basic ", "YWxpY2U6cHc=", ""),
            ("Authorization: Bearer ", "abcdefgh", ""),
            ("Proxy-Authorization: Basic ", "YWxpY2U6cHc=", ""),
            ('Authorization: Digest username="a", response="', B, '"'),
            ("Authorization: ", B, ""),
            ("Cookie: session=", "abcdefgh", "; theme=dark"),
            ("Set-Cookie: sid=", "abcdefgh", "; Path=/"),
            ("X-Api-Key: ", "abcdefgh", ""),
        ],
        [
            "Cookie 是什么？",
            "cookie: 曲奇",
            "Authorization: 授权",
            "Authorization: Bearer <令牌>",
            "Authorization: Bearer $TOKEN",
            "bearer of good news, basic principles",
        ],
    ),
    "tokens": (
        [
            ("", secret, "")
            for secret in (
                f"hf_{A}",
                f"ghp_{A}{A}",
                f"github_pat_{A}{A}",
                f"glpat-{A}{A}",
                f"gldt-{A}{A}",
                f"npm_{A}{A}",
                f"pypi-{A}{A}",
                f"dckr_pat_{A}{A}",
                f"tvly-{A}",
                f"tvly-dev-{A}",
                f"xai-{A}{A}",
                f"pplx-{A}{A}",
                f"fc-{B}",
                f"jina_{B}{A}",
                f"sk-{B}",
                f"sk-ant-api03-{A}-{A}_x",
                f"sk-or-v1-{B}",
                f"gsk_{A}{A}",
                f"nvapi-{A}{A}",
                f"r8_{A}{A}",
                f"AIzaSy{A}{A}x",
                f"AIzaSy{A}{A}xyz",
                f"ya29.{A}_{A}",
                f"GOCSPX-{A}",
                f"xoxb-123456-{A}",
                f"SG.{A}.{A}",
                f"hvs.{A}{A}",
                f"shpat_{B}",
                f"dapi{B}",
                f"lsv2_pt_{B}_x",
                f"ms-{UUID}",
                f"bce-v3/ALTAK-{A}/{B}",
                f"{B}.{A}",
                f"bot123456789:AA{A}{A}",
                "AKIAABCDEFGHIJKLMNOP",
                f"LTAI5t{A}",
                f"AKID{A}{A}",
                "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0NSJ9.c2lnbmF0",
            )
        ],
        [
            "npm_config_registry_mirror_address",
            "pypi-mirror-of-a-university",
            "xai-is-the-name-of-a-company",
            "ms-swift, hf_hub_download, sk-learn-like-pipelines-in-python",
            "hf_, tvly-, xai-, glpat-, ya29., AIza",
            "fc-layers-of-the-network, app-of-the-year",
            "sha256 " + B,
            "secret_sauce, pat_on_the_back",
        ],
    ),
    "private keys": (
        [
            ("-----BEGIN OPENSSH PRIVATE KEY-----\n", f"{A}{A}", "\n-----END OPENSSH PRIVATE KEY-----"),
            ("-----BEGIN PRIVATE KEY-----\n", f"{A}{A}", ""),
            ("-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n", f"{A}{A}", "\n-----END PGP PRIVATE KEY BLOCK-----"),
        ],
        ["-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0B\n-----END PUBLIC KEY-----"],
    ),
}
SECRETS = [(kind, *each) for kind, (secrets, _) in KINDS.items() for each in secrets]
HARMLESS = [(kind, text) for kind, (_, texts) in KINDS.items() for text in texts]


@pytest.mark.parametrize(("kind", "before", "secret", "after"), SECRETS)
def test_a_secret_is_hidden_and_most_of_the_text_around_it_stays(kind: str, before: str, secret: str, after: str):
    shown = redact(before + secret + after)
    assert secret not in shown and HIDDEN in shown
    assert kind in ("headers", "private keys", "addresses") or shown == f"{before}{HIDDEN}{after}"


@pytest.mark.parametrize(("kind", "text"), HARMLESS)
def test_a_harmless_text_stays(kind: str, text: str):
    assert redact(text) == text


around = st.text(st.sampled_from("的，。 \n\t“（x=1/"), max_size=12)


@given(st.sampled_from(SECRETS), around, around)
def test_a_secret_is_hidden_in_any_text(kind: tuple[str, str, str, str], left: str, right: str):
    """Chinese letters and marks, white space and lines may stand right beside it."""
    _, before, secret, after = kind
    text = f"{left} {before}{secret}{after} {right}"
    shown = redact(text)
    assert secret not in shown and redact(shown) == shown


@given(st.lists(st.sampled_from([text for _, text in HARMLESS]), min_size=1, max_size=4))
def test_harmless_texts_stay_together(texts: list[str]):
    text = "\n".join(texts)
    assert redact(text) == text


SEEDS = sorted(
    {before + secret + after for _, before, secret, after in SECRETS}
    | {before for _, before, _, _ in SECRETS if before}
    | {text for _, text in HARMLESS}
    | {"-u", "-u ", "-u'", '-u"', "curl ", "curl -u ", "-b a", "cookie:", "cookie: a", "/hook/", "/hooks/a", "?key="}
    | {"?sig=", "&sig=", "machine a login ", "machine ", "authorization", "a-b-", "a_b_", "token=a-", "password=a."}
    | {"0a1b2c3d", "AA", "12345678:AA", "SG.", "bce-v3/", "Aa", "passwordPassword", ";pwd", "your_", "$", "a.b("}
)


@pytest.mark.thorough
def test_a_megabyte_of_any_kind_takes_no_hours(tmp_path: Path):
    """A quadratic pattern would take that long; the limit is for a busy machine."""
    script = tmp_path / "redact.py"
    script.write_text(
        "from mlx_zh.system.redaction import redact\n"
        f"for seed in {SEEDS!r}:\n"
        "    redact(seed * (200_000 // len(seed)))\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, script], check=True, timeout=900)
