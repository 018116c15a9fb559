"""Rows of a store that is not open: they are changed behind its back, and fsck looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusestore.config.store_config import StoreConfig
from fusestore.metadata.engine import Engine
from fusestore.serve.messages.safety import FsckRequest
from fusestore.serve.offline import offline
from fusestore.typed_json import to_json

Rows = dict[bytes, bytes]


def edit(config: StoreConfig, change: Callable[[Rows], Any]) -> Any:
    """Change rows of the metadata of a store that is not open, behind its back."""
    engine = Engine(config.metadata)
    before = dict(engine.scan(b"A", b"["))
    after = dict(before)
    result = change(after)
    gone = {key: None for key in before if key not in after}
    engine.apply({**gone, **{k: v for k, v in after.items() if before.get(k) != v}})
    engine.freeze()
    engine.write()
    engine.thaw()
    engine.close()
    return result


async def check(config: StoreConfig, *, repair: bool = False) -> dict[str, Any]:
    return to_json(await offline(config, FsckRequest(repair), lambda message: None))
