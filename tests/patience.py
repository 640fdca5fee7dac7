"""How long a test waits for what must happen."""

PATIENCE_S = 120.0
"""Far longer than anything takes: a busy machine has been seen to stand still for a minute. It costs nothing when all is well."""
