import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from deployments.app import StageHandles, build
from deployments.settings import Exposed, Settings, Split, load_settings
from engines.checkpoints.source import Source

CONFIGS = ["serve_config.yaml", *sorted(map(str, Path("cluster").glob("serve_config.*.yaml")))]


@pytest.mark.parametrize(
    "args",
    [
        {"databse": "embedded"},
        {"queue": {"lease": 3}},
        {"animatediff": {"weight": "demo"}},
        {"animatediff": {"weights": {"base": {"folder": "/x", "branch": "main"}}}},
        {"queue": {"lease_s": 0}},
        {"webhooks": {"timeout": 3}},
        {"webhooks": {"timeout_s": 31}},
        {"auth": "none"},
        {"retention": {"jobs_s": 0}},
        {"retention": {"job_s": 60}},
        {"queue": {"deadlines": {"fal-ai/controlnet": {"run_s": 60}}}},
        {"queue": {"deadlines": {"fal-ai/controlnext": {"run": 60}}}},
        {"animatediff": {"num_frames": 8}},
        {"animatediff": {"decode_chunk": 0}},
        {"controlnext": {"weight": "demo"}},
        {"controlnext": {"decode_batch_frames": 0}},
        {"controlnext": {"control_cache_bytes": -1}},
        {"controlnext": {"max_video_s": 0}},
        {"controlnext": {"max_decode_chunk": 0}},
    ],
)
def test_a_misspelt_or_impossible_setting_is_refused(args: dict[str, Any]):
    with pytest.raises(ValidationError):
        Settings.model_validate(args)


