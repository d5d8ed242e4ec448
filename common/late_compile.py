"""torch.compile at the first call: importing torch's compiler takes time that a run without it need not spend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps

import torch

compile_now = torch.compile


def compiled_late(function: Callable | None = None, **settings) -> Callable:
    """Return ``function``, compiled by torch when it is first called. Without ``function``, return such a decorator.

    ``settings``: torch.compile's.
    """
    if function is None:
        return partial(compiled_late, **settings)

    @cache
    def compiled() -> Callable:
        return compile_now(function, **settings)

    @wraps(function)
    def call(*arguments, **named):
        return compiled()(*arguments, **named)

    return call


@contextmanager
def compiling_late() -> Iterator[None]:
    """Around imports: what they give to torch.compile is compiled when it is called.

    transformers imports peft, and peft imports bitsandbytes, which (0.50) gives four functions to torch.compile while
    it is imported. It can go when bitsandbytes compiles them later.
    """
    torch.compile = compiled_late
    try:
        yield
    finally:
        torch.compile = compile_now
