"""The labels of report.html and of the comparison of runs, in English and in Chinese."""

import locale
import os
from collections.abc import Callable

Label = Callable[[str], str]  # the English text of a label -> its text in the language of the page

CHINESE = {
    # Sections.
    "Run": "这次训练",
    "Results": "结果",
    "Curves": "曲线",
    "Tasks": "任务",
    "Where every token went": "每个 token 的去向",
    "Samples": "生成的样例",
    "Environment": "环境",
    "How to repeat it": "怎样重现",
    # The line under the title.
    "{state}, step {step} of {max_steps}": "{state}，第 {step} 步，共 {max_steps} 步",
    "running": "训练中",
    "interrupted": "已中断",
    "finished": "已完成",
    "failed": "失败",
    "unknown": "未知",
    # What is trained.
    "recipe": "配方",
    "branch": "分支",
    "model": "模型",
    "parameters": "参数总数",
    "active parameters, met by a token": "激活参数（每个 token 用到的）",
    "data": "数据",
    "context": "上下文",
    "{tokens} tokens, {packing} packing, {rows} rows a step": "{tokens} 个 token，{packing} 打包，每步 {rows} 行",
    "optimizer": "优化器",
    "{optimizer}, learning rate {rate}, seed {seed}": "{optimizer}，学习率 {rate}，随机种子 {seed}",
    "of {checkpoint}, after {steps} steps, {tokens} tokens": "来自 {checkpoint}，在 {steps} 步、{tokens} 个 token 之后",
    ", with other {changed}": "，改了 {changed}",
    ", with nothing changed": "，什么都没改",
    ". Held-out losses up to that step are of the other run's documents": "。此前的验证集损失来自原来那次训练的文档",
    # Figures.
    "held-out loss, nats a token": "验证集损失，nats/token",
    "by token frequency alone": "只按词频预测时",
    "bits per byte": "每字节比特数",
    "perplexity": "困惑度",
    "held-out tokens": "验证集 token 数",
    "test loss": "测试集损失",
    "tokens trained on": "已训练 token 数",
    "training time, seconds": "训练用时，秒",
    "tokens/s, evaluation and saving included": "tokens/s，包括评估和保存",
    "MFU, at the last log": "MFU，最后一次日志",
    "bad steps left out": "跳过的异常步",
    "busiest expert of a layer": "一层里最忙的专家",
    "idlest expert of a layer": "一层里最闲的专家",
    "{:.1%} of the tokens since the last log; none is dropped": "处理上次日志以来 {:.1%} 的 token；没有 token 被丢弃",
    "{:.1%} of the tokens since the last log": "处理上次日志以来 {:.1%} 的 token",
    # What the units mean.
    "nat: the unit of the loss. At 3 nats a token the model is as unsure of the next token as between 20 equally "
    "likely ones, its perplexity (e to the power of 3).": "nat：损失的单位。每个 token 3 nats，"
    "相当于在 20 个可能性相同的 token 里猜下一个；20（e 的 3 次方）就是困惑度。",
    "bits per byte: the same loss in bits (1 nat = 1.44 bits), for each byte of the text. It compares models with "
    "different tokenizers. 8 is as good as guessing each byte; lower is better.": "每字节比特数：同一个损失换算成比特"
    "（1 nat = 1.44 比特），再平均到文本的每个字节，因此可以比较使用不同分词器的模型。8 等于逐个字节瞎猜，越低越好。",
    "MFU (model FLOPs utilisation): the share of the device's peak FLOP/s that the model's own arithmetic takes. "
    "Recompute is not counted.": "MFU（模型 FLOPs 利用率）：模型本身的计算占设备峰值 FLOP/s 的比例，不计重计算。",
    # Plots.
    "loss, nats a token": "损失，nats/token",
    "training": "训练",
    "held out": "验证集",
    "held-out bits per byte": "验证集每字节比特数",
    "share of a layer's tokens that one expert gets": "一层里单个专家分到的 token 比例",
    "busiest": "最忙",
    "idlest": "最闲",
    "learning rate": "学习率",
    "gradient norm before clipping": "裁剪前的梯度范数",
    "tokens/s per device": "每个设备的 tokens/s",
    "model FLOPs utilisation (MFU)": "模型 FLOPs 利用率（MFU）",
    "device memory, GiB": "显存，GiB",
    "peak": "峰值",
    "in use": "占用",
    "tokens seen": "已训练 token 数",
    "training time": "训练用时",
    # Ledger.
    "train": "训练",
    "test": "测试",
    "duplicate": "重复",
    "dropped": "丢弃",
    "{name}: {tokens} tokens read = {parts}": "{name}：读入 {tokens} 个 token = {parts}",
    "; {tokens} trained on": "；训练了 {tokens} 个",
    "; {documents} documents": "；{documents} 篇文档",
    # Tasks.
    "task": "任务",
    "metric": "指标",
    "score": "得分",
    "standard error": "标准误",
    "chance": "随机水平",
    "documents": "文档数",
    "examples": "示例数",
    "step": "步",
    "seconds": "秒",
    "eval_tasks.jsonl has {parts} scores of parts, too.": "eval_tasks.jsonl 里还有 {parts} 个子任务得分。",
    # Samples.
    "prompt and continuation": "提示词和续写",
    "texts of {shown} steps out of {all}; samples.jsonl has all of them.": "{all} 步中的 {shown} 步；见 samples.jsonl",
    # Environment, and how to repeat it.
    "device": "设备",
    "python": "Python",
    "versions": "版本",
    "commit": "提交",
    "launcher": "启动器",
    "launches": "启动次数",
    "{launches} (launches.jsonl has the arguments of each)": "{launches}（每次的参数在 launches.jsonl 里）",
    "Some files had been changed since that commit.": "这个提交之后有文件改动过。",
    "run.json has every setting that decides the losses.": "run.json 里有决定损失的全部设置。",
    # The comparison of runs.
    "Comparison of runs": "训练对比",
    " and ": " 与 ",
    "state": "状态",
    "training loss, nats a token": "训练损失，nats/token",
    "settings that affect the losses and differ: {names}": "影响损失且不同的设置：{names}",
    "nothing": "没有",
    "a flag of the recipe's own that differs: {name}: {values}": "配方自己的参数，值不同：{name}：{values}",
    "note: the runs were evaluated on different held-out tokens. Their held-out figures do not compare.": "注意："
    "几次训练的验证集 token 不同，验证集上的数字不能互相比较。",
    "curves: {page}": "曲线：{page}",
}


def labels(language: str) -> Label:
    """Return the function that gives a label in ``language``: "en", "zh", or "auto" for the system's.

    A text that has no translation stays as it is.
    """
    if language == "auto":
        language = system_language()
    return (lambda text: CHINESE.get(text, text)) if language == "zh" else (lambda text: text)


def system_language() -> str:
    """Return "zh" if this system speaks Chinese, otherwise "en"."""
    names = [os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG")]  # the first that is set decides
    names.append(locale.getlocale()[0])  # on Windows, where none of them is: Chinese (Simplified)_China, or zh_CN
    name = next((name for name in names if name), "")
    return "zh" if name.lower().startswith(("zh", "chinese")) else "en"
