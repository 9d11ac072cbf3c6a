"""What a server's log must not say."""

from __future__ import annotations

import re

# SGLang 0.5.23 with --skip-server-warmup asks itself to freeze its objects before it listens, and logs that it failed.
KNOWN = re.compile(r"^\[[^\]]*\] post-warmup freeze_gc failed\n(?:(?!\[\d{4}-).*\n)*", re.MULTILINE)


def traceback_in(text: str) -> str:
    """The first traceback and what follows, 3,000 characters at most; "" when there is none but SGLang's known one."""
    text = KNOWN.sub("", text)
    return text[text.index("Traceback") :][:3000] if "Traceback" in text else ""
