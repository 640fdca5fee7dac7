import asyncio
import json
import pickle
from pathlib import Path
from uuid import UUID

import av
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from deployments.cli.commands.request_commands import read_input
from deployments.cli.main import app
from deployments.hosting.embedded_postgres import database_for_command
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from deployments.webhooks.outbox import Outbox
from tests.conftest import execute, of_database
from tests.engines.animatediff.media import png, scribble

runner = CliRunner()


def config(tmp_path: Path, **args: object) -> Path:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"args": args}]}))
    return path


def run(*words: object) -> Result:
    return runner.invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def job_file(tmp_path: Path, **job: object) -> Path:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    return path


def test_render_writes_a_video_without_a_service(tmp_path: Path, demo_settings: Settings):
    (tmp_path / "ball.png").write_bytes(png(scribble()))
    job = job_file(tmp_path, prompt="a red ball", seed=5, keyframe_0_image_url="ball.png", keyframe_0_index=4)
    out = tmp_path / "video.mp4"
    args = {"home": str(demo_settings.home), "animatediff": {"threads": 1}}
    done = run("render", "animatediff-sparsectrl-lcm", "--input", job, "--out", out, "--config", config(tmp_path, **args))
    assert done.exit_code == 0, done.output
    assert "16 frames, 64x64, seed 5" in done.stdout
    shown = [line.partition(",")[0] for line in done.stderr.splitlines()]
    assert shown == ["loading the model", *(f"denoise: step {done}/4" for done in range(5))]
    with av.open(str(out)) as container:
        assert len(list(container.decode(video=0))) == 16