def test_serve_refuses_args_that_the_settings_do_not_know():
    with pytest.raises(ValidationError, match="databse"):
        call_user_app_builder_with_args_if_necessary(build, {"databse": "embedded"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.5", "door.example", "localhost.example", "::ffff:10.0.0.5"])
def test_an_open_service_is_refused_on_the_network(host: str):
    with pytest.raises(Exposed, match="auth: keys"):
        Settings().refuse_exposure(host)
    Settings(auth="keys").refuse_exposure(host)
    Settings(open_to_network=True).refuse_exposure(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]", None])
def test_an_open_service_may_listen_on_loopback(host: str | None):
    Settings().refuse_exposure(host)


def test_what_serve_deploy_builds_is_refused_where_serve_listens_on_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("deployments.app._listening_host", lambda: "0.0.0.0")
    with pytest.raises(Exposed):
        build(Settings(home=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({}, "database"),
        ({"files": "s3://bucket/files"}, "database"),
        ({"database": "postgresql://db.example/reelray"}, "files"),
        ({"database": "postgresql://db.example/reelray", "files": "/srv/files"}, "files"),
        ({"database": "postgresql://db.example/reelray", "files": "file:///srv/files"}, "files"),
    ],
)
def test_a_service_that_several_nodes_would_split_is_not_built(
    args: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    settings = Settings(home=tmp_path, **args)
    settings.refuse_split(1)
    monkeypatch.setattr("deployments.app._nodes", lambda: 2)
    with pytest.raises(Split, match=f"set `{word}`"):
        build(settings)
    assert not list(tmp_path.iterdir())


def test_nodes_may_share_a_bucket_or_a_folder():
    shared = {"database": "postgresql://db.example/reelray"}
    Settings(**shared, files="s3://bucket/files").refuse_split(3)
    Settings(**shared, files="/mnt/files", files_shared=True).refuse_split(3)


def test_the_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("REELRAY_HOME", str(tmp_path))
    assert Settings().files_url == str(tmp_path / "files")
    assert Settings(home=Path("/elsewhere")).files_url == "/elsewhere/files"


def test_a_model_that_is_left_out_is_not_served():
    assert Settings(animatediff=None).model_configs().keys() == {"controlnext"}
    assert Settings(controlnext=None).model_configs().keys() == {"animatediff-sparsectrl-lcm"}


@pytest.mark.parametrize("path", CONFIGS)
def test_the_yaml_files_are_valid_and_name_the_deployments_that_are_built(path: str, tmp_path: Path):
    document = yaml.safe_load(Path(path).read_text())
    schema = ServeDeploySchema.model_validate(document)
    (application,) = schema.applications
    settings = load_settings(Path(path)).model_copy(update={"home": tmp_path})
    for model in ("animatediff", "controlnext"):
        (settings.demo_weights / model).mkdir(parents=True)  # as if the demo weights had been written
    built = deployments_of(build(settings))
    assert {deployment.name for deployment in application.deployments} == built


def deployments_of(application: Any) -> set[str]:
    """The names of an application's deployments."""
    return {each.name for each in all_deployments(application)}


def all_deployments(application: Any) -> list[Any]:
    """An application's deployments, including those that are its arguments."""
    found = [application._bound_deployment]
    waiting = [*application._bound_deployment.init_args, *application._bound_deployment.init_kwargs.values()]
    while waiting:
        value = waiting.pop()
        if hasattr(value, "_bound_deployment"):
            found += all_deployments(value)
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, StageHandles):
            waiting += vars(value).values()
    return list({each.name: each for each in found}.values())


@pytest.mark.parametrize("path", CONFIGS)
def test_every_stage_is_scaled_within_the_bounds_of_the_settings_and_without_serves_delays(path: str, tmp_path: Path):
    (application,) = yaml.safe_load(Path(path).read_text())["applications"]
    assert not [each["name"] for each in application["deployments"] if "autoscaling_config" in each]  # these would replace ours
    assert application["autoscaling_policy"]["policy_function"] == "deployments.hosting.scaler:Scaler"
    scaling = {"controlnext": {"denoise": {"min": 0, "max": 8}}}
    settings = Settings.model_validate(application["args"] | {"home": tmp_path, "scaling": scaling})
    for model in ("animatediff", "controlnext"):
        (settings.demo_weights / model).mkdir(parents=True)
    found = {each.name: each._deployment_config.autoscaling_config for each in all_deployments(build(settings))}
    scaled = {name: config for name, config in found.items() if config is not None}
    assert len(scaled) == 6
    assert {(each.upscale_delay_s, each.downscale_delay_s) for each in scaled.values()} == {(0, 0)}
    bounds = {name: (each.min_replicas, each.max_replicas) for name, each in scaled.items()}
    assert bounds.pop("controlnext-denoise") == (0, 8)
    assert set(bounds.values()) == {(1, 1)}


def test_bounds_that_cannot_be_and_unknown_stages_are_refused():
    for wrong in ({"denoise": {"min": 3, "max": 2}}, {"denoise": {"max": 0}}, {"render": {}}, {"drain_s": 0}):
        with pytest.raises(ValidationError):
            Settings.model_validate({"scaling": {"controlnext": wrong}})
    with pytest.raises(ValidationError):
        Settings.model_validate({"scaling": {"control": {}}})


def test_the_autoscaling_knows_the_endpoints_that_are_served():
    settings = Settings(animatediff=None, scaling={"controlnext": {"drain_s": 120}})
    (only,) = settings.scaled_endpoints()
    assert (only.id, only.family, only.drain_s, only.idle_s) == ("fal-ai/controlnext", "controlnext", 120, 300)


def test_real_weights_are_read_from_the_gpu_configuration():
    weights = load_settings(Path("cluster/serve_config.gpu.yaml")).model_configs()["animatediff-sparsectrl-lcm"].weights
    assert weights.vae == Source(repo="stabilityai/sd-vae-ft-mse", revision="31f26fdeee1355a5c34592e401dd41e45d25a493")


@pytest.mark.parametrize("path", CONFIGS)
def test_a_replica_that_dies_is_noticed_within_seconds(path: str):
    (application,) = yaml.safe_load(Path(path).read_text())["applications"]
    assert {deployment.get("health_check_period_s") for deployment in application["deployments"]} == {2}


def test_weights_are_pinned_but_for_those_the_file_names_as_not():
    text = Path("cluster/serve_config.gpu.yaml").read_text()
    head, body = text.split("proxy_location", 1)
    pinned = dict(re.findall(r"repo: (\S+), revision: (\w+)", body))
    moving = {repo for repo, revision in pinned.items() if not re.fullmatch("[0-9a-f]{40}", revision)}
    assert moving == {repo for repo in pinned if f"{repo.partition('/')[0]}'s" in head}
    assert len(pinned) - len(moving) == 5
