"""Networks: encoders from timm, heads, and a BatchNorm that sees every rank."""

from pathlib import Path

ELSEWHERE = "timm:", "hf-hub:"      # how encoders are named that are no folder here: timm's own, and the hub's


def absent(encoder: str) -> list[str]:
    """What to say of an encoder that is neither a folder here nor a name; nothing of one that may be there."""
    if encoder.startswith(ELSEWHERE) or Path(encoder).exists():
        return []
    return [f"encoder={encoder!r} is no folder here (looked in {Path.cwd()}); a run writes RUN/encoder when it ends, "
            "`ssl-dist export RUN` before; others are timm:NAME and hf-hub:OWNER/NAME"]
