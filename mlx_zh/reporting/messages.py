"""Every sentence of the report, in Chinese and in English: the only place where the report's words are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Text:
    """The same words in two languages."""

    zh: str
    en: str

    @staticmethod
    def same(text: object) -> Text:
        """A name, a number or a file: the same in both languages."""
        return Text(str(text), str(text))

    def both(self) -> str:
        """Both languages on one line, once where they are equal."""
        return self.zh if self.zh == self.en else f"{self.zh} {self.en}"


def say(key: str, **values: Any) -> Text:
    """A message with its values filled in; a value that is a `Text` stands in its language."""
    zh, en = MESSAGES[key]
    sides = []
    for side, words in (("zh", zh), ("en", en)):
        filled = {name: getattr(v, side) if isinstance(v, Text) else v for name, v in values.items()}
        sides.append(words.format(**filled))
    return Text(*sides)


def named(key: str) -> Text:
    """The message for a name that came from a file (a stage, a row); the name itself where there is none."""
    return say(key) if key in MESSAGES and "{" not in MESSAGES[key][0] else Text.same(key)


def translated(sentence: str) -> Text:
    """A tripwire's English sentence with its Chinese; a sentence that is not known here stays English."""
    for pattern, zh in SENTENCES:
        if found := re.fullmatch(pattern, sentence):
            return Text(zh.format(*found.groups()), sentence)
    return Text.same(sentence)


