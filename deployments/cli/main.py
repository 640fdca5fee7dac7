"""The console command `reelray`: puts the commands together in the order in which its help lists them.

Heavy imports stand inside the commands, so that `reelray status` starts at once.
"""

import typer

from deployments.cli.commands.client_setup import connect, env, tls
from deployments.cli.commands.database_commands import database
from deployments.cli.commands.engine_commands import engines
from deployments.cli.commands.job_commands import jobs
from deployments.cli.commands.key_commands import keys
from deployments.cli.commands.queue_commands import queue
from deployments.cli.commands.request_commands import cancel, render, result, status, submit
from deployments.cli.commands.service_commands import demo, gateway, serve
from deployments.cli.commands.webhook_commands import webhooks
from deployments.cli.commands.weight_commands import convert_weights, demo_weights

app = typer.Typer(help="Video generation as a service on your own GPUs.", no_args_is_help=True, pretty_exceptions_enable=False)
for command in (serve, gateway, tls, connect, env, render, submit, status, result, cancel, demo_weights, convert_weights, demo):
    app.command()(command)
app.add_typer(keys, name="keys")
app.add_typer(queue, name="queue")
app.add_typer(jobs, name="jobs")
app.add_typer(webhooks, name="webhooks")
app.add_typer(engines, name="engines")
app.add_typer(database, name="database")
