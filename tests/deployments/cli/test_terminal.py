import io

from rich.console import Console

from deployments.cli.terminal import Terminal
from deployments.stages.progress import StageProgress
from engines.spec import Progress

STEPS = [StageProgress("denoise", Progress("step", done, 4), 8.0) for done in range(5)]


def shown(*, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with Terminal(console) as terminal:
        for _ in range(3):
            terminal.wait("queued, 2 ahead")
        for step in STEPS:
            terminal.line(step.message, step.fields())
        terminal.line("[a] warning", None)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_where_there_is_no_terminal_every_line_is_printed_once_and_plainly():
    assert shown(terminal=False).splitlines() == ["queued, 2 ahead", *(step.message for step in STEPS), "[a] warning"]


def test_on_a_terminal_progress_is_one_line_with_stage_step_and_time_left():
    *above, last = shown(terminal=True).replace("\r", "\n").split("denoise: step 4/4")
    assert "━━━" in last
    assert any("[a] warning" in part for part in (*above, last)), "a warning line is not overwritten"