MESSAGES: dict[str, tuple[str, str]] = {
    # The page
    "report": ("微调报告", "Fine-tuning report"),
    "made": ("生成于 {time}", "made {time}"),
    "summary": ("摘要", "At a glance"),
    "contents": ("目录", "Contents"),
    "none_yet": ("本次运行还没有这部分结果。", "This run has no results here yet."),
    # Stages
    "prepare": ("准备数据", "prepare data"),
    "base": ("原模型", "base"),
    "sft": ("SFT", "SFT"),
    "dpo": ("DPO", "DPO"),
    "fused": ("合并后", "fused"),
    "eval-base": ("评测原模型", "evaluate base"),
    "eval-sft": ("评测 SFT", "evaluate SFT"),
    "eval-dpo": ("评测 DPO", "evaluate DPO"),
    "fuse": ("合并导出", "fuse and export"),
    # Alarms
    "alarms": ("警告", "Warnings"),
    "no_alarm": ("没有触发任何警告。", "No tripwire fired."),
    "alarm_count": ("触发了 {count} 条警告，见下文。", "Warnings that fired: {count}. They are listed below."),
    "skipped_steps": (
        "有 {count} 步的损失或梯度不是有限数，已跳过。",
        "{count} steps had a loss or gradient that is not finite, and were skipped.",
    ),
    "not_finite": (
        "{count} 行指标含有非有限数值，图中未画出。",
        "{count} lines of metrics hold values that are not finite; the charts leave them out.",
    ),
    "eval_rose": (
        "验证损失从 {before} 升到了 {after}：没有学到验证集上有用的东西。",
        "validation loss rose from {before} to {after}: nothing was learned that helps on the validation set.",
    ),
    "overfitted": (
        "验证损失在第 {step} 步最低（{best}），最后为 {after}，而用的是最后的权重：可能过拟合。可设"
        " load_best: true。",
        "validation loss was lowest at step {step} ({best}) and ended at {after}, and the last weights are used: "
        "perhaps overfitted; try load_best: true.",
    ),
    "accuracy_low": (
        "DPO 末段奖励准确率为 {accuracy}，不高于随机：模型没有学会偏好被选回答。",
        "reward accuracy at the end of DPO is {accuracy}, no better than chance: the preference was not learned.",
    ),
    "unlike": (
        "{before} 与 {after} 答的题或提问方式不同，不作比较；请重新评测。",
        "{before} and {after} were not asked the same questions in the same way, so they are not compared; "
        "evaluate again.",
    ),
    "unreadable": ("{file} 无法读取，已略过。", "{file} cannot be read and was left out."),
    "unfinished": ("{stage} 尚未完成，以下是目前的结果。", "{stage} is not finished; its figures are those so far."),
    # Benchmarks
    "benchmarks": ("中文基准测试", "Chinese benchmarks"),
    "exam_head": (
        "{split} 集 {questions} 题，协议 {protocol}。",
        "{questions} questions of the {split} split, protocol {protocol}.",
    ),
    "exam_note": (
        "各科准确率的平均（%），下方是 95 % 区间。变化按相同题目配对比较；McNemar 检验 p ≥ 0.05 时记为噪声范围内。",
        "Mean accuracy over subjects (%), with its 95 % interval below. Changes are paired question by question; "
        "a change whose McNemar p is 0.05 or more is within noise.",
    ),
    "category": ("类别", "Category"),
    "change": ("变化（{after} − {before}）", "Change ({after} − {before})"),
    "verdict": ("结论", "Verdict"),
    "noise": ("噪声范围内", "within noise"),
    "better": ("提高", "better"),
    "worse": ("下降", "worse"),
    "unpaired": ("（未配对）", " (not paired)"),
    "guessing": ("灰带：随机猜测的 95 % 范围。", "Grey band: what guessing gives, 95 %."),
    "unlabelled": (
        "该集没有公开答案，分数需在官网提交后得到。",
        "The answers of this split are not published; scores come from the benchmark's own server.",
    ),
    "Average": ("平均", "Average"),
    "Average (hard)": ("平均（困难）", "Average (hard)"),
    "STEM": ("理工科", "STEM"),
    "Social Sciences": ("社会科学", "Social Sciences"),
    "Humanities": ("人文学科", "Humanities"),
    "Other": ("其他", "Other"),
    "China-specific": ("中国特有", "China-specific"),
    # Training
    "training_sft": ("监督微调（SFT）", "Supervised fine-tuning (SFT)"),
    "training_dpo": ("偏好优化（DPO）", "Preference optimization (DPO)"),
    "loss": ("训练损失", "training loss"),
    "eval_loss": ("验证损失", "validation loss"),
    "chart_sft_loss": ("SFT 损失", "SFT loss"),
    "chart_dpo_loss": ("DPO 损失", "DPO loss"),
    "chart_dpo_rewards": ("DPO 奖励：被选与被拒", "DPO rewards: chosen and rejected"),
    "chart_dpo_margins": ("DPO 奖励差", "DPO reward margins"),
    "chart_dpo_accuracies": ("DPO 奖励准确率", "DPO reward accuracies"),
    "chart_sft_gradient": ("SFT 梯度范数", "SFT gradient norm"),
    "grad_norm": ("梯度范数", "gradient norm"),
    "reward": ("奖励", "reward"),
    "rewards/chosen": ("被选", "chosen"),
    "rewards/rejected": ("被拒", "rejected"),
    "rewards/margins": ("奖励差", "margin"),
    "rewards/accuracies": ("准确率", "accuracy"),
    "eval_rewards/accuracies": ("验证准确率", "validation accuracy"),
    "raw": ("{name}（原始）", "{name} (raw)"),
    "smoothed": ("{name}（平滑）", "{name} (smoothed)"),
    "step": ("步", "step"),
    "accuracy_axis": ("准确率（%）", "accuracy (%)"),
    "smoothing": (
        "浅色为原始值，深色为指数平滑（与 LLaMA-Factory 同一公式）。指向曲线可看数值。",
        "Light: raw. Dark: exponentially smoothed, by LLaMA-Factory's formula. Point at a curve to read values.",
    ),
    "steps": ("步数", "steps"),
    "epochs": ("轮数", "epochs"),
    "tokens": ("处理的词元", "tokens processed"),
    "scored_tokens": ("计入损失的词元", "tokens scored"),
    "speed": ("速度", "speed"),
    "speed_value": ("{value} 词元/秒", "{value} tokens/s"),
    "ranks": ("并行进程", "ranks"),
    "ranks_value": ("{ranks} 个，通信占 {share} 的时间", "{ranks}, communication {share} of the time"),
    "peak_memory": ("内存峰值", "peak memory"),
    "time": ("用时", "time"),
    "energy": ("耗电", "energy"),
    "val_loss_tile": ("SFT 验证损失", "SFT validation loss"),
    "accuracy_tile": ("DPO 奖励准确率", "DPO reward accuracy"),
    "time_tile": ("总用时", "Total time"),
    # Answers
    "answers": ("回答对比", "Answers side by side"),
    "answers_note": (
        "同样的问题，贪心解码（温度 0）。",
        "The same prompts, decoded greedily (temperature 0).",
    ),
    "no_answer": ("（空）", "(empty)"),
    # Data, export, machine
    "data": ("数据", "Data"),
    "data_sft": ("SFT 数据", "SFT data"),
    "data_dpo": ("DPO 数据", "DPO data"),
    "source": ("来源", "source"),
    "rows": ("行数", "rows"),
    "for_training": ("训练", "training"),
    "for_validation": ("验证", "validation"),
    "removed": ("去掉的行", "rows left out"),
    "examples": ("训练样本", "training examples"),
    "train_tokens": ("词元（计入损失）", "tokens (scored)"),
    "lengths": ("长度：中位 / 95 % / 最长", "length: median / 95 % / longest"),
    "lengths_chart": ("{name}：长度分布（词元）", "{name}: lengths (tokens)"),
    "over_long": ("过长的样本", "over-long rows"),
    "per_character": ("每个汉字的词元", "tokens a Chinese character"),
    "exams_checked": ("与考题重合", "overlap with exam questions"),
    "exams_removed": ("查了 {exams}，去掉 {count} 行", "{count} rows left out; looked for {exams}"),
    "exams_unchecked": ("没有检查", "not looked for"),
    "unchecked": (
        "没有检查训练数据是否含有 {exam} 的考题：{reason}",
        "the data was not checked for questions of {exam}: {reason}",
    ),
    "many_over_long": (
        "{share} 的样本超过 max_length，被截短或丢弃；可以增大 data.max_length。",
        "{share} of the rows are longer than max_length and were cut short or left out; a larger data.max_length "
        "keeps them.",
    ),
    "file": ("文件", "file"),
    "digest": ("SHA-256", "SHA-256"),
    "setting": ("项目", "what"),
    "value": ("值", "value"),
    "export": ("合并与导出", "Fuse and export"),
    "run": ("运行环境", "Recipe and machine"),
    "stage": ("阶段", "stage"),
    "model": ("基座模型", "base model"),
    "machine": ("机器", "machine"),
    "device": ("设备", "device"),
    "commit": ("代码版本", "code version"),
    "versions": ("软件版本", "versions"),
    "recipe": ("完整配方", "the recipe as resolved"),
    "total": ("合计", "total"),
    "hidden": ("（已隐藏）", "(hidden)"),
}

# Sentences of `mlx_zh.exams.figures.tripwires` and their Chinese.
SENTENCES: tuple[tuple[str, str], ...] = (
    (r"accuracy (\S+) is what guessing gives \((\S+) to (\S+)\)\.", "准确率 {0}，与随机猜测（{1} 到 {2}）无异。"),
    (r"accuracy (\S+) is less than guessing gives \((\S+) to (\S+)\)\.", "准确率 {0}，低于随机猜测（{1} 到 {2}）。"),
    (r"(\S+) of the answers are ([A-D])\.", "{0} 的回答都是 {1}。"),
    (
        r"the four letters have (\S+) of the probability on average: the prompt does not elicit an answer\.",
        "四个选项字母平均只占 {0} 的概率：提示没有引出答案。",
    ),
    (
        r"(\d+) of (\d+) answers give no letter; they count as wrong\.",
        "{1} 个回答中有 {0} 个没有给出选项，计为答错。",
    ),
    (r"(\d+) of (\d+) prompts were too long and were cut\.", "{1} 个提示中有 {0} 个过长，已截断。"),
    (r"(\d+) questions were asked; (.+) (\S+) has (\d+)\.", "只问了 {0} 题；{1} {2} 集共有 {3} 题。"),
)
