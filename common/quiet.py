"""Quiet libraries: what they say that is not the user's to fix. Imported first, because some speak while they load.

Only levels and filters that logging and warnings have for this, each with its reason. Errors still show, and so does
every warning that is not named here. To hear all of them: PRETRAINING_VERBOSE=1.
"""

import logging
import os
import warnings

MESSAGES = {  # logger -> beginnings of messages that are left out
    # Said while peft loads bitsandbytes on CPUs. It concerns 4-bit products on CPUs, which no recipe has.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # The first lines of a run say on what it runs. (DeepSpeed sets its own level when it is imported: a filter stays.)
    "DeepSpeed": ("Setting accelerator to CPU",),
    # About the launcher's way of starting processes on Windows and macOS.
    "torch.distributed.elastic.multiprocessing.redirects": ("NOTE: Redirects are currently not supported",),
}
WARNINGS = {  # beginnings of warnings that are left out
    # From inductor. Matrix products run in the YAML's bf16; what is left in fp32 is meant to be.
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled": UserWarning,
    # From barriers of accelerate and transformers: each process has chosen its device long before.
    r"barrier\(\): using the device under current context": UserWarning,
}


class LeftOut(logging.Filter):
    """Leaves out INFO and below, and messages with these beginnings."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO and not record.getMessage().startswith(self.beginnings)


def be_quiet() -> None:
    """Set the filters, once, unless PRETRAINING_VERBOSE is set."""
    if os.environ.get("PRETRAINING_VERBOSE"):
        return
    for name, beginnings in MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, LeftOut) for known in logger.filters):
            logger.addFilter(LeftOut(beginnings))
    for beginning, category in WARNINGS.items():
        warnings.filterwarnings("ignore", message=beginning, category=category)


def no_bars_while_training() -> None:
    """Switch off transformers' bars, of which every checkpoint shows one; those of downloads stay as they are."""
    if os.environ.get("PRETRAINING_VERBOSE"):
        return
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    downloads = not are_progress_bars_disabled()
    disable_progress_bar()
    if downloads:
        enable_progress_bars()


be_quiet()  # the one module that works at import: recipes import it before the libraries it is about
