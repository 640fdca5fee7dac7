"""`python -m deployments.batch <the run's folder>`: see `driver.py`."""

from deployments.batch.driver import main

main()