def test_render_names_what_is_wrong_with_the_input(tmp_path: Path):
    job = job_file(tmp_path, prompt="a", num_inference_steps=0, keyframe_0_index=3)
    done = run("render", "animatediff-sparsectrl-lcm", "--input", job, "--out", tmp_path / "v.mp4", "--config", config(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "body.num_inference_steps: Input should be greater than or equal to 1"


def test_an_input_that_is_no_json_is_said_to_be_none(tmp_path: Path):
    job = tmp_path / "job.json"
    job.write_text("{prompt: a}")
    done = run("submit", "animatediff-sparsectrl-lcm", "--input", job)
    assert done.exit_code == 1
    assert "job.json is not JSON: Expecting property name" in done.stderr


def test_a_service_that_is_not_there_is_said_to_be_away(tmp_path: Path):
    done = run("submit", "animatediff-sparsectrl-lcm", "--input", job_file(tmp_path, prompt="a"), "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert "http://127.0.0.1:1 does not answer" in done.stderr


def test_an_endpoint_that_is_not_served_is_refused_with_those_that_are():
    done = run("status", "stable-video", "x")
    assert done.exit_code == 2
    assert "fal-ai/animatediff-sparsectrl-lcm" in done.stderr


def test_files_beside_the_input_become_data_uris_and_other_strings_stay(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"png")
    (tmp_path / "prompt").write_bytes(b"a file of that name")
    long_uri = "data:image/png;base64," + "A" * 5000
    urls = {"keyframe_0_image_url": "a.png", "keyframe_1_image_url": "https://a.example/x.png", "keyframe_2_image_url": long_uri}
    job = job_file(tmp_path, prompt="prompt", **urls)
    assert read_input(job) == {
        "prompt": "prompt",
        "keyframe_0_image_url": "data:image/png;base64,cG5n",
        "keyframe_1_image_url": "https://a.example/x.png",
        "keyframe_2_image_url": long_uri,
    }


def test_demo_weights_are_written(tmp_path: Path):
    done = run("demo-weights", tmp_path / "demo")
    assert done.stdout.strip() == str(tmp_path / "demo")
    animatediff, controlnext = tmp_path / "demo" / "animatediff", tmp_path / "demo" / "controlnext"
    assert (animatediff / "stable-diffusion-v1-5" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (controlnext / "DWPose" / "yolox_l.onnx").is_file()
    for endpoint in ENDPOINTS.values():
        endpoint.input.model_validate(read_input(tmp_path / "demo" / f"{endpoint.model}.json"))


def test_a_published_pickle_becomes_safetensors(tmp_path: Path):
    torch.save({"a.weight": torch.ones(2, 3), "b": torch.arange(3)}, tmp_path / "unet.bin")
    done = run("convert-weights", tmp_path / "unet.bin", tmp_path / "unet.safetensors", "--dtype", "float16")
    assert "2 tensors, 0.00 M parameters" in done.stdout
    assert load_file(tmp_path / "unet.safetensors")["a.weight"].dtype == torch.float16
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(print))
    refused = run("convert-weights", tmp_path / "evil.bin", tmp_path / "evil.safetensors")
    assert refused.exit_code == 1
    assert "holds more than tensors" in refused.stderr
    assert not (tmp_path / "evil.safetensors").exists()


def test_an_open_gateway_is_not_started_on_the_network(tmp_path: Path):
    refused = run("gateway", "--host", "0.0.0.0", "--config", config(tmp_path, home=str(tmp_path)))
    assert refused.exit_code == 1
    assert refused.stderr.startswith("auth: open serves everybody who can connect, and 0.0.0.0 is more than loopback.")


def test_a_command_leaves_the_embedded_database_as_it_was(tmp_path: Path, home: Settings):
    options = ("--config", config(tmp_path, home=str(home.home)))
    assert run("keys", "create", "studio", *options).exit_code == 0
    assert not (home.home / "postgres" / "data" / "postmaster.pid").exists()
    with database_for_command(home):
        assert "studio" in run("keys", "list", *options).stdout
        assert (home.home / "postgres" / "data" / "postmaster.pid").exists()


def test_keys_are_made_listed_rotated_and_revoked(tmp_path: Path, database: str):
    options = ("--config", config(tmp_path, database=database))
    secret = run("keys", "create", "studio", "--max-running", 37, *options).stdout.strip()
    key_id, _, _ = secret.partition(":")
    listed = run("keys", "list", *options).stdout
    assert key_id in listed
    assert "studio" in listed
    assert secret not in listed
    assert "37" in listed.replace(key_id, "")
    assert "submit, read" in listed
    assert run("keys", "create", "dashboard", "--scope", "admin", *options).exit_code == 0
    assert "admin" in run("keys", "list", *options).stdout
    assert run("keys", "create", "x", "--scope", "write", *options).exit_code == 2
    rotated = run("keys", "rotate", key_id, "--overlap-hours", 1, *options).stdout.strip()
    assert rotated.startswith(f"{key_id}:")
    assert rotated != secret
    assert run("keys", "revoke", key_id, *options).exit_code == 0
    assert run("keys", "revoke", key_id, *options).exit_code == 0, "it is revoked"
    unknown = run("keys", "revoke", "nobody", *options)
    assert (unknown.exit_code, unknown.stderr) == (1, "there is no key nobody\n")
    assert run("keys", "rotate", key_id, *options).exit_code == 1


def test_a_database_that_cannot_be_used_is_one_line(tmp_path: Path, embedded_server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.jobs.database.RIDE_OUT_S", 0.1)
    for url in ("postgresql://postgres@127.0.0.1:1/reelray", of_database(embedded_server, "nothing")):
        told = run("keys", "list", "--config", config(tmp_path, database=url))
        assert told.exit_code == 1
        assert told.stderr.startswith("the database cannot be used: ")
        assert "Traceback" not in told.output


def test_migrating_is_a_command_of_its_own(tmp_path: Path, database: str):
    options = ("--config", config(tmp_path, database=database))
    assert run("database", "migrate", *options).stdout == "the schema is up to date\n"
    asyncio.run(execute(database, "INSERT INTO schema_migrations (name) VALUES ('9999_newer.sql')"))
    for words in (("database", "migrate"), ("keys", "list")):
        refused = run(*words, *options)
        assert refused.exit_code == 1
        assert refused.stderr.startswith("the database cannot be used: the database belongs to a newer Reelray")


def test_an_endpoint_is_paused_drained_and_resumed(tmp_path: Path, database: str):
    options = ("--config", config(tmp_path, database=database))
    assert run("queue", "status", "controlnext", *options).stdout == "fal-ai/controlnext: open, 0 waiting, 0 running\n"
    paused = run("queue", "pause", "controlnext", "--drain", *options).stdout
    assert paused.startswith("fal-ai/controlnext: paused since 20")
    assert run("queue", "status", "controlnext", *options).stdout == paused
    for _ in range(2):
        resumed = run("queue", "resume", "controlnext", *options).stdout
        assert resumed == "fal-ai/controlnext: open, 0 waiting, 0 running\n"


def test_a_webhook_is_shown_and_queued_again_and_its_key_rotated(tmp_path: Path, database: str):
    async def ended(url: str) -> UUID:
        store = await JobStore.open(url)
        job = await store.submit(NewJob("e", {}, webhook_url="http://h.example/hook"))
        await store.request_cancel(job.id)
        [delivery] = await Outbox(store.database).claim(1, 1, 1, 60)
        await Outbox(store.database).finish(delivery, 500, "The receiver answered 500.", 0.25, None)
        await store.close()
        return job.id

    options = ("--config", config(tmp_path, database=database))
    job_id = asyncio.run(ended(database))
    shown = run("webhooks", "show", job_id, *options).stdout
    assert "failed: http://h.example/hook" in shown
    assert "The receiver answered 500." in shown
    assert run("webhooks", "redeliver", job_id, *options).exit_code == 0
    assert "pending: http://h.example/hook" in run("webhooks", "show", job_id, *options).stdout
    unknown = run("webhooks", "redeliver", UUID(int=0), *options)
    assert (unknown.exit_code, unknown.stderr) == (1, f"there is no webhook of {UUID(int=0)}\n")
    assert "is not a request's id" in run("webhooks", "redeliver", "x", *options).stderr
    kid = run("webhooks", "rotate-key", "--overlap-hours", "0", *options).stdout.strip()
    assert len(kid) == 16


@pytest.mark.parametrize("command", ["serve", "demo", "gateway", "render", "submit", "status", "result", "cancel"])
def test_every_command_explains_itself(command: str):
    assert run(command, "--help").exit_code == 0
