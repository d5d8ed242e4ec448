"""Write docs/families.md and its Chinese page: the real shapes of published models, planned. Nothing is fetched.

    python docs/families.py        # takes a minute

Memory is the prediction of --plan, for rows of 2,048 tokens, one at once on each card. Of the cards, as few as fit
count: one with single_gpu.yaml, then 2, 4, 8 ... with fsdp2.yaml or, if that does not fit, fsdp2_recompute.yaml.

Shapes are those of the models' config.json files, as far as memory depends on them. `parameters` is the published
number; a test compares it with what transformers builds of the shape (tests/pages/test_families_page.py). Another test
trains a small model of every model_type (tests/model/test_families.py).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.model.counts import experts_per_token, parameter_report
from common.model.from_config import planned_model
from common.model.memory import NF4_BYTES, Setting, predict
from common.model.presets import PRESETS
from common.system import GIB
from common.train.advice import beside_adapters

FOLDER = Path(__file__).resolve().parent
CONTEXT_LENGTH = 2048
CARDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CARD_GIB = 80
SMALL_CARD_GIB = 24
USED_SHARE = 0.95  # of a card, as in docs/scaling.md
CARDS_OF_A_MACHINE = 8
MAIN_MEMORY_GIB = 512  # if every process loading its own copy takes more, one process loads for all
TOKENS_A_STEP = 131_072  # openwebtext_continue.py's
GPT2_VOCABULARY = 50_257


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        family: its name in the lists that people know.
        model: its id on the hubs, or a preset of common/model/presets.py where there are no weights.
        parameters: as published; 0: never published as a file.
        shape: what its config.json says.
        note: what must be done before its weights can be used.
    """

    family: str
    model: str
    parameters: int
    shape: dict
    note: str = ""


def dense(model_type: str, hidden: int, width: int, layers: int, heads: int, key_heads: int, rows: int, **more) -> dict:
    """Return a shape in the words of Llama's config, which most families use."""
    return dict(
        model_type=model_type, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=rows, **more,
    )  # fmt: skip


LLAMA_70B = dict(hidden=8192, width=28_672, layers=80, heads=64, key_heads=8)
LLAMA_8B = dense("llama", 4096, 14_336, 32, 32, 8, 128_256)
QWEN_7B = dense("qwen2", 4096, 11_008, 32, 32, 32, 151_936)
QWEN2_7B = dense("qwen2", 3584, 18_944, 28, 28, 4, 152_064)
QWEN2_32B = dense("qwen2", 5120, 27_648, 64, 40, 8, 152_064)
BAICHUAN = dict(hidden=4096, width=11_008, layers=32, heads=32, key_heads=32)
CHATGLM = dense(
    "glm", 4096, 13_696, 28, 32, 2, 65_024, head_dim=128, rms_norm_eps=1e-5, pad_token_id=0,
)  # fmt: skip
LATENT = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, tie_word_embeddings=False)
DEEPSEEK_V3 = dense(
    "deepseek_v3", 7168, 18_432, 61, 128, 128, 129_280, **LATENT, q_lora_rank=1536, moe_intermediate_size=2048,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, n_group=8, topk_group=4,
    norm_topk_prob=True, routed_scaling_factor=2.5,
)  # fmt: skip
CONVERTED, IN_FP8 = "converted", "in FP8"  # what NOTES explains

