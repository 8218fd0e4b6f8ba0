"""Networks: encoders from timm, heads, and a BatchNorm that sees every rank."""
