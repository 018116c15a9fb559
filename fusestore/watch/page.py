"""The status page of a mount, and the JSON that it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from ..tally import summary
from ..typed_json import to_json
from .health import cleaning_text, health, repair_text, risk_text, scrub_text
from .observation import Observation
from .web import Answer


@cache
def page(accept: str = "") -> Answer:
    """Return the status page.

    Its security policy allows only its own scripts and styles, and requests to this server.
    """
    text = (files(__package__) / "status.html").read_text("utf-8")
    allowed = {
        f"{tag}-src": " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        )
        for tag in ("style", "script")
    }
    policy = {
        "default-src": "'none'",
        **allowed,
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items())
    }
    return Answer(text.encode(), "text/html; charset=utf-8", headers=headers)


def page_fields(seen: Observation, samples: Sequence[tuple[float, ...]]) -> Answer:
    """Return the data of the page: the fields of `status`, sentences, operations, and samples."""
    value = {
        **to_json(seen.status),
        "now": time.time(),
        "serving": health(seen.status)[0],
        "risk": risk_text(seen.status),
        "repair_text": repair_text(seen.status),
        "scrub_text": scrub_text(seen.status),
        "cleaning_text": cleaning_text(seen.status.cleaning) if seen.status.cleaning else "",
        "operations": summary(seen.tallies, time.time() - seen.mount.mounted_at),
        "samples": list(samples),
    }
    return Answer(json.dumps(value).encode(), "application/json")
