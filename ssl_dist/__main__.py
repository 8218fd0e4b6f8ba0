"""`python -m ssl_dist VERB …`: the same as `ssl-dist VERB …`, for torchrun and for machines without the script."""

from ssl_dist.cli import main

if __name__ == "__main__":
    main()
