"""The corpora that have a name: what they are, their licence, and where they are on the hubs.

``--data NAME`` reads one of them from a hub, ``python data/prepare.py download NAME`` downloads it, and ``python
data/prepare.py corpora`` lists them. What is said about a corpus is what its publishers or users say; data/README.md
says what of it was ever read by this project.
"""

from dataclasses import dataclass

PADDLENLP = "https://bj.bcebos.com/paddlenlp/models/transformers/llama/data/"


@dataclass(frozen=True)
class Corpus:
    """A corpus with a name of its own.

    Attributes:
        about: what it is, as its publishers or users describe it; not measured here.
        identifier: the data set id on the hubs: owner/name, owner/name:subset or owner/name:file.
        modelscope: owner/name on ModelScope, where it differs.
        urls: where its files are, if it is not on a hub.
    """

    about: str
    licence: str
    identifier: str = ""
    modelscope: str = ""
    urls: tuple[str, ...] = ()


CORPORA = {
    "wiki-zh": Corpus(
        "Chinese Wikipedia of 2024-08-20, simplified: about 1.44 million articles, 1.99 GB, one JSON array",
        "CC BY-SA (https://dumps.wikimedia.org/legal.html)",
        identifier="fjcanyue/wikipedia-zh-cn:wikipedia-zh-cn-20240820.json",
    ),
    "openwebtext": Corpus(
        "English web pages, about 8.0 million documents, about 24 GB in 80 parquet files",
        "CC0-1.0 for the collection; the pages belong to their authors (https://skylion007.github.io/OpenWebTextCorpus)",
        identifier="Skylion007/openwebtext",
    ),
    "openwebtext-100k": Corpus(
        "100,000 documents of OpenWebText2 as PaddleNLP's token files, with the ids of LLaMA's tokenizer",
        "none stated by PaddleNLP (https://github.com/PaddlePaddle/PaddleNLP, llm/README.md)",
        urls=(PADDLENLP + "llama_openwebtext_100k.bin", PADDLENLP + "llama_openwebtext_100k.idx"),
    ),
    "fineweb-edu": Corpus(
        "English web pages of educational value, the sample of about 10 billion tokens, parquet files of about 2 GB",
        "ODC-By 1.0, and Common Crawl's terms of use (https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu)",
        identifier="HuggingFaceFW/fineweb-edu:sample-10BT",
        modelscope="AI-ModelScope/fineweb-edu",
    ),
    "fineweb-edu-zh": Corpus(
        "Chinese web pages of educational value: 188 million documents, about 420 billion tokens, parquet files of "
        "about 1 GB",
        "Apache-2.0 and OpenCSG's community licence: commercial use needs their permission "
        "(https://huggingface.co/datasets/opencsg/chinese-fineweb-edu-v2)",
        identifier="opencsg/chinese-fineweb-edu-v2",
    ),
    "skypile": Corpus(
        "Chinese web pages: 233 million documents, about 150 billion tokens, 620 GB of JSON lines",
        "Skywork Community License (https://huggingface.co/datasets/Skywork/SkyPile-150B)",
        identifier="Skywork/SkyPile-150B",
        modelscope="modelscope/SkyPile-150B",
    ),
    "seq-monkey": Corpus(
        "Mobvoi's general Chinese corpus, which happy-llm trains on: 13 million documents, about 10 GB packed",
        "Apache-2.0 (https://github.com/mobvoi/seq-monkey-data)",
        identifier="ddzhu123/seq-monkey:mobvoi_seq_monkey_general_open_corpus.jsonl.tar.bz2",
    ),
    "minimind": Corpus(
        "MiniMind's pretraining file pretrain_hq.jsonl, 1.6 GB: mostly Chinese dialogues shorter than 512 characters",
        "Apache-2.0 and CC-BY-NC-2.0, without saying which file has which: take it as non-commercial "
        "(https://huggingface.co/datasets/jingyaogong/minimind_dataset)",
        identifier="jingyaogong/minimind_dataset:pretrain_hq.jsonl",
        modelscope="gongjy/minimind_dataset",
    ),
}


def on_modelscope(repository: str) -> str:
    """Return the name on ModelScope of the data set ``repository``, an owner/name of Hugging Face."""
    for corpus in CORPORA.values():
        if corpus.modelscope and corpus.identifier.partition(":")[0] == repository:
            return corpus.modelscope
    return repository


def listing() -> str:
    """Return the corpora as text: what each is, its licence, and where it is."""
    lines = []
    for name, corpus in CORPORA.items():
        repository, _, part = corpus.identifier.partition(":")
        lines += [name, f"  {corpus.about}", f"  licence: {corpus.licence}"]
        lines += [f"  {url}" for url in corpus.urls]
        if repository:
            lines += [f"  Hugging Face: {repository}", f"  ModelScope: {on_modelscope(repository)}"]
        if part:
            lines.append(f"  of it: {part}")
    return "\n".join(lines)
