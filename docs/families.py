"""Write docs/families.md: the real shapes of published models, planned. Nothing is fetched, no GPU is needed.

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
from common.model.memory import Setting, predict
from common.model.presets import PRESETS
from common.system import GIB
from common.train.plan import beside_adapters

PAGE = Path(__file__).resolve().parent / "families.md"
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
CONVERTED = "convert first: `python data/convert_weights.py FOLDER OUT`"
IN_FP8 = "published in FP8: write them in bf16 first (`inference/fp8_cast_bf16.py` of DeepSeek-V3's repository)"

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

NOT_HERE = [
    (
        "Baichuan 13B, Baichuan 2 13B",
        "they have ALiBi instead of rotary embeddings; transformers has no family with ALiBi, RMSNorm and a gated MLP",
    ),
    (
        "ChatGLM 1 (6B)",
        "it reads a prompt in both directions and counts positions in two dimensions; no family of transformers does",
    ),
    ("Yuan 2", "a filter over neighbouring tokens stands before each attention; no family of transformers has one"),
]

HEAD = """# Families

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
"""


def smallest_plan(model: PreTrainedModel) -> tuple[int, str, float]:
    """Return the fewest 80 GiB cards that train ``model``, the YAML, and the GiB that each card needs."""
    for cards in CARDS:
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
    setting = Setting(rows=1, context_length=CONTEXT_LENGTH, recompute=True)
    methods = {"full": "rounding_8bit", "lora": "adamw_8bit", "qlora": "adamw_8bit"}
    model.to(torch.bfloat16)
    for method, optimizer in methods.items():
        tried = replace(setting, method=method, optimizer=optimizer)
        need = predict(beside_adapters(model, tried), tried).total / GIB
        if need <= USED_SHARE * SMALL_CARD_GIB:
            return f"{method} {need:.1f}"
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
    """Return the line of the table for a model."""
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
    return f"| {' | '.join(cells)}{f'; {published.note}' if published.note else ''} |"


def page() -> str:
    """Return the text of docs/families.md."""
    figures = dict(context_length=CONTEXT_LENGTH, main_memory=MAIN_MEMORY_GIB, small=SMALL_CARD_GIB)
    rows = [planned_row(published) for published in MODELS]
    reasons = [f"| {family} | {reason} |" for family, reason in NOT_HERE]
    return HEAD.format(**figures) + "\n".join(rows) + "\n" + AFTER + "\n".join(reasons) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
