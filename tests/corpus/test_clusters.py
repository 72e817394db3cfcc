"""Clusters of rows by their words."""

from __future__ import annotations

import numpy as np

from mlx_zh.corpus.clusters import Sides, cluster_count, clusters
from mlx_zh.system.splitmix import mix64

TOPICS = ("红烧肉怎么做才好吃", "用编程语言写一个排序函数", "介绍一下北京的名胜古迹")
ANSWERS = ("先把五花肉切块焯水再炒糖色", "可以使用快速排序算法递归划分数组", "故宫长城颐和园都值得一看")


def rows(count: int) -> list[Sides]:
    return [(f"{TOPICS[i % 3]}，第{i}次问", f"{ANSWERS[i % 3]}，这是第{i}次回答") for i in range(count)]


def clustered(sides: list[Sides], batch: int = 7) -> np.ndarray:
    hashes = mix64(np.arange(len(sides), dtype=np.uint64))
    return clusters(hashes, (sides[i : i + batch] for i in range(0, len(sides), batch)))


def test_rows_of_one_topic_share_clusters_with_no_other_topic():
    labels = clustered(rows(90))
    by_topic = [set(labels[topic::3].tolist()) for topic in range(3)]
    assert not by_topic[0] & by_topic[1] and not by_topic[1] & by_topic[2] and not by_topic[0] & by_topic[2]


def test_clusters_do_not_depend_on_how_rows_come_in_batches():
    assert (clustered(rows(60), 7) == clustered(rows(60), 60)).all()


def test_rows_without_letters_and_single_rows_have_a_cluster():
    assert clustered([("？？？", "……"), ("你好", "")]).shape == (2,)
    assert clustered([("", "")]).tolist() == [0]
    assert clustered([]).shape == (0,)


def test_a_template_with_other_names_does_not_fill_a_selection():
    """570 of 600 rows are one template; a tenth of the rows, chosen at random, would hold it 57 times of 60."""
    from mlx_zh.corpus.selecting import Candidates, ordered

    names = [chr(0x4E00 + 7 * i) + chr(0x4F00 + 3 * i) for i in range(570)]
    sides = [(f"请写一首关于{name}的五言绝句", f"{name}清风明月夜，山高水远路难行") for name in names]
    sides += [
        ("".join(chr(0x5600 + 97 * i + j) for j in range(20)), "答" * 9 + chr(0x5600 + 97 * i)) for i in range(30)
    ]
    hashes = mix64(np.arange(len(sides), dtype=np.uint64))
    labels = clustered(sides)
    chosen = ordered(Candidates(hashes, labels), np.arange(600), ("diverse",), seed=1)[:60]
    assert (chosen >= 570).sum() >= 25


def test_the_number_of_clusters():
    """About 2 √n, rounded down to a power of two: 2 √300,000 is 1,095."""
    assert [cluster_count(n) for n in (1, 2, 4_000, 300_000)] == [2, 2, 64, 1024]