MODELS = [
    Published("LLaMA 1", "huggyllama/llama-7b", 6_738_415_616, dense("llama", 4096, 11_008, 32, 32, 32, 32_000)),
    Published("Llama 2", "meta-llama/Llama-2-7b-hf", 6_738_415_616, dense("llama", 4096, 11_008, 32, 32, 32, 32_000)),
    Published("Llama 2", "meta-llama/Llama-2-70b-hf", 68_976_648_192, dense("llama", **LLAMA_70B, rows=32_000)),
    Published("Llama 3", "meta-llama/Meta-Llama-3-8B", 8_030_261_248, LLAMA_8B),
    Published("Llama 3.1", "meta-llama/Llama-3.1-8B", 8_030_261_248, LLAMA_8B),
    Published(
        "Llama 3.1",
        "meta-llama/Llama-3.1-405B",
        405_853_388_800,
        dense("llama", 16_384, 53_248, 126, 128, 8, 128_256),
    ),
    Published(
        "Llama 3.2",
        "meta-llama/Llama-3.2-1B",
        1_235_814_400,
        dense("llama", 2048, 8192, 16, 32, 8, 128_256, head_dim=64, tie_word_embeddings=True),
    ),
    Published(
        "Llama 3.3",
        "meta-llama/Llama-3.3-70B-Instruct",
        70_553_706_496,
        dense("llama", **LLAMA_70B, rows=128_256),
    ),
    Published(
        "Baichuan", "baichuan-inc/Baichuan-7B", 7_000_559_616, dense("llama", **BAICHUAN, rows=64_000), CONVERTED
    ),
    Published(
        "Baichuan 2",
        "baichuan-inc/Baichuan2-7B-Base",
        7_505_973_248,
        dense("llama", **BAICHUAN, rows=125_696),
        CONVERTED,
    ),
    Published(
        "Bloom",
        "bigscience/bloom-560m",
        559_214_592,
        dict(model_type="bloom", hidden_size=1024, n_layer=24, n_head=16, vocab_size=250_880),
    ),
    Published(
        "Bloom",
        "bigscience/bloom-7b1",
        7_069_016_064,
        dict(model_type="bloom", hidden_size=4096, n_layer=30, n_head=32, vocab_size=250_880),
    ),
    Published(
        "Bloom",
        "bigscience/bloom",
        176_247_271_424,
        dict(model_type="bloom", hidden_size=14_336, n_layer=70, n_head=112, vocab_size=250_880),
    ),
    Published("ChatGLM 2", "THUDM/chatglm2-6b", 6_243_584_000, CHATGLM, CONVERTED),
    Published("ChatGLM 3", "THUDM/chatglm3-6b-base", 6_243_584_000, CHATGLM, CONVERTED),
    Published(
        "DeepSeek V2",
        "deepseek-ai/DeepSeek-V2-Lite",
        15_706_484_224,
        dense(
            "deepseek_v2",
            2048,
            10_944,
            27,
            16,
            16,
            102_400,
            **LATENT,
            q_lora_rank=None,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
        ),
    ),
    Published(
        "DeepSeek V2",
        "deepseek-ai/DeepSeek-V2",
        235_741_434_880,
        dense(
            "deepseek_v2",
            5120,
            12_288,
            60,
            128,
            128,
            102_400,
            **LATENT,
            q_lora_rank=1536,
            moe_intermediate_size=1536,
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            n_group=8,
            topk_group=3,
            topk_method="group_limited_greedy",
        ),
    ),
    Published("DeepSeek V3", "deepseek-ai/DeepSeek-V3-Base", 671_026_419_200, DEEPSEEK_V3, IN_FP8),
    Published("DeepSeek R1", "deepseek-ai/DeepSeek-R1", 671_026_419_200, DEEPSEEK_V3, IN_FP8),
    Published(
        "DeepSeek R1 distilled",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        1_777_088_000,
        PRESETS["qwen2.5-1.5b"] | dict(vocab_size=151_936, tie_word_embeddings=False),
    ),
    Published("DeepSeek R1 distilled", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8_030_261_248, LLAMA_8B),
    Published("Gemma", "google/gemma-2b", 2_506_172_416, dense("gemma", 2048, 16_384, 18, 8, 1, 256_000, head_dim=256)),
    Published(
        "Gemma", "google/gemma-7b", 8_537_680_896, dense("gemma", 3072, 24_576, 28, 16, 16, 256_000, head_dim=256)
    ),
    Published("Mistral", "mistralai/Mistral-7B-v0.1", 7_241_732_096, dense("mistral", 4096, 14_336, 32, 32, 8, 32_000)),
    Published(
        "Mixtral",
        "mistralai/Mixtral-8x7B-v0.1",
        46_702_792_704,
        dense("mixtral", 4096, 14_336, 32, 32, 8, 32_000, num_local_experts=8, num_experts_per_tok=2),
    ),
    Published(
        "OPT",
        "facebook/opt-6.7b",
        6_658_473_984,
        dict(
            model_type="opt",
            hidden_size=4096,
            ffn_dim=16_384,
            num_hidden_layers=32,
            num_attention_heads=32,
            word_embed_proj_dim=4096,
            vocab_size=50_272,
        ),
    ),
    Published("Qwen 1", "Qwen/Qwen-7B", 7_721_324_544, QWEN_7B, CONVERTED),
    Published("Qwen1.5", "Qwen/Qwen1.5-7B", 7_721_324_544, QWEN_7B),
    Published(
        "Qwen1.5",
        "Qwen/Qwen1.5-MoE-A2.7B",
        14_315_784_192,
        dense(
            "qwen2_moe",
            2048,
            5632,
            24,
            16,
            16,
            151_936,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
    ),
    Published("Qwen2", "Qwen/Qwen2-7B", 7_615_616_512, QWEN2_7B),
    Published("Qwen2.5", "Qwen/Qwen2.5-0.5B", 494_032_768, PRESETS["qwen2.5-0.5b"] | dict(vocab_size=151_936)),
    Published("Qwen2.5", "Qwen/Qwen2.5-1.5B", 1_543_714_304, PRESETS["qwen2.5-1.5b"] | dict(vocab_size=151_936)),
    Published("Qwen2.5", "Qwen/Qwen2.5-3B", 3_085_938_688, PRESETS["qwen2.5-3b"] | dict(vocab_size=151_936)),
    Published("Qwen2.5", "Qwen/Qwen2.5-72B", 72_706_203_648, dense("qwen2", 8192, 29_568, 80, 64, 8, 152_064)),
    Published("Qwen2.5-Math", "Qwen/Qwen2.5-Math-7B", 7_615_616_512, QWEN2_7B),
    Published("Qwen2.5-Coder", "Qwen/Qwen2.5-Coder-7B", 7_615_616_512, QWEN2_7B),
    Published("QwQ", "Qwen/QwQ-32B", 32_763_876_352, QWEN2_32B),
    Published("GPT-3", "gpt3-6.7b", 0, PRESETS["gpt3-6.7b"]),
    Published(
        "Qwen3", "Qwen/Qwen3-8B-Base", 8_190_735_360, dense("qwen3", 4096, 12_288, 36, 32, 8, 151_936, head_dim=128)
    ),
    Published(
        "Qwen3-MoE",
        "Qwen/Qwen3-30B-A3B-Base",
        30_532_122_624,
        dense(
            "qwen3_moe",
            2048,
            6144,
            48,
            32,
            4,
            151_936,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
    ),
    Published(
        "Gemma 3",
        "google/gemma-3-1b-pt",
        999_885_952,
        dense("gemma3_text", 1152, 6912, 26, 4, 1, 262_144, head_dim=256),
    ),
    Published(
        "GLM-4",
        "zai-org/GLM-4-9B-0414",
        9_400_279_040,
        dense("glm4", 4096, 13_696, 40, 32, 2, 151_552, head_dim=128, attention_bias=True),
    ),
    Published("OLMo 2", "allenai/OLMo-2-1124-7B", 7_298_617_344, dense("olmo2", 4096, 11_008, 32, 32, 32, 100_352)),
    Published(
        "SmolLM3",
        "HuggingFaceTB/SmolLM3-3B-Base",
        3_075_098_624,
        dense("smollm3", 2048, 11_008, 36, 16, 4, 128_256, tie_word_embeddings=True),
    ),
]

HEAD = """# Families

[中文](families.zh-CN.md)

Which published models these recipes train, what that takes, and the command. `python docs/families.py` writes this page
without network and GPU; a test compares the two.

- **Any causal model of transformers is trained, unless it has no attention.** These are the families of PaddleNLP's
  list and today's. `tests/model/test_families.py` builds, trains, saves and loads a small model of every name in the
  column "in transformers". The real models are planned here; [benchmarks/README.md](../benchmarks/README.md) has those
  that were run.
- **80 GiB cards**: the fewest that hold all of the training with AdamW, and the GiB that each card needs. Rows have
  {context_length:,} tokens, one row at once, with `single_gpu.yaml`, `fsdp2.yaml` or `fsdp2_recompute.yaml`. With more
  cards than 8, run the command on every machine, with `--num_machines`, `--machine_rank` and `--main_process_ip`
  ([scaling.md](scaling.md)).
- **Main memory**: GiB that the processes of a machine need while they load the weights in fp32. Above {main_memory} GiB
  the command lets the first process load for all.
- **One {small} GiB card**: the first of `--method full`, `lora`, `qlora` of `recipes/low_memory_16gb.py` that fits with
  the same rows, and its GiB. "-": none fits, or it is a mixture of experts, which was not tried there.
- The commands continue the weights on your text. `recipes/wiki_zh_scratch.py --model ID` trains the same shape from
  random weights. `--plan` plans your own rows and cards.
- Some owners want you to accept a licence first: `hf auth login`. ModelScope has some models under another owner.
- Weights must be safetensors. If a repository has only `.bin` files, write them once, and copy the tokenizer's files:
  `python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('ID').save_pretrained('OUT')"`

| family | model | in transformers | parameters (active) | 80 GiB cards | main memory | one {small} GiB card | command |
|---|---|---|---|---|---|---|---|
"""
AFTER = """
## Weights that come with code of their own

Code in a model's folder is never run here. Qwen 1, Baichuan 7B, Baichuan 2 7B, ChatGLM 2 and ChatGLM 3 are in
transformers under another name, with their weights arranged differently. Convert them once:

```
modelscope download Qwen/Qwen-7B --local-dir Qwen-7B
python data/convert_weights.py Qwen-7B outputs/qwen-7b
accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/low_memory_16gb.py --method qlora \\
    --model outputs/qwen-7b --data my.jsonl
```

`tests/recipes/test_convert_weights.py` compares the logits of small converted weights with the formulas of the
originals, in fp64, and the tokenizers with tiktoken and with ids by hand. Real weights were not converted here.

- Qwen 1 changes its attention beyond the length that it was trained with, when it generates. The converted model does
  not.
- Baichuan 2 divides the rows of its head by their lengths in every step. The converted head is divided once, and its
  rows are free while you train.
- ChatGLM puts `[gMASK]` and `sop` before every text. Add them to your texts if you want the same.

## Not trained here

| family | why |
|---|---|
| Baichuan 13B, Baichuan 2 13B | ALiBi; no family of transformers has ALiBi, RMSNorm and a gated MLP |
| ChatGLM 1 (6B) | reads a prompt in both directions, counts positions twice; no family of transformers does |
| Yuan 2 | a filter over neighbouring tokens stands before each attention; no family of transformers has one |
"""
NOTES = {
    CONVERTED: "convert first: `python data/convert_weights.py FOLDER OUT`",
    IN_FP8: "published in FP8: write them in bf16 first (`inference/fp8_cast_bf16.py` of DeepSeek-V3's repository)",
}
HEAD_ZH = """# 模型家族

[English](families.md)

这些配方能训练哪些已发布的模型，需要什么，用什么命令。本页由 `python docs/families.py` 生成，不需要网络和 GPU；
测试会核对两者一致。

- **transformers 里的任何因果语言模型都能训练，没有注意力的除外。** 下表是 PaddleNLP 列出的家族和现在常用的家族。
  `tests/model/test_families.py` 对“transformers 中的名字”一列里的每个名字都搭建、训练、保存并加载一个小模型。
  真实尺寸的模型在这里只做规划；实际跑过的见 [benchmarks/README.md](../benchmarks/README.md)。
- **80 GiB 的卡**：用 AdamW 训练全部参数最少要几张卡，每张卡用多少 GiB。每行 {context_length:,} 个 token，一次一行，
  配置是 `single_gpu.yaml`、`fsdp2.yaml` 或 `fsdp2_recompute.yaml`。超过 8 张卡时，在每台机器上执行同一条命令，
  并加上 `--num_machines`、`--machine_rank` 和 `--main_process_ip`（[scaling.md](scaling.md)，英文）。
- **内存**：一台机器上的各进程以 fp32 加载权重时共需多少 GiB。超过 {main_memory} GiB 时，命令让第一个进程
  替所有进程加载。
- **一张 {small} GiB 的卡**：`recipes/low_memory_16gb.py` 的 `--method full`、`lora`、`qlora` 中第一个放得下的
  （行长同上），以及它用多少 GiB。“-”：都放不下，或者是混合专家模型（没有在那里试过）。
- 表中的命令在你的文本上继续训练已有权重。`recipes/wiki_zh_scratch.py --model ID` 用随机权重训练同样的结构。
  `--plan` 可以按你自己的行长和卡数规划。
- 有些模型要先同意许可证：`hf auth login`。有些模型在 ModelScope 上属于另一个账号。
- 权重必须是 safetensors。仓库里只有 `.bin` 文件时，先转存一次，并复制分词器的文件：
  `python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('ID').save_pretrained('OUT')"`

| 家族 | 模型 | transformers 中的名字 | 参数量（激活） | 80 GiB 的卡 | 内存 | 一张 {small} GiB 的卡 | 命令 |
|---|---|---|---|---|---|---|---|
"""
AFTER_ZH = """
## 自带代码的权重

这里从不执行模型目录里的代码。Qwen 1、百川 7B、百川 2 7B、ChatGLM 2 和 ChatGLM 3 的结构在 transformers 里另有名字，
只是权重的排列不同。转换一次即可：

```
modelscope download Qwen/Qwen-7B --local-dir Qwen-7B
python data/convert_weights.py Qwen-7B outputs/qwen-7b
accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/low_memory_16gb.py --method qlora \\
    --model outputs/qwen-7b --data my.jsonl
```

`tests/recipes/test_convert_weights.py` 用小的随机权重核对：转换后的 logits 与原模型的公式（用 fp64 写出）一致，
分词器与 tiktoken 和手工算出的 id 一致。真实的权重没有在这里转换过。

- Qwen 1 在生成的文本超过训练长度后会改变注意力，转换后的模型不会。
- 百川 2 每一步都把输出层的每一行除以它的长度。转换时只除一次，之后训练中各行不受限制。
- ChatGLM 在每段文本前放 `[gMASK]` 和 `sop`。需要的话，自己加到文本里。

## 不能训练的

| 家族 | 原因 |
|---|---|
| 百川 13B、百川 2 13B | 用 ALiBi；transformers 里没有同时用 ALiBi、RMSNorm 和门控 MLP 的家族 |
| ChatGLM 1（6B） | 提示部分双向可见，位置编码是两维的；transformers 里没有这样的家族 |
| Yuan 2（源） | 每个注意力之前有一个作用于相邻 token 的滤波器；transformers 里没有这样的家族 |
"""
NOTES_ZH = {
    CONVERTED: "先转换：`python data/convert_weights.py FOLDER OUT`",
    IN_FP8: "发布的权重是 FP8：先转成 bf16（`inference/fp8_cast_bf16.py`，在 DeepSeek-V3 的仓库里）",
}


def smallest_plan(model: PreTrainedModel) -> tuple[int, str, float]:
    """Return the fewest 80 GiB cards that train ``model``, the YAML, and the GiB that each card needs."""
    for cards in CARDS:
        if 16 * model.num_parameters() > cards * USED_SHARE * CARD_GIB * GIB:  # fp32 weights, gradients, two averages
            continue
        setting = Setting(rows=1, context_length=CONTEXT_LENGTH, processes=cards)
        yamls = {"single_gpu": setting}
        if cards > 1:
            sharded = replace(setting, strategy="fsdp2")
            yamls = {"fsdp2": sharded, "fsdp2_recompute": replace(sharded, recompute=True)}
        for yaml, tried in yamls.items():
            need = predict(model, tried).total / GIB
            if need <= USED_SHARE * CARD_GIB:
                return cards, yaml, need
    raise ValueError(f"{model.config.model_type}: does not fit on {CARDS[-1]} cards")


def smallest_method(model: PreTrainedModel) -> str:
    """Return the first method of low_memory_16gb.py that fits a small card, with its GiB; "-" if none does.

    ``model`` has its parameters in bf16 afterwards, as that recipe has them.
    """
    if experts_per_token(model.config):
        return "-"
    limit = USED_SHARE * SMALL_CARD_GIB * GIB
    if NF4_BYTES * model.num_parameters() > limit:  # before the adapters are built, which takes long for large models
        return "-"
    setting = Setting(rows=1, context_length=CONTEXT_LENGTH, recompute=True, optimizer="adamw_8bit")
    whole = predict(model.to(torch.bfloat16), replace(setting, method="full", optimizer="rounding_8bit")).total
    if whole <= limit:
        return f"full {whole / GIB:.1f}"
    adapted = beside_adapters(model, replace(setting, method="lora"))
    for method in ("lora", "qlora"):
        need = predict(adapted, replace(setting, method=method)).total
        if need <= limit:
            return f"{method} {need / GIB:.1f}"
    return "-"


def command(published: Published, cards: int, yaml: str, one_loads: bool) -> str:
    words = ["accelerate launch --config_file", f"accelerate_configs/{yaml}.yaml"]
    words += ["--num_processes", str(cards)] if cards > 1 else []
    words += ["--fsdp_cpu_ram_efficient_loading true"] if one_loads else []
    if published.model in PRESETS:
        words += ["recipes/wiki_zh_scratch.py --optimizer adamw"]
    else:
        words += ["recipes/openwebtext_continue.py"]
    place = "OUT" if published.note == CONVERTED else published.model
    words += [f"--model {place} --data my.jsonl --context_length {CONTEXT_LENGTH}"]
    words += [f"--tokens_per_step {cards * CONTEXT_LENGTH}"] if cards * CONTEXT_LENGTH > TOKENS_A_STEP else []
    return f"`{' '.join(words)}`"


def planned_row(published: Published) -> str:
    """Return the cells of the table for a model, without what closes the line: a note may follow."""
    model = planned_model(published.shape, published.shape.get("vocab_size", GPT2_VOCABULARY), CONTEXT_LENGTH)
    counts = parameter_report(model)
    cards, yaml, need = smallest_plan(model)
    loading = 4 * counts["total"] / GIB  # in fp32
    together = loading * min(cards, CARDS_OF_A_MACHINE)
    one_loads = cards > 1 and together > MAIN_MEMORY_GIB
    size = f"{counts['total'] / 1e9:.2f}B"
    if counts["active"] != counts["total"]:
        size += f" ({counts['active'] / 1e9:.2f}B)"
    done = command(published, cards, yaml, one_loads)
    cells = [published.family, published.model, f"`{published.shape['model_type']}`", size, f"{cards} x {need:.1f}"]
    cells += [f"{loading if one_loads else together:,.0f}", smallest_method(model), done]
    return f"| {' | '.join(cells)}"


def page(rows: list[str], head: str, notes: dict[str, str], after: str) -> str:
    """Return the text of a page: ``rows`` of the table, each with its note, and what stands around them."""
    figures = dict(context_length=CONTEXT_LENGTH, main_memory=MAIN_MEMORY_GIB, small=SMALL_CARD_GIB)
    lines = []
    for row, published in zip(rows, MODELS, strict=True):
        note = f"; {notes[published.note]}" if published.note else ""
        lines.append(f"{row}{note} |\n")
    return head.format(**figures) + "".join(lines) + after


def pages(rows: list[str]) -> dict[str, str]:
    """Return file name -> text, in both languages."""
    return {
        "families.md": page(rows, HEAD, NOTES, AFTER),
        "families.zh-CN.md": page(rows, HEAD_ZH, NOTES_ZH, AFTER_ZH),
    }


if __name__ == "__main__":
    for name, text in pages([planned_row(published) for published in MODELS]).items():
        (FOLDER / name).write_text(text, encoding="utf-8")
