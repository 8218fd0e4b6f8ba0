"""The demo with three seeds, each from an empty folder: is the encoder worth more than a random one?"""

import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (0, 1, 2)


def main() -> None:
    """Runs the demo a seed at a time and appends one result file."""
    rows = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", "ssl_dist", "demo", folder, "--seed", str(seed)], check=True)
            seconds = time.monotonic() - started
            run = Path(folder) / "run"
            knn = json.loads((run / "eval" / "knn.json").read_text())
            environment = json.loads((run / "env.json").read_text())
            rows.append({"seed": seed, "seconds": round(seconds, 1), "k": knn["k"], **knn["counts"],
                         "accuracy": knn["metrics"]["accuracy"], "random": knn["baselines"]["random"]["accuracy"],
                         "balanced_accuracy": knn["metrics"]["balanced_accuracy"],
                         "random_balanced": knn["baselines"]["random"]["balanced_accuracy"]})
    now = datetime.now(UTC)
    result = {"date": f"{now:%Y-%m-%d}", "cpu": environment["cpu"], "cpus": environment["cpus"],
              "gpus": environment["gpus"], "versions": environment["packages"], "rows": rows}
    (RESULTS / f"demo_{now:%Y%m%dT%H%M%S}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
