"""Networks: encoders from timm, heads, and a BatchNorm that sees every rank."""

ELSEWHERE = "timm:", "hf-hub:"      # how encoders are named that are no folder here: timm's own, and the hub's
