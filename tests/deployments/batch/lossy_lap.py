"""A lap whose actors die of the rows called poison, and take every row along that is not alone."""

import json
import sys
from dataclasses import asdict

from deployments.batch.records import Record
from deployments.batch.run_folder import Row

if __name__ == "__main__":
    for row in [Row(**json.loads(line)) for line in iter(sys.stdin.readline, "\n")]:
        if "--alone" in sys.argv and row.id != "poison":
            sys.stdout.write(json.dumps(asdict(Record(row.id, row.number, "done"))) + "\n")
