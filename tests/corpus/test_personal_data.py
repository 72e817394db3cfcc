"""Personal data: what is found, what only looks like it, and what its placeholders are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.corpus.quality.personal import Masks, has_id_checksum, has_luhn_checksum


@pytest.mark.parametrize(
    ("text", "masked", "kind"),
    [
        ("身份证号11010519491231002X。", "身份证号000000000000000001。", "ID number"),  # the example of GB 11643
        ("我的手机是13912345678，", "我的手机是10000000001，", "mobile number"),
        ("电话：139-1234-5678", "电话：100-0000-0001", "mobile number"),
        ("+86 139 1234 5678", "+86 100 0000 0001", "mobile number"),
        ("座机010-62511234", "座机000-00000001", "landline"),
        ("座机（0571）87654321", "座机（0000）00000001", "landline"),
        ("卡号4111111111111111", "卡号0000000000000001", "bank card"),  # the card schemes' number for tests
        ("卡号4111 1111 1111 1111。", "卡号0000 0000 0000 0001。", "bank card"),
        ("邮箱zhang.san@qq.com。", "邮箱user1@example.com。", "e-mail"),
        ("服务器在61.135.169.121上", "服务器在192.0.2.1上", "IP address"),
        ("车牌京A·12345", "车牌京A·00001", "number plate"),
        ("车牌粤BD12345", "车牌粤B000001", "number plate"),
        ("家住北京市海淀区中关村南大街5号院3号楼2单元501室。", "家住某市某区某路1号。", "address"),
        ("我住在西湖区文三路478号", "我住在某市某区某路1号", "address"),
        ("广东省深圳市南山区科技园路1栋", "某市某区某路1号", "address"),
        ("邮编：100081", "邮编：000000", "postcode"),
        ("身份证：110105 19491231 002x", "身份证：000000000000000001", "ID number"),
        (
            "身份证号码为123456789012345678",
            "身份证号码为000000000000000001",
            "ID number",
        ),  # called so, if it is wrong
        ("身份證號：110105491231002", "身份證號：000000000000000001", "ID number"),  # of 15 digits, until 1999
        ("护照号：E12345678", "护照号：E00000001", "passport"),
        ("13912345678/13812345678", "10000000001/10000000002", "mobile number"),
        ("0086-13912345678", "0086-10000000001", "mobile number"),
        ("139.1234.5678", "100.0000.0001", "mobile number"),
        ("https://a.cn/?phone=13912345678&x=1", "https://a.cn/?phone=10000000001&x=1", "mobile number"),
        ("加我wx13912345678", "加我wx10000000001", "mobile number"),
        ("台灣手機0912-345-678", "台灣手機1000-000-001", "mobile number"),
        ("+852 9123 4567", "+852 1000 0001", "mobile number"),
        ("座机021-6234 5678", "座机000-0000 0001", "landline"),
        ("座机0571-8888-9999", "座机0000-0000-0001", "landline"),
        ("座机010-62345678-801", "座机000-00000000-001", "landline"),
    ],
)
def test_personal_data_and_its_placeholder(text: str, masked: str, kind: str):
    masks = Masks()
    assert masks.mask(text) == masked
    assert masks.kinds == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "编号110105194912310021",  # the check character is X
        "卡号4111111111111112",  # fails Luhn's check
        "5+13912345678=13912345683",
        "3.13912345678",
        "订单AB13912345678",
        "圆周率3.14159265358979323846",
        "请发邮件到 name@example.com",
        "git@github.com:a/b.git",
        "192.168.1.1、127.0.0.1、8.8.8.8",
        "版本 1.2.3.4",
        "第3号文件和5号线",
        "地铁2号线在市区的路上",
        "云A4打印纸",
        "2024-05-01 12:30:45",
        "热线 400-123-4567，报警 110",
        "总数是100081",
        "人口13912345678人",
        "共13912345678元",
        "延时13800000123 毫秒",
        "15012345678是质数吗？",
        "计算 18612345678 除以 3",
        "13912345678/3",
        "15000000000",  # a round number
        "北京路18号线",
        "江苏省南京市长江路段5号公路",
        "北京市公安局海淀分局中关村大街派出所2023年5月1号发布",
        "上海市街道办事处于5号开会",
    ],
)
def test_what_only_looks_like_it(text: str):
    masks = Masks()
    assert masks.mask(text) == text
    assert masks.kinds == []


def test_one_value_has_one_placeholder_in_a_row():
    masks = Masks()
    first = masks.mask("电话13912345678，或13887654321，邮箱a@qq.com")
    assert first == "电话10000000002，或10000000003，邮箱user1@example.com"
    assert masks.mask("再打139-1234-5678或+86 13912345678") == "再打100-0000-0002或+86 10000000002"


def check_character(digits: str) -> str:
    """ISO 7064, MOD 11-2, digit by digit: an independent way to the same character."""
    total = 0
    for digit in digits:
        total = (total + int(digit)) * 2 % 11
    return "0123456789X"[(12 - total) % 11]


@given(
    st.from_regex(r"\A[1-57-8][1-9][0-9]{4}19[5-9][0-9](0[1-9]|1[0-2])(0[1-9]|1[0-9]|2[0-8])[0-9]{3}\Z"), st.data()
)
def test_only_id_numbers_with_their_check_character_are_masked(digits: str, data: st.DataObject):
    right = check_character(digits)
    assert has_id_checksum(digits + right)
    assert Masks().mask(f"证号{digits}{right}。") == "证号000000000000000001。"
    wrong = data.draw(st.sampled_from(sorted(set("0123456789X") - {right})))
    assert not has_id_checksum(digits + wrong)
    assert Masks().mask(f"证号{digits}{wrong}。") == f"证号{digits}{wrong}。"


@given(st.from_regex(r"\A[0-9]{15}\Z"))
def test_one_last_digit_of_ten_passes_luhn(digits: str):
    assert sum(has_luhn_checksum(f"{digits}{last}") for last in range(10)) == 1


NUMBERS = ["13912345678", "139-1234-5678", "+86 ", "11010519491231002X", "000000000000000001", "邮编100081", "1"]
CARDS = ["4111111111111111", "4111-1111-1111-1111", "61.135.169.121", "010-62511234", "京A·12345", "粤BD12345"]
ADDRESS = ["北京市海淀区学院路", "38号", "3号楼", "2单元", "501室", "某市", "住在", "号", "路", "区", "a@qq.com"]
PIECES = st.sampled_from([*NUMBERS, *CARDS, *ADDRESS, *"，。 -x@.\n"])


@given(st.lists(PIECES, max_size=30).map("".join))
def test_masking_twice_is_masking_once(text: str):
    once = Masks().mask(text)
    again = Masks()
    assert again.mask(once) == once
    assert again.kinds == []
